"""A step in doubt is settled by a signed statement, which the ledger names, and by nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runbook_lib import decisions, testimony
from runbook_lib.adapters import processes
from runbook_lib.canonical import sha256_file
from runbook_lib.errors import UsageError
from runbook_lib.fsck import examine
from runbook_lib.model import Status
from runbook_lib.run import Run
from tests.unit.conftest import OPENER

KEY = "prepare.freeze_merges"


@pytest.fixture
def blocked(run: Run) -> Run:
    return blocked_at(run, KEY)


def blocked_at(run: Run, key: str) -> Run:
    """A run of which nobody knows whether a step's effect is there."""
    run.ledger.take_lease(run.run_id, processes.me())
    intent = {"step": key, "phase": key.partition(".")[0], "attempt": 1, "title": key, "executor": processes.me()}
    run.ledger.append(run.run_id, "step_intent", intent)
    run.ledger.append(run.run_id, "step_blocked", {"step": key, "attempt": 1, "why": "cannot tell"})
    return run


@pytest.mark.parametrize(("done", "then"), [(True, Status.GREEN), (False, Status.PENDING)])
def test_a_signed_statement_settles_a_step_and_the_ledger_names_it(
    blocked: Run, people: dict[str, Path], done: bool, then: Status
) -> None:
    testimony.resolve(blocked, KEY, done=done, comment="looked", person="ada", key=people["ada"])

    settled = blocked.ledger.events(blocked.run_id)[-1].data
    said = json.loads((blocked.folder / settled["statement"]).read_bytes())["predicate"]
    assert blocked.state.step(KEY).status is then
    assert (said["step"], said["done"], said["person"]) == (KEY, done, "ada")
    assert settled["sha256"] == sha256_file(blocked.folder / settled["statement"])
    decisions.load(blocked, settled)
    assert [f for f in examine(blocked.ledger.events(blocked.run_id), blocked.folder) if not f.ok] == []


@pytest.mark.parametrize("done", [True, False])
def test_a_settlement_whose_statement_was_changed_is_named(blocked: Run, people: dict[str, Path], done: bool) -> None:
    testimony.resolve(blocked, KEY, done=done, comment="looked", person="ada", key=people["ada"])
    for file in (blocked.folder / "decisions").iterdir():
        file.write_text("{}")

    found = [f.why for f in examine(blocked.ledger.events(blocked.run_id), blocked.folder) if not f.ok]

    assert len(found) == 1
    assert found[0].endswith("is not what the event names")


@pytest.mark.parametrize(
    ("person", "key_of", "why"),
    [
        ("ada", "bea", "the signature is not ada's"),
        ("mallory", "dan", "is nobody in the params file"),
        ("dan", "dan", "dan holds dba; prepare.freeze_merges is settled by deploy_lead"),
        (OPENER, OPENER, f"{OPENER} opened this run"),
    ],
)
def test_nobody_settles_a_step_in_anothers_name(
    blocked: Run, people: dict[str, Path], person: str, key_of: str, why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        testimony.resolve(blocked, KEY, done=True, comment="looked", person=person, key=people[key_of])

    assert blocked.state.step(KEY).status is Status.BLOCKED
    assert not (blocked.folder / "decisions").exists()


def test_of_two_who_settle_a_step_at_once_the_first_one_counts(
    blocked: Run, people: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sign = decisions.signed

    def first_bea(data: bytes, *, key: Path, ask: bool = True) -> bytes:
        monkeypatch.setattr(decisions, "signed", sign)
        testimony.resolve(blocked, KEY, done=False, comment="not there", person="bea", key=people["bea"])
        return sign(data, key=key, ask=ask)

    monkeypatch.setattr(decisions, "signed", first_bea)
    with pytest.raises(UsageError, match="was settled by somebody else"):
        testimony.resolve(blocked, KEY, done=True, comment="looked", person="ada", key=people["ada"])

    assert blocked.state.step(KEY).status is Status.PENDING


@pytest.mark.parametrize(
    ("key", "person"),
    [
        ("migrate.migrate_production", "dan"),
        ("deploy.deploy_new_version", "quinn"),
        ("complete.lift_maintenance", "dan"),
        ("rollback.restore_code", "quinn"),
    ],
)
def test_who_decides_after_a_step_may_settle_it(run: Run, people: dict[str, Path], key: str, person: str) -> None:
    testimony.resolve(blocked_at(run, key), key, done=True, comment="looked", person=person, key=people[person])

    assert run.state.step(key).settled_by == person


@pytest.mark.parametrize("key", ["backup.dump_database", "backup.archive_files@app-01", "migrate.record_schema"])
def test_what_later_steps_read_is_made_again_and_not_signed_for(run: Run, people: dict[str, Path], key: str) -> None:
    who = "dan" if key.startswith("migrate") else "ada"

    with pytest.raises(UsageError, match="later steps rest on what it recorded"):
        testimony.resolve(blocked_at(run, key), key, done=True, comment="looked", person=who, key=people[who])
    assert run.state.step(key).status is Status.BLOCKED

    testimony.resolve(run, key, done=False, comment="moved away", person=who, key=people[who])
    assert run.state.step(key).status is Status.PENDING


def sealed_parts(run: Run) -> list[str]:
    return sorted(path.name for path in (run.folder / "decisions").glob("*"))


def test_nothing_is_settled_after_the_end_since_the_record_is_sealed(blocked: Run, people: dict[str, Path]) -> None:
    blocked.ledger.append(blocked.run_id, "run_ended", {"state": "aborted"})

    with pytest.raises(UsageError, match=r"has ended \(aborted\)"):
        testimony.resolve(blocked, KEY, done=False, comment="seen", person="ada", key=people["ada"])

    assert sealed_parts(blocked) == []


def test_a_run_that_ends_while_somebody_signs_takes_no_settlement(
    blocked: Run, people: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = decisions.signed

    def ends_meanwhile(*words: object, **named: object) -> bytes:
        blocked.ledger.append(blocked.run_id, "run_ended", {"state": "aborted"})
        return signed(*words, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(decisions, "signed", ends_meanwhile)

    with pytest.raises(UsageError, match="has ended"):
        testimony.resolve(blocked, KEY, done=False, comment="seen", person="ada", key=people["ada"])

    assert sealed_parts(blocked) == []


def test_undoing_migrations_is_not_settled_as_done(run: Run, people: dict[str, Path]) -> None:
    """Done would skip the undos behind the one that is in doubt."""
    blocked = blocked_at(run, "rollback.restore_schema")

    with pytest.raises(UsageError, match=r"undoes one migration after the other.*--not-done"):
        testimony.resolve(
            blocked, "rollback.restore_schema", done=True, comment="looked", person="quinn", key=people["quinn"]
        )

    assert blocked.state.step("rollback.restore_schema").status is Status.BLOCKED
