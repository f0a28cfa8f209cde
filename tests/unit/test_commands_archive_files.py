"""How files are listed, archived and compared."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from runbook_lib.commands import archive_files

H1, H2, H3 = "1" * 64, "2" * 64, "3" * 64


def test_manifest_follows_what_is_named_and_nothing_below() -> None:
    command = archive_files.manifest(("current", "shared"), into=Path("m"), timeout_s=9.0)

    assert command.argv == (
        "find",
        "-H",
        "./current",
        "./shared",
        "-type",
        "f",
        "-exec",
        "sha256sum",
        "--zero",
        "--",
        "{}",
        "+",
    )
    assert command.stdout == Path("m")


def test_create_takes_folders_by_their_inside_and_files_as_they_are() -> None:
    command = archive_files.create(
        ("current", "-odd", "shared/env"), known={"shared/env": H1}, into=Path("a.tgz.part"), timeout_s=9.0
    )

    assert command.argv[:3] == ("tar", "--create", "--gzip")
    assert command.argv[command.argv.index("--") + 1 :] == ("./current/.", "./-odd/.", "./shared/env")
    assert command.ok_exits == (0, 1)


def test_manifest_is_read_whatever_the_names_are() -> None:
    data = f"{H1}  ./current/a b\nc\0{H2} *./shared/x\0".encode() + H3.encode() + b"  ./bad\xff\0"

    assert archive_files.parse_manifest(data) == {"current/a b\nc": H1, "shared/x": H2, "bad\\xff": H3}


@pytest.mark.parametrize("data", [b"find: no such file\0", H1.encode() + b"\0", H1.encode() + b"x ./a\0"])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"not a line|codec|digest"):
        archive_files.parse_manifest(data)


def test_size_adds_up() -> None:
    assert archive_files.parse_size("4096\t./current\n10\t./shared\nwarning\n") == 4106


def test_contents_of_a_cut_archive_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tgz"
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo("./current/a")
        member.size = 300_000
        tar.addfile(member, io.BytesIO(bytes(range(250)) * 1200))
    assert list(archive_files.contents(path)) == ["current/a"]

    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:-1], whole[: len(whole) // 2], whole[:-5] + b"\0" + whole[-4:], b""):
        path.write_bytes(damaged)
        with pytest.raises((EOFError, OSError, tarfile.TarError)):
            archive_files.contents(path)


def test_a_quiet_host_must_be_equal() -> None:
    before = {"a": H1, "b": H2}

    assert archive_files.compare(before, before, before).proved
    assert archive_files.compare(before, {"a": H1}, before).missing == ("b",)
    assert archive_files.compare(before, {"a": H1, "b": H3}, before).differing == ("b",)


def test_what_moved_meanwhile_is_named_not_failed() -> None:
    before, after = {"log": H1, "gone": H2, "a": H1}, {"log": H2, "new": H3, "a": H1}

    compared = archive_files.compare(before, {"log": H3, "a": H1}, after)

    assert compared.proved
    assert compared.moving == ("gone", "log", "new")
