#!/bin/sh
# Installs the twin's system parts where that may be done: the OpenSSH server, for hosts that are reached by ssh, and zstd.
# Tests start their own sshd on loopback ports; the system's is neither started nor enabled by this.
# Says in one line what it did or why it could not; never fails the caller.
set -u

install_quietly() {
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends openssh-server zstd >/dev/null 2>&1
}

if { command -v sshd >/dev/null 2>&1 || [ -x /usr/sbin/sshd ]; } && command -v zstd >/dev/null 2>&1; then
    echo "install-debian: openssh-server and zstd are there"
    exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "install-debian: openssh-server or zstd is missing and can't be installed here: that needs root and apt-get"
    exit 0
fi
# Debian asks this file whether a service may start on installation.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' INT TERM
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
fi
if install_quietly || { apt-get update -qq >/dev/null 2>&1 && install_quietly; }; then
    ! command -v systemctl >/dev/null 2>&1 || systemctl disable ssh.service >/dev/null 2>&1
    echo "install-debian: openssh-server and zstd installed"
else
    echo "install-debian: openssh-server and zstd can't be installed: apt-get failed; try: apt-get install openssh-server zstd"
fi
exit 0
