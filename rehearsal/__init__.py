"""The local production twin: real servers, hosts, users and people, all on this machine."""
