"""The release desk as HTML: where a run stands on one screen, from its state and a few facts; pure.

It reads well where a viewer drops the style sheet: headings, an ordered list, tables with heads; what a colour says, a
mark and a word say too. Only the line that says the state is a live region.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from runbook_lib.clock import Moment
from runbook_lib.model import Event, GateRule, Status
from runbook_lib.pages import moment, output, seconds, text
from runbook_lib.render import checklist_html, clock_jumps, failing, failure_menu, in_doubt
from runbook_lib.state import RunState, StepState


@dataclass(frozen=True, slots=True)
class StepFact:
    """A step of the plan: its keys in the ledger (one an item), and how long it is expected to take in all."""

    title: str
    owner: str
    expected_s: float
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PhaseFact:
    """A phase of the plan, in order; `gate` ends it, when it has one."""

    name: str
    notebook: str
    steps: tuple[StepFact, ...]
    gate: str = ""

    @property
    def keys(self) -> list[str]:
        """The ledger keys of all its steps."""
        return [key for step in self.steps for key in step.keys]


@dataclass(frozen=True, slots=True)
class ReadOnly:
    """When users were shut out, and let in again; None while that has not happened."""

    since: Moment | None = None
    until: Moment | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What the page needs beside the state.

    Attributes:
        now: by both clocks.
        phases: forward, then rollback and review.
        gates: the params' rules by gate, and who may approve each.
        window: the announced window in epoch seconds; None before it is known.
        window_fixed: the params name its hour: its end binds, as the budget does.
        budget_s: how long users may be shut out, in seconds.
        way_back_s: how long the whole way back is expected to take, in seconds.
        at_work: who holds the run's lease and lives; empty when nobody does.
        lost: who holds it and is gone, or cannot be looked at from here.
        progress: lines of long effects.
        checks: names of the manual spot checks.
        edited: which notebooks are not what the run was opened with, a sentence each.
        may_settle: who may settle each step that is in doubt.
        record: the run's folder.
        sealed: the record is sealed.
        review_signed: the review is, beside it.
        trouble: what else must be seen, such as a ledger that does not answer.
    """

    now: Moment
    phases: tuple[PhaseFact, ...]
    gates: Mapping[str, tuple[GateRule, tuple[str, ...]]]
    window: tuple[float, float] | None = None
    window_fixed: bool = False
    budget_s: float = 600.0
    way_back_s: float = 0.0
    read_only: ReadOnly = field(default_factory=ReadOnly)
    at_work: str = ""
    lost: str = ""
    progress: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()
    edited: tuple[str, ...] = ()
    may_settle: Mapping[str, Sequence[str]] = field(default_factory=dict)
    record: str = ""
    sealed: bool = False
    review_signed: bool = False
    trouble: tuple[str, ...] = ()

    @property
    def forward(self) -> tuple[PhaseFact, ...]:
        """The phases of the way forth."""
        return tuple(phase for phase in self.phases if phase.name not in ("rollback", "review"))


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a phase or a run stands: a mark, a word and a tone say the same."""

    mark: str
    word: str
    tone: str
    more: str = ""

    @property
    def pill(self) -> str:
        """The mark and the word, coloured."""
        return f'<span class="pill {self.tone}">{self.mark} {text(self.word)}</span>'


_LATE_S = 300.0  # from five minutes before the latest safe moment on, the clock is orange


def read_only(events: Sequence[Event], *, before_watch: bool) -> ReadOnly:
    """When users were shut out first, and when they were let in again, from a run's events.

    Args:
        events: oldest first.
        before_watch: the params let users in before the watch.
    """
    since: Moment | None = None
    until: Moment | None = None
    for event in events:
        key = event.data.get("step", "")
        if event.kind == "step_intent" and key == "begin.enable_maintenance" and since is None:
            since = event.moment
        if event.kind != "step_outcome" or event.data["status"] != "green" or since is None:
            continue
        if key in _LETS_IN or (before_watch and key == "verify.open_for_users"):
            until = until or event.moment
        elif key == "rollback.close_for_users" and event.data["result"]["facts"].get("read-only mode") != "as it is":
            since, until = (event.moment, None) if until is not None else (since, None)
    return ReadOnly(since, until)


_LETS_IN = ("complete.lift_maintenance", "rollback.lift_fence_and_maintenance")


def next_phase(state: RunState, facts: Facts) -> str:
    """The phase that is run next: the first that is not green; empty when all are, or when the run has ended."""
    if state.ended:
        return ""
    phases = facts.forward if state.rollback is None else [p for p in facts.phases if p.name == "rollback"]
    return next((p.name for p in phases if not all(state.green(key) for key in p.keys)), "")


def open_gate(state: RunState, facts: Facts) -> str:
    """The gate that waits for people, or an empty string."""
    if state.ended or state.rollback is not None or state.rejected_gate:
        return ""
    for phase in facts.forward:
        now = state.gate(phase.gate) if phase.gate else None
        if now is not None and now.round and not now.timed_out and not state.green(f"{phase.name}.sign_off"):
            return phase.gate
    return ""


def signed(state: RunState, facts: Facts, gate: str) -> bool:
    """True when a gate has as many approvals as it asks for: a look at it passes it, if they stand."""
    people = {d["person"] for d in state.gate(gate).decisions if d["decision"] == "approve"}
    return len(people) >= facts.gates[gate][0].quorum


def standing(state: RunState, facts: Facts) -> Standing:
    """Where the run stands, for the one line that is read aloud; it holds nothing that ticks."""
    running = [key for key, step in state.steps.items() if step.status is Status.RUNNING]
    gate, phase = open_gate(state, facts), next_phase(state, facts)
    if state.ended:
        tone = {"completed": "good", "rolled_back": "warn"}.get(state.ended, "bad")
        mark = "✔" if state.ended == "completed" else "✖"
        return Standing(mark, state.ended.replace("_", " "), tone, "the record is sealed" if facts.sealed else "")
    if in_doubt(state):
        return Standing("?", "in doubt", "bad", f"{', '.join(in_doubt(state))}: somebody must look and sign")
    if running and facts.at_work:
        return Standing("●", "running", "plain", ", ".join(_title(facts, key) for key in running))
    if running:
        return Standing("?", "cut off", "bad", f"{', '.join(running)} was begun, and who did it is gone: run the phase")
    if facts.at_work and not gate:
        return Standing("●", "running", "plain", f"{facts.at_work}, phase {state.phase}")
    if state.rejected_gate and state.rollback is None:
        return Standing("✖", "rejected", "bad", f"gate {state.rejected_gate}: roll back or abort")
    if failing(state):
        return Standing("✖", "failed", "bad", ", ".join(failing(state)))
    if gate:
        rule, _ = facts.gates[gate]
        if signed(state, facts, gate):
            return Standing("○", "paused", "warn", f"{rule.title} is signed: pass it")
        return Standing("?", "waits for people", "warn", f"{rule.title}: {' or '.join(rule.roles)}")
    if not phase:
        return Standing("✔", "all phases are green", "good", "end and seal it")
    return Standing("○", "paused", "warn", f"next: {phase}")


def phase_standing(state: RunState, facts: Facts, phase: PhaseFact) -> Standing:
    """Where a phase stands."""
    steps = [state.step(key) for key in phase.keys]
    green = sum(step.status is Status.GREEN for step in steps)
    some = f"{green} of {len(steps)}" if green else ""
    if steps and green == len(steps):
        return Standing("✔", "done", "good")
    if any(step.status is Status.BLOCKED for step in steps):
        return Standing("?", "in doubt", "bad", some)
    if any(step.status is Status.RUNNING for step in steps):
        return Standing("●", "at work", "live", some) if facts.at_work else Standing("?", "cut off", "bad", some)
    if any(step.status is Status.FAILED for step in steps):
        return Standing("✖", "failed", "bad", some)
    if phase.gate and state.rejected_gate == phase.gate:
        return Standing("✖", "rejected", "bad", some)
    if phase.gate and open_gate(state, facts) == phase.gate:
        word = "gate signed" if signed(state, facts, phase.gate) else "gate open"
        return Standing("?", word, "warn", some)
    if state.ended or (state.rollback is not None and phase.name not in ("rollback", "review")):
        review = phase.name == "review"
        return Standing("○", "not yet" if review else "not done", "plain", "" if review else some)
    if green or phase.name == _current(state, facts):
        return Standing("●", "at work", "live", some) if facts.at_work else Standing("○", "next", "warn", some)
    return Standing("○", "not yet", "plain")


def _current(state: RunState, facts: Facts) -> str:
    if state.ended:
        return "" if any(key.startswith("review.") for key in state.steps) else "review"
    return next_phase(state, facts)


# --- the page ----------------------------------------------------------------------------------------------------

_STYLE = (
    ".rb .desk{max-width:1240px}.rb .desk h2{font-size:18px;margin:0;line-height:1.3}"
    ".rb .desk h3{font-size:13.5px;margin:0 0 2px;line-height:1.4}"
    ".rb .hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}"
    ".rb .what{font-size:12.5px;color:var(--soft);margin:0 0 4px;overflow-wrap:anywhere}.rb .what b{color:var(--text)}"
    ".rb .state{margin:4px 0 6px}.rb .live{color:var(--link);background:var(--code)}"
    ".rb .rail{display:flex;gap:4px;list-style:none;margin:0 0 6px;padding:0}"
    ".rb .rail li{flex:1 1 0;min-width:0;margin:0;padding:4px 4px 5px;border-top:4px solid var(--line);background:var(--card)}"
    ".rb .rail li.good{border-color:var(--bar);color:inherit}.rb .rail li.bad{border-color:var(--bad);color:inherit}"
    ".rb .rail li.warn{border-color:var(--warn);color:inherit}.rb .rail li.live{border-color:var(--link);color:inherit}"
    ".rb .rail li[aria-current]{outline:2px solid var(--link);outline-offset:-1px}"
    ".rb .rail strong{display:block;font-size:12.5px}.rb .rail .pill{font-size:11.5px;padding:0 6px}"
    ".rb .rail small{display:block;color:var(--soft);font-size:11px}"
    ".rb .desk table{width:100%;font-size:12.5px}.rb .desk th,.rb .desk td{padding:2px 8px 2px 0;line-height:1.35;"
    "border-bottom:1px solid var(--line);color:var(--text)}.rb .desk thead th{white-space:nowrap;color:var(--soft);font-size:11.5px}"
    ".rb .desk tbody th{font-weight:500}.rb .desk td .soft{display:-webkit-box;-webkit-line-clamp:2;"
    "-webkit-box-orient:vertical;overflow:hidden;font-size:11.5px}.rb .desk td .pill{font-size:11.5px;padding:0 7px}"
    ".rb .desk td code{white-space:nowrap;padding:0 3px;font-size:11.5px}"
    ".rb .box{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:6px 10px;margin:0 0 6px}"
    ".rb .box p{font-size:12.5px;margin:0 0 3px}.rb .box table th{color:var(--soft);white-space:nowrap;width:1%}"
    ".rb .box tr:last-child>*{border-bottom:0}.rb .box td{overflow-wrap:anywhere}.rb .box ul{margin:0;padding-left:16px;font-size:12.5px}"
    ".rb .box progress{width:100%;height:8px;display:block;accent-color:var(--bar)}"
    ".rb .cols{display:grid;grid-template-columns:minmax(0,11fr) minmax(0,9fr);gap:8px}"
)


def parts(state: RunState, facts: Facts) -> tuple[str, str, str]:
    """The page in three regions, each of which changes on its own: the head with the rail, the checklist with the ways on, what ticks."""
    return _output(_head(state, facts)), _output(_still(state, facts)), _output(_moving(state, facts))


def desk_html(state: RunState, facts: Facts) -> str:
    """The whole page as one output of a notebook.

    Args:
        state: where the run stands.
        facts: what the ledger does not say.
    """
    left, right = _still(state, facts), _moving(state, facts)
    return _output(f'{_head(state, facts)}<div class="cols"><div>{left}</div><div>{right}</div></div>')


def _output(body: str) -> str:
    return output(f'<div class="desk">{body}</div>', more_style=_STYLE)


def _head(state: RunState, facts: Facts) -> str:
    opened, stands = state.opened, standing(state, facts)
    more = f" {text(stands.more)}" if stands.more else ""
    review = any(key.startswith("review.") for key in state.steps)
    shown = [p for p in facts.phases if p.name != "rollback" or state.rollback is not None]
    current = _current(state, facts)
    items = []
    for phase in shown:
        now = phase_standing(state, facts, phase)
        here = ' aria-current="step"' if phase.name == current and not (phase.name == "review" and review) else ""
        count = f"<small>{text(now.more)}</small>" if now.more else ""
        items.append(
            f'<li class="{now.tone}"{here}><strong>{text(phase.name)}<span class="hidden">: </span></strong>'
            f"{now.pill}{count}</li>"
        )
    return (
        f"<h2>{text(opened.get('version', ''))} to {text(opened.get('environment', ''))}</h2>"
        f'<p class="what">commit <code>{text(str(opened.get("commit", ""))[:12])}</code> · before '
        f"<b>{text(opened.get('previous_version', ''))}</b> · run <code>{text(state.run_id)}</code> · opened "
        f"{moment(state.opened_time)} by <b>{text(opened.get('opened_by', ''))}</b></p>"
        f'<p class="state" aria-live="polite"><span class="hidden">State: </span>{stands.pill}{more}</p>'
        f'<h3 class="hidden">Phases</h3><ol class="rail">{"".join(items)}</ol>'
    )


def _still(state: RunState, facts: Facts) -> str:
    menu = _menu(state, facts)
    # When something is wrong the ways on come first: the whole checklist may not fit on the screen below them.
    return (f'<div class="box">{menu}</div>' if menu else "") + f"<h3>Checklist</h3>{checklist_html(state)}"


def _moving(state: RunState, facts: Facts) -> str:
    boxes = (
        _warnings(state, facts),
        _gate(state, facts),
        _clock(state, facts),
        _now(state, facts),
        _record(state, facts),
    )
    return "".join(f'<div class="box">{box}</div>' for box in boxes if box)


def _warnings(state: RunState, facts: Facts) -> str:
    said = [*facts.trouble]
    if facts.lost:
        said.append(facts.lost)
    said += [f"{key} is in doubt: {state.step(key).error.partition('. Next: ')[0]}" for key in in_doubt(state)]
    said += [f"the clock {jump}" for jump in clock_jumps(state)]
    said += facts.edited
    if not said:
        return ""
    return f"<h3>! Warnings</h3><ul>{''.join(f'<li class=why>{text(_short(line))}</li>' for line in said)}</ul>"


def _gate(state: RunState, facts: Facts) -> str:
    name = open_gate(state, facts)
    if not name:
        return _spot_checks(state, facts)
    rule, may_sign = facts.gates[name]
    now = state.gate(name)
    phase = next(p for p in facts.forward if p.gate == name)
    approved = [str(d["person"]) for d in now.decisions if d["decision"] == "approve"]
    left = rule.timeout_s - facts.now.since(now.opened_moment)
    time_left = seconds(left) if left > 0 else "none: the next look closes it, and resume asks again"
    return f"<h3>? {text(rule.title)}</h3><p>{text(rule.asks)}</p>" + _table(
        ("Signed", f"{len(approved)} of {rule.quorum}" + (f": {', '.join(approved)}" if approved else "")),
        ("May sign", f"{', '.join(may_sign) or 'nobody'} ({' or '.join(rule.roles)})"),
        ("Time left", time_left),
        ("Where", f"the last cell of {phase.notebook}, or: runbook gate"),
    )


def _spot_checks(state: RunState, facts: Facts) -> str:
    if state.ended or state.rollback is not None or not state.green("verify.smoke_tests"):
        return ""
    if state.green("verify.spot_checks"):
        return ""
    rows = [
        (name, "not yet" if name not in state.checks else _check(state.checks[name]["passed"], state, name))
        for name in facts.checks
    ]
    return f"<h3>? Spot checks</h3>{_table(*rows)}" if rows else ""


def _check(passed: bool, state: RunState, name: str) -> str:  # noqa: FBT001
    return f"{'✔ passed' if passed else '✖ failed'}, {state.checks[name]['person']}"


def _clock(state: RunState, facts: Facts) -> str:
    closed = facts.read_only
    if closed.since is None:
        if state.ended:
            return "<h3>Maintenance clock</h3><p>Users were never shut out.</p>"
        rows = [("Announced", _span(facts.window) if facts.window else "not yet")]
        if facts.window and facts.window_fixed and (ahead := facts.window[0] - facts.now.wall_s) > 0:
            rows.append(("Opens in", seconds(ahead)))
        rows.append(("Budget", f"{seconds(facts.budget_s)} read-only; way back about {seconds(facts.way_back_s)}"))
        return f"<h3>Maintenance clock: not begun</h3>{_table(*rows)}"
    elapsed = (closed.until or facts.now).since(closed.since)
    share = f"{seconds(elapsed)} of {seconds(facts.budget_s)}"
    over = elapsed > facts.budget_s
    if closed.until is not None:
        word = (
            f'<span class="pill {"warn" if over else "good"}">{"! over budget" if over else "✔ within budget"}</span>'
        )
        return f"<h3>Maintenance clock: ended {word}</h3>" + _table(
            ("Read-only", share), ("From", _wall(closed.since.wall_s)), ("To", _wall(closed.until.wall_s))
        )
    # By the time that has passed, not by what the wall clock was then: somebody may have set it.
    end = facts.now.wall_s + facts.budget_s - elapsed
    bound = "budget"
    if facts.window is not None and facts.window_fixed and facts.window[1] < end:
        end, bound = facts.window[1], "announced window"
    spare = end - facts.way_back_s - facts.now.wall_s
    tone, word = (
        ("bad", "✖ too late")
        if spare <= 0
        else ("warn", "! soon too late")
        if spare < _LATE_S
        else ("good", "✔ in time")
    )
    safe = _wall(end - facts.way_back_s) + (f", in {seconds(spare)}" if spare > 0 else f", {seconds(-spare)} ago")
    value = min(elapsed, facts.budget_s)
    return (
        f'<h3>Maintenance clock: read-only <span class="pill {tone}">{word}</span></h3>'
        f'<progress aria-label="Read-only time used" max="{facts.budget_s:.0f}" value="{value:.0f}"></progress>'
        + _table(
            ("Elapsed", share + (" (over budget)" if over else "")),
            ("Latest safe way back", safe),
            ("Ends", f"{_wall(end)} ({bound}), way back about {seconds(facts.way_back_s)}"),
        )
    )


def _now(state: RunState, facts: Facts) -> str:
    rows = []
    for phase in facts.phases:
        for step in phase.steps:
            running = [key for key in step.keys if state.step(key).status is Status.RUNNING]
            if running:
                rows += _running(state, facts, step, running)
    rows += [("Progress", line) for line in facts.progress]
    if facts.at_work:
        rows.append(("At work", facts.at_work))
    if not rows:
        return ""
    return f"<h3>Now</h3>{_table(*rows)}"


def _running(state: RunState, facts: Facts, step: StepFact, running: Sequence[str]) -> list[tuple[str, str]]:
    begun = min((state.step(key) for key in running), key=lambda s: s.intent_time)
    passed = max(0.0, facts.now.since(_moment(begun)))
    expected = step.expected_s / len(step.keys) if len(running) == 1 else step.expected_s
    rows = [("Step", f"{step.title} ({step.owner})")]
    if len(step.keys) > 1:
        done = sum(state.green(key) for key in step.keys)
        at = ", ".join(key.partition("@")[2] for key in running)
        rows.append(("Hosts", f"{done} of {len(step.keys)} done, at {at}"))
    rows.append(("Since", f"{_clock_of(begun.intent_time)}: {seconds(passed)}, expected about {seconds(expected)}"))
    return rows


def _menu(state: RunState, facts: Facts) -> str:
    if facts.at_work:
        return ""
    moves = failure_menu(state, facts.may_settle)
    if not moves:
        return ""
    failed = [f"{key}: {_short(state.step(key).error)}" for key in failing(state)]
    said = "".join(f'<p class="why">{text(line)}</p>' for line in failed)
    commands = "\n".join(move.command for move in moves)
    return (
        f"<h3>What can be done</h3>{said}<p>No step can be skipped.</p>{_table(*((m.label, m.why) for m in moves))}"
        f"<details><summary>The same as commands</summary><pre>{text(commands)}</pre></details>"
    )


def _record(state: RunState, facts: Facts) -> str:
    if not state.ended:
        return ""
    rows = [
        ("Ended", state.ended_time[:19].replace("T", " ") + " UTC"),
        ("Record", f"{facts.record}/index.html" if facts.sealed else f"{facts.record} (not sealed yet)"),
    ]
    if any(key.startswith("review.") for key in state.steps):
        rows.append(("Review", f"{facts.record}/review"))
    return f"<h3>Record</h3>{_table(*rows)}"


def _table(*rows: tuple[str, str]) -> str:
    body = "".join(f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>' for name, value in rows)
    return f"<table>{body}</table>"


def _title(facts: Facts, key: str) -> str:
    return next((s.title for p in facts.phases for s in p.steps if key in s.keys), key) + f" ({key})"


def _moment(step: StepState) -> Moment:
    return Moment.of(step.intent_time, step.intent.get("clock", {}))


def _wall(epoch: float) -> str:
    return f"{datetime.fromtimestamp(epoch, UTC):%H:%M:%S} UTC"


def _clock_of(time: str) -> str:
    return time[11:19] + " UTC"


def _span(window: tuple[float, float]) -> str:
    start, end = (datetime.fromtimestamp(at, UTC) for at in window)
    return f"{start:%Y-%m-%d %H:%M} to {end:%H:%M} UTC"


def _short(value: str, *, characters: int = 220) -> str:
    line = " ".join(value.split())
    return line if len(line) <= characters else line[: characters - 1] + "…"
