"""How files are listed, archived and compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from runbook_lib.commands import archive_files

H1, H2, H3 = "1" * 64, "2" * 64, "3" * 64


def test_manifest_follows_what_is_named_and_nothing_below() -> None:
    command = archive_files.manifest(("current", "shared"), into=Path("m"), timeout_s=9.0)

    assert command.argv[:2] == ("sh", "-c")
    assert command.argv[5:] == ("./current", "./shared")
    assert command.stdout == Path("m")


def test_create_takes_folders_by_their_inside_and_files_as_they_are() -> None:
    command = archive_files.create(
        ("current", "-odd", "shared/env"),
        known={"shared/env": H1},
        packing=archive_files.Packing("zstd", 3, 2),
        into=Path("a.tar.zst.part"),
        timeout_s=9.0,
    )

    assert command.argv[:2] == ("sh", "-c")
    assert command.argv[command.argv.index("zstd -3 -T2") + 1 :][:2] == ("tar", "--create")
    assert command.argv[command.argv.index("--") + 1 :] == ("./current/.", "./-odd/.", "./shared/env")
    assert command.ok_exits == (0, 1)


def test_manifest_is_read_whatever_the_names_are() -> None:
    data = f"{H1}  ./current/a b\nc\0{H2} *./shared/x\0".encode() + H3.encode() + b"  ./bad\xff\0"

    expected = {"current/a b\nc": H1, "shared/x": H2, "bad\\xff": H3}
    for blocks in ([data], [data[:70], data[70:71], data[71:]], [bytes([byte]) for byte in data]):
        assert dict(archive_files.parse_manifest(blocks)) == expected
    assert list(archive_files.parse_manifest([])) == []


@pytest.mark.parametrize(
    "data", [b"find: no such file\0", H1.encode() + b"\0", H1.encode() + b"x ./a\0", H1.encode() + b"  ./cut"]
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"not a line|codec|digest|in the middle"):
        list(archive_files.parse_manifest([data]))


def test_size_adds_up() -> None:
    assert archive_files.parse_size("4096\t./current\n10\t./shared\nwarning\n") == 4106


def test_packing_is_a_program_with_its_own_level() -> None:
    assert archive_files.Packing("gzip", threads=4).words == "gzip"
    assert archive_files.Packing("zstd").words == "zstd -2 -T0"
    assert archive_files.Packing("gzip", 1).suffix == ".tgz"


def test_stamps_are_read_whatever_the_names_are() -> None:
    data = b"./current/a b\nc\x003 1.5 1.5 77\0shared/x\x000 2.0 2.0 78\0"

    assert dict(archive_files.parse_stamps([data])) == {"current/a b\nc": "3 1.5 1.5 77", "shared/x": "0 2.0 2.0 78"}
    assert list(archive_files.parse_stamps([b""])) == []
    for cut in (data[:-1], data[:-12], b"find: no such file"):
        with pytest.raises(ValueError, match="in the middle"):
            list(archive_files.parse_stamps([cut]))


def test_the_streams_digest_is_found_among_other_words() -> None:
    said = f"Welcome to app-01\ntar: x: file changed as we read it\nrunbook-stream-sha256 {H1}\n"

    assert archive_files.streamed_sha256(said) == H1
    assert not archive_files.streamed_sha256("runbook-stream-sha256 ")
