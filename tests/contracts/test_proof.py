"""A dump is proved by restoring it: whatever the database holds, a good one passes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from rehearsal import postgres as twin_postgres
from runbook_lib import restore
from runbook_lib.adapters import inventory
from runbook_lib.adapters.database import Database
from runbook_lib.adapters.secrets import Secrets
from runbook_lib.adapters.shell import LocalShell
from runbook_lib.adapters.table_files import moved, table_files
from runbook_lib.canonical import sha256_file
from runbook_lib.commands import postgres
from runbook_lib.errors import StepFailedError, UsageError
from runbook_lib.params import Database as DatabaseParams
from tests.ledgers import LedgerServer

ZSTD = postgres.Packing("0", ("zstd", "-q", "-1"))
PACKINGS = {
    "zstd": ZSTD,
    "gzip": postgres.Packing("1"),
    "none": postgres.Packing("0"),
    "directory": postgres.Packing("1", jobs=2),
}

SHOP = """
CREATE TABLE customers (id serial PRIMARY KEY, name text NOT NULL, note text);
CREATE TABLE orders (id bigserial PRIMARY KEY, customer int REFERENCES customers, cents int CHECK (cents >= 0));
CREATE INDEX ON orders (customer);
CREATE VIEW totals AS SELECT customer, sum(cents) FROM orders GROUP BY 1;
INSERT INTO customers (name, note) SELECT 'customer ' || n, md5(n::text || '{day}') FROM generate_series(1, 400) n;
INSERT INTO orders (customer, cents) SELECT 1 + n % 400, n FROM generate_series(1, 2000) n;
"""
UNUSUAL = """
CREATE SCHEMA "Odd schema";
CREATE TABLE "Odd schema"."t""able; DROP" ("se lect" int PRIMARY KEY, "ö" text);
INSERT INTO "Odd schema"."t""able; DROP" VALUES (1, E'tab\\tand \\\\ and ''quote'''), (2, NULL);
CREATE TABLE events (at date NOT NULL, what text) PARTITION BY RANGE (at);
CREATE TABLE events_2025 PARTITION OF events FOR VALUES FROM ('2025-01-01') TO ('2026-01-01');
CREATE TABLE events_2026 PARTITION OF events FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
INSERT INTO events SELECT '2025-06-01'::date + n, 'event ' || n FROM generate_series(1, 400) n;
CREATE TABLE sizes (w int, h int, area int GENERATED ALWAYS AS (w * h) STORED, id int GENERATED ALWAYS AS IDENTITY);
INSERT INTO sizes (w, h) SELECT n, n + 1 FROM generate_series(1, 50) n;
CREATE TABLE parent (a int); CREATE TABLE child (b int) INHERITS (parent);
INSERT INTO parent VALUES (1); INSERT INTO child VALUES (2, 3);
CREATE TABLE empty (x jsonb, y bytea, z float8[], r numrange);
CREATE UNLOGGED TABLE quick (x int); INSERT INTO quick VALUES (7);
CREATE TABLE odd_values (f float8, n numeric, t timestamptz, b bytea, i interval, j jsonb);
INSERT INTO odd_values VALUES ('NaN', 'NaN', 'infinity', '\\x00ff', '1 mon -3 days', '{"a": [1, null]}'),
    (1.0000000000000002, 1e100, '2026-03-29 01:30:00+00', '', '-1 sec', 'null'), (NULL, NULL, NULL, NULL, NULL, NULL);
