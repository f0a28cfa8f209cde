"""What a walked notebook shows is held against the ledger."""

from __future__ import annotations

from typing import Any

from runbook_lib import walked
from runbook_lib.card import MIME
from runbook_lib.model import StepResult
from runbook_lib.run import Run


def notebook(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"cells": [{"outputs": [{"data": {MIME: {"parts": list(parts)}}}]}]}


def test_a_green_card_of_a_step_that_never_was_green_is_refused(run: Run) -> None:
    part = {"step": "backup.sign_off", "status": "green", "attempt": 1}

    assert "backup.sign_off is green, and the ledger" in walked.missing(run, run.state, "backup", notebook(part))
    assert walked.missing(run, run.state, "backup", notebook({**part, "status": "failed"})) == ""


def test_a_card_of_a_green_attempt_that_was_undone_later_is_no_lie(run: Run) -> None:
    key = "backup.sign_off"
    intent = {"step": key, "attempt": 1, "phase": "backup", "title": "Gate", "executor": {}, "children": "x"}
    run.ledger.append(run.run_id, "step_intent", intent)
    outcome = {"step": key, "attempt": 1, "status": "green", "result": StepResult().as_json(), "duration_s": 0.0}
    run.ledger.append(run.run_id, "step_outcome", outcome)
    run.ledger.append(run.run_id, "step_reset", {"step": key, "attempt": 1, "why": "stale"})

    shown = notebook({"step": key, "status": "green", "attempt": 1})
    assert walked.missing(run, run.state, "backup", shown) == ""
