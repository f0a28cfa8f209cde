#!/bin/sh
# Installs the twin's system parts where that may be done: the OpenSSH server, for hosts that are reached by ssh.
# Says in one line what it did or why it could not; never fails the caller.
set -u
if command -v sshd >/dev/null 2>&1 || [ -x /usr/sbin/sshd ]; then
    echo "install-debian: openssh-server is there"
elif [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "install-debian: openssh-server is missing and cannot be installed here (needs root and apt-get)"
elif { DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends openssh-server ||
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends openssh-server; }; } >/dev/null 2>&1; then
    echo "install-debian: openssh-server installed"
else
    echo "install-debian: openssh-server could not be installed"
fi
exit 0
