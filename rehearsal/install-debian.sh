#!/bin/sh
# Installs the system parts of the twin and its tests where that may be done: the OpenSSH server, for hosts that are reached by
# ssh, zstd, and Chromium, in which the tests walk JupyterLab.
# Tests start their own sshd on loopback ports; the system's is neither started nor enabled by this.
# Says in one line what it did or why it could not; never fails the caller.
set -u

# What is not there yet, as package names.
missing() {
    { command -v sshd || [ -x /usr/sbin/sshd ]; } >/dev/null 2>&1 || printf ' openssh-server'
    command -v zstd >/dev/null 2>&1 || printf ' zstd'
    command -v chromium >/dev/null 2>&1 || printf ' chromium'
}

# One package at a time: where a distribution has no such name, the others are installed all the same.
install_quietly() {
    for package in $(missing); do
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null 2>&1
    done
    [ -z "$(missing)" ]
}

wanted=$(missing)
if [ -z "$wanted" ]; then
    echo "install-debian: openssh-server, zstd and chromium are there"
    exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "install-debian: missing, and can't be installed here (that needs root and apt-get):$wanted"
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
    echo "install-debian: installed:$wanted"
else
    echo "install-debian: apt-get failed; try: apt-get install$(missing)"
fi
case "$wanted" in
*openssh-server*) ! command -v systemctl >/dev/null 2>&1 || systemctl disable ssh.service >/dev/null 2>&1 ;;
esac
exit 0
