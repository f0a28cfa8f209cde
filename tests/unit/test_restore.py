"""A dump is run on a server as an administrator: whose digest is wrong never comes so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runbook_lib import restore
from runbook_lib.canonical import sha256

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
