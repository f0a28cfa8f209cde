"""What a database's schema consists of, object by object, as its own catalogue says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psycopg

# Columns go by name: what is taken away and put back comes last in its table, and is the same. What an extension brought
# comes and goes with it, and may be another in another version of it. A foreign key of a partition is its parent's, and
# where partitions are referenced the server numbers its copies as it likes.
_OBJECTS = """
WITH named AS (
  SELECT oid, nspname FROM pg_namespace WHERE nspname NOT LIKE 'pg\\_%' AND nspname <> 'information_schema'
), brought AS (
  SELECT classid, objid FROM pg_depend WHERE deptype = 'e'
), relations AS (
  SELECT c.* FROM pg_class c JOIN named n ON n.oid = c.relnamespace
   WHERE (1259, c.oid) NOT IN (SELECT classid, objid FROM brought)
), types AS (
  SELECT t.* FROM pg_type t JOIN named n ON n.oid = t.typnamespace
   WHERE (1247, t.oid) NOT IN (SELECT classid, objid FROM brought)
), others AS (
  SELECT 'pg_operator'::regclass AS class, oid FROM pg_operator
  UNION ALL SELECT 'pg_opclass'::regclass, oid FROM pg_opclass
  UNION ALL SELECT 'pg_opfamily'::regclass, oid FROM pg_opfamily
  UNION ALL SELECT 'pg_am'::regclass, oid FROM pg_am
  UNION ALL SELECT 'pg_cast'::regclass, oid FROM pg_cast
  UNION ALL SELECT 'pg_transform'::regclass, oid FROM pg_transform
  UNION ALL SELECT 'pg_language'::regclass, oid FROM pg_language
  UNION ALL SELECT 'pg_collation'::regclass, oid FROM pg_collation
  UNION ALL SELECT 'pg_conversion'::regclass, oid FROM pg_conversion
  UNION ALL SELECT 'pg_ts_parser'::regclass, oid FROM pg_ts_parser
  UNION ALL SELECT 'pg_ts_template'::regclass, oid FROM pg_ts_template
  UNION ALL SELECT 'pg_ts_dict'::regclass, oid FROM pg_ts_dict
  UNION ALL SELECT 'pg_ts_config'::regclass, oid FROM pg_ts_config
  UNION ALL SELECT 'pg_foreign_data_wrapper'::regclass, oid FROM pg_foreign_data_wrapper
  UNION ALL SELECT 'pg_foreign_server'::regclass, oid FROM pg_foreign_server
)
SELECT 'schema ' || nspname, '' FROM named WHERE (2615, oid) NOT IN (SELECT classid, objid FROM brought)
UNION ALL
SELECT CASE relkind WHEN 'v' THEN 'view ' WHEN 'm' THEN 'view ' WHEN 'S' THEN 'sequence ' ELSE 'table ' END
       || r.oid::regclass,
       concat_ws(' ', relkind, relpersistence, relrowsecurity, relforcerowsecurity, relreplident, reloptions,
                 CASE WHEN relkind IN ('v', 'm') THEN pg_get_viewdef(r.oid) END, pg_get_expr(relpartbound, r.oid),
                 CASE relkind WHEN 'p' THEN pg_get_partkeydef(r.oid) END,
                 (SELECT string_agg(inhparent::regclass::text, ', ' ORDER BY inhseqno) FROM pg_inherits WHERE inhrelid = r.oid),
                 (SELECT concat_ws(' ', seqtypid::regtype, seqstart, seqincrement, seqmin, seqmax, seqcache, seqcycle)
                    FROM pg_sequence WHERE seqrelid = r.oid),
                 (SELECT string_agg(concat_ws('.', d.refobjid::regclass, attname), ', ') FROM pg_depend d
                    JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
                   WHERE relkind = 'S' AND d.classid = 1259 AND d.objid = r.oid AND d.deptype IN ('a', 'i')))
  FROM relations r WHERE relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
UNION ALL
SELECT 'column ' || a.attrelid::regclass || '.' || quote_ident(attname),
       concat_ws(' ', format_type(atttypid, atttypmod), attnotnull, attidentity, attgenerated, attcollation::regcollation,
                 pg_get_expr(d.adbin, d.adrelid))
  FROM pg_attribute a JOIN relations c ON c.oid = a.attrelid
  LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
 WHERE attnum > 0 AND NOT attisdropped AND relkind IN ('r', 'p', 'v', 'm', 'f', 'c')
UNION ALL
SELECT 'index ' || indexrelid::regclass, concat_ws(' ', pg_get_indexdef(indexrelid), indisvalid, indisready)
  FROM pg_index i JOIN relations c ON c.oid = i.indrelid WHERE relkind <> 't'
