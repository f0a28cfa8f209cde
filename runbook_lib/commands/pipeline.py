"""A program that writes a backup and the one that packs it, joined so that the two rarely wait for each other."""

from __future__ import annotations

from collections.abc import Sequence

# For any Python since 3.8. The exit status is the archiver's own; 90 says that what it wrote was not packed or not passed on.
# A pipe of the usual 64 KB, written to in pieces of 4, wakes its reader for every piece: that took a third of the time.
_SCRIPT = """
import fcntl, hashlib, os, shutil, signal, subprocess, sys

digest, buffered, packer, *archiver = sys.argv[1:]
children = []

def ended(exit_code, said=""):
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for child in children:
        child.kill()
    try:
        os.write(2, said.encode())
    except OSError:
        pass
    os._exit(exit_code)

def pipe():
    ends = os.pipe()
    try:
        fcntl.fcntl(ends[1], getattr(fcntl, "F_SETPIPE_SZ", 1031), 1 << 20)
    except OSError:
        pass
    return ends

def started(argv, source, sink):
    try:
        children.append(subprocess.Popen(argv, stdin=source, stdout=sink))
    except OSError as error:
        ended(127, f"{argv[0]}: {error.strerror}\\n")

def passed_on(source):
    whole, block = hashlib.sha256(), memoryview(bytearray(1 << 20))
    try:
        while read := os.readv(source, [block]):
            whole.update(block[:read])
            written = 0
            while written < read:
                written += os.write(1, block[written:read])
    except OSError as error:
        ended(90, f"what was packed could not be passed on: {error.strerror}\\n")
    return whole.hexdigest()

def buffering():
    words = [shutil.which("stdbuf") if buffered == "buffered" else None, "-o65536"]
    try:
        none = subprocess.DEVNULL
        works = words[0] and subprocess.run([*words, "true"], stdout=none, stderr=none).returncode == 0
    except OSError:
        works = False
    return words if works else []

def main():
    plain, into = pipe()
    started([*buffering(), *archiver], None, into)
    os.close(into)
    packed, into = pipe() if digest == "digest" else (None, 1)
    started(packer.split(), plain, into)
    os.close(plain)
    os.close(into)
    said = f"runbook-stream-sha256 {passed_on(packed)}\\n" if digest == "digest" else ""
    status, packing = [child.wait() for child in children]
    if packing and status in (0, 1, -signal.SIGPIPE):
        ended(90, f"{packer} exited {packing}\\n")
    ended(status if status >= 0 else 128 - status, said if status in (0, 1) else "")

for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda *_: ended(90, "ended by a signal\\n"))
try:
    main()
except Exception as error:
    ended(90, f"{type(error).__name__}: {error}\\n")
"""
# The same by what every system has, for a host without Python: it takes the digest in any case.
_PIPED = """
set -u
script=$1 packer=$4
command -v python3 > /dev/null && python3 -I -S -c 'import fcntl, hashlib, os, shutil, signal, subprocess, sys; sys.exit(sys.version_info < (3, 8))' && exec python3 -I -S -c "$@"
shift 4
folder=$(mktemp -d) && mkfifo "$folder/copy" || exit 90
trap 'rm -rf "$folder"' EXIT
trap 'exit 90' HUP INT TERM
if command -v openssl > /dev/null
then openssl dgst -sha256 -r < "$folder/copy" > "$folder/digest" &
else sha256sum < "$folder/copy" > "$folder/digest" &
fi
{ { "$@"; echo $? > "$folder/status"; } | { $packer; echo $? > "$folder/packed"; } } | tee "$folder/copy"
passed=$?
wait $! || exit 90
read -r digest rest < "$folder/digest" && read -r status < "$folder/status" && read -r packed < "$folder/packed" || exit 90
if [ "$packed" -ne 0 ]
then case $status in 0|1|141) echo "$packer exited $packed" >&2; exit 90;; esac
fi
[ $passed -eq 0 ] || exit 90
case $status in 0|1) echo "runbook-stream-sha256 $digest" >&2;; esac
exit "$status"
"""
# What `digest` makes it say on standard error when all is passed on.
SAID = "runbook-stream-sha256"


def piped(archiver: Sequence[str], packer: str, *, digest: bool = False, buffered: bool = False) -> tuple[str, ...]:
    """The words of a command that packs what another one writes, to its standard output.

    Args:
        archiver: what writes.
        packer: what packs, words with blanks between them.
        digest: hash what is passed on, and say the SHA-256 at the end.
        buffered: the archiver writes by C's standard output, a page at a time when nobody asks for more.
    """
    ways = ("digest" if digest else "-", "buffered" if buffered else "-")
    return ("sh", "-c", _PIPED, "sh", _SCRIPT, *ways, packer, *archiver)
