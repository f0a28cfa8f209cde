"""What people read of a run, as text and HTML, from its state alone; pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runbook_lib.model import Status, command_line, shown
from runbook_lib.pages import moment, page, pill, seconds, text, visible
from runbook_lib.state import RunState, StepState

_MARKS = {True: "✔", False: "✖", None: ""}
_SAID = {True: "done", False: "not done", None: "not yet"}


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the playbook's summary checklist; `done` is None while it is open."""

    phase: str
    action: str
    owner: str
    done: bool | None
    note: str = ""


# The playbook's nine rows: phase, command or action, owner, the steps that must all be green, undone by a rollback.
_ROWS: tuple[tuple[str, str, str, tuple[str, ...], bool], ...] = (
    ("Backups complete & validated", "`tar`, `pg_dump`, S3 sync", "Ops", ("backup.*",), False),
    ("Maintenance mode ON", "playbook", "Ops", ("begin.prove_read_only",), False),
    ("DB migrated", "`rails db:migrate`", "DBA", ("migrate.verify_schema",), True),
    ("App code deployed", "playbook", "DevOps", ("deploy.verify_commits",), True),
    ("Smoke tests pass", "CI + QA script", "QA", ("verify.smoke_tests",), False),
    ("Metrics healthy 15 min", "Grafana", "On-call", ("verify.watch_telemetry",), False),
    ("Maintenance mode OFF", "playbook", "Ops", ("*.lift_maintenance", "*.lift_fence_and_maintenance"), False),
    ("Team notified", "Slack", "Lead", ("complete.notify_team",), False),
    ("Docs updated", "Confluence / Git", "Dev", ("complete.publish_pages", "complete.update_changelog"), False),
)
_ANY_OF = "Maintenance mode OFF"  # either way out of maintenance will do; elsewhere all steps are needed


@dataclass(frozen=True, slots=True)
class Move:
    """One way out of a stop: what it is called, the command that takes it, what it means."""

    label: str
    command: str
    why: str


def failure_menu(state: RunState, may_sign: Mapping[str, Sequence[str]] | None = None) -> list[Move]:
    """Every way on when a step failed or is in doubt, or a gate was rejected; empty while nothing is wrong.

    Args:
        state: where the run stands.
        may_sign: who may settle each step that is in doubt.
    """
    run = state.run_id
    blocked, failed = in_doubt(state), failing(state)
    if state.ended or not (blocked or failed or state.rejected_gate):
        return []
    moves = []
    for key in blocked:
        able = (may_sign or {}).get(key)
        who = f"one of {', '.join(able)}" if able else "somebody who may decide there"
        settle = f"runbook resolve {run} {key}"
        signed = "--as PERSON --key FILE --comment WHAT_YOU_SAW"
        moves += [
            Move(
                "resolve: done",
                f"{settle} --done {signed}",
                f"{who} looked at the target of {key}, saw its effect and signs that; no other way passes a step over",
            ),
            Move(
                "resolve: not done",
                f"{settle} --not-done {signed}",
                f"{who} looked, saw no effect and signs that; the step starts again",
            ),
        ]
    if failed and not blocked:
        moves.append(Move("retry", f"runbook resume {run}", f"tries {', '.join(failed)} again; what is green stays"))
    if state.rollback is None:
        moves.append(Move("roll back", f"runbook rollback {run} --reason TEXT", "takes the compiled way back"))
    moves.append(Move("abort", f"runbook abort {run} --reason TEXT", "ends the run; what was changed stays changed"))
    return moves


def in_doubt(state: RunState) -> list[str]:
    """Steps that only a person's signed statement can settle."""
    return [key for key, step in state.steps.items() if step.status is Status.BLOCKED]


def failing(state: RunState) -> list[str]:
    """Steps that failed and stand in the way; on the way back only its own do."""
    back = state.rollback is not None
    return [
        key
        for key, step in state.steps.items()
        if step.status is Status.FAILED and (not back or key.startswith("rollback."))
    ]


