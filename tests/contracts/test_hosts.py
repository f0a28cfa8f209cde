"""A host runs a command in its home, with its words as they were given."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from runbook_lib.adapters.hosts import LocalHost, SshHost, host_from
from runbook_lib.adapters.secrets import Secrets
from runbook_lib.adapters.shell import LocalShell
from runbook_lib.commands import archive_files
from runbook_lib.commands.hosts import over_ssh
from runbook_lib.errors import StepFailedError, UsageError
from runbook_lib.model import Command
from runbook_lib.ports import Host

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


def test_files_are_archived_and_compared(host: Host, shell: LocalShell, tmp_path: Path) -> None:
    home = Path(host.home)
    (home / "releases" / "abc").mkdir(parents=True)
    (home / "releases" / "abc" / "web.py").write_text("print()\n")
    (home / "current").symlink_to("releases/abc")
    (home / "shared" / "uploads").mkdir(parents=True)
    (home / "shared" / "uploads" / "odd\nname 'x'").write_bytes(b"\0\1")
    (home / "shared" / "one").write_text("x")
    (home / "shared" / "two").hardlink_to(home / "shared" / "one")
    files, archive, listing = ("current", "shared"), tmp_path / "a.tgz", tmp_path / "a.sha256"

    shell.run(host.command(archive_files.manifest(files, into=listing, timeout_s=30)), name="manifest")
    before = archive_files.parse_manifest(listing.read_bytes())
    shell.run(host.command(archive_files.create(files, known=before, into=archive, timeout_s=30)), name="tar")

    assert set(before) == {"current/web.py", "shared/uploads/odd\nname 'x'", "shared/one", "shared/two"}
    assert archive_files.contents(archive) == before
    size = shell.run(host.command(archive_files.size(files)), name="du")
    assert archive_files.parse_size(size.output) > 0


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
