"""What is seen of a dump before any server sees it: whose it is, and that it has room."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runbook_lib import progress, restore, room
from runbook_lib.adapters.secrets import Secrets
from runbook_lib.adapters.shell import LocalShell
from runbook_lib.canonical import sha256
from runbook_lib.errors import StepFailedError

NOBODY: Any = None  # a server that is asked for anything fails the test


def test_a_dump_that_is_not_the_manifests_is_not_restored(tmp_path: Path) -> None:
    dump = tmp_path / "prod.dump"
    dump.write_bytes(b"somebody else's")
    manifest = {"files": [{"kind": "dump", "source_sha256": sha256(b"ours")}], "inventory": {}, "run": "run-1"}

    report = restore.prove_against_manifest(dump, manifest, database=NOBODY, params=NOBODY, shell=NOBODY, timeout_s=1.0)

    assert not report["ok"]
    assert report["why"] == [
        f"sha256 is {sha256(dump.read_bytes())}, the manifest says {sha256(b'ours')}: it was not restored"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["prod.dump"]


@pytest.mark.parametrize(("spare", "fits"), [(3 << 20, True), ((2 << 20) + 300, False), (0, False)])
@pytest.mark.parametrize("packed_by", ["zstd", "tar"])
def test_unpacking_stops_when_its_disk_would_be_too_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed_by: str, spare: int, fits: bool
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "toc.dat").write_bytes(bytes(2 << 20) + b"the end of it" * 30)
    dump, plain = tmp_path / "prod.dump", tmp_path / "prod.dump.plain.part"
    argv = ("zstd", "-q", "toc.dat", "-o", dump) if packed_by == "zstd" else ("tar", "-cf", dump, ".")
    subprocess.run(argv, cwd=folder, check=True)
    disk = SimpleNamespace(f_blocks=10_000_000, f_frsize=1, f_bavail=1_000_000 + spare, f_files=0, f_favail=0)
    monkeypatch.setattr(room.os, "statvfs", lambda _: disk)
    shell = LocalShell(lambda: tmp_path / "logs", Secrets())

    def unpacked() -> int:
        with restore._plain(dump, plain, free_ratio=0.1, shell=shell, timeout_s=60, told=progress.untold) as path:
            return (path if packed_by == "zstd" else path / "toc.dat").stat().st_size

    if fits:
        assert unpacked() == (folder / "toc.dat").stat().st_size
    else:
        with pytest.raises(StepFailedError, match="10% of that disk must stay free"):
            unpacked()
    assert not plain.exists()


def test_a_damaged_dump_is_not_called_too_big(tmp_path: Path) -> None:
    dump, shell = tmp_path / "prod.dump", LocalShell(lambda: tmp_path / "logs", Secrets())
    subprocess.run(("zstd", "-q", "-o", dump), input=bytes(2 << 20), check=True)
    dump.write_bytes(dump.read_bytes()[:-4] + b"junk")

    with (
        pytest.raises(StepFailedError, match=r"\(unpack\) exited 1"),
        restore._plain(dump, restore.plain_of(dump), free_ratio=0.0, shell=shell, timeout_s=60, told=progress.untold),
    ):
        pass
