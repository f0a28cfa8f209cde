"""Every damaged dump is refused, by its digest and without it, and every good one passes.

A dump may be damaged before anybody hashes it: then its digest is right, and only reading, restoring and comparing tell.
So each is proved twice, by the good dump's manifest and by one that holds the damaged file's own digest. What passes then
must be shown to lose nothing: a bit that no reader looks at, or one in a word that is no part of a restore.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import pytest

from rehearsal import postgres as twin_postgres
from runbook_lib.canonical import sha256_file
from runbook_lib.errors import StepFailedError
from tests.contracts.test_proof import PACKINGS, SHOP, Dumped, Proofs, proofs  # noqa: F401  # a fixture

# Of each kind of damage: in the tests that everybody runs, and in the soak.
FEW, MANY = 1, 20
HEAD_BYTES = 6000  # of a custom dump: its table of contents

_COMMANDS = {"unpack": "reading", "pg_restore-list": "reading", "pg_restore-read": "reading", "pg_restore": "restoring"}
_REFUSED = re.compile(r"\((unpack|pg_restore-list|pg_restore-read|pg_restore)\) exited")
# What a dump of another moment or another database has, and how the database comes back from it.
_STATEMENTS = (
    ("UPDATE orders SET cents = cents + 1 WHERE id = 77", "UPDATE orders SET cents = cents - 1 WHERE id = 77"),
    (
        "DELETE FROM orders WHERE id > 1990",
        "INSERT INTO orders SELECT n, 1 + n % 400, n FROM generate_series(1991, 2000) n",
    ),
    ("DROP VIEW totals", "CREATE VIEW totals AS SELECT customer, sum(cents) FROM orders GROUP BY 1"),
    ("CREATE TABLE aside AS TABLE orders; TRUNCATE orders", "INSERT INTO orders TABLE aside; DROP TABLE aside"),
)


@dataclass
class Corpus:
    """What became of the dumps: counts for the table, and what must not be."""

    good: Counter[str] = field(default_factory=Counter)
    damaged: Counter[str] = field(default_factory=Counter)
    by_digest: Counter[str] = field(default_factory=Counter)
    without: Counter[tuple[str, str]] = field(default_factory=Counter)
    no_loss: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def table(self) -> str:
        """As it stands in docs/backups.md."""
        stages = ("reading", "restoring", "comparing", "no loss")
        rows = [
            "| packing | good, passed | damaged | refused by the digest | hashed after the damage, refused by reading | restoring | comparing | no loss |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for kind in self.good:
            cells = (
                self.good[kind],
                self.damaged[kind],
                self.by_digest[kind],
                *(self.without[kind, s] for s in stages),
            )
            rows.append(f"| {kind} | {' | '.join(map(str, cells))} |")
        sums = [sum(n for (_, at), n in self.without.items() if at == stage) for stage in stages]
        cells = (self.good.total(), self.damaged.total(), self.by_digest.total(), *sums)
        return "\n".join([*rows, f"| **together** | {' | '.join(map(str, cells))} |"])


def _outcome(proofs: Proofs, path: Path, manifest: dict[str, object], name: str) -> str:
    """What refuses a dump: `digest`, `reading`, `restoring`, `comparing`; or `equal`."""
    try:
        report = proofs.prove(path, manifest, name)
    except StepFailedError as error:
        found = _REFUSED.search(error.message)
        if found is None and "is missing or empty" not in error.message:
            raise
        return _COMMANDS[found[1]] if found else "reading"
    assert report["ok"] == (not report["why"])
    if report["ok"]:
        return "equal"
    return "digest" if report["why"][0].startswith("sha256 is ") else "comparing"


def _damages(whole: bytes, each: int, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """Each differs from the whole."""
    for number in range(each):
        size = len(whole) * number // each if each > 1 else len(whole) - 3000
        yield f"cut at {size}", whole[:size]
    for end in (len(whole), HEAD_BYTES):
        for _ in range(each):
            at, bit = draw.randrange(min(end, len(whole))), 1 << draw.randrange(8)
            yield f"bit {bit} at {at}", whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :]
    count = 0
    while count < each:
        at = draw.randrange(len(whole) - 4096)
        if any(whole[at : at + 4096]):
            count += 1
            yield f"zeroed at {at}", whole[:at] + bytes(4096) + whole[at + 4096 :]


def _unpacked(path: Path, into: Path) -> dict[str, bytes]:
    """Name → content of what pg_restore is given, by other means than the proof's."""
    into.mkdir()
    head = path.read_bytes()[:512]
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        with (into / "dump").open("wb") as file:
            subprocess.run(("zstd", "-qdc", str(path)), stdout=file, check=True)
    elif head[257:262] == b"ustar":
        with tarfile.open(path) as tar:
            tar.extractall(into, filter="data")
    else:
        (into / "dump").write_bytes(path.read_bytes())
    return {file.name: file.read_bytes() for file in sorted(into.iterdir())}


