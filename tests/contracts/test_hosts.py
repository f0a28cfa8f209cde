"""A host runs a command in its home, with its words as they were given."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from runbook_lib.adapters import archives
from runbook_lib.adapters.hosts import LocalHost, SshHost, host_from
from runbook_lib.adapters.secrets import Secrets
from runbook_lib.adapters.shell import LocalShell
from runbook_lib.canonical import sha256_file
from runbook_lib.commands import archive_files
from runbook_lib.commands.hosts import over_ssh
from runbook_lib.errors import StepFailedError, UsageError
from runbook_lib.model import Command
from runbook_lib.ports import Host
from tests.project import alive, wait_until

if TYPE_CHECKING:
    from tests.contracts.conftest import SecureShell

WORDS = ("plain", "two words", "it's", '"', "$HOME", "`id`", "a;b", "*", "", "-x", "ö\n", "\\")


@pytest.fixture
def shell(tmp_path: Path) -> LocalShell:
    return LocalShell(lambda: tmp_path / "logs", Secrets())


@pytest.fixture(params=["local", "ssh"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Host:
    home = tmp_path / "the home's"
    home.mkdir()
    if request.param == "local":
        return LocalHost("app-01", str(home))
    server: SecureShell = request.getfixturevalue("secure_shell")
    return SshHost("app-01", str(home), "127.0.0.1", server.user, server.port, ("-F", str(server.config)))


def test_words_arrive_as_they_were(host: Host, shell: LocalShell) -> None:
    done = shell.run(host.command(Command(("printf", "<%s>", *WORDS))), name="words")

    assert done.output == "".join(f"<{word}>" for word in WORDS)


def test_home_is_the_working_folder(host: Host, shell: LocalShell) -> None:
    assert shell.run(host.command(Command(("pwd", "-P"))), name="pwd").output.strip() == host.home


def test_standard_output_streams_here_byte_for_byte(host: Host, shell: LocalShell, tmp_path: Path) -> None:
    content = bytes(range(256)) * 4000
    (Path(host.home) / "blob").write_bytes(content)

    shell.run(host.command(Command(("cat", "blob"), stdout=tmp_path / "copy")), name="cat")

    assert (tmp_path / "copy").read_bytes() == content


def test_exit_status_comes_back(host: Host, shell: LocalShell) -> None:
    with pytest.raises(StepFailedError, match="exited 7: gone wrong"):
        shell.run(host.command(Command(("sh", "-c", "echo gone wrong >&2; exit 7"))), name="bad")

    assert shell.run(host.command(Command(("sh", "-c", "exit 7"), ok_exits=(0, 7))), name="ok").exit_code == 7


def test_a_missing_home_is_an_error(host: Host, shell: LocalShell) -> None:
    gone = dataclasses.replace(host, home=f"{host.home}/gone")  # type: ignore[type-var]

    with pytest.raises((StepFailedError, OSError)):
        shell.run(gone.command(Command(("pwd",))), name="gone")


@pytest.mark.parametrize("program", ["zstd", "gzip"])
def test_files_are_archived_and_compared(host: Host, shell: LocalShell, tmp_path: Path, program: str) -> None:
    home = Path(host.home)
    (home / "releases" / "abc").mkdir(parents=True)
    (home / "releases" / "abc" / "web.py").write_text("print()\n")
    (home / "current").symlink_to("releases/abc")
    (home / "shared" / "uploads").mkdir(parents=True)
    (home / "shared" / "uploads" / "odd\nname 'x'").write_bytes(b"\0\1")
    (home / "shared" / "one").write_text("x")
    (home / "shared" / "two").hardlink_to(home / "shared" / "one")
    files, archive, listing = ("current", "shared"), tmp_path / "a.archive", tmp_path / "a.list"

    shell.run(host.command(archive_files.stamps(files, into=listing, timeout_s=30)), name="stamps")
    stamps = dict(archive_files.parse_stamps([listing.read_bytes()]))
    shell.run(host.command(archive_files.manifest(files, into=listing, timeout_s=30)), name="manifest")
    known = dict(archive_files.parse_manifest([listing.read_bytes()]))
    tar = archive_files.create(files, known=known, packing=archive_files.Packing(program), into=archive, timeout_s=30)
    done = shell.run(host.command(tar), name="tar")
    contents: dict[str, str] = {}
    found = archives.read(archive, keep=contents.update)

    assert set(known) == set(stamps) == {"current/web.py", "shared/uploads/odd\nname 'x'", "shared/one", "shared/two"}
    assert contents == known
    assert found.files == 4
    assert found.sha256 == archive_files.streamed_sha256(done.output) == sha256_file(archive)
    assert found.plain_bytes == 12
    size = shell.run(host.command(archive_files.size(files)), name="du")
    assert archive_files.parse_size(size.output) > 0


@pytest.mark.parametrize("python", ["", "exit 1", "there is none"])
def test_the_list_of_files_is_the_same_with_and_without_python(
    shell: LocalShell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str
) -> None:
    home, tools = tmp_path / "home", tmp_path / "tools"
    (home / "releases" / "abc").mkdir(parents=True)
    (home / "releases" / "abc" / "odd\nname 'x'").write_bytes(b"\0\1")
    (home / "releases" / "link").symlink_to("abc/odd\nname 'x'")
    (home / "current").symlink_to("releases/abc")
    (home / "single").write_text("x")
    (home / "empty").mkdir()
    os.mkfifo(home / "releases" / "abc" / "fifo")
    tools.mkdir()
    for tool in ("sh", "find", "sha256sum"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    if python != "there is none":
        (tools / "python3").write_text(f'#!/bin/sh\n{python}\nexec {sys.executable} "$@"\n')
        (tools / "python3").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    listed = archive_files.manifest(("current", "releases", "single", "empty"), into=tmp_path / "l", timeout_s=30)

    shell.run(LocalHost("app-01", str(home)).command(listed), name="manifest")

    name, two = "odd\nname 'x'", hashlib.sha256(b"\0\1").hexdigest()
    assert dict(archive_files.parse_manifest([(tmp_path / "l").read_bytes()])) == {
        f"current/{name}": two,
        f"releases/abc/{name}": two,
        "single": hashlib.sha256(b"x").hexdigest(),
    }


_TAKEN_AWAY = """
import contextlib, os, shutil
listing = os.scandir

