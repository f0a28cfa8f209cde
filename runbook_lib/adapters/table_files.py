"""Which file holds the rows of which table: what a snapshot does not protect.

TRUNCATE, and each ALTER TABLE that rewrites, give a table a new file, in which an older snapshot sees no row; a table of the
same name may be another one. Whoever reads by a snapshot therefore looks afterwards whether the tables are still the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import psycopg

# All whose rows pg_dump writes: each partition by itself, an extension's own only where it asks for that. A materialized view
# is made anew by a restore, sequences are read outside of snapshots, and large objects lie in a table of the system.
_TABLES = """
    SELECT format('%I.%I', n.nspname, c.relname), c.oid::bigint, c.relfilenode::bigint,
           ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 ORDER BY a.attnum)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
      AND (NOT EXISTS (SELECT 1 FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
           OR EXISTS (SELECT 1 FROM pg_extension e WHERE c.oid = ANY (e.extconfig)))
    ORDER BY 1
"""
TableFiles = Mapping[str, Sequence[Any]]


def table_files(connection: psycopg.Connection[Any]) -> dict[str, list[Any]]:
    """Of each table, by its quoted name: its OID, its file, and its columns in their order, as the session's snapshot sees them."""
    return {name: list(rest) for name, *rest in connection.execute(_TABLES).fetchall()}


def moved(before: TableFiles, now: TableFiles) -> list[str]:
    """The tables of which a snapshot does not hold what its catalogue says, with what became of each.

    Args:
        before: as the snapshot saw them.
        now: read after the last row was read by the snapshot.
    """
    found = []
    for name, (oid, file, columns) in before.items():
        there = now.get(name)
        if there is None:
            found.append(f"{name} was dropped or renamed")
        elif there[0] != oid:
            found.append(f"{name} is another table now")
        elif there[1] != file:
            found.append(f"{name} was truncated or rewritten")
        elif there[2][: len(columns)] != columns:  # one that was added is not in the snapshot
            found.append(f"columns of {name} were dropped or renamed")
    return found