def _script(folder: Path) -> list[bytes]:
    """What a restore runs and loads, as lines; the words that newer programs draw at random are left out."""
    dump = folder / "dump" if (folder / "dump").exists() else folder
    done = subprocess.run(
        ("pg_restore", "--no-owner", "--no-acl", "--file=-", str(dump)), capture_output=True, check=True
    )
    return [line for line in done.stdout.splitlines() if not line.startswith((b"\\restrict ", b"\\unrestrict "))]


def _restored(proofs: Proofs, folder: Path) -> bytes:
    """What a restore holds, as pg_dump writes it: every row and every statement, with no inventory in between."""
    dump, name = folder / "dump" if (folder / "dump").exists() else folder, proofs.make("")
    known = proofs.server.server
    where = ("--host=127.0.0.1", f"--port={known.port}", f"--username={twin_postgres.ADMIN}", f"--dbname={name}")
    env = {**os.environ, "PGPASSFILE": str(known.passfile)}
    restore = ("pg_restore", "--exit-on-error", "--no-owner", "--no-acl", *where, str(dump))
    subprocess.run(restore, env=env, check=True, capture_output=True)
    done = subprocess.run(("pg_dump", "--no-owner", "--no-acl", *where), env=env, check=True, capture_output=True)
    return b"\n".join(
        line for line in done.stdout.splitlines() if not line.startswith((b"\\restrict ", b"\\unrestrict "))
    )


def _statements(script: list[bytes]) -> set[bytes]:
    """Without comments, what is set for the session alone, order and number: a statement that came late or twice and did harm
    has failed, or has left another database."""
    aside = (b"--", b"SET ", b"SELECT pg_catalog.set_config(")
    return {line for line in script if line and not line.startswith(aside)}


def _why_no_loss(proofs: Proofs, good: Path, bad: Path, number: int) -> tuple[bool, str]:
    """Tell whether a damaged dump that passed loses nothing, and why."""
    folders = [proofs.folder / f"{kind}-{number}" for kind in ("good", "bad")]
    if _unpacked(good, folders[0]) == _unpacked(bad, folders[1]):
        return True, "it unpacks to the same bytes"
    one, other = (_script(folder) for folder in folders)
    if _restored(proofs, folders[0]) != _restored(proofs, folders[1]):
        return False, "it passed, and holds something else"
    if one == other:
        return True, "a bit that a restore does not read: the same statements, the same rows"
    pairs = ((was, now) for was, now in zip_longest(one, other) if was != now)
    return _statements(one) == _statements(other), "it passed; {!r} is {!r}".format(*next(pairs))


@pytest.mark.parametrize(
    "each", [FEW, pytest.param(MANY, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])], ids=["few", "many"]
)
def test_every_damaged_dump_is_refused_and_every_good_one_passes(proofs: Proofs, each: int) -> None:
    draw, corpus = random.Random(4), Corpus()
    name, other = proofs.make(SHOP.replace("{day}", "today")), proofs.make(SHOP.replace("{day}", "elsewhere"))

    def damaged(kind: str, one: Dumped, path: Path, what: str) -> None:
        corpus.damaged[kind] += 1
        if _outcome(proofs, path, one.manifest(sha256_file(one.path)), name) == "digest":
            corpus.by_digest[kind] += 1
        else:
            corpus.wrong.append(f"{kind}, {what}: its digest was not looked at")
        said = _outcome(proofs, path, one.manifest(sha256_file(path)), name)
        if said == "equal":
            same, why = _why_no_loss(proofs, one.path, path, corpus.damaged.total())
            (corpus.no_loss if same else corpus.wrong).append(f"{kind}, {what}: {why}")
            said = "no loss" if same else said
        corpus.without[kind, said] += 1

    def proved(kind: str, one: Dumped, what: str) -> None:
        corpus.good[kind] += 1
        if why := proofs.why_not(one.path, one.manifest(sha256_file(one.path)), name):
            corpus.wrong.append(f"good {kind}, {what}: {why}")

    for number, (kind, packing) in enumerate(PACKINGS.items()):
        one = proofs.dump(name, packing)
        proved(kind, one, "as it is")
        bad = one.path.with_name("bad.dump")
        for what, content in _damages(one.path.read_bytes(), each, draw):
            bad.write_bytes(content)
            damaged(kind, one, bad, what)
        if each == MANY or number == 0:
            damaged(kind, one, proofs.dump(other, packing).path, "of another database")
        # Each is well formed: only the comparison can tell. A few of them say enough of a packing.
        for statement, back in _STATEMENTS if each == MANY else _STATEMENTS[number : number + 1]:
            proofs.run(name, statement)
            changed = proofs.dump(name, packing)
            proofs.run(name, back)
            damaged(kind, one, changed.path, f"after {statement}")
        for day in range(10 if each == MANY else 0):
            proofs.run(name, f"UPDATE customers SET note = note || '{day}' WHERE id % 10 = {day}")
            proved(kind, proofs.dump(name, packing), f"on day {day}")

    print(corpus.table(), *corpus.no_loss, sep="\n")
    assert corpus.wrong == []
    assert corpus.by_digest == corpus.damaged
    # Each part of the proof is what refuses some of them: without it they would pass.
    assert {stage for _, stage in corpus.without} >= {"reading", "comparing"}
    if each == MANY:
        assert corpus.good.total() >= 30
        assert corpus.damaged.total() >= 200
