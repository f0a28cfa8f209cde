"""Good dumps on their way to the store and back through a network that cuts, delays and corrupts, against a real S3 server.

Whatever the network did: what counts as stored and read back is the dump, byte for byte, or it is refused in words. Each case
ends with the network well again, where the next attempt is green, has one version, and leaves no half upload.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from runbook_lib import off_site
from runbook_lib.adapters import objects
from runbook_lib.adapters.objects import S3Store
from runbook_lib.canonical import sha256_file
from runbook_lib.errors import RunbookError
from runbook_lib.params import ObjectStore as StoreParams
from tests.contracts.test_proof import PACKINGS, SHOP, Proofs, proofs  # noqa: F401  # a fixture
from tests.soak.proxies import Proxy

if TYPE_CHECKING:
    from tests.contracts.conftest import Bucket

_MIB = 1 << 20
_KEY = "run/one.dump"
_AT_ONCE = 4
# Random bytes, which nothing compresses: parts have at least five MiB.
BIG = (
    SHOP
    + """
CREATE TABLE blobs (id int, b bytea);
INSERT INTO blobs SELECT n, (SELECT decode(string_agg(md5((n * 1000 + m)::text), ''), 'hex') FROM generate_series(1, 512) m)
    FROM generate_series(1, {mib} * 128) n;
"""
)
_SENT = (
    "refuse",
    "503",
    "cut 200",
    "cut sent 1000",
    "cut sent 100000",
    "cut sent 3000000",
    "slow",
    "other bytes",
    "other bytes sent",
)
_BACK = ("refuse", "503", "cut 200", "cut 30000", "cut 3000000", "slow", "other bytes")
ALL = (*itertools.product(("put",), _SENT), *itertools.product(("read back",), _BACK))
# In the tests that everybody runs: each way of putting, each kind of trouble, both directions.
FEW = (
    ("in one request", "put", ("503", "cut sent 3000000", "other bytes sent")),
    ("in one request", "read back", ("cut 3000000",)),
    ("in parts", "put", ("refuse", "cut 200", "slow", "other bytes")),
    ("in parts", "read back", ("other bytes", "slow")),
    ("ahead", "put", ("cut sent 3000000", "other bytes sent")),
    ("ahead", "read back", ("cut 30000",)),
)


@dataclass
class Case:
    """One dump through one trouble."""

    dump: Path
    way: str
    during: str
    mode: str
    refused: str = ""
    wrong: list[str] = field(default_factory=list)


def _make(store: S3Store, case: Case, folder: Path) -> None:
    """The dump is there; or it grows, and is sent meanwhile."""
    if case.way == "ahead":
        part, whole = folder / "one.dump.part", case.dump.read_bytes()
        part.touch()
        with store.ahead(part, _KEY, note=folder / "note") as ahead, part.open("ab", buffering=0) as file:
            file.write(whole[: 6 * _MIB])
            _until(lambda: bool(ahead.sent_bytes or ahead.gave_up))
            file.write(whole[6 * _MIB :])


def _put(store: S3Store, case: Case, folder: Path) -> None:
    note = folder / "note" if case.way == "ahead" else None
    store.put(case.dump, _KEY, sha256=sha256_file(case.dump), note=note)


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _read_back(store: S3Store, dump: Path) -> str:
    """As the step does it, which refuses what is not the dump."""
    params, began = StoreParams(bucket=store.bucket), datetime.now(UTC)
    return str(off_site.read_one_back(store, params, dump, _KEY, sha256_file(dump), begun=began)["sha256"])


def _there(store: S3Store) -> list[bytes]:
    """The content of each version, by the server's own word."""
    s3, name = store._client, f"{store.prefix}/{_KEY}"
    found = s3.list_object_versions(Bucket=store.bucket, Prefix=name).get("Versions", [])
    return [s3.get_object(Bucket=store.bucket, Key=name, VersionId=v["VersionId"])["Body"].read() for v in found]


def _half(store: S3Store) -> int:
    return len(store._client.list_multipart_uploads(Bucket=store.bucket, Prefix=f"{store.prefix}/").get("Uploads", []))


