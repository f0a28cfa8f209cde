"""What a database holds, table by table: row counts and content digests, to compare a restore with its source.

The digest of a table is two sums of 64-bit hashes of each row's text, with different seeds. It needs one pass, no sort
and no memory, does not depend on the order of rows, and tells any damage; it is no defence against a forger, who has no
access here. The server's own hash of a text is the same in all its versions, as partitioning by hash relies on.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, LiteralString

import psycopg
from psycopg import IsolationLevel, sql

from runbook_lib.canonical import digest

FORMAT = 2
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
    SELECT n.nspname, c.relname, pg_table_size(c.oid) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND {_OURS} ORDER BY 1, 2
"""  # noqa: S608  # constants
_SEQUENCES = f"""
    SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'S' AND c.relpersistence <> 't' AND {_OURS} ORDER BY 1, 2
"""  # noqa: S608  # constants
_STRUCTURE = {
    "columns": f"""
        SELECT n.nspname || '.' || c.relname || '.' || a.attname,
               format_type(a.atttypid, a.atttypmod) || CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END
               || coalesce(' DEFAULT ' || pg_get_expr(f.adbin, f.adrelid), '')
        FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        LEFT JOIN pg_attrdef f ON f.adrelid = a.attrelid AND f.adnum = a.attnum
        WHERE c.relkind IN ('r', 'p', 'v', 'm') AND a.attnum > 0 AND NOT a.attisdropped AND c.relpersistence <> 't' AND {_OURS}
    """,  # noqa: S608
    "indexes": f"""
        SELECT n.nspname || '.' || c.relname, pg_get_indexdef(c.oid) || CASE WHEN i.indisvalid THEN '' ELSE ' INVALID' END
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_index i ON i.indexrelid = c.oid
        WHERE c.relkind IN ('i', 'I') AND c.relpersistence <> 't' AND {_OURS}
    """,  # noqa: S608
    "constraints": f"""
        SELECT n.nspname || '.' || c.relname || '.' || k.conname, pg_get_constraintdef(k.oid)
        FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE k.contype <> 'n' AND c.relpersistence <> 't' AND {_OURS}
    """,  # noqa: S608
    "views": f"""
        SELECT n.nspname || '.' || c.relname, pg_get_viewdef(c.oid)
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('v', 'm') AND {_OURS}
    """,  # noqa: S608
    "triggers": f"""
        SELECT n.nspname || '.' || c.relname || '.' || t.tgname, pg_get_triggerdef(t.oid)
        FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE NOT t.tgisinternal AND {_OURS}
    """,  # noqa: S608
}


def prepare(connection: psycopg.Connection[Any]) -> None:
    """Put a session into the settings under which digests are comparable; outside a transaction block or in one."""
    for statement in _SETTINGS:
        connection.execute(statement)


_COUNT = (
    "SELECT count(*), coalesce(sum(hashtextextended(t, 0)), 0)::text, coalesce(sum(hashtextextended(t, 1)), 0)::text"
    ' FROM (SELECT (runbook_row.*)::text COLLATE "C" AS t FROM ONLY {} AS runbook_row OFFSET 0) AS texts'
)
_LARGE_OBJECTS = """
    SELECT count(*), coalesce(sum(hashtextextended(t, 0)), 0)::text, coalesce(sum(hashtextextended(t, 1)), 0)::text
    FROM (SELECT oid || ':' || md5(lo_get(oid)) AS t FROM pg_largeobject_metadata OFFSET 0) AS texts
"""
_NOT_PROVABLE = f"""
    SELECT CASE c.relkind WHEN 'f' THEN 'foreign table ' ELSE 'materialized view ' END || n.nspname || '.' || c.relname
           || CASE c.relkind WHEN 'f' THEN ': its rows are on another server' ELSE ': made anew by a restore' END
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('f', 'm') AND {_OURS} ORDER BY 1
"""  # noqa: S608  # constants
_SELF = "SELECT current_database(), current_setting('server_version'), pg_database_size(current_database())"
_POSITION = "SELECT (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END)::text"
# A transaction keeps a lock on every table and index that it read: with thousands of them the server runs out.
_TABLES_A_TRANSACTION = 200
Connect = Callable[[], psycopg.Connection[Any]]


def take(
    connect: Connect, *, snapshot: str | None = None, jobs: int = 1, keep_on: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """The inventory of a database, as JSON.

    Args:
        connect: opens a session; each is closed here.
        snapshot: exported by a transaction that stays open; None where nobody writes.
        jobs: how many tables are read at a time.
        keep_on: called between tables; what it raises ends the inventory.
    """
    with _reading(connect, snapshot) as connection:
        rows = connection.execute(_TABLES).fetchall()
        sequences = dict(_sequence(connection, *row) for row in connection.execute(_SEQUENCES).fetchall())
        structure = {
            kind: {name: digest(text or "")[:16] for name, text in connection.execute(query).fetchall()}
            for kind, query in _STRUCTURE.items()
        }
        objects = _one_row(connection, _LARGE_OBJECTS)
        name, version, size_bytes = _one_row(connection, _SELF)
        extensions = dict(connection.execute("SELECT extname, extversion FROM pg_extension ORDER BY 1").fetchall())
        not_provable = [row[0] for row in connection.execute(_NOT_PROVABLE).fetchall()]
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
                    counted = session.execute(sql.SQL(_COUNT).format(sql.Identifier(schema, table))).fetchone()
                    assert counted is not None  # noqa: S101  # an aggregate has one row
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
        "sequences": sequences,
        "structure": structure,
        "large_objects": objects[0],
        "large_objects_content": digest(list(objects[1:]))[:32],
        "not_provable": not_provable,
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


def _one_row(connection: psycopg.Connection[Any], query: LiteralString) -> tuple[Any, ...]:
    row = connection.execute(query).fetchone()
    assert row is not None  # noqa: S101
    return tuple(row)


def _sequence(connection: psycopg.Connection[Any], schema: str, name: str) -> tuple[str, dict[str, Any]]:
    row = connection.execute(
        sql.SQL("SELECT last_value, is_called FROM {}").format(sql.Identifier(schema, name))
    ).fetchone()
    assert row is not None  # noqa: S101
    return f"{schema}.{name}", {"last_value": str(row[0]), "is_called": row[1]}


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
        # Sequences stand outside snapshots: the dump reads them a moment later, when they may have moved on.
        if now is None:
            found.append(f"sequence {name} is missing")
        elif abs(int(now["last_value"])) < abs(int(was["last_value"])):
            found.append(f"sequence {name} stands at {now['last_value']}, before {was['last_value']}")
    for kind, things in source["structure"].items():
        there = restored["structure"].get(kind, {})
        for name, text in things.items():
            if name not in there:
                found.append(f"{kind}: {name} is missing")
            elif there[name] != text:
                found.append(f"{kind}: {name} is defined otherwise")
        found += [f"{kind}: {name} was not in the source" for name in there if name not in things]
    if source["large_objects"] != restored["large_objects"]:
        found.append(f"{restored['large_objects']} large objects instead of {source['large_objects']}")
    elif source["large_objects_content"] != restored["large_objects_content"]:
        found.append(f"the {source['large_objects']} large objects have other content")
    found += [f"extension {name} is missing" for name in source["extensions"] if name not in restored["extensions"]]
    return found


def rows(inventory: Mapping[str, Any]) -> int:
    """All rows of all tables."""
    return sum(int(table["rows"]) for table in inventory["tables"].values())
