"""What a database holds, table by table: row counts and content digests, to compare a restore with its source.

The digest of a table is two sums of differently seeded hashes of each row's hash, which the server folds to 32 bits. It needs
one pass, no sort and no memory, does not depend on the order of rows, and misses one in four thousand million rows that
differ; it is no defence against a forger, who has no access here. The server's own hashes are the same in all its versions, as
partitioning by hash relies on. It has that of a whole row since version 14, which takes half the time of writing the row as text.
"""

from __future__ import annotations

import contextlib
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, LiteralString

import psycopg
from psycopg import IsolationLevel, sql

from runbook_lib.adapters import catalogue
from runbook_lib.canonical import digest
from runbook_lib.errors import UsageError

FORMAT = 4
_OLDEST_SERVER = 140000
# Text forms of values depend on these; `row_security` off makes a hidden row an error instead of an omission.
_SETTINGS = (
    "SET search_path = pg_catalog",
    "SET datestyle = 'ISO, MDY'",
    "SET intervalstyle = 'postgres'",
    "SET timezone = 'UTC'",
    "SET extra_float_digits = 1",
    "SET bytea_output = 'hex'",
    "SET row_security = off",
    "SET statement_timeout = 0",
    "SET idle_in_transaction_session_timeout = 0",
    "SET lock_timeout = '30s'",
)
# Not the system's, not an extension's (pg_dump leaves those to CREATE EXTENSION), not unlogged or temporary ones' copies.
_OURS = """
    n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
    AND NOT EXISTS (SELECT 1 FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
"""
_TABLES = f"""
    SELECT n.nspname, c.relname, coalesce(pg_table_size(c.oid), 0) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND {_OURS} ORDER BY 1, 2
"""  # noqa: S608  # constants
_SEQUENCES = f"""
    SELECT n.nspname, c.relname, s.seqincrement, s.seqcycle FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_sequence s ON s.seqrelid = c.oid
    WHERE c.relkind = 'S' AND c.relpersistence <> 't' AND {_OURS} ORDER BY 1, 2
"""  # noqa: S608  # constants
# A new database has it, whether its source had it or not, and pg_dump does not take it away. What version of an extension
# there is, is the server's matter.
_NOT_OF_THE_DUMP = re.compile(r"schema public$|extension ")
_BROKEN_INDEXES = """
    SELECT 'index ' || indexrelid::regclass FROM pg_index i JOIN pg_class c ON c.oid = indrelid
    WHERE NOT (indisready AND (indisvalid OR relkind = 'p')) AND relkind <> 't' AND relpersistence <> 't' ORDER BY 1
"""


def prepare(connection: psycopg.Connection[Any]) -> None:
    """Put a session into the settings under which digests are comparable; outside a transaction block or in one."""
    for statement in _SETTINGS:
        connection.execute(statement)


# The hash of a row is linear in those of its columns, and a sum of it would not see two values that changed places:
# therefore it is hashed once more.
_COUNT = (
    "SELECT count(*), coalesce(sum(hashint8extended(h, 0)), 0)::text, coalesce(sum(hashint8extended(h, 1)), 0)::text"
    " FROM (SELECT hash_record_extended(ROW({columns}), 0) AS h FROM ONLY {table} AS runbook_row OFFSET 0) AS hashes"
)
# Of these types values that count as equal are written alike; of numeric 1.0 and 1.00 are not, and of a type of the database's
# own nobody knows. A text's hash is that of its bytes when its collation is C; 64 bits are folded to 32 before they are hashed.
_TEXTS, _EXACT = (
    ("text", "varchar"),
    ("bool", "bytea", "int2", "int4", "int8", "uuid", "date", "timestamp", "timestamptz"),
)
_COLUMNS = """
    SELECT a.attname, CASE WHEN t.typnamespace = 'pg_catalog'::regnamespace THEN t.typname ELSE '' END
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid JOIN pg_class c ON c.oid = a.attrelid
    JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = %s AND c.relname = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""
# By pieces: a value of PostgreSQL holds 1 GB, a large object 4 TB. Reading its pages would be quicker and takes a superuser;
# for this the right is enough that pg_dump needs too.
LARGE_OBJECT_PIECE = 8 << 20
_LARGE_OBJECTS = """
    WITH RECURSIVE pieces (oid, start, size, content) AS (
      SELECT oid, 0::bigint, length(bytes), md5(bytes)
        FROM (SELECT oid, lo_get(oid, 0, {size}) AS bytes FROM pg_largeobject_metadata OFFSET 0) AS first
      UNION ALL
      SELECT oid, start, length(bytes), md5(bytes)
        FROM (SELECT oid, start + size AS start, lo_get(oid, start + size, {size}) AS bytes
                FROM pieces WHERE size = {size} OFFSET 0) AS next
    )
    SELECT count(*) FILTER (WHERE start = 0), coalesce(sum(hashtextextended(t, 0)), 0)::text,
           coalesce(sum(hashtextextended(t, 1)), 0)::text
    FROM (SELECT start, oid || ':' || start || ':' || content AS t FROM pieces) AS texts
