"""What a step's call shows in a notebook: one compact card, drawn from what the ledger says of it; pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runbook_lib.model import Status, StepResult, shown
from runbook_lib.pages import moment, output, pill, seconds, size, text
from runbook_lib.state import StepState

MIME = "application/vnd.runbook.step+json"
_MARKS = {"green": "✔", "failed": "✖", "running": "●", "blocked": "?"}
_STYLE = ".rb ul{margin:2px 0;padding-left:18px}.rb.rb td.n{text-align:right;font-variant-numeric:tabular-nums}"


@dataclass(frozen=True, slots=True)
class Log:
    """The end of one command's log, and its exit status when it has ended."""

    name: str
    exit_code: int | None
    tail: str


@dataclass(frozen=True, slots=True)
class Part:
    """One item of a step (a host), or all of a step that has none, as the ledger has it."""

    key: str
    state: StepState
    logs: tuple[Log, ...] = ()

    @property
    def result(self) -> StepResult:
        """What it proved; empty while it has no outcome."""
        return self.state.result or StepResult(status=self.state.status.value)

    def as_json(self) -> dict[str, Any]:
        """What a card says of it and the ledger must say too."""
        return {
            "step": self.key,
            "status": self.state.status.value,
            "attempt": self.state.attempt,
            "began": self.state.intent_time,
            "duration_s": self.state.duration_s,
            "result": self.result.as_json(),
        }


@dataclass(frozen=True, slots=True)
class Card(StepResult):
    """A step's result with what ran, where, how long, and the tails of its logs.

    Attributes:
        owner: who answers for the step.
        commands: what the plan says that it runs, a line each.
        parts: none for a step that did not act.
    """

    owner: str = ""
    commands: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()

    @classmethod
    def of(cls, result: StepResult, **more: Any) -> Card:
        """A card for a result; `more` are the attributes that a result lacks."""
        names = ("facts", "artifacts", "verdict", "title", "status")
        return cls(**{name: getattr(result, name) for name in names}, **more)

    def bundle(self) -> dict[str, Any]:
        """MIME type -> data."""
        return {
            "text/html": self._html(),
            "text/plain": f"{self.status}: {self.title}",
            MIME: {"title": self.title, "status": self.status, "parts": [part.as_json() for part in self.parts]},
        }

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        return self.bundle()

    def _html(self) -> str:
        # Reads well without the style sheet: code hosts drop it.
        body = self._head()
        if len(self.parts) > 1:
            body += _TABLE.format("".join(_row(part) for part in self.parts))
        else:
            facts = self.parts[0].result.facts if self.parts else self.facts
            body += _facts(facts)
        body += _files(self) + self._details()
        return output(f'<div class="card">{body}</div>', more_style=_STYLE)

    def _head(self) -> str:
        said = [text(self.owner)] if self.owner else []
        for part in self.parts[:1]:
            host = part.state.intent.get("executor", {}).get("host", "")
            where = part.state.intent.get("target", "")
            said += [text(" from ".join(filter(None, (f"on {where}", host))))] if where else []
            said.append(moment(part.state.intent_time))
            if part.state.attempt > 1:
                said.append(f"attempt {part.state.attempt}")
            if part.state.settled_by:
                said.append(f"settled by {text(part.state.settled_by)}")
        took = sum(part.state.duration_s for part in self.parts)
        said += [f"took {seconds(took)}"] if self.parts else []
        words = {self.status, *({self.verdict} if self.status == "green" else ())}
        pills = " ".join(pill(word) for word in sorted(words, key=["failed", "green"].__contains__, reverse=True))
        wrong = [part.state.error for part in self.parts if part.state.error and part.state.status is not Status.GREEN]
        errors = "".join(f'<p class="why">{text(error)}</p>' for error in wrong)
        return (
            f"<p><strong>{_MARKS.get(self.status, '○')} {text(self.title)}</strong> {pills}<br>"
            f'<span class="soft">{" · ".join(said)}</span></p>{errors}'
        )

    def _details(self) -> str:
        ran = "".join(f"<li><code>{text(line)}</code></li>" for line in self.commands)
        found = f"<details><summary>What it runs</summary><ul>{ran}</ul></details>" if ran else ""
        several = len(self.parts) > 1
        for part in self.parts:
            for log in part.logs:
                name = f"{part.key.partition('@')[2]} · {log.name}" if several else log.name
                exited = "no exit status" if log.exit_code is None else f"exit {log.exit_code}"
                found += (
                    f"<details><summary>Log of {text(name)} · {exited}</summary><pre>{text(log.tail)}</pre></details>"
                )
        return found


_TABLE = (
    '<table><thead><tr><th scope="col">Where</th><th scope="col">State</th><th scope="col">Took</th>'
    '<th scope="col">Facts</th></tr></thead><tbody>{}</tbody></table>'
)


def _row(part: Part) -> str:
    facts = "; ".join(f"{name}: {shown(value)}" for name, value in part.result.facts.items())
    return (
        f'<tr><th scope="row">{text(part.key.partition("@")[2])}</th><td>{pill(part.state.status.value)}</td>'
        f'<td class="n">{seconds(part.state.duration_s)}</td><td>{text(facts)}</td></tr>'
    )


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{text(name)}</th><td>{text(shown(value))}</td></tr>' for name, value in facts.items()
    )
    return f"<table><tbody>{rows}</tbody></table>" if rows else ""


def _files(result: StepResult) -> str:
    files = "".join(
        f"<li><code>{text(a.path)}</code> · {size(a.size_bytes)} · sha256 <code>{a.sha256[:16]}…</code></li>"
        for a in result.artifacts
    )
    return f"<ul>{files}</ul>" if files else ""
