"""What a database holds, table by table: row counts and content digests, to compare a restore with its source.

The digest of a table is two sums of 64-bit halves of each row's MD5. It needs one pass, no sort and no memory, does
not depend on the order of rows, and tells any damage; it is no defence against a forger, who has no access here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg import sql

from runbook_lib.canonical import digest

FORMAT = 1
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
    SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
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


def take(connection: psycopg.Connection[Any]) -> dict[str, Any]:
    """The inventory of the session's database, as JSON.

    For a consistent one, call it within one REPEATABLE READ transaction after `prepare`.
    """
    tables = {}
    for schema, name in connection.execute(_TABLES).fetchall():
        query = sql.SQL(
            "SELECT count(*), coalesce(sum(('x' || left(h, 16))::bit(64)::bigint::numeric), 0)::text,"
            " coalesce(sum(('x' || right(h, 16))::bit(64)::bigint::numeric), 0)::text"
            " FROM (SELECT md5((runbook_row.*)::text) AS h FROM ONLY {} AS runbook_row) AS hashed"
        ).format(sql.Identifier(schema, name))
        row = connection.execute(query).fetchone()
        assert row is not None  # noqa: S101  # an aggregate has one row
        tables[f"{schema}.{name}"] = {"rows": row[0], "content": digest([row[1], row[2]])[:32]}
    sequences = {}
    for schema, name in connection.execute(_SEQUENCES).fetchall():
        row = connection.execute(
            sql.SQL("SELECT last_value, is_called FROM {}").format(sql.Identifier(schema, name))
        ).fetchone()
        assert row is not None  # noqa: S101
        sequences[f"{schema}.{name}"] = {"last_value": str(row[0]), "is_called": row[1]}
    structure = {
        kind: {name: digest(text or "")[:16] for name, text in connection.execute(query).fetchall()}
        for kind, query in _STRUCTURE.items()
    }
    objects = connection.execute("SELECT count(*) FROM pg_largeobject_metadata").fetchone()
    return {
        "format": FORMAT,
        "tables": tables,
        "sequences": sequences,
        "structure": structure,
        "large_objects": objects[0] if objects else 0,
    }


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
    return found


def rows(inventory: Mapping[str, Any]) -> int:
    """All rows of all tables."""
    return sum(int(table["rows"]) for table in inventory["tables"].values())
