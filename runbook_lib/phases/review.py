"""Phase 8, the next day: what went how, said to those who were there. Runs on an ended run, beside its sealed record."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import partial
from typing import Any

from runbook_lib import outward
from runbook_lib.model import Event, Recovery, StepResult
from runbook_lib.phases import complete, prepare
from runbook_lib.run import Run
from runbook_lib.step import step as _step


def _not_ended(run: Run) -> StepResult | None:
    """A record is looked back at when it is sealed: what was written before would be missing in it."""
    if run.state.ended:
        return None
    said = f"the run has not ended: runbook resume {run.run_id}, then runbook review {run.run_id}"
    return StepResult(facts={"nothing was done": said}, status="not ended yet")


step = partial(_step, instead=_not_ended)


@step("Who attends the retrospective", recovery=Recovery.REPEAT, owner="Lead")  # only reads
def list_attendees(run: Run) -> StepResult:
    """Everybody who holds a gate's role, and who decided or opened the run."""
    state = run.state
    decided = sorted({str(d["person"]) for gate in state.gates.values() for d in gate.decisions})
    return StepResult(
        facts={
            "invited": prepare.people_of_gates(run),
            "decided": [_name(run, person) for person in decided],
            "opened by": _name(run, str(state.opened["opened_by"])),
        }
    )


@list_attendees.plan
def _(run: Run) -> list[tuple[str, ...]]:
    return [("call", f"people: {', '.join(prepare.people_of_gates(run))}")]


def _name(run: Run, person: str) -> str:
    known = run.params.people.get(person)
    return person if known is None else known.name


@step("Deliver what could not be delivered during the run", recovery=Recovery.REPEAT, owner="Ops")
def deliver_left_over(run: Run) -> StepResult:
    """Messages, changelog, pages and ticket by the keys that they had: none of them arrives twice."""
    facts: dict[str, Any] = {}
    for key, said in outward.left_over(run):
        if key in complete.AGAIN:
            again = outward.deliver(run, lambda key=key: complete.AGAIN[key](run))  # type: ignore[misc]
        elif {"what", "channel", "message"} <= set(said):
            again = outward.post(run, said["channel"], said["message"], what=said["what"])
        else:
            again = {outward.UNDELIVERED: f"{key} is not repeated after the run"}
        facts[key] = again.get(outward.UNDELIVERED, "delivered now")
    return StepResult(facts=facts or {"left over": "nothing"})


@deliver_left_over.plan
def _(run: Run) -> list[tuple[str, ...]]:
    return [("call", "repeat undelivered words with their keys")]


@step("Draft the retrospective", recovery=Recovery.PROBE, owner="Lead", expected_s=1.0, way_back="edit the page")
def draft_retrospective(run: Run) -> StepResult:
    """A page with the run's times, decisions and incidents; the notes of the meeting go below."""
    data = retrospective(run)
    kept = run.keep("retrospective.json", json.dumps(data, indent=1) + "\n")
    body = _page(data)
    page = run.keep(
        "retrospective.html", f"<!doctype html>\n<meta charset='utf-8'>\n<title>{_title(run)}</title>\n{body}\n"
    )

    def publish() -> dict[str, Any]:
        return {
            "page": _title(run),
            "address": run.services.pages.publish(_title(run), body, key=run.key("retrospective")),
        }

    facts = {**outward.deliver(run, publish), **_retrospective_facts(data)}
    return StepResult(facts=facts, artifacts=(kept, page))


@draft_retrospective.probe
def _(run: Run, intent: Mapping[str, Any]) -> StepResult | None:
    return None  # the page has a key: publishing again replaces it by the same text


@draft_retrospective.plan
def _(run: Run) -> list[tuple[str, ...]]:
    return [("call", f"publish Retrospective: {run.release.version}")]


def _title(run: Run) -> str:
    return f"Retrospective: {run.params.application.name} {run.release.version}"


def retrospective(run: Run) -> dict[str, Any]:
    """What the ledger tells of the run, as JSON."""
    events = [event for event in run.ledger.events(run.run_id) if event.data.get("phase") != "review"]
    state = run.state
    return {
        "run": run.run_id,
        "version": run.release.version,
        "commit": run.release.commit,
        "state": state.ended,
        "opened": state.opened_time,
        "ended": state.ended_time,
        "attendees": prepare.people_of_gates(run),
        "phases": phase_times(events),
        "gates": gate_times(events),
        "incidents": incidents(events),
        "left over": [key for key, _ in outward.left_over(run)],
    }


def phase_times(events: Iterable[Event]) -> dict[str, dict[str, float]]:
    """Per phase: seconds in steps (monotonic), and from its first intent to its last outcome (wall clock)."""
    worked: dict[str, float] = {}
    spans: dict[str, tuple[datetime, datetime]] = {}
    for event in events:
        if event.kind in ("step_intent", "step_outcome"):
            phase = str(event.data["step"]).partition(".")[0]
            if phase == "review":
                continue
            at = datetime.fromisoformat(event.time)
            first, _ = spans.get(phase, (at, at))
            spans[phase] = (first, at)
            worked[phase] = worked.get(phase, 0.0) + float(event.data.get("duration_s", 0.0))
    return {
        phase: {"steps_s": round(worked[phase], 1), "elapsed_s": round((last - first).total_seconds(), 1)}
        for phase, (first, last) in spans.items()
    }