def checklist(state: RunState) -> list[Row]:
    """The playbook's summary checklist as the ledger has it now."""
    rows = []
    for phase, action, owner, patterns, undone in _ROWS:
        done, note = _done(state, phase, patterns)
        if done and undone and state.ended == "rolled_back":
            done, note = False, "was green, then rolled back"
        if done is None and state.ended:
            done, note = False, note or f"not reached: the run was {state.ended.replace('_', ' ')}"
        rows.append(Row(phase, action, owner, done, note))
    return rows


def _done(state: RunState, phase: str, patterns: Sequence[str]) -> tuple[bool | None, str]:
    groups = [_matching(state, pattern) for pattern in patterns]
    known = {key: step for group in groups for key, step in group.items()}
    for key, step in known.items():
        if step.status in (Status.FAILED, Status.BLOCKED) and not (phase == _ANY_OF and _any_green(groups)):
            return (
                False,
                f"{key}: {step.error.partition('. Next: ')[0]}" if step.error else f"{key} {step.status.value}",
            )
    if phase == "Backups complete & validated" and not state.gate("backup").round:
        return None, ""  # gate 1 opens behind the last backup step: until then some have not even begun
    green = [bool(group) and all(s.status is Status.GREEN for s in group.values()) for group in groups]
    if not (any(green) if phase == _ANY_OF else all(green)):
        return None, ""
    verdicts = {
        step.result.verdict for step in known.values() if step.result is not None and step.status is Status.GREEN
    }
    if phase.startswith("Metrics") and verdicts != {"green"}:
        return (False, "the verdict is red") if "red" in verdicts else (None, "the verdict is inconclusive")
    return True, ""


def _any_green(groups: Sequence[Mapping[str, StepState]]) -> bool:
    return any(s.status is Status.GREEN for group in groups for s in group.values())


def _matching(state: RunState, pattern: str) -> dict[str, StepState]:
    phase, _, name = pattern.partition(".")
    found = {}
    for key, step in state.steps.items():
        its_phase, _, rest = key.partition(".")
        its_name = rest.partition("@")[0]
        if phase in ("*", its_phase) and (its_name == name or (name == "*" and its_name != "sign_off")):
            found[key] = step
    return found