UNION ALL
SELECT 'constraint ' || quote_ident(conname) || ' of ' || CASE conrelid WHEN 0 THEN contypid::regtype::text ELSE conrelid::regclass::text END,
       concat_ws(' ', pg_get_constraintdef(t.oid), convalidated)
  FROM pg_constraint t
 WHERE contype <> 'n' AND NOT (contype = 'f' AND conparentid <> 0)
   AND (conrelid IN (SELECT oid FROM relations) OR contypid IN (SELECT oid FROM types))
UNION ALL
SELECT 'trigger ' || quote_ident(tgname) || ' of ' || tgrelid::regclass, concat_ws(' ', pg_get_triggerdef(t.oid), tgenabled)
  FROM pg_trigger t JOIN relations c ON c.oid = tgrelid WHERE NOT tgisinternal
UNION ALL
SELECT 'event trigger ' || quote_ident(evtname), concat_ws(' ', evtevent, evttags, evtfoid::regproc, evtenabled)
  FROM pg_event_trigger e WHERE (3466, e.oid) NOT IN (SELECT classid, objid FROM brought)
UNION ALL
SELECT 'rule ' || quote_ident(rulename) || ' of ' || ev_class::regclass, concat_ws(' ', pg_get_ruledef(r.oid), ev_enabled)
  FROM pg_rewrite r JOIN relations c ON c.oid = ev_class WHERE rulename <> '_RETURN'
UNION ALL
SELECT 'function ' || p.oid::regprocedure,
       concat_ws(' ', prokind, CASE WHEN prokind <> 'a' THEN pg_get_functiondef(p.oid) ELSE pg_get_function_result(p.oid) END,
                 (SELECT concat_ws(' ', to_jsonb(g) - '{aggfnoid,aggsortop,aggtranstype,aggmtranstype}'::text[],
                                   aggsortop::regoperator, aggtranstype::regtype, aggmtranstype::regtype)
                    FROM pg_aggregate g WHERE g.aggfnoid = p.oid))
  FROM pg_proc p JOIN named n ON n.oid = pronamespace WHERE (1255, p.oid) NOT IN (SELECT classid, objid FROM brought)
UNION ALL
SELECT 'type ' || t.oid::regtype,
       concat_ws(' ', typtype, CASE typtype WHEN 'd' THEN format_type(typbasetype, typtypmod) END, typnotnull, typdefault,
                 CASE typtype WHEN 'd' THEN typcollation::regcollation END, CASE typtype WHEN 'b' THEN typinput END,
                 (SELECT string_agg(enumlabel, ', ' ORDER BY enumsortorder) FROM pg_enum WHERE enumtypid = t.oid),
                 (SELECT concat_ws(' ', rngsubtype::regtype, rngcollation::regcollation, rngcanonical, rngsubdiff)
                    FROM pg_range WHERE rngtypid = t.oid))
  FROM types t
 WHERE typtype IN ('d', 'e', 'r') OR typtype = 'c' AND typrelid IN (SELECT oid FROM relations WHERE relkind = 'c')
    OR typtype = 'b' AND NOT EXISTS (SELECT 1 FROM pg_type element WHERE element.typarray = t.oid)
UNION ALL
SELECT 'policy ' || quote_ident(polname) || ' of ' || polrelid::regclass,
       concat_ws(' ', polcmd, polpermissive, pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid),
                 (SELECT string_agg(coalesce(rolname, 'public'), ', ' ORDER BY rolname)
                    FROM unnest(polroles) role LEFT JOIN pg_roles m ON m.oid = role))
  FROM pg_policy JOIN relations c ON c.oid = polrelid
UNION ALL
SELECT 'statistics ' || quote_ident(nspname) || '.' || quote_ident(stxname), pg_get_statisticsobjdef(s.oid)
  FROM pg_statistic_ext s JOIN named n ON n.oid = stxnamespace
UNION ALL
SELECT 'publication ' || quote_ident(p.pubname),
       concat_ws(' ', to_jsonb(p) - '{oid,pubowner}'::text[],
                 (SELECT string_agg(format('%I.%I', schemaname, tablename), ', ' ORDER BY schemaname, tablename)
                    FROM pg_publication_tables t WHERE t.pubname = p.pubname))
  FROM pg_publication p
UNION ALL
SELECT i.type || ' ' || i.identity, ''
  FROM others o, pg_identify_object(o.class, o.oid, 0) i
 WHERE o.oid >= 16384 AND (o.class, o.oid) NOT IN (SELECT classid, objid FROM brought)
   AND (i.schema IS NULL OR i.schema IN (SELECT quote_ident(nspname) FROM named))
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
