from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runbook_lib.adapters import processes
from runbook_lib.commands.pipeline import SAID, piped
from tests.project import wait_until

LONG = b"a line of the archive\n" * 100_000


@pytest.fixture(params=["python", "no python"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A PATH with python3 on it, and one of a host that has none."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "cat", "tee", "rm", "mktemp", "mkfifo", "sha256sum", "gzip", "stdbuf", "true", "false"):
        (folder / name).symlink_to(next(p for d in os.defpath.split(":") if (p := Path(d, name)).exists()))
    if request.param == "python":
        (folder / "python3").symlink_to(sys.executable)
    return str(folder)


def run(path: str, archiver: str, packer: str, **ways: bool) -> subprocess.CompletedProcess[bytes]:
    argv = piped(("sh", "-c", archiver), packer, **ways)
    return subprocess.run(argv, check=False, capture_output=True, env={"PATH": path}, timeout=60)


def test_what_is_written_comes_out_packed_with_its_digest(path: str, tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(LONG)

    done = run(path, f"cat {tmp_path}/long", "gzip -1", digest=True)

    assert done.returncode == 0
    assert subprocess.run(("gzip", "-dc"), input=done.stdout, check=True, capture_output=True).stdout == LONG
    assert f"{SAID} {hashlib.sha256(done.stdout).hexdigest()}".encode() in done.stderr


def test_a_digest_that_nobody_wants_changes_nothing(path: str, tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(LONG)

    done = run(path, f"cat {tmp_path}/long", "cat", buffered=True)

    assert (done.returncode, done.stdout) == (0, LONG)


@pytest.mark.parametrize("ways", [{"digest": True}, {"buffered": True}], ids=["digest", "buffered"])
@pytest.mark.parametrize(
    ("archiver", "packer", "exit_code"),
    [
        ("exit 0", "cat", 0),
        ("exit 1", "cat", 1),
        ("exit 3", "cat", 3),
        ("kill -9 $$", "cat", 137),
        ("exit 0", "false", 90),
        ("exit 1", "false", 90),
        ("exit 3", "false", 3),
        ("while echo; do :; done; kill -13 $$", "false", 90),
        ("exit 0", "/nowhere/zstd", 127),
    ],
)
def test_the_exit_status_of_each_part_counts(
    path: str, ways: dict[str, bool], archiver: str, packer: str, exit_code: int
) -> None:
    done = run(path, archiver, packer, **ways)

    assert (done.returncode in (90, 127)) if exit_code == 127 else done.returncode == exit_code
    assert bool(done.stderr.replace(SAID.encode(), b"")) or exit_code not in (90, 127)


def test_what_cannot_be_passed_on_is_an_error(path: str, tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(LONG)
    argv = piped(("cat", str(tmp_path / "long")), "cat", digest=True)

    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(argv, check=False, stdout=full, stderr=subprocess.PIPE, env={"PATH": path}, timeout=60)

    assert done.returncode == 90
    assert b"No space left on device" in done.stderr


def test_a_reader_that_is_gone_ends_it(path: str) -> None:
    argv = piped(("sh", "-c", "while echo a line; do :; done"), "cat", digest=True)

    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={"PATH": path}) as child:
        assert child.stdout
        child.stdout.read(10)
        child.stdout.close()
        assert child.wait(60) != 0


def test_a_script_that_is_ended_ends_what_it_started(tmp_path: Path) -> None:
    argv = piped(("sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 300"), "cat -u", digest=True)
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, start_new_session=True) as child:
        below = Path(f"/proc/{child.pid}/task/{child.pid}/children")
        wait_until(lambda: len(below.read_text().split()) == 2 and (tmp_path / "pid").exists(), "archiver and packer")
        started = list(map(int, below.read_text().split()))
        child.terminate()
        assert child.wait(60) == 90

    wait_until(lambda: not any(map(processes.start_time, started)), "their end")


def test_where_it_can_be_the_archiver_writes_in_bigger_pieces(path: str) -> None:
    done = run(path, 'echo "${_STDBUF_O-none}"', "cat", buffered=True)

    assert done.stdout == (b"65536\n" if (Path(path) / "python3").exists() else b"none\n")


@pytest.mark.parametrize(
    "broken", ["#!/bin/sh\nexit 125", "#!/bin/sh\necho no lib | tee /dev/stderr; exit 1", "\x7fELF"]
)
def test_what_makes_it_faster_may_be_broken(tmp_path: Path, broken: str) -> None:
    (tmp_path / "stdbuf").write_text(f"{broken}\n")
    (tmp_path / "stdbuf").chmod(0o755)

    done = run(f"{tmp_path}:{os.environ['PATH']}", "echo a", "cat", buffered=True)

    assert (done.returncode, done.stdout, done.stderr) == (0, b"a\n", b"")


@pytest.mark.parametrize("lacking", ["fcntl", "hashlib"])
def test_a_python_that_lacks_something_is_none(tmp_path: Path, lacking: str) -> None:
    python = f'case "$*" in *{lacking}*) exit 1;; esac; exec {sys.executable} "$@"'
    (tmp_path / "python3").write_text(f"#!/bin/sh\n{python}\n")
    (tmp_path / "python3").chmod(0o755)

    done = run(f"{tmp_path}:{os.environ['PATH']}", "echo a", "cat", digest=True)

    assert (done.returncode, done.stdout) == (0, b"a\n")
    assert SAID.encode() in done.stderr


def test_the_archivers_status_is_told_when_nothing_can_be_said() -> None:
    argv = piped(("sh", "-c", "exit 2"), "cat", digest=True)
    with Path("/dev/full").open("wb") as full:
        assert subprocess.run(argv, check=False, stdout=subprocess.DEVNULL, stderr=full, timeout=60).returncode == 2
