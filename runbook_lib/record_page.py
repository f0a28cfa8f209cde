"""The release record's front page: what happened, who decided, what proves it; pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from runbook_lib.clock import epoch_s
from runbook_lib.model import Event, shown
from runbook_lib.pages import moment, page, pill, seconds, size, text
from runbook_lib.render import checklist_html, clock_jumps
from runbook_lib.state import RunState

_GATE_TITLES = {"backup": "Gate 1 · backup", "migration": "Gate 2 · migration", "release": "Gate 3 · release"}


@dataclass(frozen=True, slots=True)
class FileFact:
    """A file of the record: its digest and its size in bytes."""

    sha256: str
    size_bytes: int


@dataclass(slots=True)
class _Span:
    """One attempt of a step, or one round of a gate, in the timeline."""

    key: str
    phase: str
    title: str
    start: str
    end: str = ""
    status: str = "running"
    duration_s: float | None = None
    note: str = ""
    attempt: int = 1


@dataclass(slots=True)
class _Round:
    """One round of a gate with its decisions."""

    opened: Event
    decisions: list[Event] = field(default_factory=list)
    timed_out: str = ""


def record_html(state: RunState, events: Sequence[Event], files: Mapping[str, FileFact]) -> str:
    """The page index.html of a record.

    Args:
        state: the fold of the events.
        events: the run's events, oldest first.
        files: the record's files by their path in it, without those that are made after this page.
    """
    rounds = _rounds(events)
    sections = [
        _outcome(state, events),
        '<div class="two"><div>',
        _card("checklist", "Checklist", checklist_html(state)),
        _notebooks(files),
        "</div>",
        _card(
            "gates", "Gates", "".join(_gate(name, its) for name, its in rounds.items()) or "<p>No gate was reached.</p>"
        ),
        "</div>",
        _spot_checks(events),
        _charts(state, files),
        _timeline(events, rounds),
        _artifacts(files),
        _proof(state, files),
    ]
    opened = state.opened
    version, environment = str(opened.get("version", "")), str(opened.get("environment", ""))
    return page(
        f"{version} to {environment}: {state.status}", _header(state) + f'<main id="main">{"".join(sections)}</main>'
    )


def _header(state: RunState) -> str:
    opened = state.opened
    begun, ended = state.opened_time, state.ended_time
    took = seconds(epoch_s(ended) - epoch_s(begun)) if begun and ended else "–"
    facts = {
        "Commit": f"<code>{text(str(opened.get('commit', ''))[:12])}</code>",
        "Before": f"{text(opened.get('previous_version', ''))} <code>{text(str(opened.get('previous_commit', ''))[:12])}</code>",
        "Opened": f"{moment(begun)} by {text(opened.get('opened_by', ''))}",
        "Ended": moment(ended),
        "Took": took,
        "Run": f"<code>{text(state.run_id)}</code>",
    }
    shown_facts = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    return (
        f"<header><h1>{text(opened.get('version', ''))} to {text(opened.get('environment', ''))} "
        f'{pill(state.status)}</h1><p class="soft">Release record</p><dl class="facts">{shown_facts}</dl></header>'
    )


def _card(name: str, title: str, body: str) -> str:
    return f'<section class="card" aria-labelledby="{name}"><h2 id="{name}">{text(title)}</h2>{body}</section>'


def _outcome(state: RunState, events: Sequence[Event]) -> str:
    """Why a run did not simply complete; nothing for one that did."""
    parts = []
    if state.rollback is not None:
        parts.append(
            f"<p>The way back was taken: {text(str(state.rollback.get('reason', '')).partition('. Next: ')[0])}</p>"
        )
    for event in events:
        if event.kind == "run_ended":
            rest = {key: value for key, value in event.data.items() if key not in ("state", "epoch", "clock")}
            parts += [f"<p>{text(key.replace('_', ' '))}: {text(shown(value))}</p>" for key, value in rest.items()]
    parts += [f"<p>The clock {text(said)}</p>" for said in clock_jumps(state)]
    return _card("outcome", "How it ended", "".join(parts)) if parts else ""


def _rounds(events: Iterable[Event]) -> dict[str, list[_Round]]:
    gates: dict[str, list[_Round]] = {}
    for event in events:
        if event.kind == "gate_opened":
            gates.setdefault(event.data["gate"], []).append(_Round(event))
        elif event.kind == "gate_decision" and event.data["gate"] in gates:
            gates[event.data["gate"]][-1].decisions.append(event)
        elif event.kind == "gate_timed_out" and event.data["gate"] in gates:
            gates[event.data["gate"]][-1].timed_out = event.time
    return gates


def _standing(now: _Round) -> tuple[str, str]:
    said = [event.data["decision"] for event in now.decisions]
    if "reject" in said:
        return "rejected", "bad"
    if said.count("approve") >= int(now.opened.data.get("quorum", 1)):
        return "approved", "good"
    return ("timed out", "bad") if now.timed_out else ("not decided", "plain")


def _gate(name: str, rounds: Sequence[_Round]) -> str:
    word, tone = _standing(rounds[-1])
    parts = [f"<h3>{text(_GATE_TITLES.get(name, name))} {pill(word, tone=tone)}</h3>"]
    for now in reversed(rounds):
        data = now.opened.data
        evidence = data["evidence"]
        path = str(evidence["path"])
        label = f"Round {data['round']}" + ("" if now is rounds[-1] else f" (superseded, {_standing(now)[0]})")
        parts.append(
            f'<p class="soft">{text(label)}: asked {moment(now.opened.time)}, {text(data.get("quorum", 1))} of '
            f"{text(_roles(data, ' or '))}<br>"
            f'<a href="{_href(path)}">Evidence</a> of {text(evidence.get("cards", "–"))} cards, sha256 <code>{text(str(evidence["sha256"])[:16])}…</code></p>'
        )
        parts += [_decision(event) for event in now.decisions]
    return "".join(parts)


def _roles(data: Mapping[str, Any], between: str) -> str:
    return between.join(str(role).replace("_", " ") for role in data.get("roles", []))


def _decision(event: Event) -> str:
    data = event.data
    approve = data["decision"] == "approve"
    roles = _roles(data, ", ")
    word = pill("✔ approved" if approve else "✖ rejected", tone="good" if approve else "bad")
    comment = f"<blockquote>{text(data['comment'])}</blockquote>" if data.get("comment") else ""
    return (
        f"<p>{word} <strong>{text(data['person'])}</strong> ({text(roles)}), {moment(event.time)} · "
        f'<a href="{_href(str(data["statement"]))}">signed statement</a></p>{comment}'
    )


def _spot_checks(events: Iterable[Event]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{text(e.data["check"])}</th>'
        f"<td>{pill('✔ passed', tone='good') if e.data['passed'] else pill('✖ failed', tone='bad')}</td>"
        f"<td>{text(e.data['person'])}</td><td>{moment(e.time)}</td><td>{text(e.data.get('note', ''))}</td>"
        f'<td><a href="{_href(str(e.data["statement"]))}">signed statement</a></td></tr>'
        for e in events
        if e.kind == "check_recorded"
    )
    heads = _heads("Check", "Result", "Person", "Recorded", "Note", "Proof")
    return (
        _card("checks", "Manual spot checks", f'<div class="wide"><table>{heads}<tbody>{rows}</tbody></table></div>')
        if rows
        else ""
    )


def _charts(state: RunState, files: Mapping[str, FileFact]) -> str:
    figures = []
    for path in sorted(p for p in files if p.startswith("artifacts/") and p.endswith(".png")):
        name = path.rpartition("/")[2].removesuffix(".png").replace("_", " ").replace("-", " ")
        data = path.removesuffix(".png") + ".csv"
        link = f' · <a href="{_href(data)}">its data</a>' if data in files else ""
        figures.append(
            f'<figure><img src="{_href(path)}" alt="{text(_alt(state, path, name))}" loading="lazy">'
            f"<figcaption>{text(name)}{link}</figcaption></figure>"
        )
    if not figures:
        return ""
    watch = state.step("verify.watch_telemetry").result
    facts = (
        ""
        if watch is None
        else "".join(
            f"<div><dt>{text(name.replace('_', ' '))}</dt><dd>{text(shown(value)[:300])}</dd></div>"
            for name, value in watch.facts.items()
        )
    )
    verdict = (
        "" if watch is None else f'<p>Verdict of the watch: {pill(watch.verdict)}</p><dl class="facts">{facts}</dl><br>'
    )
    return _card("charts", "Telemetry", f'{verdict}<div class="charts">{"".join(figures)}</div>')


def _alt(state: RunState, path: str, name: str) -> str:
    watch = state.step("verify.watch_telemetry").result
    if watch is None or not path.startswith("artifacts/watch/"):
        return f"Chart: {name}"
    return f"Chart of the telemetry watch: {name}, baseline and current window; the verdict of the watch is {watch.verdict}"


def _timeline(events: Sequence[Event], rounds: Mapping[str, Sequence[_Round]]) -> str:
    spans = _spans(events, rounds)
    if not spans:
        return ""
    first = min(epoch_s(span.start) for span in spans)
    whole_s = max(max(epoch_s(span.end or span.start) for span in spans) - first, 0.001)
    rows, phase = [], ""
    for span in spans:
        if span.phase != phase:
            phase = span.phase
            its = [s for s in spans if s.phase == phase]
            took_s = max(epoch_s(s.end or s.start) for s in its) - min(epoch_s(s.start) for s in its)
            rows.append(
                f'<tr class="row-phase"><th colspan="3" scope="rowgroup">{text(phase)}</th>'
                f'<th class="n">{text(seconds(took_s))}</th><th></th></tr>'
            )
        rows.append(_span_row(span, first, whole_s))
    heads = (
        '<thead><tr><th scope="col">Step</th><th scope="col">State</th><th scope="col">Began (UTC)</th>'
        '<th scope="col" class="n">Took</th><th scope="col" class="lane">When</th></tr></thead>'
    )
    return _card(
        "timeline", "Timeline", f'<div class="wide"><table>{heads}<tbody>{"".join(rows)}</tbody></table></div>'
    )


def _span_row(span: _Span, first: float, whole_s: float) -> str:
    begin = epoch_s(span.start)
    end = epoch_s(span.end) if span.end else begin
    left, width = 1000 * (begin - first) / whole_s, max(1000 * (end - begin) / whole_s, 4)
    tone = {"green": "done", "approved": "done", "failed": "failed", "rejected": "failed"}.get(span.status, "open")
    # The bar only repeats the two columns before it: screen readers pass over it.
    lane = (
        '<svg viewBox="0 0 1000 16" preserveAspectRatio="none" aria-hidden="true"><rect class="track" width="1000" height="16"/>'
        f'<rect class="{tone}" x="{min(left, 996):.1f}" width="{min(width, 1000):.1f}" height="16"/></svg>'
    )
    again = f" (attempt {span.attempt})" if span.attempt > 1 else ""
    target = span.key.partition("@")[2]
    note = f'<br><span class="why">{text(span.note[:600])}</span>' if span.note else ""
    took = seconds(span.duration_s if span.duration_s is not None else end - begin)
    return (
        f'<tr><th scope="row">{text(span.title)}{text(f" on {target}" if target else "")}{text(again)}{note}</th>'
        f"<td>{pill(span.status)}</td><td>{text(span.start[11:19])}</td>"
        f'<td class="n">{text(took)}</td><td class="lane">{lane}</td></tr>'
    )


def _spans(events: Iterable[Event], rounds: Mapping[str, Sequence[_Round]]) -> list[_Span]:
    spans: list[_Span] = []
    last: dict[str, _Span] = {}
    phase_of_gate: dict[str, str] = {}
    phase = ""
    for event in events:
        data = event.data
        if event.kind == "phase_started":
            phase = str(data["phase"])
        elif event.kind == "gate_opened":
            phase_of_gate.setdefault(data["gate"], phase)
        elif event.kind == "step_intent":
            key = str(data["step"])
            span = _Span(
                key, key.partition(".")[0], str(data.get("title", key)), event.time, attempt=int(data.get("attempt", 1))
            )
            last[key] = span
            spans.append(span)
        elif event.kind in ("step_outcome", "step_reset", "step_blocked") and data["step"] in last:
            _finish(last[data["step"]], event)
    for name, its in rounds.items():
        for now in its:
            end = now.timed_out or (now.decisions[-1].time if now.decisions else "")
            number = now.opened.data["round"]
            title = f"{_GATE_TITLES.get(name, name)}: people decide" + (f" (round {number})" if number > 1 else "")
            spans.append(
                _Span(f"gate {name}", phase_of_gate.get(name, ""), title, now.opened.time, end, _standing(now)[0])
            )
    phases = list(dict.fromkeys(span.phase for span in spans if span.phase))
    return sorted(spans, key=lambda span: (phases.index(span.phase) if span.phase in phases else -1, span.start))


def _finish(span: _Span, event: Event) -> None:
    data: Mapping[str, Any] = event.data
    span.end = event.time
    if event.kind == "step_outcome":
        span.status = str(data["status"])
        # A probe settles in no time what began before a crash: then the ledger's own times tell more.
        span.duration_s = float(data.get("duration_s", 0.0)) or None
        span.note = str(data.get("error", "")).partition(". Next: ")[0]
        if data.get("settled_by"):
            span.note = f"settled by {data['settled_by']}"
    else:
        span.status = "blocked" if event.kind == "step_blocked" else "interrupted"
        span.note = str(data.get("why", ""))


def _notebooks(files: Mapping[str, FileFact]) -> str:
    items = []
    for path in sorted(files):
        if path.startswith("html/"):
            source = "notebooks/" + path.removeprefix("html/").removesuffix(".html") + ".ipynb"
            extra = f' <span class="soft">(<a href="{_href(source)}">.ipynb</a>)</span>' if source in files else ""
            name = path.removeprefix("html/").removesuffix(".html")
            items.append(f'<li><a href="{_href(path)}">{text(name)}</a>{extra}</li>')
    return _card("notebooks", "Notebooks, as they ran", f'<ul class="flat">{"".join(items)}</ul>') if items else ""


def _artifacts(files: Mapping[str, FileFact]) -> str:
    rows = "".join(
        f'<tr><th scope="row"><a href="{_href(path)}">{text(path)}</a></th><td class="n">{size(fact.size_bytes)}</td>'
        f"<td><code>{text(fact.sha256)}</code></td></tr>"
        for path, fact in sorted(files.items())
        if not path.startswith(("html/", "logs/"))
    )
    logs = sum(path.startswith("logs/") for path in files)
    note = f'<p class="soft">and {logs} command logs under <code>logs/</code>, listed in SHA256SUMS</p>' if logs else ""
    heads = '<thead><tr><th scope="col">File</th><th scope="col" class="n">Size</th><th scope="col">SHA-256</th></tr></thead>'
    return _card(
        "files", "Files and their digests", f'<div class="wide"><table>{heads}<tbody>{rows}</tbody></table></div>{note}'
    )


def _proof(state: RunState, files: Mapping[str, FileFact]) -> str:
    facts = {
        "Ledger": f"{state.seq} events, head <code>{text(state.head)}</code>",
        "Parameters": f"<code>{text(state.opened.get('params_sha256', ''))}</code>",
        "Plan": f"<code>{text(state.plan_digest)}</code>" if state.plan_digest else "–",
        "Files": f"{len(files)} beside this page",
    }
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    commands = (
        "runbook verify . --trust ALLOWED_SIGNERS\n\n"
        "# or with public tools alone\n"
        "sha256sum --check --strict SHA256SUMS\n"
        "ssh-keygen -Y verify -f ALLOWED_SIGNERS -I recorder -n runbook-record -s statement.json.sig &lt; statement.json"
    )
    return _card(
        "proof",
        "How to verify this record",
        f'<p>This page is a view. What counts is signed in <a href="statement.json">statement.json</a>.</p>'
        f'<pre tabindex="0">{commands}</pre><dl class="facts">{listed}</dl>',
    )


def _heads(*names: str) -> str:
    return "<thead><tr>" + "".join(f'<th scope="col">{text(name)}</th>' for name in names) + "</tr></thead>"


def _href(path: str) -> str:
    # "./" keeps a path whose first part has a colon from being read as a URL with a scheme.
    return "./" + quote(path)