CREATE MATERIALIZED VIEW summary AS SELECT count(*) FROM events;
CREATE SEQUENCE downwards INCREMENT -1; SELECT nextval('downwards'), nextval('downwards');
CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$;
CREATE TRIGGER touched BEFORE UPDATE ON sizes FOR EACH ROW EXECUTE FUNCTION touch();
SELECT lo_from_bytea(0, convert_to(repeat('large object ', 1000), 'UTF8')), lo_from_bytea(0, '\\x0001');
CREATE TYPE "Mood" AS ENUM ('good', 'bad'); CREATE TYPE address AS (street text, number int);
CREATE DOMAIN positive AS int DEFAULT 1 CHECK (VALUE > 0); CREATE TYPE span AS RANGE (subtype = int);
CREATE FUNCTION price(cents int, times int DEFAULT 1) RETURNS int LANGUAGE sql AS 'SELECT cents * times';
CREATE PROCEDURE nothing() LANGUAGE sql AS 'SELECT 1'; CREATE FUNCTION quiet() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END';
CREATE AGGREGATE product (int) (SFUNC = int4mul, STYPE = int, INITCOND = '1');
CREATE TABLE kinds (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, mood "Mood", home address, n positive, a int, b int);
ALTER TABLE kinds ENABLE ROW LEVEL SECURITY; ALTER TABLE kinds FORCE ROW LEVEL SECURITY;
CREATE POLICY "own rows" ON kinds USING (a = 1) WITH CHECK (b > 0);
CREATE RULE kept AS ON DELETE TO kinds DO INSTEAD NOTHING;
CREATE STATISTICS together ON a, b FROM kinds;
ALTER TABLE kinds ADD CONSTRAINT later CHECK (a > 0) NOT VALID;
CREATE TABLE days (day date PRIMARY KEY) PARTITION BY RANGE (day);
CREATE TABLE days_2026 PARTITION OF days FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
CREATE TABLE days_2025 PARTITION OF days FOR VALUES FROM ('2025-01-01') TO ('2026-01-01');
CREATE TABLE visits (day date REFERENCES days);
CREATE PUBLICATION changes FOR TABLE kinds, days;
CREATE EVENT TRIGGER watched ON ddl_command_end EXECUTE FUNCTION quiet();
CREATE FUNCTION same(address, address) RETURNS bool LANGUAGE sql AS 'SELECT $1.street = $2.street';
CREATE OPERATOR === (LEFTARG = address, RIGHTARG = address, FUNCTION = same);
CREATE CAST (address AS text) WITH INOUT; CREATE COLLATION plain FROM "C";
CREATE TEXT SEARCH CONFIGURATION words (COPY = simple);
COMMENT ON TABLE kinds IS 'all of them';
"""
# What a restore may lack besides rows, each alone: a statement, and what is then said.
CHANGES = {
    "DROP FUNCTION price": "function public.price(integer,integer) is missing",
    "CREATE OR REPLACE FUNCTION price(cents int, times int DEFAULT 1) RETURNS int LANGUAGE sql AS 'SELECT 0'": (
        "function public.price(integer,integer) is defined otherwise"
    ),
    "DROP PROCEDURE nothing": "function public.nothing() is missing",
    "DROP AGGREGATE product (int); CREATE AGGREGATE product (int) (SFUNC = int4mul, STYPE = int, INITCOND = '2')": (
        "function public.product(integer) is defined otherwise"
    ),
    'DROP POLICY "own rows" ON kinds': 'policy "own rows" of public.kinds is missing',
    "ALTER TABLE kinds DISABLE ROW LEVEL SECURITY": "table public.kinds is defined otherwise",
    "ALTER TABLE kinds NO FORCE ROW LEVEL SECURITY": "table public.kinds is defined otherwise",
    "DROP RULE kept ON kinds": "rule kept of public.kinds is missing",
    "ALTER TYPE \"Mood\" RENAME VALUE 'bad' TO 'worse'": 'type public."Mood" is defined otherwise',
    "ALTER TYPE address RENAME ATTRIBUTE number TO no": "column public.address.number is missing",
    "ALTER DOMAIN positive DROP CONSTRAINT positive_check": "constraint positive_check of public.positive is missing",
    "ALTER DOMAIN positive SET DEFAULT 2": "type public.positive is defined otherwise",
    "DROP TYPE span": "type public.span is missing",
    "ALTER TABLE events DETACH PARTITION events_2025": "table public.events_2025 is defined otherwise",
    "ALTER TABLE child NO INHERIT parent": "table public.child is defined otherwise",
    "ALTER TABLE kinds ALTER id SET GENERATED BY DEFAULT": "column public.kinds.id is defined otherwise",
    "ALTER TABLE sizes ALTER area DROP EXPRESSION": "column public.sizes.area is defined otherwise",
    "ALTER SEQUENCE downwards CYCLE": "sequence public.downwards is defined otherwise",
    "ALTER TABLE kinds VALIDATE CONSTRAINT later": "constraint later of public.kinds is defined otherwise",
    "DROP STATISTICS together": "statistics public.together is missing",
    "ALTER PUBLICATION changes DROP TABLE days": "publication changes is defined otherwise",
    "DROP EVENT TRIGGER watched": "event trigger watched is missing",
    "ALTER TABLE sizes DISABLE TRIGGER touched": "trigger touched of public.sizes is defined otherwise",
    "DROP OPERATOR === (address, address)": "operator public.===(public.address,public.address) is missing",
    "DROP CAST (address AS text)": "cast (public.address AS pg_catalog.text) is missing",
    "DROP COLLATION plain": "collation public.plain is missing",
    "DROP TEXT SEARCH CONFIGURATION words": "text search configuration public.words is missing",
    "CREATE SCHEMA more": "schema more was not in the source",
}


@dataclass(frozen=True)
class Dumped:
    """A dump with what its snapshot held."""

    path: Path
    inventory: dict[str, Any]

    def manifest(self, sha256: str) -> dict[str, Any]:
        return {"run": "r", "files": [{"kind": "dump", "source_sha256": sha256}], "inventory": self.inventory}


class Proofs:
    """Databases on one server, dumped and proved as a run does it."""

    def __init__(self, server: LedgerServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        known = server.server
        self.database = Database("127.0.0.1", known.port, str(known.passfile))
        self.shell = LocalShell(lambda: folder / "logs", Secrets())
        self._made: list[str] = []

    def make(self, script: str, options: str = "") -> str:
        name = f"proof_{os.getpid()}_{self.folder.name.replace('-', '_')}_{len(self._made)}"[-60:]
        with self.server.session() as session:
            session.execute(f'CREATE DATABASE "{name}" {options}')
        self._made.append(name)
        self.run(name, script)
        return name

    def run(self, name: str, script: str) -> None:
        with self.server.session(name) as session:
            if script:
                session.execute(script)

    def end(self) -> None:
        with self.server.session() as session:
            for name in self._made:
                session.execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    def connect(self, name: str) -> psycopg.Connection[Any]:
        return self.database.connect(twin_postgres.ADMIN, name, application="proof")

    def dump(
        self,
        name: str,
        packing: postgres.Packing,
        between: Callable[[], None] = lambda: None,
        *,
        after: Callable[[], None] = lambda: None,
    ) -> Dumped:
        path = self.folder / f"{name}-{len(list(self.folder.iterdir()))}{packing.suffix}"
        server = postgres.Server("127.0.0.1", self.server.server.port, str(self.server.server.passfile))
        with self.connect(name) as connection:
            snapshot = restore.export_snapshot(connection)
            between()
            taken = inventory.take(lambda: self.connect(name), snapshot=snapshot.name, jobs=2)
            after()
            command = postgres.dump(
                server, twin_postgres.ADMIN, name, snapshot=snapshot.name, packing=packing, into=path, timeout_s=60
            )
            self.shell.run(command, name="dump")
        return Dumped(path, json.loads(json.dumps(taken)))

    def prove(self, path: Path, manifest: dict[str, Any], production: str, **more: Any) -> dict[str, Any]:
        params = DatabaseParams(
            host="127.0.0.1",
            port=self.server.server.port,
            passfile=str(self.server.server.passfile),
            production=production,
            staging="s",
            admin_role=twin_postgres.ADMIN,
            backup_role="b",
            migrate_role="m",
            app_role="a",
            critical_reads=["SELECT 1"],
        )
        return restore.prove_against_manifest(
            path, manifest, database=self.database, params=params, shell=self.shell, timeout_s=60, jobs=2, **more
        )

    def why_not(self, path: Path, manifest: dict[str, Any], production: str) -> list[str]:
        """Empty for a proved dump."""
        try:
            report = self.prove(path, manifest, production)
        except StepFailedError as error:
            return [error.message]
        assert report["ok"] == (not report["why"])
        return list(report["why"])


@pytest.fixture
def proofs(ledger_server: LedgerServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proofs]:
    monkeypatch.setenv("PATH", f"{ledger_server.server.bin}{os.pathsep}{os.environ['PATH']}")
    made = Proofs(ledger_server, tmp_path)
    yield made
    made.end()


def _extension(proofs: Proofs, database: str, name: str) -> bool:
    with proofs.server.session(database) as session:
        found = session.execute("SELECT 1 FROM pg_available_extensions WHERE name = %s", (name,)).fetchone()
        if found is not None:
            session.execute(f"CREATE EXTENSION {name}")
    return found is not None


def test_whatever_a_database_holds_is_proved_or_named(proofs: Proofs) -> None:
    name = proofs.make(UNUSUAL)
    foreign = _extension(proofs, name, "file_fdw")
    if foreign:
        proofs.run(
            name,
            "CREATE SERVER files FOREIGN DATA WRAPPER file_fdw; "
            "CREATE FOREIGN TABLE hosts (line text) SERVER files OPTIONS (filename '/etc/hosts')",
        )
    proofs.run(name, f"ALTER DATABASE \"{name}\" SET work_mem = '8MB'")
    with pytest.raises(psycopg.errors.UniqueViolation):  # what is left of it is an index that is not valid
        proofs.run(name, "CREATE UNIQUE INDEX CONCURRENTLY broken ON events_2025 ((1))")
    one = proofs.dump(name, ZSTD)

    report = proofs.prove(one.path, one.manifest(sha256_file(one.path)), name)

    assert report["why"] == []
    assert one.inventory["large_objects"] == 2
    assert {'Odd schema.t"able; DROP', "public.events_2025", "public.child", "public.quick"} <= set(
        one.inventory["tables"]
    )
    assert one.inventory["tables"]["public.parent"]["rows"] == 1
    named = ["comments on objects: not compared"]
    named += ["foreign table public.hosts: its rows are on another server"] if foreign else []
    assert report["not_provable"] == [
        *named,
        "materialized view public.summary: made anew by a restore",
        "owners and rights: the dump holds none",
        "settings of the database (ALTER DATABASE, ALTER ROLE IN DATABASE): in no backup",
        "index public.broken: it is not valid, and so not in the dump",
    ]
    assert set(one.inventory["extensions"]) == {"plpgsql", *(["file_fdw"] if foreign else [])}
    assert one.inventory["size_bytes"] > 0
    assert one.inventory["server_version"]


def _tablespace_files(session: psycopg.Connection[Any]) -> set[str]:
    """What lies in the tablespace `fast`."""
    (where,) = session.execute("SELECT 'pg_tblspc/' || oid FROM pg_tablespace WHERE spcname = 'fast'").fetchone() or (
        "",
    )
    folders = [row[0] for row in session.execute("SELECT pg_ls_dir(%s)", (where,)).fetchall()]
    return {
        row[0]
        for folder in folders
        for row in session.execute(
            "SELECT d || '/' || pg_ls_dir(%(d)s) FROM (SELECT %(d)s AS d) AS t", {"d": f"{where}/{folder}"}
        )
    }


def test_what_depends_on_the_order_of_texts_is_restored_under_the_same_order(proofs: Proofs) -> None:
    with proofs.server.session() as session:
        if session.info.server_version < 150000:
            pytest.skip("a database's locale is of ICU since PostgreSQL 15")
    name = proofs.make(
        "CREATE TABLE ranges (low text, high text, CHECK (low < high)); INSERT INTO ranges VALUES ('apple', 'Banana');"
        "CREATE TABLE people (name text) PARTITION BY RANGE (name);"
        "CREATE TABLE first_half PARTITION OF people FOR VALUES FROM ('a') TO ('n');"
        "INSERT INTO people VALUES ('Berta')",
        "TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en-US-u-kf-upper'",
    )
    one = proofs.dump(name, ZSTD)

    assert proofs.why_not(one.path, one.manifest(sha256_file(one.path)), name) == []


def test_a_proof_fills_no_tablespace_and_needs_none(proofs: Proofs) -> None:
    with proofs.server.session() as session:
        if session.info.server_version < 150000:
            pytest.skip("a tablespace within the server's own folder takes PostgreSQL 15")
        session.execute("SET allow_in_place_tablespaces = on")
        session.execute("CREATE TABLESPACE fast LOCATION ''")
        name = proofs.make(
            "CREATE TABLE quick (id int PRIMARY KEY USING INDEX TABLESPACE fast, t text) TABLESPACE fast"
        )
        proofs.run(
            name,
            "INSERT INTO quick SELECT n, n FROM generate_series(1, 100) n; CREATE INDEX ON quick (t) TABLESPACE fast",
        )
        one = proofs.dump(name, ZSTD)
        manifest = one.manifest(sha256_file(one.path))
        seen: list[set[str]] = []

        @contextmanager
        def tell(
            what: str, done: Callable[[], int], *, total: int | None = None, unit: str = "bytes"
        ) -> Iterator[None]:
            yield
            if what == "restore":
                seen.append(_tablespace_files(session))

        session.execute(f"ALTER ROLE {twin_postgres.ADMIN} SET default_tablespace = 'fast'")
        try:
            before = _tablespace_files(session)
            assert proofs.prove(one.path, manifest, name, told=tell)["why"] == []
        finally:
            session.execute(f"ALTER ROLE {twin_postgres.ADMIN} RESET default_tablespace")
        assert seen == [before], "a restored database would have a folder of its own there"

        proofs.run(name, "DROP TABLE quick")
        session.execute("DROP TABLESPACE fast")
        assert proofs.why_not(one.path, manifest, name) == []


def test_a_proof_tells_how_far_it_is_and_how_far_it_has_to_go(proofs: Proofs) -> None:
    name, told = proofs.make(SHOP), {}

    @contextmanager
    def tell(what: str, done: Callable[[], int], *, total: int | None = None, unit: str = "bytes") -> Iterator[None]:
        yield
        told[what] = (total, unit)

    def parts(one: Dumped, **more: Any) -> dict[str, Any]:
        told.clear()
        assert proofs.prove(one.path, {**one.manifest(sha256_file(one.path)), **more}, name, told=tell)["ok"]
        assert told.pop(f"{one.path.name}, hashed") == (one.path.stat().st_size, "bytes")
        assert told.pop("restore") == (one.inventory["size_bytes"], "bytes")
        assert told.pop("comparing the restore") == (2, "tables")
        return dict(told)

    packed, plain, folder = (proofs.dump(name, PACKINGS[kind]) for kind in ("zstd", "none", "directory"))

    assert parts(packed, proof={"unpacked_bytes": 4711}) == {"dump, unpacked": (4711, "bytes")}
    assert parts(packed, proof=None) == {"dump, unpacked": (None, "bytes")}
    assert parts(plain) == {"dump, read to its end": (None, "s")}
    size = folder.path.stat().st_size
    assert parts(folder) == {"dump, unpacked": (size, "bytes"), "dump, read to its end": (None, "s")}


def test_whatever_a_restore_lacks_is_named(proofs: Proofs) -> None:
    name = proofs.make(UNUSUAL)
    source = inventory.take(lambda: proofs.connect(name))

    unseen = {}
    for change, said in CHANGES.items():
        with proofs.connect(name) as session, session.transaction(force_rollback=True):
            session.execute(change)
            session.execute("SET search_path = pg_catalog")
            lacking = inventory.differences(source, {**source, "structure": inventory.structure(session)})
        if said not in lacking:
            unseen[change] = lacking

    assert unseen == {}


def test_a_dump_of_several_jobs_is_one_file_and_leaves_no_folder(proofs: Proofs) -> None:
    name = proofs.make(UNUSUAL)
    one = proofs.dump(name, PACKINGS["directory"])
    cut = one.path.with_name("cut.dump.tar")
    cut.write_bytes(one.path.read_bytes()[:-20_000])

    assert proofs.why_not(one.path, one.manifest(sha256_file(one.path)), name) == []
    assert proofs.why_not(cut, one.manifest(sha256_file(cut)), name)
    assert {path.name for path in proofs.folder.iterdir()} == {one.path.name, cut.name, "logs"}


def test_an_empty_database_is_proved_too(proofs: Proofs) -> None:
    name = proofs.make("")
    one = proofs.dump(name, ZSTD)

    assert proofs.why_not(one.path, one.manifest(sha256_file(one.path)), name) == []
    assert one.inventory["tables"] == {}
    # As it was read before the snapshot, which sees that it is gone.
    read_before = inventory.take(lambda: proofs.connect(name), standing={"public.dropped": {"last_value": "1"}})
    assert read_before["sequences"] == {}


def test_tables_whose_names_an_inventory_cannot_tell_apart_are_refused(proofs: Proofs) -> None:
    """One of two would not be in it at all, and its loss would not be seen."""
    name = proofs.make(
        'CREATE SCHEMA "a.b"; CREATE SCHEMA a; CREATE TABLE "a.b".c (x int); CREATE TABLE a."b.c" (x int)'
    )
    said = r'"a"\."b\.c" and "a\.b"\."c" cannot be told apart in an inventory'
    with pytest.raises(UsageError, match=said):
        inventory.take(lambda: proofs.connect(name))

    proofs.run(name, 'DROP TABLE a."b.c"; DROP TABLE "a.b".c; CREATE SEQUENCE a."b.c"; CREATE SEQUENCE "a.b".c')
    with pytest.raises(UsageError, match=said):
        inventory.sequences(lambda: proofs.connect(name))


def test_what_is_written_during_the_dump_is_in_neither(proofs: Proofs) -> None:
    name = proofs.make(SHOP)
    one = proofs.dump(name, ZSTD, between=lambda: proofs.run(name, "DELETE FROM orders WHERE id % 2 = 0"))

    assert proofs.why_not(one.path, one.manifest(sha256_file(one.path)), name) == []
    assert one.inventory["tables"]["public.orders"]["rows"] == 2000


_RELOADED = "BEGIN; TRUNCATE {0}; INSERT INTO {0} SELECT * FROM spare; COMMIT"
# What happens while a snapshot is held, in this order, and what is then said of the snapshot's tables, above what was said before.
MOVES = {
    "UPDATE orders SET cents = cents + 1; DELETE FROM orders WHERE id = 1": None,
    "ALTER TABLE orders ADD COLUMN paid bool DEFAULT true; CREATE INDEX ON orders (cents)": None,
    "VACUUM ANALYZE orders": None,
    "REFRESH MATERIALIZED VIEW sums; CREATE TABLE later AS SELECT 1 AS one": None,
    "TRUNCATE of_extension": None,
    "TRUNCATE asked_for": "public.asked_for was truncated or rewritten",
    "ALTER SEQUENCE orders_id_seq RESTART; CREATE TEMP TABLE mine (x int); TRUNCATE mine": None,
    _RELOADED.format("orders"): "public.orders was truncated or rewritten",
    "ALTER TABLE notes ALTER size TYPE bigint": "public.notes was truncated or rewritten",
    "ALTER TABLE tokens ADD COLUMN token uuid DEFAULT gen_random_uuid()": "public.tokens was truncated or rewritten",
    "ALTER TABLE logged SET UNLOGGED": "public.logged was truncated or rewritten",
    "TRUNCATE quick": "public.quick was truncated or rewritten",
    "TRUNCATE events": 'public."Events of 2026" was truncated or rewritten',
    "DROP TABLE gone": "public.gone was dropped or renamed",
    "ALTER SCHEMA old RENAME TO older": "old.there was dropped or renamed",
    "BEGIN; DROP TABLE made; CREATE TABLE made AS SELECT 1 AS x; COMMIT": "public.made is another table now",
    "ALTER TABLE a RENAME TO c; ALTER TABLE b RENAME TO a; ALTER TABLE c RENAME TO b": "public.a is another table now",
    "ALTER TABLE wide DROP one; ALTER TABLE wide ADD one int DEFAULT 0": "columns of public.wide were dropped or renamed",
}


def test_what_a_snapshot_does_not_protect_is_named(proofs: Proofs) -> None:
    name = proofs.make(
        "CREATE TABLE orders (id serial, cents int); INSERT INTO orders (cents) VALUES (1), (2); CREATE TABLE spare AS TABLE orders;"
        "CREATE TABLE notes (size int); CREATE TABLE tokens (x int); CREATE TABLE logged (x int); CREATE UNLOGGED TABLE quick (x int);"
        'CREATE TABLE events (d date) PARTITION BY RANGE (d); CREATE TABLE "Events of 2026" PARTITION OF events DEFAULT;'
        "CREATE TABLE gone (x int); CREATE SCHEMA old; CREATE TABLE old.there (x int); CREATE TABLE made (x int);"
        "CREATE TABLE a (x int); CREATE TABLE b (x int); CREATE TABLE wide (one int, two int);"
        "CREATE MATERIALIZED VIEW sums AS SELECT sum(cents) FROM orders; CREATE TABLE of_extension (x int); CREATE TABLE asked_for (x int);"
        "ALTER EXTENSION plpgsql ADD TABLE of_extension; ALTER EXTENSION plpgsql ADD TABLE asked_for;"
        "UPDATE pg_extension SET extconfig = ARRAY['asked_for'::regclass::oid], extcondition = ARRAY['']"
    )
    said: dict[str, list[str]] = {}

    with proofs.connect(name) as holding:
        snapshot = restore.export_snapshot(holding)
        known: set[str] = set()
        for change in MOVES:
            with proofs.server.session(name) as session:
                for statement in change.split("; "):
                    session.execute(statement)
                # As the note of a dump keeps it, and in the session of the snapshot, which sees what it always saw.
                found = moved(json.loads(json.dumps(table_files(holding))), table_files(session))
            said[change] = [words for words in found if words not in known]
            known |= set(found)
        rows = holding.execute("SELECT count(*) FROM public.orders").fetchone()
        with pytest.raises(psycopg.errors.UndefinedTable):
            inventory.take(lambda: proofs.connect(name), snapshot=snapshot.name)

    assert rows == (0,), "the snapshot does hold the rows of a truncated table: this guard is of no use any more"
    assert {change: (words[0] if words else None) for change, words in said.items()} == MOVES


def test_what_lives_on_while_it_is_dumped_is_proved(proofs: Proofs) -> None:
    """Sequences stand outside of the snapshot; a subscription would follow its publisher from the scratch database."""
    name = proofs.make(
        "CREATE SEQUENCE upwards MINVALUE -1000 START -1000; CREATE SEQUENCE countdown INCREMENT -2 MINVALUE 1 MAXVALUE 1000 START 999;"
        "CREATE SEQUENCE fresh; CREATE SEQUENCE ring MAXVALUE 5 CYCLE;"
        "SELECT nextval('upwards'), nextval('countdown'), setval('ring', 5);"
        "CREATE SUBSCRIPTION followed CONNECTION 'host=127.0.0.1 port=1' PUBLICATION p WITH (connect = false, slot_name = NONE)"
    )
    moving = "SELECT nextval('upwards'), nextval('countdown'), nextval('fresh'), nextval('ring')"
    one = proofs.dump(name, ZSTD, after=lambda: proofs.run(name, moving))
    proofs.run(name, "DROP SUBSCRIPTION followed")

    report = proofs.prove(one.path, one.manifest(sha256_file(one.path)), name)

    assert report["why"] == []
    assert report["not_provable"] == [
        "owners and rights: the dump holds none",
        "sequence public.ring: it cycles, where it stands is not compared",
        "subscription followed: not restored, it would follow its publisher",
    ]
    with proofs.server.session() as session:
        assert session.execute("SELECT 1 FROM pg_database WHERE datname LIKE 'runbook_scratch_%'").fetchall() == []


@pytest.mark.parametrize(
    "size",
    [inventory.LARGE_OBJECT_PIECE, pytest.param(1_200_000_000, marks=[pytest.mark.soak, pytest.mark.timeout(600)])],
)
def test_a_large_object_is_read_to_its_last_byte_by_who_may_only_read_it(proofs: Proofs, size: int) -> None:
    """What is not written of it takes no room: PostgreSQL reads it as zeros."""
    name = proofs.make(f"SELECT lo_create(1), lo_create(2), lo_put(2, {size - 1}, 'x')")
    proofs.run(name, "GRANT SELECT ON LARGE OBJECT 1, 2 TO pg_monitor")

    def reader() -> psycopg.Connection[Any]:
        session = proofs.connect(name)
        session.execute("SET ROLE pg_monitor")
        return session

    before = inventory.take(reader)
    proofs.run(name, f"SELECT lo_put(2, {size - 1}, 'y')")
    changed = inventory.take(reader)
    proofs.run(name, f"SELECT lo_put(2, {size - 1}, 'x'), lo_put(2, {size}, 'z')")
    longer = inventory.take(reader)

    assert before["large_objects"] == 2
    for now in (changed, longer):
        assert inventory.differences(before, now) == ["the 2 large objects have other content"]


ALIKE = """
CREATE COLLATION careless (provider = icu, locale = 'und-u-ks-level1', deterministic = false);
CREATE DOMAIN name_of AS text COLLATE careless;
CREATE TABLE alike (id int PRIMARY KEY, t text, c char(4), n numeric, f float8, i interval, j jsonb, a int[], d name_of,
                    k text COLLATE careless, b bytea, x boolean, at timestamptz, none text);
