"""What `runbook doctor` says before a release, of servers that are there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runbook_lib import doctor, restore
from runbook_lib.doctor import examine
from runbook_lib.run import Run
from tests.ledgers import LedgerServer
from tests.project import wait_until
from tests.unit.conftest import OpenRun


def said(run: Run, name: str) -> dict[str, Any]:
    return next(found for found in examine(run.params) if found["name"] == name)


@pytest.fixture
def plain_role(ledger_server: LedgerServer, tmp_path: Path) -> Iterator[Path]:
    """The password file of a role that may do nothing."""
    with ledger_server.session() as session:
        session.execute("CREATE ROLE plain LOGIN PASSWORD 'p'")
    passfile = tmp_path / "pgpass"
    passfile.write_text("*:*:*:plain:p\n")
    passfile.chmod(0o600)
    yield passfile
    with ledger_server.session() as session:
        session.execute("DROP ROLE plain")


def test_an_administrator_who_may_make_roles_can_let_the_migration_tool_in(run_with_database: Run) -> None:
    found = said(run_with_database, "fence for the migration tool")

    assert (found["ok"], found["why"]) == (True, "postgres may make roles")
    assert said(run_with_database, "scratch volume")["ok"]


def test_one_who_may_not_is_named_before_the_night_of_the_release(
    open_run: OpenRun, ledger_server: LedgerServer, plain_role: Path
) -> None:
    run = open_run(
        database__host="127.0.0.1",
        database__port=str(ledger_server.server.port),
        database__passfile=str(plain_role),
        database__admin_role="plain",
    )

    found = said(run, "fence for the migration tool")

    assert not found["ok"]
    assert found["why"] == "plain may not make roles: no migration could be let in. Next: ALTER ROLE plain CREATEROLE"
    # Nor may they ask where the server's files lie.
    volume = said(run, "scratch volume")
    assert not volume["ok"]
    assert "set backup.scratch_capacity_bytes" in volume["why"]


def test_what_a_killed_proof_left_is_named_with_how_to_drop_it(run_with_database: Run) -> None:
    run = run_with_database
    params, database = run.params.database.model_copy(update={"production": "postgres"}), run.services.database

    def scratch(name: str, mark: str) -> restore.ScratchDatabase:
        return restore.ScratchDatabase(database, params, f"{restore.SCRATCH_PREFIX}{name}", mark)

    left, of_a_run = scratch("left", "runbook proof left of r"), scratch("run", "runbook r")
    try:
        of_a_run.create()
        with_a_runs = doctor._none_is_left(run)
        left.create()
        with database.connect(params.admin_role, left.name, application="a proof"):
            at_work = doctor._none_is_left(run)
        wait_until(lambda: not restore.of_proofs(database, params)[0].at_work, "the end of its session", 30)
        afterwards = said(run, "scratch databases")
    finally:
        left.drop()
        of_a_run.drop()

    assert with_a_runs == "none is left over"
    assert at_work == f"a proof is at work in {left.name}"
    assert not afterwards["ok"]
    assert afterwards["why"].startswith(f"killed proofs left {left.name} (")
    assert afterwards["why"].endswith(
        f'Next: when no proof is at work: as postgres in postgres: DROP DATABASE "{left.name}"'
    )