def _try(bucket: Bucket, proxy: Proxy, case: Case, folder: Path) -> Case:
    folder.mkdir()
    near = bucket.store(folder.name)
    far = bucket.store(folder.name, endpoint=f"http://127.0.0.1:{proxy.port}")
    whole, digest = case.dump.read_bytes(), sha256_file(case.dump)
    stored, told = False, ""
    try:
        proxy.mode = case.mode if case.during == "put" else "pass"
        _make(far, case, folder)
        _put(far, case, folder)
        stored = True
        proxy.mode = case.mode if case.during == "read back" else "pass"
        # By a connection of its own: who refuses refuses no old ones.
        told = _read_back(bucket.store(folder.name, endpoint=far.endpoint), case.dump)
    except RunbookError as error:
        case.refused = f"{type(error).__name__}: {error}"
    proxy.mode = "pass"
    there = _there(near)
    if any(one != whole for one in there):
        case.wrong.append("the store holds something else under its name")
    if stored and not there:
        case.wrong.append("it was put, and is not there")
    if told and (told, len(there)) != (digest, 1):
        case.wrong.append("it was read back, and is not what is there")
    if told and (case.mode, case.during) == ("other bytes", "read back"):
        case.wrong.append("other bytes came back, and counted")
    if not told and not case.refused.partition(": ")[2]:
        case.wrong.append("nothing was said")
    _put(far, case, folder)
    if (_read_back(far, case.dump), _there(near), _half(near)) != (digest, [whole], 0):
        case.wrong.append(f"afterwards: {len(_there(near))} versions, {_half(near)} half uploads")
    return case


def table(cases: list[Case]) -> str:
    """As it stands in docs/backups.md."""
    rows = [
        "| trouble | during | cases | stored, read back, equal | refused in words | anything wrong or left |",
        "|---|---|---|---|---|---|",
    ]
    of: dict[tuple[str, str], Counter[str]] = {}
    for case in cases:
        seen = of.setdefault((case.mode, case.during), Counter())
        seen.update(cases=1, equal=int(not case.refused), refused=int(bool(case.refused)), wrong=int(bool(case.wrong)))
    total = sum(of.values(), Counter())
    for (mode, during), n in [*of.items(), (("**together**", "both"), total)]:
        rows.append(f"| {mode} | {during} | {n['cases']} | {n['equal']} | {n['refused']} | {n['wrong']} |")
    return "\n".join(rows)


@pytest.fixture
def proxies(bucket: Bucket, tmp_path: Path) -> Iterator[SimpleQueue[Proxy]]:
    """As many as work at once, started before there is any thread: they are forks."""
    address, free = urlsplit(bucket.endpoint), SimpleQueue[Proxy]()
    started = [
        Proxy((str(address.hostname), int(address.port or 0)), tmp_path / f"mode-{n}").start() for n in range(_AT_ONCE)
    ]
    for proxy in started:
        free.put(proxy)
    yield free
    for proxy in started:
        proxy.stop()


@pytest.mark.parametrize(
    "full", [False, pytest.param(True, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])], ids=["few", "all"]
)
def test_through_a_bad_network_a_dump_is_stored_as_it_is_or_refused(
    proxies: SimpleQueue[Proxy], bucket: Bucket, proofs: Proofs, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    big = proofs.make(BIG.format(mib=12 if full else 6, day="today"))
    dumps = [proofs.dump(big, packing).path for kind, packing in PACKINGS.items() if full or kind == "zstd"]
    small: list[Path] = []
    if full:
        name = proofs.make(SHOP)
        small = [proofs.dump(name, packing).path for packing in PACKINGS.values()]
    ways = ("in one request", "in parts", "ahead")
    planned = (
        [Case(dump, way, *case) for way in ways for dump in dumps for case in ALL]
        + [Case(dump, ways[0], *case) for dump in small for case in ALL]
        if full
        else [Case(dumps[0], way, during, mode) for way, during, modes in FEW for mode in modes]
    )

    def one(number: int, case: Case) -> Case:
        proxy = proxies.get()
        try:
            return _try(bucket, proxy, case, proofs.folder / f"case-{full}-{number}")
        finally:
            proxies.put(proxy)

    cases: list[Case] = []
    for way in ways:
        with monkeypatch.context() as patch, ThreadPoolExecutor(_AT_ONCE) as pool:
            if way != "in one request":
                patch.setattr(objects, "_ONE_REQUEST_BYTES", _MIB)
                patch.setattr(objects, "_PART_BYTES", 5 * _MIB)
            mine = [case for case in planned if case.way == way]
            cases += pool.map(one, itertools.count(len(cases)), mine)

    print(table(cases))
    assert [case for case in cases if case.wrong] == []
    # The network did harm, and not only harm: both ways out of it were seen.
    assert {bool(case.refused) for case in cases} == {True, False}
    if full:
        assert len(cases) >= 200
