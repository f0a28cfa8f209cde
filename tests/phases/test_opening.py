"""What is refused before a run exists, who may have a run, and what an ended run leaves to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from runbook_lib import executor, wiring
from runbook_lib.errors import PausedError, UsageError
from runbook_lib.model import Status
from runbook_lib.phases import prepare, review
from tests.phases.conftest_backup import Opened, opened, twin  # noqa: F401  # fixtures

Open = Callable[..., Opened]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("database.production", "staging_db", "are both staging_db"),
        ("database.production", "postgres", "schema_migrations"),
        ("watch.rules.foo", "1", "watch.rules"),
        ("window.start", "garbage", "window.start"),
        ("repository.url", "-oProxyCommand=x", "repository.url"),
        ("repository.url", "/nope", "/nope"),
        ("migrations.executable", "no-such-tool", "no-such-tool is not installed"),
        ("deploy.playbooks", "/nope", "deploy.playbooks"),
        ("backup.directory", "/nope/deep", "backup.directory"),
    ],
)
def test_what_would_fail_later_is_refused_before_anything_starts(
    opened: Open,  # noqa: F811
    key: str,
    value: str,
    said: str,
) -> None:
    one = opened()
    before = [state.run_id for state in one.run.ledger.runs()]

    with pytest.raises(UsageError, match=said):
        wiring.preview("rehearsal", settings={key: value})

    assert [state.run_id for state in one.run.ledger.runs()] == before


def test_a_database_at_another_schema_is_not_the_applications(opened: Open) -> None:  # noqa: F811
    one = opened()
    d = one.run.params.database
    with one.run.services.database.connect(d.migrate_role, d.production, application="test") as session:
        session.execute("INSERT INTO schema_migrations (version) VALUES ('20990101000000')")
        session.commit()
        try:
            with pytest.raises(UsageError, match="20990101000000"):
                wiring.preview("rehearsal")
        finally:
            session.execute("DELETE FROM schema_migrations WHERE version = '20990101000000'")
            session.commit()


def test_the_freeze_of_a_run_that_has_ended_is_taken_over(opened: Open) -> None:  # noqa: F811
    one = opened()
    prepare.confirm_candidate(one.run)
    prepare.freeze_merges(one.run)
    executor.end(one.run, "aborted", reason="wrong day")
    draft = wiring.preview("rehearsal")
    from runbook_lib.plan import plan_of

    later = wiring.create(draft, plan=plan_of(draft))

    prepare.freeze_merges(later)

    assert later.services.repository.frozen_by() == later.run_id


def test_the_review_of_a_run_that_goes_on_only_says_so(opened: Open) -> None:  # noqa: F811
    one = opened()
    before = one.run.state.seq

    for step in review.STEPS:
        assert step(one.run).status == "not ended yet"

    assert one.run.state.seq == before
    assert not (one.run.folder / "artifacts" / "retrospective.json").exists()


def test_a_settled_step_is_never_reset_by_a_slower_executor(opened: Open) -> None:  # noqa: F811
    one = opened()
    prepare.confirm_candidate(one.run)
    key = prepare.confirm_candidate.key()
    known = one.run.state.step(key)
    seen_too_early = replace(known, status=Status.RUNNING, result=None)

    with pytest.raises(PausedError, match="settled by another executor: green"):
        prepare.confirm_candidate._recover(one.run, None, key, seen_too_early)

    assert one.run.state.step(key).status is Status.GREEN


def test_one_executor_has_a_run(opened: Open) -> None:  # noqa: F811
    one = opened()

    with executor._alone(one.run), pytest.raises(PausedError, match="taken on by process"):
        executor.go(one.run)
