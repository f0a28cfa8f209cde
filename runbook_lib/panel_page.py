"""The panels of gates and spot checks as HTML: what a living panel shows, and its twin for a notebook without kernel; pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from runbook_lib.model import shown
from runbook_lib.pages import moment, output, pill, seconds, text

_SUMMARY_CHARACTERS = 240
_MEANING = {"green": "proved good", "red": "nobody can approve this", "inconclusive": "not proved good: look closely"}
PAST = {"approve": "approved", "reject": "rejected"}
ELSEWHERE = (
    "Or sign on another machine, with the key that lies there: copy the command; this panel sees the decision arrive."
)
CHECK_ELSEWHERE = (
    "Or record it on another machine, with the key that lies there; --fail instead of --pass when it failed."
)
# What is pressed and filled in lies outside of `.rb`, in ipywidgets' own elements.
_STYLE = (
    ".rb ul.cards{list-style:none;margin:4px 0;padding:0;display:grid;gap:6px;max-width:1000px;"
    "grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr))}.rb ul.cards>.card{margin:0;min-width:0}"
    ".rb h4{font-size:16px;margin:0 0 4px;color:var(--text)}.rb .card p,.rb .card td,.rb dd{overflow-wrap:anywhere}"
    ".rb dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:2px 14px;margin:6px 0}.rb dt{color:var(--soft)}"
    ".rb dt,.rb dd{float:none;width:auto;margin:0;padding:0;font-weight:400}.rb dd ul{list-style:none;margin:0;padding:0}"
    ".rb .digest{font-size:11.5px;color:var(--soft)}.rb .note{margin:0 0 4px 140px}"
    ".rb [role=status],.rb [role=alert]{padding:6px 10px;border-radius:6px;margin:4px 0;max-width:1000px;overflow-wrap:anywhere}"
    ".rb-panel{max-width:1020px;overflow:visible}.rb-panel .widget-html,.rb-panel .widget-html-content{min-width:0;max-width:100%}"
    ".rb-panel .jupyter-button{height:32px;line-height:20px;font-weight:600}"
    ".rb-panel button:focus-visible,.rb-panel input:focus-visible,.rb-panel select:focus-visible,.rb-panel summary:focus-visible"
    "{outline:3px solid #4a90e2;outline-offset:2px}"
)


def gate_head(facts: Mapping[str, Any], cards: Sequence[Mapping[str, Any]]) -> str:
    """Question, evidence, people: `facts` as `gate.show` gives them, `cards` the round's whole evidence."""
    return _page(
        f"<h4>{text(facts['title'])}</h4><p>{text(facts['asks'])}</p>"
        f"<p class='soft'>Round {facts['round']} · {len(cards)} pieces of evidence · sha256 "
        f"<code class='digest'>{text(facts['evidence_sha256'])}</code> · check code <code>{text(facts['check_code'])}</code></p>"
        f"<ul class='cards'>{''.join(map(_card, cards))}</ul>{_people(facts)}"
    )


def _card(card: Mapping[str, Any]) -> str:
    verdict = str(card["verdict"])
    summary = str(card["summary"])
    if len(summary) > _SUMMARY_CHARACTERS:
        summary = summary[: _SUMMARY_CHARACTERS - 1] + "…"
    facts = "".join(
        f"<tr><th scope='row'>{text(name)}</th><td>{text(shown(value))}</td></tr>"
        for name, value in card.get("facts", {}).items()
    )
    files = "".join(
        f"<li><code>{text(file['path'])}</code><br><code class='digest'>{text(file['sha256'])}</code></li>"
        for file in card.get("files", ())
    )
    details = (facts and f"<table>{facts}</table>") + (files and f"<ul>{files}</ul>")
    return (
        f"<li class='card'><p><strong>{text(card['name'])}</strong> {pill(verdict)} "
        f"<span class='soft'>{text(_MEANING.get(verdict, 'not proved good'))}</span></p>"
        f"{f'<p>{text(summary)}</p>' if summary else ''}"
        f"<p class='soft'>check code <code>{text(card['sha256'][:8])}</code></p>"
        f"<details><summary data-lm-suppress-shortcuts='true'>Details of {text(card['name'])}</summary>"
        f"<p>sha256 <code class='digest'>{text(card['sha256'])}</code></p>{details}</details></li>"
    )


