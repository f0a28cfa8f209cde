"""What a run would do, before it does it: every step with its commands, hosts, gates, time and way back."""

from __future__ import annotations

from typing import Any

from runbook_lib import gate
from runbook_lib.canonical import digest
from runbook_lib.phases import FORWARD, name_of, review, rollback
from runbook_lib.run import Run
from runbook_lib.step import Step

_CLOSED_PHASES = ("begin", "migrate", "deploy", "verify")


def plan_of(run: Run) -> dict[str, Any]:
    """The plan as JSON, with its own digest; from params and release only, so that it is the same at every call."""
    steps = [_step(run, name_of(module), step) for module in (*FORWARD, rollback, review) for step in module.STEPS]
    window_s = read_only_s(run)
    budget_s = run.params.window.budget_s
    plan: dict[str, Any] = {
        "environment": run.release.environment,
        "version": run.release.version,
        "commit": run.release.commit,
        "previous_commit": run.release.previous_commit,
        "params_sha256": digest(run.params.frozen()),
        "steps": steps,
        "gates": {
            name: {"roles": list(rule.roles), "quorum": rule.quorum, "timeout_s": rule.timeout_s}
            for name in gate.NAMES
            for rule in (gate.rule(run, name),)
        },
        "read_only_s": window_s,
        "budget_s": budget_s,
        "warnings": [],
    }
    if window_s > budget_s:
        plan["warnings"].append(
            f"the read-only window is expected to last {window_s / 60:.0f} min, the budget is {budget_s / 60:.0f} min: "
            "raise window.budget_s, shorten the watch, or set maintenance.lift: before_watch"
        )
    return {**plan, "digest": digest(plan)}


def read_only_s(run: Run) -> float:
    """How long users are refused writes, in seconds, as far as the steps' expected durations tell."""
    from runbook_lib.phases import steps_of

    total = 0.0
    for phase in _CLOSED_PHASES:
        for step in steps_of(phase):
            if run.params.maintenance.lift == "before_watch" and step.name == "watch_telemetry":
                return total
            total += expected_s(run, step)
    return total


def expected_s(run: Run, step: Step) -> float:
    """A step's expected duration in seconds, over all its items; the watch's is its parameter."""
    if step.name == "watch_telemetry":
        return run.params.watch.duration_s
    return step.expected_s * len(step.keys(run))


def _step(run: Run, phase: str, step: Step) -> dict[str, Any]:
    return {
        "phase": phase,
        "step": step.key(),
        "title": step.title,
        "owner": step.owner,
        "recovery": step.recovery.value,
        "targets": list(step.each(run)) if step.each is not None else [run.release.environment],
        "commands": [list(map(str, line)) for line in (step.shows(run) if step.shows is not None else [])],
        "needs_gates": list(step.needs),
        "expected_s": expected_s(run, step),
        "way_back": step.way_back,
    }
