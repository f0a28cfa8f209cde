"""What is seen of a dump before any server sees it: whose it is, and that it has room."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runbook_lib import progress, restore, room
from runbook_lib.adapters import inventory
from runbook_lib.adapters.secrets import Secrets
from runbook_lib.adapters.shell import LocalShell
from runbook_lib.canonical import sha256
from runbook_lib.errors import StepFailedError, UsageError

NOBODY: Any = None  # a server that is asked for anything fails the test


def test_a_dump_that_is_not_the_manifests_is_not_restored(tmp_path: Path) -> None:
    dump = tmp_path / "prod.dump"
    dump.write_bytes(b"somebody else's")
    manifest = _whole()

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
        (("inventory", "size_bytes"), True, "inventory.size_bytes: 'True'"),
        (("inventory", "size_bytes"), -1, "inventory.size_bytes: '-1'"),
        (("inventory", "size_bytes"), 10**400, "inventory.size_bytes: '1000"),
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


@pytest.mark.parametrize("size_bytes", ["1 GB", None, pytest.param(10**400, id="huge")])
def test_an_inventory_of_another_format_is_refused_whatever_is_in_it(tmp_path: Path, size_bytes: Any) -> None:
    dump, manifest = tmp_path / "prod.dump", _whole()
    dump.write_bytes(b"ours")
    manifest["inventory"] |= {"format": 3, "size_bytes": size_bytes}

    with pytest.raises(UsageError, match="the inventory has format 3"):
        restore.asked_of(dump, manifest)


@pytest.mark.parametrize("said", [pytest.param(10**400, id="huge"), -1, True, "much", None])
def test_a_size_that_cannot_be_is_none(tmp_path: Path, said: Any) -> None:
    dump = tmp_path / "prod.dump"
    dump.write_bytes(restore._ZSTD)

    found = restore.unpacked_bytes(dump, {**_whole(), "proof": {"unpacked_bytes": said}})

    assert found == 2 * 8_000_000


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


@pytest.mark.parametrize(
    ("row", "more"),
    [
        pytest.param({}, [], id="14"),
        pytest.param({"datlocprovider": "c", "daticulocale": None}, [("LOCALE_PROVIDER", "libc")], id="15, libc"),
        pytest.param(
            {"datlocprovider": "i", "daticulocale": "de", "daticurules": "&a < g"},
            [("LOCALE_PROVIDER", "icu"), ("ICU_LOCALE", "de"), ("ICU_RULES", "&a < g")],
            id="16, ICU",
        ),
        pytest.param(
            {"datlocprovider": "b", "datlocale": "C.UTF-8", "daticurules": None},
            [("LOCALE_PROVIDER", "builtin"), ("BUILTIN_LOCALE", "C.UTF-8")],
            id="17, the server's own",
        ),
    ],
)
def test_a_scratch_database_orders_texts_as_its_source_does(row: dict[str, Any], more: list[tuple[str, str]]) -> None:
    options = restore.locale_options("UTF8", {"datcollate": "C", "datctype": "en_US.utf8", **row})

    assert options == [("ENCODING", "UTF8"), ("LC_COLLATE", "C"), ("LC_CTYPE", "en_US.utf8"), *more]


def test_an_order_of_texts_that_is_not_known_is_refused() -> None:
    with pytest.raises(StepFailedError, match="database shop has the locale provider 'x'"):
        restore.locale_options("UTF8", {"datname": "shop", "datcollate": "C", "datctype": "C", "datlocprovider": "x"})