INSERT INTO alike SELECT n, 'text ' || n, 'c', 1.0, 0, '1 day', '{"a": 1.0}', '{1,2}', 'Name', 'Name', '\\x00', true, '2026-01-01', NULL
    FROM generate_series(1, 3) n;
CREATE TABLE bare (); INSERT INTO bare DEFAULT VALUES
"""


@pytest.mark.parametrize(
    "change",
    [
        pytest.param("t = 'text ' || 3 - id", id="two values that changed places"),
        pytest.param("t = t || ' '", id="a blank"),
        pytest.param("c = 'C'", id="a character"),
        pytest.param("n = 1.00", id="the scale of a number"),
        pytest.param("f = '-0'", id="the sign of zero"),
        pytest.param("i = '24 hours'", id="a day and 24 hours"),
        pytest.param("""j = '{"a": 1.00}'""", id="a number's scale within JSON"),
        pytest.param("a = '[0:1]={1,2}'", id="an array's bounds"),
        pytest.param("d = 'name'", id="a text of a domain, under a collation that does not tell it apart"),
        pytest.param("k = 'name'", id="a text under a collation that does not tell it apart"),
        pytest.param("b = '\\x0000'", id="a byte"),
        pytest.param("x = NOT x", id="a truth"),
        pytest.param("at = at + '1 microsecond'", id="a microsecond"),
        pytest.param("none = ''", id="nothing and an empty text"),
    ],
)
def test_values_that_count_as_equal_and_are_written_otherwise_are_told_apart(proofs: Proofs, change: str) -> None:
    name = proofs.make(ALIKE)
    before = inventory.take(lambda: proofs.connect(name))

    proofs.run(name, f"UPDATE alike SET {change} WHERE id < 3")

    now = inventory.take(lambda: proofs.connect(name))
    assert inventory.differences(before, now) == ["table public.alike has other content in its 3 rows"]
    assert before["tables"]["public.bare"]["rows"] == 1


def test_a_large_object_that_differs_is_seen(proofs: Proofs) -> None:
    name = proofs.make("SELECT lo_from_bytea(4711, 'one')")
    right = proofs.dump(name, ZSTD)
    proofs.run(name, "SELECT lo_put(4711, 0, 'two')")
    wrong = proofs.dump(name, ZSTD)

    why = proofs.why_not(wrong.path, right.manifest(sha256_file(wrong.path)), name)

    assert why == ["the 1 large objects have other content"]


def test_an_inventory_of_another_version_is_not_compared(proofs: Proofs) -> None:
    name = proofs.make("")
    one = proofs.dump(name, ZSTD)
    one.inventory["format"] = 1

    with pytest.raises(UsageError, match="the inventory has format 1"):
        proofs.why_not(one.path, one.manifest(sha256_file(one.path)), name)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_thousands_of_tables_are_proved(proofs: Proofs) -> None:
    name = proofs.make("")
    for start in range(0, 5000, 500):
        proofs.run(
            name,
            f"DO $$ BEGIN FOR n IN {start} .. {start + 499} LOOP EXECUTE format('CREATE TABLE t%s (id serial PRIMARY KEY, "
            "x text)', n); EXECUTE format('INSERT INTO t%s (x) VALUES (%L)', n, n); END LOOP; END $$",
        )
    one = proofs.dump(name, ZSTD)

    assert len(one.inventory["tables"]) == 5000
    assert proofs.why_not(one.path, one.manifest(sha256_file(one.path)), name) == []