@contextlib.contextmanager
def scandir(path):
    with listing(path) as entries:
        found = list(entries)
    with contextlib.suppress(FileNotFoundError):
        os.unlink("current/gone")
        shutil.rmtree("current/folder")
    yield found

os.scandir = scandir
"""


def test_a_file_that_goes_while_the_list_is_made_is_left_out(shell: LocalShell, tmp_path: Path) -> None:
    home = tmp_path / "home"
    for name in ("a", "gone", "folder/x", "z"):
        (home / "current" / name).parent.mkdir(parents=True, exist_ok=True)
        (home / "current" / name).write_text(name)
    listed = archive_files.manifest(("current",), into=tmp_path / "l", timeout_s=60)
    argv = tuple(_TAKEN_AWAY + word if "def told" in word else word for word in listed.argv)

    shell.run(LocalHost("app-01", str(home)).command(dataclasses.replace(listed, argv=argv)), name="manifest")

    assert sorted(path.name for path in (home / "current").iterdir()) == ["a", "z"]
    assert set(dict(archive_files.parse_manifest([(tmp_path / "l").read_bytes()]))) == {"current/a", "current/z"}


def test_what_a_command_writes_takes_the_place_of_what_was_there(shell: LocalShell, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("what an earlier attempt left, and longer")

    shell.run(Command(("echo", "new"), stdout=tmp_path / "out"), name="echo")

    assert (tmp_path / "out").read_text() == "new\n"


@pytest.mark.parametrize("name", ["gone", "shut"])
def test_a_file_that_cannot_be_read_stops_the_list(host: Host, shell: LocalShell, tmp_path: Path, name: str) -> None:
    (Path(host.home) / "shut").symlink_to("shut")
    listed = archive_files.manifest((name,), into=tmp_path / "l", timeout_s=30)

    with pytest.raises(StepFailedError, match="exited 1"):
        shell.run(host.command(listed), name="manifest")


@pytest.mark.parametrize(
    ("tar", "exit_code"), [("echo x; exit 0", 0), ("echo x; exit 1", 1), ("echo x; exit 2", 2), ("exec 1>&-", 0)]
)
def test_the_archivers_exit_status_passes_through_the_pipe(
    host: Host, shell: LocalShell, tmp_path: Path, tar: str, exit_code: int
) -> None:
    made = archive_files.create(
        ("x",), known={}, packing=archive_files.Packing("gzip"), into=tmp_path / "out", timeout_s=30
    )
    argv = (*made.argv[: made.argv.index("tar")], "sh", "-c", tar)

    done = shell.run(host.command(dataclasses.replace(made, argv=argv, ok_exits=(0, 1, 2))), name="tar")

    assert done.exit_code == exit_code
    whole = exit_code in (0, 1)
    assert archive_files.streamed_sha256(done.output) == (sha256_file(tmp_path / "out") if whole else "")


def test_a_reader_that_goes_away_ends_the_stream_red(tmp_path: Path) -> None:
    made = archive_files.create(
        ("x",), known={}, packing=archive_files.Packing("gzip"), into=tmp_path / "out", timeout_s=30
    )
    argv = (*made.argv[: made.argv.index("tar")], "cat", "/dev/zero")

    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ) as child:
        assert child.stdout is not None
        child.stdout.read(1000)
        child.stdout.close()

        assert child.wait(timeout=30) != 0


@pytest.mark.parametrize("program", ["zstd", "gzip"])
def test_a_damaged_archive_is_not_readable(shell: LocalShell, tmp_path: Path, program: str) -> None:
    here = LocalHost("app-01", str(tmp_path))
    (tmp_path / "a").write_bytes(bytes(range(250)) * 2000 + os.urandom(20_000))
    made = archive_files.create(
        ("a",), known={"a": ""}, packing=archive_files.Packing(program), into=tmp_path / "out", timeout_s=30
    )
    shell.run(here.command(made), name="tar")
    whole = (tmp_path / "out").read_bytes()
    assert archives.read(tmp_path / "out", keep=list).files == 1

    damaged = [whole[:-cut] for cut in (1, 3, 9, len(whole) // 2, len(whole) - 2)]
    damaged += [whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:], whole + b"junk", b"", b"\0" * 2000]
    damaged += [whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :] for at in range(2000, len(whole), 2999)]
    for content in damaged:
        (tmp_path / "out").write_bytes(content)
        with pytest.raises(StepFailedError, match="cannot be read to its end"):
            archives.read(tmp_path / "out", keep=list)


def test_an_archive_is_read_where_pipes_may_not_be_widened(
    shell: LocalShell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"a")
    made = archive_files.create(
        ("a",), known={"a": ""}, packing=archive_files.Packing("gzip"), into=tmp_path / "out", timeout_s=30
    )
    shell.run(LocalHost("app-01", str(tmp_path)).command(made), name="tar")

    def forbidden(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(archives.fcntl, "fcntl", forbidden)

    assert archives.read(tmp_path / "out", keep=list).files == 1


@pytest.mark.parametrize("status", ["exit 1", "kill -9 $$"])
def test_an_archive_whose_reader_fails_without_a_word_is_not_readable(
    shell: LocalShell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    (tmp_path / "a").write_bytes(b"a")
    made = archive_files.create(
        ("a",), known={"a": ""}, packing=archive_files.Packing("gzip"), into=tmp_path / "out", timeout_s=30
    )
    shell.run(LocalHost("app-01", str(tmp_path)).command(made), name="tar")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "gzip").write_text(f'#!/bin/sh\n{shutil.which("gzip")} "$@"\n{status}\n')
    (tools / "gzip").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")

    with pytest.raises(StepFailedError, match=r"cannot be read to its end: gzip exited (1|-9)"):
        archives.read(tmp_path / "out", keep=list)


def test_a_command_that_hangs_is_ended_long_before_its_time_is_up(
    host: Host, shell: LocalShell, tmp_path: Path
) -> None:
    hung = Command(("sh", "-c", "printf x; exec sleep 500"), timeout_s=400, stall_s=1, stdout=tmp_path / "out")

    with pytest.raises(StepFailedError, match=r"was ended since no byte came from it for 1 s: it hangs \(tar-app-01\)"):
        shell.run(host.command(hung), name="tar-app-01")

    assert (tmp_path / "out").read_bytes() == b"x"


def test_a_slow_command_that_goes_on_is_left_alone(host: Host, shell: LocalShell, tmp_path: Path) -> None:
    slow = Command(("sh", "-c", "for n in 1 2 3 4 5 6; do sleep 1; printf x; done"), stall_s=5, stdout=tmp_path / "out")

    assert shell.run(host.command(slow), name="slow").exit_code == 0


def test_a_host_that_hangs_in_the_middle_of_its_archive_is_named(host: Host, shell: LocalShell, tmp_path: Path) -> None:
    big = Path(host.home) / f"big-{tmp_path.name}"
    big.write_bytes(os.urandom(4 << 20) * 50)
    packing, part = archive_files.Packing("gzip"), tmp_path / "part"
    tar = archive_files.create((big.name,), known={big.name: ""}, packing=packing, into=part, timeout_s=400, stall_s=4)
    held: list[int] = []

    def hold() -> None:
        wait_until(lambda: part.exists() and part.stat().st_size > 0, "an archive")
        held.extend(alive(f"--\0./{big.name}"))
        for pid in held:
            os.kill(pid, signal.SIGSTOP)

    holding = threading.Thread(target=hold)
    holding.start()
    try:
        with pytest.raises(StepFailedError, match=r"no byte came from it for 4 s: it hangs \(tar-app-01\)"):
            shell.run(host.command(tar), name="tar-app-01")
        assert held
    finally:
        holding.join()
        for pid in held:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_an_unknown_host_key_is_refused(secure_shell: SecureShell, shell: LocalShell, tmp_path: Path) -> None:
    (tmp_path / "known_hosts").write_text("")
    options = ("-F", str(secure_shell.config), "-o", f"UserKnownHostsFile={tmp_path / 'known_hosts'}")
    stranger = SshHost("app-01", str(tmp_path), "127.0.0.1", secure_shell.user, secure_shell.port, options)

    with pytest.raises(StepFailedError, match="Host key verification failed"):
        shell.run(stranger.command(Command(("true",))), name="stranger")


def test_nobody_answering_is_an_error_not_a_wait(shell: LocalShell, tmp_path: Path) -> None:
    if shutil.which("ssh") is None:
        pytest.skip("no ssh client on this machine")
    away = SshHost("app-01", str(tmp_path), "127.0.0.1", None, 1)

    with pytest.raises(StepFailedError, match="exited 255"):
        shell.run(away.command(Command(("true",), timeout_s=20)), name="away")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("local:/srv/shop", LocalHost("app-01", "/srv/shop")),
        ("ssh:app-01.example:/srv/shop", None),
        ("ssh:app-01.example/srv/shop", SshHost("app-01", "/srv/shop", "app-01.example")),
        ("ssh:deploy@10.0.0.7:2222/srv", SshHost("app-01", "/srv", "10.0.0.7", "deploy", 2222)),
        ("ssh:-oProxyCommand=x/srv", None),
        ("local:srv", None),
        ("ftp:/x", None),
    ],
)
def test_addresses(address: str, expected: Host | None) -> None:
    if expected is not None:
        assert host_from("app-01", address) == expected
        return
    with pytest.raises(UsageError, match="no address"):
        host_from("app-01", address)


def test_ssh_is_one_quoted_line_behind_fixed_options() -> None:
    argv = over_ssh(("tar", "-c", "my file"), host="app-01", home="/srv/the shop", user="deploy", port=2222)

    assert argv[:2] == ("ssh", "-T")
    assert argv[-7:] == ("-l", "deploy", "-p", "2222", "--", "app-01", "cd '/srv/the shop' && exec tar -c 'my file'")
    assert {"BatchMode=yes", "StrictHostKeyChecking=yes"} <= set(argv)


@pytest.mark.parametrize("wrong", [{"host": "-oProxyCommand=x"}, {"host": "a", "user": "-l"}])
def test_names_are_no_options(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="no host name"):
        over_ssh(("true",), home="/", **wrong)  # type: ignore[arg-type]


def test_an_environment_is_not_put_on_a_remote_command_line() -> None:
    remote = SshHost("app-01", "/srv", "app-01.example")

    refuse: Callable[[Command], Command] = remote.command
    with pytest.raises(UsageError, match="PGPASSWORD"):
        refuse(Command(("psql",), env={"PGPASSWORD": "x"}))