"""
_NOT_PROVABLE = f"""
    SELECT CASE c.relkind WHEN 'f' THEN 'foreign table ' ELSE 'materialized view ' END || n.nspname || '.' || c.relname
           || CASE c.relkind WHEN 'f' THEN ': its rows are on another server' ELSE ': made anew by a restore' END
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('f', 'm') AND {_OURS}
    UNION ALL
    SELECT 'extension ' || extname || ': rows of its own tables' FROM pg_extension WHERE cardinality(extconfig) > 0
    UNION ALL
    SELECT 'sequence ' || n.nspname || '.' || c.relname || ': it cycles, where it stands is not compared'
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_sequence s ON s.seqrelid = c.oid WHERE seqcycle AND {_OURS}
    UNION ALL
    SELECT 'subscription ' || subname || ': not restored, it would follow its publisher'
    FROM pg_subscription s JOIN pg_database d ON d.oid = s.subdbid AND d.datname = current_database()
    UNION ALL
    SELECT 'comments on objects: not compared' WHERE EXISTS (SELECT 1 FROM pg_description WHERE objoid >= 16384)
    UNION ALL
    SELECT 'settings of the database (ALTER DATABASE, ALTER ROLE IN DATABASE): in no backup'
    WHERE EXISTS (SELECT 1 FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase AND d.datname = current_database())
    UNION ALL
    SELECT 'owners and rights: the dump holds none' ORDER BY 1
