"""The incident note is taken for written only where its text is, whoever posted it."""

from __future__ import annotations

from pathlib import Path

from runbook_lib import lease, outward
from runbook_lib.phases import rollback
from tests.unit.conftest import OpenRun


def test_a_note_that_was_posted_from_another_machine_is_written_here_again(open_run: OpenRun, tmp_path: Path) -> None:
    run = open_run(messages__chat=f"outbox:{tmp_path / 'outbox'}")
    with lease.held(run):
        outward.post(run, run.params.messages.incidents, "what failed", what="incident")
    assert rollback.incident_note.settle is not None

    assert rollback.incident_note.settle(run, {}) is None

    run.keep("rollback/incident.md", "what failed")
    noted = rollback.incident_note.settle(run, {})
    assert noted is not None
    assert [artifact.path for artifact in noted.artifacts] == ["artifacts/rollback/incident.md"]