def _people(facts: Mapping[str, Any]) -> str:
    given = "".join(
        f"<li>{text(d['person'])} {pill(PAST.get(d['decision'], d['decision']))}{_remark(d['comment'])}</li>"
        for d in facts["decisions"]
    )
    return (
        f"<dl><dt>Needed</dt><dd>{facts['quorum']} of {text(' or '.join(facts['roles']))}</dd>"
        f"<dt>May sign</dt><dd>{text(', '.join(facts['may_sign']) or 'nobody')}"
        f" ({text(facts['opened_by'])} opened this run and cannot approve it)</dd>"
        f"<dt>Have signed</dt><dd>{f'<ul>{given}</ul>' if given else 'nobody yet'}</dd></dl>"
    )


def _remark(words: str) -> str:
    return f": {text(words)}" if words else ""


def gate_clock(left_s: float, expires_epoch_s: float) -> str:
    """How long the round is still open."""
    until = moment(datetime.fromtimestamp(expires_epoch_s, UTC).isoformat())
    if left_s <= 0:
        return _page(f"<p>{pill('time is up', tone='bad')} The round ended {until}.</p>")
    return _page(f"<p>Time left: <strong>{text(seconds(left_s))}</strong>, until {until}.</p>")


def checks_head(title: str, roles: Sequence[str], able: Sequence[str], *, required: bool) -> str:
    """What the spot checks are for and who may sign them."""
    need = (
        "Every check must be recorded as passed before gate 3 is asked."
        if required
        else ("A check that nobody records is shown at gate 3 as not recorded.")
    )
    return _page(
        f"<h4>{text(title)}</h4><p>Do each as a user would, in the browser, and sign what you saw. {need}</p>"
        f"<dl><dt>Needed</dt><dd>{text(' or '.join(roles))}</dd>"
        f"<dt>May sign</dt><dd>{text(', '.join(able) or 'nobody')}</dd></dl>"
    )


def check_row(check: Mapping[str, Any], said: Mapping[str, Any] | None) -> str:
    """One check: name, question, link, and its last word."""
    return _page(_check(check, said))


def _check(check: Mapping[str, Any], said: Mapping[str, Any] | None) -> str:
    if said is None:
        word = pill("not recorded", tone="warn")
    else:
        word = (
            f"{pill('passed', tone='good') if said['passed'] else pill('failed', tone='bad')} by {text(said['person'])}, "
            f"{moment(str(said.get('time', '')))}{_remark(said['note'])}"
        )
    return (
        f"<p><strong>{text(check['name'].replace('_', ' '))}</strong> {word}</p><p>{text(check['asks'])} "
        f"<a href='{text(check['link'])}' target='_blank' rel='noopener noreferrer'>{text(check['link'])}</a></p>"
    )


def checks_twin(head: str, checks: Sequence[tuple[Mapping[str, Any], Mapping[str, Any] | None]], commands: str) -> str:
    """All of the checks panel without a widget."""
    rows = "".join(f"<li class='card'>{_check(check, said)}</li>" for check, said in checks)
    return head + _page(f"<ul class='cards'>{rows}</ul>") + commands


def command(*words: str) -> str:
    """A command as it is typed; `FILE`, `~` and the like stay as they are."""
    return " ".join(w if w.startswith("~/") and " " not in w else shlex.quote(w) for w in ("runbook", *words))


def commands_to_read(what: str, commands: Mapping[str, str]) -> str:
    """Commands for another machine, on a page without fields; label -> command."""
    return _page(f"<p class='soft'>{text(what)}</p><pre>{text(chr(10).join(commands.values()))}</pre>")


def said(words: str, *, tone: str = "plain") -> str:
    """What came of a click; trouble is an alert, so that a screen reader says it at once."""
    role = "alert" if tone == "bad" else "status"
    return _page(f"<div role='{role}' class='{tone}'>{text(words)}</div>") if words else ""


def note(words: str) -> str:
    """A line between the fields."""
    return _page(f"<p class='soft note'>{text(words)}</p>")


def hide(twin: str) -> str:
    """The style by which a living panel hides its twin."""
    return f"<style>.{twin}{{display:none}}</style>"


def twin(name: str, content: str) -> str:
    """The twin that `hide` hides."""
    return f"<div class='{name}'>{content}</div>"


def _page(body: str) -> str:
    return output(body, more_style=_STYLE)
