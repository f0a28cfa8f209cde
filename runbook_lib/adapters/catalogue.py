"""What a database's schema consists of, object by object, as its own catalogue says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psycopg

# Columns go by name: what is taken away and put back comes last in its table, and is the same.
_OBJECTS = """
WITH named AS (
  SELECT oid, nspname FROM pg_namespace WHERE nspname NOT LIKE 'pg\\_%' AND nspname <> 'information_schema'
), relations AS (
  SELECT c.* FROM pg_class c JOIN named n ON n.oid = c.relnamespace
)
SELECT 'schema ' || nspname, '' FROM named
UNION ALL
SELECT CASE relkind WHEN 'v' THEN 'view ' WHEN 'm' THEN 'view ' WHEN 'S' THEN 'sequence ' ELSE 'table ' END
       || oid::regclass,
       concat_ws(' ', relkind, relpersistence, relrowsecurity, reloptions,
                 CASE WHEN relkind IN ('v', 'm') THEN pg_get_viewdef(oid) END, pg_get_expr(relpartbound, oid))
  FROM relations WHERE relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
UNION ALL
SELECT 'column ' || a.attrelid::regclass || '.' || quote_ident(attname),
       concat_ws(' ', format_type(atttypid, atttypmod), attnotnull, attidentity, attgenerated, attcollation::regcollation,
                 pg_get_expr(d.adbin, d.adrelid))
  FROM pg_attribute a JOIN relations c ON c.oid = a.attrelid
  LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
 WHERE attnum > 0 AND NOT attisdropped AND relkind IN ('r', 'p', 'v', 'm', 'f')
UNION ALL
SELECT 'index ' || indexrelid::regclass, concat_ws(' ', pg_get_indexdef(indexrelid), indisvalid, indisready)
  FROM pg_index i JOIN relations c ON c.oid = i.indexrelid
UNION ALL
SELECT 'constraint ' || quote_ident(conname) || ' of ' || CASE conrelid WHEN 0 THEN contypid::regtype::text ELSE conrelid::regclass::text END,
       concat_ws(' ', pg_get_constraintdef(t.oid), convalidated)
  FROM pg_constraint t JOIN named n ON n.oid = connamespace
UNION ALL
SELECT 'trigger ' || quote_ident(tgname) || ' of ' || tgrelid::regclass, concat_ws(' ', pg_get_triggerdef(t.oid), tgenabled)
  FROM pg_trigger t JOIN relations c ON c.oid = tgrelid WHERE NOT tgisinternal
UNION ALL
SELECT 'function ' || p.oid::regprocedure,
       concat_ws(' ', prokind, CASE WHEN prokind IN ('f', 'p') THEN pg_get_functiondef(p.oid) END)
  FROM pg_proc p JOIN named n ON n.oid = pronamespace
UNION ALL
SELECT 'type ' || t.oid::regtype,
       concat_ws(' ', typtype, CASE typtype WHEN 'd' THEN format_type(typbasetype, typtypmod) END, typnotnull, typdefault,
                 (SELECT string_agg(enumlabel, ', ' ORDER BY enumsortorder) FROM pg_enum WHERE enumtypid = t.oid))
  FROM pg_type t JOIN named n ON n.oid = typnamespace WHERE typtype IN ('d', 'e', 'r')
UNION ALL
SELECT 'policy ' || quote_ident(polname) || ' of ' || polrelid::regclass,
       concat_ws(' ', polcmd, polpermissive, pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid))
  FROM pg_policy
UNION ALL
SELECT 'extension ' || extname, extversion FROM pg_extension
"""


def objects(session: psycopg.Connection[Any]) -> dict[str, str]:
    """Every object of the database's schema with its definition; rights, owners and contents are not looked at."""
    session.execute("SELECT set_config('search_path', 'pg_catalog', false)")
    return {str(name): str(definition) for name, definition in session.execute(_OBJECTS).fetchall()}


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The objects that came, went or changed, each with which of the three."""
    came = [f"{name} came" for name in now.keys() - before.keys()]
    went = [f"{name} went" for name in before.keys() - now.keys()]
    other = [f"{name} changed" for name in before.keys() & now.keys() if before[name] != now[name]]
    return sorted((*came, *went, *other))
