"""A dump is run on a server as an administrator: whose digest is wrong never comes so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runbook_lib import restore
from runbook_lib.adapters import inventory
from runbook_lib.canonical import sha256
from runbook_lib.errors import UsageError

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


def _whole() -> dict[str, Any]:
    source = {
        "format": inventory.FORMAT,
        "size_bytes": 8_000_000,
        "not_provable": [],
        "tables": {"public.orders": {"rows": 3, "content": "00"}},
        "sequences": {},
        "structure": {},
        "extensions": {"plpgsql": "1.0"},
        "large_objects": 0,
        "large_objects_content": "00",
    }
    return {"run": "run-1", "files": [{"kind": "dump", "source_sha256": sha256(b"ours")}], "inventory": source}


@pytest.mark.parametrize(
    ("at", "instead", "says"),
    [
        (("files",), ..., "'files' is missing"),
        (("files",), 7, "int"),
        (("files",), [7], "int"),
        (("files",), [{"kind": "files"}], "none is a dump"),
        (("files", 0, "source_sha256"), ..., "'source_sha256' is missing"),
        (("files", 0, "source_sha256"), None, "'None' is no SHA-256"),
        (("run",), ["run-1"], "run: it is no text"),
        (("inventory",), [], "inventory: it is no object"),
        (("inventory", "size_bytes"), ..., "'size_bytes' is missing"),
        (("inventory", "size_bytes"), "much", "inventory.size_bytes: 'much'"),
        (("inventory", "not_provable"), None, "inventory.not_provable: 'None'"),
        (("inventory", "tables"), [], "list"),
        (("inventory", "tables", "public.orders"), 3, "int"),
        (("inventory", "tables", "public.orders", "rows"), "3", "inventory.tables.public.orders.rows: '3'"),
        (("inventory", "tables", "public.orders", "content"), ..., "'content' is missing"),
        (("inventory", "sequences"), ..., "'sequences' is missing"),
        (("inventory", "sequences"), {"public.s": 1}, "int"),
        (("inventory", "structure"), ["view"], "list"),
        (("inventory", "large_objects"), ..., "'large_objects' is missing"),
        (("inventory", "extensions"), None, "NoneType"),
    ],
)
def test_a_damaged_manifest_is_refused_in_words_and_before_any_work(
    tmp_path: Path, at: tuple[Any, ...], instead: Any, says: str
) -> None:
    dump = tmp_path / "prod.dump"
    dump.write_bytes(b"ours")
    manifest = _whole()
    assert restore.asked_of(dump, manifest)[0] == sha256(b"ours")
    place: Any = manifest
    for key in at[:-1]:
        place = place[key]
    if instead is ...:
        del place[at[-1]]
    else:
        place[at[-1]] = instead

    with pytest.raises(UsageError, match="no manifest of a backup, or it is damaged: ") as refused:
        restore.asked_of(dump, manifest)

    assert says in refused.value.message