"""  # noqa: S608  # constants
_SELF = "SELECT current_database(), current_setting('server_version'), pg_database_size(current_database())"
_POSITION = "SELECT (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END)::text"
# A transaction keeps a lock on every table and index that it read: with thousands of them the server runs out.
_TABLES_A_TRANSACTION = 200
Connect = Callable[[], psycopg.Connection[Any]]


def take(
    connect: Connect,
    *,
    snapshot: str | None = None,
    standing: Mapping[str, Any] | None = None,
    jobs: int = 1,
    keep_on: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The inventory of a database, as JSON.

    Args:
        connect: opens a session; each is closed here.
        snapshot: exported by a transaction that stays open; None where nobody writes.
        standing: from `sequences`, when they were read before the snapshot; by default they are read now.
        jobs: how many tables are read at a time.
        keep_on: called between tables; what it raises ends the inventory.

    Raises:
        UsageError: the server is older than version 14, or two tables have one name here.
        psycopg.errors.UndefinedTable: a table of the snapshot was dropped or renamed.
    """
    stand = sequences(connect, snapshot) if standing is None else dict(standing)
    with _reading(connect, snapshot) as connection:
        if connection.info.server_version < _OLDEST_SERVER:
            raise UsageError(
                f"PostgreSQL {connection.info.server_version // 10000} cannot hash a row: version 14 and later can",
                remedy="that version gets no mends any more: use a newer server",
            )
        rows = _by_name(connection.execute(_TABLES).fetchall()).values()
        # One that was dropped between its reading and the snapshot is not missing in a restore.
        there = _by_name(connection.execute(_SEQUENCES).fetchall())
        definitions = structure(connection)
        large = sql.SQL(_LARGE_OBJECTS).format(size=sql.Literal(LARGE_OBJECT_PIECE))
        objects = _one_row(connection, large)
        name, version, size_bytes = _one_row(connection, _SELF)
        extensions = dict(connection.execute("SELECT extname, extversion FROM pg_extension ORDER BY 1").fetchall())
        not_provable = [row[0] for row in connection.execute(_NOT_PROVABLE).fetchall()]
        broken = [row[0] for row in connection.execute(_BROKEN_INDEXES).fetchall()]
        not_provable += [f"{name}: it is not valid, and so not in the dump" for name in broken]
    # Big ones first, each job its next one: the last to end is a small one.
    left: deque[tuple[str, str]] = deque((schema, table) for schema, table, _ in sorted(rows, key=lambda r: -r[2]))
    tables: dict[str, dict[str, Any]] = {}

    def read() -> None:
        while left:
            with _reading(connect, snapshot) as session:
                for _ in range(_TABLES_A_TRANSACTION):
                    keep_on()
                    try:
                        schema, table = left.popleft()
                    except IndexError:
                        return
                    counted = _one_row(session, _count(session, schema, table))
                    tables[f"{schema}.{table}"] = {"rows": counted[0], "content": digest(list(counted[1:]))[:32]}

    with ThreadPoolExecutor(jobs, thread_name_prefix="inventory") as pool:
        for done in [pool.submit(read) for _ in range(jobs)]:
            done.result()
    return {
        "format": FORMAT,
        "database": name,
        "server_version": version,
        "size_bytes": size_bytes,
        "extensions": extensions,
        "tables": dict(sorted(tables.items())),
        "sequences": {name: place for name, place in stand.items() if name in there},
        "structure": definitions,
        "large_objects": objects[0],
        "large_objects_content": digest(list(objects[1:]))[:32],
        "not_provable": not_provable,
    }


def _count(session: psycopg.Connection[Any], schema: str, table: str) -> sql.Composed:
    """The query of one table. Values of types whose hash is not exact are hashed as the text of a row of them."""
    exact: list[sql.Composable] = []
    others: list[sql.Composable] = []
    for name, kind in session.execute(_COLUMNS, (schema, table)).fetchall():
        column = sql.SQL("runbook_row.{}").format(sql.Identifier(name))
        if kind in _TEXTS:
            exact.append(sql.SQL('{} COLLATE "C"').format(column))
        else:
            (exact if kind in _EXACT else others).append(column)
    if others or not exact:
        exact.append(sql.SQL('ROW({})::text COLLATE "C"').format(sql.SQL(", ").join(others)))
    return sql.SQL(_COUNT).format(columns=sql.SQL(", ").join(exact), table=sql.Identifier(schema, table))


def sequences(connect: Connect, snapshot: str | None = None) -> dict[str, dict[str, Any]]:
    """Where each sequence stands now: they are outside of snapshots, so it is read before whoever may not be behind it."""
    found = {}
    with _reading(connect, snapshot) as connection:
        for key, (schema, name, increment, cycles) in _by_name(connection.execute(_SEQUENCES).fetchall()).items():
            query = sql.SQL("SELECT last_value, is_called FROM {}").format(sql.Identifier(schema, name))
            value, is_called = _one_row(connection, query)
            found[key] = {
                "last_value": str(value),
                "is_called": is_called,
                "increment": str(increment),
                "cycles": cycles,
            }
    return found