def gate_times(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Each decision: who, what, how many seconds after its round was opened."""
    opened: dict[str, str] = {}
    found = []
    for event in events:
        if event.kind == "gate_opened":
            opened[event.data["gate"]] = event.time
        elif event.kind == "gate_decision":
            data = event.data
            waited = datetime.fromisoformat(event.time) - datetime.fromisoformat(opened[data["gate"]])
            found.append(
                {
                    "gate": data["gate"],
                    "round": data["round"],
                    "person": data["person"],
                    "decision": data["decision"],
                    "comment": data["comment"],
                    "after_s": round(waited.total_seconds(), 1),
                }
            )
        elif event.kind == "gate_timed_out":
            found.append({"gate": event.data["gate"], "round": event.data["round"], "decision": "timed out"})
    return found


def incidents(events: Iterable[Event]) -> list[dict[str, str]]:
    """What did not go as planned: failures, doubts, repeats, the way back, the run's other ends."""
    found = []
    for event in events:
        data = event.data
        if event.kind == "step_outcome" and data["status"] != "green":
            what, why = f"{data['step']} failed", data.get("error", "")
        elif event.kind == "step_blocked":
            what, why = f"{data['step']} in doubt", data["why"]
        elif event.kind == "step_reset" and data["why"] != "paused":
            what, why = f"{data['step']} started again", data["why"]
        elif event.kind == "step_outcome" and data.get("settled_by"):
            what, why = f"{data['step']} settled", f"by {data['settled_by']}"
        elif event.kind == "rollback_requested":
            what, why = "rollback", data["reason"]
        elif event.kind == "run_ended" and data["state"] != "completed":
            what, why = data["state"], data.get("reason", "")
        else:
            continue
        found.append({"time": event.time, "what": str(what), "why": str(why)})
    return found


def _retrospective_facts(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "state": data["state"],
        "time in steps": {phase: f"{times['steps_s']:.1f} s" for phase, times in data["phases"].items()},
        "decisions": [f"{g['gate']}: {g.get('person', '')} {g['decision']}" for g in data["gates"]],
        "incidents": len(data["incidents"]),
    }


def _page(data: Mapping[str, Any]) -> str:
    def table(head: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> str:
        body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
        return "<table><tr>" + "".join(f"<th>{name}</th>" for name in head) + f"</tr>{body}</table>"

    phases = table(
        ("Phase", "In steps", "Elapsed"),
        ((name, f"{t['steps_s']:.1f} s", f"{t['elapsed_s']:.1f} s") for name, t in data["phases"].items()),
    )
    gates = table(
        ("Gate", "Who", "Decision", "After", "Comment"),
        (
            (g["gate"], g.get("person", ""), g["decision"], f"{g.get('after_s', 0):.0f} s", g.get("comment", ""))
            for g in data["gates"]
        ),
    )
    went_wrong = table(("Time (UTC)", "What", "Why"), ((i["time"], i["what"], i["why"]) for i in data["incidents"]))
    people = "".join(f"<li>{html.escape(person)}</li>" for person in data["attendees"])
    return (
        f"<p>Run <code>{html.escape(data['run'])}</code>: {html.escape(data['version'])} "
        f"(<code>{html.escape(data['commit'])}</code>), {html.escape(data['state'])}, "
        f"{html.escape(data['opened'])} to {html.escape(data['ended'])}.</p>"
        f"<h2>Attendees</h2><ul>{people}</ul><h2>Times</h2>{phases}<h2>Decisions</h2>{gates}"
        f"<h2>Incidents</h2>{went_wrong if data['incidents'] else '<p>None.</p>'}"
        "<h2>What went well</h2><p></p><h2>What to change</h2><p></p><h2>Actions</h2><p></p>"
    )


@step("Close the release in the deployment tracker", recovery=Recovery.PROBE, owner="Lead", way_back="edit the row")
def close_release(run: Run) -> StepResult:
    """One row a run."""

    def record() -> dict[str, Any]:
        row = _row(run)
        return {**row, "address": run.services.tracker.record(row, key=run.run_id)}

    return StepResult(facts=outward.deliver(run, record))


@close_release.probe
def _(run: Run, intent: Mapping[str, Any]) -> StepResult | None:
    address = outward.found(lambda: run.services.tracker.find(run.run_id))
    return None if address is None else StepResult(facts={**_row(run), "address": address})


@close_release.plan
def _(run: Run) -> list[tuple[str, ...]]:
    return [("call", f"tracker row {run.release.version}")]


def _row(run: Run) -> dict[str, str]:
    state = run.state
    return {
        "version": run.release.version,
        "commit": run.release.commit,
        "environment": run.release.environment,
        "state": state.ended,
        "opened": state.opened_time,
        "ended": state.ended_time,
        "opened by": str(state.opened["opened_by"]),
        "previous version": run.release.previous_version,
        "record": str(run.folder),
    }


STEPS = (list_attendees, deliver_left_over, draft_retrospective, close_release)
