"""The argv of PostgreSQL's programs word for word, and what is read from their output."""

from __future__ import annotations

from pathlib import Path

import pytest

from runbook_lib.adapters import inventory
from runbook_lib.commands import postgres

SERVER = postgres.Server("10.0.0.5", 5432, "/etc/runbook/pgpass")
CUT_OFF = "keepalives_idle=10 keepalives_interval=5 keepalives_count=3 tcp_user_timeout=30000"
PLAIN = postgres.Packing("1")
DUMP = Path("/backups/run.dump")


def test_dump() -> None:
    command = postgres.dump(
        SERVER, "backup_user", "prod_db", snapshot="00000003-1", packing=PLAIN, into=DUMP, timeout_s=7200.0
    )

    assert command.argv == (
        "pg_dump",
        "--format=custom",
        "--no-acl",
        "--no-owner",
        "--snapshot=00000003-1",
        "--lock-wait-timeout=30000",
        "--compress=1",
        "--host=10.0.0.5",
        "--port=5432",
        "--username=backup_user",
        "--no-password",
        f"--dbname=dbname='prod_db' {CUT_OFF}",
        "--file=/backups/run.dump",
    )
    assert command.env["PGPASSFILE"] == "/etc/runbook/pgpass"
    assert "PGPASSWORD" not in command.env
    assert command.timeout_s == 7200.0


def test_restore_stops_at_the_first_error() -> None:
    command = postgres.restore(SERVER, "postgres", "runbook_scratch_1", DUMP, timeout_s=60.0, jobs=2)

    assert command.argv == (
        "pg_restore",
        "--exit-on-error",
        "--no-acl",
        "--no-owner",
        "--no-subscriptions",
        "--no-tablespaces",
        "--jobs=2",
        "--host=10.0.0.5",
        "--port=5432",
        "--username=postgres",
        "--no-password",
        f"--dbname=dbname='runbook_scratch_1' {CUT_OFF}",
        "/backups/run.dump",
    )


def test_a_dump_may_be_packed_by_a_program_behind_it() -> None:
    packing = postgres.Packing("0", ("zstd", "-q", "-1", "-T0"))

    command = postgres.dump(
        SERVER, "backup_user", "prod_db", snapshot="00000003-1", packing=packing, into=DUMP, timeout_s=7200.0
    )

    assert command.argv[:2] == ("sh", "-c")
    assert command.argv[command.argv.index("zstd -q -1 -T0") + 1] == "pg_dump"
    assert "--compress=0" in command.argv
    assert not any(word.startswith("--file") for word in command.argv)
    assert command.stdout == DUMP
    assert packing.suffix == ".dump.zst"


def test_what_pg_dump_can_pack_with_is_told_by_what_it_refuses_last() -> None:
    assert postgres.can_pack("pg_dump: error: parallel backup only supported by the directory format\n")
    assert not postgres.can_pack('pg_dump: error: invalid value "zstd:1" for option -Z/--compress\n')
    assert not postgres.can_pack("pg_dump: error: invalid compression specification: this build does not support ZSTD")


def test_globals_are_written_without_passwords() -> None:
    argv = postgres.globals_(SERVER, "backup_user", "postgres", into=Path("g.sql"), timeout_s=1.0).argv

    assert argv[:3] == ("pg_dumpall", "--globals-only", "--no-role-passwords")
    assert argv[-1] == "--file=g.sql"


def test_reading() -> None:
    assert postgres.list_contents(DUMP).argv == ("pg_restore", "--list", "/backups/run.dump")
    assert postgres.read_through(DUMP, timeout_s=1.0).argv == ("pg_restore", "--file=/dev/null", "/backups/run.dump")


@pytest.mark.parametrize(
    ("said", "major"),
    [
        ("pg_dump (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)", 15),
        ("pg_dump (PostgreSQL) 18.1", 18),
        ("pg_dump (PostgreSQL) 9.6.24", 9),
        ("pg_dump (PostgreSQL) 19devel", 19),
        ("nothing of the kind", 0),
    ],
)
def test_major_version(said: str, major: int) -> None:
    assert postgres.major(said) == major


def test_tables_listed() -> None:
    listing = (
        ";\n; Archive created at 2026\n;\n"
        "215; 1259 16390 TABLE public orders postgres\n"
        "3360; 0 16390 TABLE DATA public orders postgres\n"
        "3361; 0 0 SEQUENCE SET public orders_id_seq postgres\n"
        "; 3362; 0 16390 TABLE DATA public hidden postgres\n"
    )

    assert postgres.tables_listed(listing) == 1


def _sequence(at: str, *, called: bool = True, increment: int = 1, cycles: bool = False) -> dict[str, object]:
    return {"last_value": at, "is_called": called, "increment": str(increment), "cycles": cycles}


def _inventory(**tables: tuple[int, str]) -> dict[str, object]:
    return {
        "tables": {name: {"rows": rows, "content": content} for name, (rows, content) in tables.items()},
        "sequences": {"public.s": _sequence("10")},
        "structure": {"index public.i": "d1", "table public.t": "d2"},
        "large_objects": 0,
        "large_objects_content": "",
        "extensions": {"plpgsql": "1.0"},
    }


def test_inventories_that_are_equal_have_no_differences() -> None:
    assert inventory.differences(_inventory(a=(1, "x")), _inventory(a=(1, "x"))) == []


def test_every_difference_is_said() -> None:
    source = _inventory(a=(1, "x"), b=(2, "y"), c=(3, "z"))
    restored = _inventory(a=(1, "other"), b=(1, "y"), d=(0, ""))
    restored |= {
        "sequences": {"public.s": _sequence("9")},
        "structure": {"index public.j": "d1", "table public.t": "d3"},
        "large_objects": 2,
        "extensions": {},
    }

    said = inventory.differences(source, restored)

    assert said == [
        "table a has other content in its 1 rows",
        "table b has 1 rows instead of 2",
        "table c is missing",
        "table d was not in the source",
        "sequence public.s stands at 9, before 10",
        "index public.i is missing",
        "table public.t is defined otherwise",
        "index public.j was not in the source",
        "2 large objects instead of 0",
        "extension plpgsql is missing",
    ]


@pytest.mark.parametrize(
    ("was", "now", "says"),
    [
        (_sequence("10"), _sequence("12"), ""),
        (_sequence("-999"), _sequence("-998"), ""),
        (_sequence("-998"), _sequence("-999"), "-999, before -998"),
        (_sequence("1000", increment=-1), _sequence("999", increment=-1), ""),
        (_sequence("999", increment=-1), _sequence("1000", increment=-1), "1000, before 999"),
        (_sequence("1", called=False), _sequence("1"), ""),
        (_sequence("1"), _sequence("1", called=False), "1 (not given yet), before 1"),
        (_sequence("5", cycles=True), _sequence("1", cycles=True), ""),
    ],
)
def test_a_sequence_may_have_moved_on_and_not_back(was: dict[str, object], now: dict[str, object], says: str) -> None:
    found = inventory.differences(
        {**_inventory(), "sequences": {"public.s": was}}, {**_inventory(), "sequences": {"public.s": now}}
    )

    assert found == ([f"sequence public.s stands at {says}"] if says else [])


def test_a_databases_name_cannot_end_its_word_in_the_connection_string() -> None:
    arguments = SERVER.arguments("backup_user", "it's \\ host=elsewhere")

    assert arguments[-1] == f"--dbname=dbname='it\\'s \\\\ host=elsewhere' {CUT_OFF}"