def _by_name(rows: Iterable[tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """Rows that begin with a schema and a name, by what the inventory calls them; UsageError when that is not one's own."""
    found: dict[str, tuple[Any, ...]] = {}
    for row in rows:
        schema, name = row[:2]
        other = found.setdefault(f"{schema}.{name}", row)
        if other is not row:
            raise UsageError(
                f'"{other[0]}"."{other[1]}" and "{schema}"."{name}" cannot be told apart in an inventory',
                remedy="rename one of them: a point within a name makes them alike",
            )
    return found


def structure(connection: psycopg.Connection[Any]) -> dict[str, str]:
    """Each object that pg_dump takes of the schema, with a digest of its definition; a session prepared by `prepare`."""
    broken = {row[0] for row in connection.execute(_BROKEN_INDEXES).fetchall()}
    return {
        name: digest(text)[:16]
        for name, text in catalogue.objects(connection).items()
        if not _NOT_OF_THE_DUMP.match(name) and name not in broken
    }


def position(connection: psycopg.Connection[Any]) -> str:
    """How far the server has written its log: an LSN. Taken before a snapshot, nothing in front of it is missing there."""
    return str(_one_row(connection, _POSITION)[0])


def written_since(connection: psycopg.Connection[Any], lsn: str) -> tuple[str, int]:
    """Where the server's log stands now, and how many bytes it wrote since an LSN, of all databases together."""
    now = position(connection)
    row = connection.execute("SELECT pg_wal_lsn_diff(%s, %s)::bigint", (now, lsn)).fetchone()
    assert row is not None  # noqa: S101
    return now, int(row[0])


@contextmanager
def _reading(connect: Connect, snapshot: str | None) -> Iterator[psycopg.Connection[Any]]:
    """A session whose one transaction sees one moment: its own beginning, or an exported snapshot."""
    with contextlib.closing(connect()) as connection:
        prepare(connection)
        connection.autocommit = False
        connection.isolation_level = IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        if snapshot is not None:
            connection.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot)))
        yield connection


def _one_row(connection: psycopg.Connection[Any], query: LiteralString | sql.Composed) -> tuple[Any, ...]:
    row = connection.execute(query).fetchone()
    assert row is not None  # noqa: S101
    return tuple(row)


def differences(source: Mapping[str, Any], restored: Mapping[str, Any]) -> list[str]:
    """What a restored database lacks against its source, in words; empty when it is the same."""
    found = []
    for name, was in source["tables"].items():
        now = restored["tables"].get(name)
        if now is None:
            found.append(f"table {name} is missing")
        elif now["rows"] != was["rows"]:
            found.append(f"table {name} has {now['rows']} rows instead of {was['rows']}")
        elif now["content"] != was["content"]:
            found.append(f"table {name} has other content in its {was['rows']} rows")
    found += [f"table {name} was not in the source" for name in restored["tables"] if name not in source["tables"]]
    for name, was in source["sequences"].items():
        now = restored["sequences"].get(name)
        if now is None:
            found.append(f"sequence {name} is missing")
        elif _goes_back(was, now):
            found.append(f"sequence {name} stands at {_place(now)}, before {_place(was)}")
    was, now = source["structure"], restored["structure"]
    found += [f"{name} is missing" for name in was if name not in now]
    found += [f"{name} is defined otherwise" for name in was if name in now and was[name] != now[name]]
    found += [f"{name} was not in the source" for name in now if name not in was]
    if source["large_objects"] != restored["large_objects"]:
        found.append(f"{restored['large_objects']} large objects instead of {source['large_objects']}")
    elif source["large_objects_content"] != restored["large_objects_content"]:
        found.append(f"the {source['large_objects']} large objects have other content")
    found += [f"extension {name} is missing" for name in source["extensions"] if name not in restored["extensions"]]
    return found


def _goes_back(was: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a sequence would give a number again. The dump reads it a moment later, when it may have moved on."""
    towards = -1 if int(was["increment"]) < 0 else 1
    return not was["cycles"] and (towards * int(now["last_value"]), now["is_called"]) < (
        towards * int(was["last_value"]),
        was["is_called"],
    )


def _place(sequence: Mapping[str, Any]) -> str:
    return f"{sequence['last_value']}{'' if sequence['is_called'] else ' (not given yet)'}"


def rows(inventory: Mapping[str, Any]) -> int:
    """All rows of all tables."""
    return sum(int(table["rows"]) for table in inventory["tables"].values())