def checklist_text(state: RunState) -> str:
    """The checklist for a terminal or a Markdown page."""
    head = ("Phase", "Command / Action", "Owner", "Done (✔/✖)")
    rows = [
        (row.phase, row.action, row.owner, f"{_MARKS[row.done]} {_one_line(row.note)}".strip().replace("|", "\\|"))
        for row in checklist(state)
    ]
    widths = [max(len(r[i]) for r in (head, *rows)) for i in range(3)] + [len(head[3])]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(r, widths, strict=True)) + " |"
        for r in (head, *rows)
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def checklist_html(state: RunState) -> str:
    """The checklist as a table, without a page around it."""
    rows = []
    for row in checklist(state):
        tone = {True: "good", False: "bad", None: "plain"}[row.done]
        mark = f'<span class="pill {tone}">{_MARKS[row.done]} {_SAID[row.done]}</span>'.replace("> ", ">")
        note = f'<br><span class="soft">{text(_one_line(row.note))}</span>' if row.note else ""
        action = re.sub(r"`([^`]*)`", r"<code>\1</code>", text(row.action))
        rows.append(
            f'<tr><th scope="row">{text(row.phase)}</th><td>{action}</td><td>{text(row.owner)}</td>'
            f"<td>{mark}{note}</td></tr>"
        )
    return (
        '<div class="wide"><table><thead><tr><th scope="col">Phase</th><th scope="col">Command / Action</th>'
        f'<th scope="col">Owner</th><th scope="col">Done (✔/✖)</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def runs_index_html(states: Sequence[RunState]) -> str:
    """The page outputs/<environment>/index.html: all runs, newest first."""
    environment = str(states[0].opened.get("environment", "")) if states else ""
    rows = []
    for state in states:
        opened = state.opened
        name = text(state.run_id)
        # Before it is sealed a run has no front page to link to.
        run = f'<a href="{name}/index.html">{name}</a>' if state.ended else name
        approved = ", ".join(
            f"{gate}: {' '.join(str(d['person']) for d in now.decisions) or 'open'}"
            for gate, now in state.gates.items()
        )
        rows.append(
            f'<tr><th scope="row">{run}</th><td>{text(opened.get("version", ""))}</td><td>{pill(state.status)}</td>'
            f"<td>{text(state.phase)}</td><td>{moment(state.opened_time)}</td><td>{moment(state.ended_time)}</td>"
            f"<td>{text(opened.get('opened_by', ''))}</td><td>{text(approved)}</td></tr>"
        )
    heads = "".join(
        f'<th scope="col">{h}</th>'
        for h in ("Run", "Version", "State", "Phase", "Opened", "Ended", "Opened by", "Gates")
    )
    body = (
        f"<header><h1>Releases to {text(environment or 'this environment')}</h1>"
        f'<p class="soft">{len(states)} {"run" if len(states) == 1 else "runs"}, newest first</p></header>'
        f'<main id="main"><div class="card wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody>'
        "</table></div></main>"
    )
    return page(f"Releases to {environment}", body)


def status_text(state: RunState, may_sign: Mapping[str, Sequence[str]] | None = None) -> str:
    """Where a run stands: its release, what is green, what failed, who decided, and every way on after a failure.

    Args:
        state: the fold of its events.
        may_sign: who may settle each step that is in doubt.
    """
    opened = state.opened
    lines = [
        f"run    {state.run_id}",
        f"state  {state.status}" + (f" since {state.ended_time}" if state.ended else f" (phase {state.phase})"),
        f"what   {opened.get('version')} ({str(opened.get('commit'))[:12]}) to {opened.get('environment')}, "
        f"before: {opened.get('previous_version')}",
        f"opened {state.opened_time} by {opened.get('opened_by')}",
    ]
    by_phase: dict[str, list[str]] = {}
    for key, step in state.steps.items():
        by_phase.setdefault(key.partition(".")[0], []).append(_step_mark(step))
    lines += [f"  {phase:<9} {''.join(marks)}" for phase, marks in by_phase.items()]
    for key, step in state.steps.items():
        if step.status is Status.FAILED:
            lines.append(f"  {_step_mark(step)} {key}: {_one_line(step.error) or step.status.value}")
        elif step.status is Status.BLOCKED:
            lines += _doubt(key, step)
        elif step.status is Status.RUNNING:
            lines.append(f"  ● {key} since {step.intent_time}, outcome not known yet")
    for name, gate in state.gates.items():
        said = ", ".join(f"{d['person']} {d['decision']}s" for d in gate.decisions) or "nobody has decided"
        lines.append(f"gate   {name}, round {gate.round}: {said}" + (", timed out" if gate.timed_out else ""))
    for name, check in state.checks.items():
        lines.append(f"check  {name}: {'passed' if check['passed'] else 'failed'}, says {check['person']}")
    lines += [f"clock  {said}" for said in clock_jumps(state)]
    lines += [f"can    {move.label:<17} {move.command}  ({move.why})" for move in failure_menu(state, may_sign)]
    return "\n".join(visible(line) for line in lines)


def _doubt(key: str, step: StepState) -> list[str]:
    """A blocked step: what is known of it, and what is not; the menu has the commands of which one settles it."""
    intent = step.intent
    process = intent.get("executor", {})
    before = "; ".join(f"{name}: {shown(value)}" for name, value in intent.get("pre_state", {}).items())
    return [
        f"  ? {key}: {_one_line(step.error) or 'blocked'}",
        f"      known    attempt {step.attempt} on {intent.get('target', '?')} was begun {step.intent_time} by process "
        f"{process.get('pid', '?')} on {process.get('host', '?')}, which is gone or shut out",
        *([f"      before   {_one_line(before)}"] if before else []),
        f"      logs     {intent.get('children', 'none')}/ in the run's folder",
        "      unknown  whether its effect is there, wholly or in part",
    ]


def clock_jumps(state: RunState) -> list[str]:
    """Where somebody set the wall clock while the run was on (times before and after do not compare), or it slept."""
    return [
        *(f"was set by {jump:+.1f} s before event {seq}; it decided nothing" for seq, jump in state.clock_jumps),
        *(f"went on: the machine slept for {seconds(slept)} before event {seq}" for seq, slept in state.sleeps),
    ]


def _step_mark(step: StepState) -> str:
    return {Status.GREEN: "✔", Status.FAILED: "✖", Status.BLOCKED: "?", Status.RUNNING: "●"}.get(step.status, "·")


def next_move(state: RunState, gate: str | None) -> str:
    """What the operator does next, in words that can be typed.

    Args:
        state: where the run stands.
        gate: the name of the gate that the run waits at, if any.
    """
    run = state.run_id
    if state.ended:
        after = (
            ""
            if any(key.startswith("review.") for key in state.steps)
            else f"the next working day: runbook review {run}"
        )
        return after or "nothing: the run has ended and was reviewed"
    blocked, failed = in_doubt(state), failing(state)
    if blocked:
        return f"look at the target of {blocked[0]}, then: runbook resolve {run} {blocked[0]} --done | --not-done --as PERSON --key FILE --comment WHAT_YOU_SAW"
    if state.rejected_gate:
        return f"gate {state.rejected_gate} was rejected: runbook rollback {run}, or runbook abort {run} --reason TEXT"
    if failed and state.rollback is None:
        return (
            f"{failed[0]} failed: runbook resume {run} tries again, runbook rollback {run} goes back, "
            f"runbook abort {run} --reason TEXT ends it there"
        )
    if failed:
        return f"{failed[0]} failed: runbook resume {run} tries again, runbook abort {run} --reason TEXT ends it there"
    if gate:
        return f"runbook gate show {run} {gate}, then: runbook gate approve {run} {gate} --as PERSON --key FILE, then: runbook resume {run}"
    return f"runbook resume {run}"


def plan_text(plan: Mapping[str, Any]) -> str:
    """A plan for a terminal: every step with its commands, hosts, gates, time and way back."""
    lines = [
        f"{plan['version']} ({plan['commit'][:12]}) to {plan['environment']}, before: {plan['previous_commit'][:12]}"
    ]
    phase = ""
    for step in plan["steps"]:
        if step["phase"] != phase:
            phase = step["phase"]
            lines.append(f"\n── {phase} ──")
        needs = f", behind gate {', '.join(step['needs_gates'])}" if step["needs_gates"] else ""
        lines.append(f"{step['title']}  [{step['step']}, {step['owner']}, about {seconds(step['expected_s'])}{needs}]")
        lines.append(f"    on   {', '.join(step['targets'])}")
        lines += [f"    $    {command_line(command)}" for command in step["commands"]]
        lines.append(f"    back {step['way_back']}")
    lines.append("")
    for name, gate in plan["gates"].items():
        lines.append(
            f"gate {name}: {gate['quorum']} of {' or '.join(gate['roles'])}, within {seconds(gate['timeout_s'])}"
        )
    lines.append(f"read-only for about {seconds(plan['read_only_s'])} (budget {seconds(plan['budget_s'])})")
    lines += [f"WARNING: {warning}" for warning in plan["warnings"]]
    lines.append(f"plan digest {plan['digest']}")
    return "\n".join(visible(line, keep="\n") for line in lines)


def gate_text(facts: Mapping[str, Any]) -> str:
    """A gate's question and evidence for a terminal."""
    where = (
        f"round {facts['round']}, {'open' if facts['open'] else 'not open'}" if facts["round"] else "not reached yet"
    )
    lines = [
        f"{facts['title']} ({where})",
        facts["asks"],
        f"needs {facts['quorum']} of {' or '.join(facts['roles'])}; may sign: {', '.join(facts['may_sign']) or 'nobody'}",
    ]
    for card in facts["evidence"]:
        mark = {"green": "✔", "red": "✖"}.get(card["verdict"], "?")
        lines.append(f"  {mark} {card['name']} — {card['verdict']} · sha256 {card['sha256'][:16]}…")
        if card["summary"]:
            lines.append(f"      {_one_line(card['summary'])}")
    if facts["evidence_sha256"]:
        lines.append(f"evidence sha256 {facts['evidence_sha256']} (check code {facts['check_code']})")
    lines += [
        f"{d['person']} {d['decision']}s" + (f": {_one_line(d['comment'])}" if d["comment"] else "")
        for d in facts["decisions"]
    ]
    return "\n".join(visible(line) for line in lines)


def _one_line(value: str, *, characters: int = 400) -> str:
    line = " ".join(value.split())
    return line if len(line) <= characters else line[: characters - 1] + "…"
