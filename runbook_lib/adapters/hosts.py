"""Machines of the application: a folder on this machine, or another one over ssh."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from runbook_lib.commands.hosts import over_ssh
from runbook_lib.errors import UsageError
from runbook_lib.model import Command
from runbook_lib.ports import Host

_SSH = re.compile(r"ssh:(?:([a-z_][a-z0-9_-]*)@)?([A-Za-z0-9][A-Za-z0-9.-]*)(?::([0-9]{1,5}))?(/\S*)")


@dataclass(frozen=True, slots=True)
class LocalHost:
    """Local default: a folder of this machine that stands for a host; refused in production."""

    name: str
    home: str

    def command(self, command: Command) -> Command:
        """See `ports.Host`; a relative `cwd` is taken from `home`."""
        return replace(command, cwd=Path(self.home) / (command.cwd or "."))


@dataclass(frozen=True, slots=True)
class SshHost:
    """Another machine, by the system's own ssh with the user's keys and known hosts.

    Args:
        options: more words for ssh, such as `-F FILE`.
    """

    name: str
    home: str
    host: str
    user: str | None = None
    port: int | None = None
    options: tuple[str, ...] = ()

    def command(self, command: Command) -> Command:
        """See `ports.Host`.

        Raises:
            UsageError: the command has an environment: over ssh it would stand in everybody's process list.
        """
        if command.env:
            raise UsageError(
                f"{command.argv[0]} on {self.name}: an environment ({', '.join(command.env)}) is not sent over ssh",
                remedy="leave it to the host's own configuration",
            )
        home = self.home if command.cwd is None else str(Path(self.home) / command.cwd)
        argv = over_ssh(command.argv, host=self.host, home=home, user=self.user, port=self.port, options=self.options)
        return replace(command, argv=argv, cwd=None)


def host_from(name: str, address: str) -> Host:
    """The host behind `local:/FOLDER` or `ssh:[user@]host[:port]/FOLDER`.

    Raises:
        UsageError: the address is neither.
    """
    kind, _, where = address.partition(":")
    if kind == "local" and where.startswith("/"):
        return LocalHost(name, where)
    found = _SSH.fullmatch(address)
    if found is None:
        raise UsageError(
            f"hosts.{name}.address: {address!r} is no address",
            remedy="use local:/FOLDER or ssh:[user@]host[:port]/FOLDER",
        )
    user, host, port, home = found.groups()
    return SshHost(name, home, host, user, int(port) if port else None)
