"""The words of the domain as frozen values; no I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from runbook_lib.canonical import digest
from runbook_lib.clock import Moment


class Recovery(StrEnum):
    """What is done with a step whose intent has no outcome."""

    REPEAT = "repeat"  # a second run is harmless: it writes the same thing to the same place
    PROBE = "probe"  # ask the target whether the effect is there
    ASK = "ask"  # only a person can tell


class Status(StrEnum):
    """Where a step stands, folded from the ledger."""

    PENDING = "pending"
    RUNNING = "running"
    GREEN = "green"
    FAILED = "failed"
    BLOCKED = "blocked"


@dataclass(frozen=True, slots=True)
class Release:
    """One version for one environment; the previous one is what a rollback goes back to."""

    environment: str
    version: str
    ref: str
    commit: str
    previous_version: str
    previous_commit: str


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file in the run's folder, named by its path there, with what proves it unchanged."""

    path: str
    sha256: str
    size_bytes: int

    def as_json(self) -> dict[str, Any]:
        """JSON form, as the ledger keeps it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step proved: small facts for the ledger, artifacts for the record."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    artifacts: tuple[Artifact, ...] = ()
    verdict: str = "green"  # what gate evidence shows: green, red or inconclusive
    title: str = ""
    status: str = "green"

    def as_json(self) -> dict[str, Any]:
        """JSON form, as the ledger keeps it."""
        return {
            "facts": dict(self.facts),
            "artifacts": [artifact.as_json() for artifact in self.artifacts],
            "verdict": self.verdict,
            "title": self.title,
            "status": self.status,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StepResult:
        """Read back what `as_json` wrote."""
        return cls(
            facts=data["facts"],
            artifacts=tuple(Artifact(**item) for item in data["artifacts"]),
            verdict=data["verdict"],
            title=data["title"],
            status=data["status"],
        )


_QUOTED = re.compile(r"""'(?:[^']|'"'"')*'""")


def command_line(words: Iterable[str]) -> str:
    """A command on one line for people; a script in it is told by its length: the plan has it whole."""
    return " ".join(map(_without_scripts, words))


def _without_scripts(word: str) -> str:
    # What ssh runs is one word, with a script quoted in it as a shell wants it.
    word = _QUOTED.sub(lambda quoted: _script(quoted[0]) if "\n" in quoted[0] else quoted[0], word)
    return _script(word) if "\n" in word else word


def _script(text: str) -> str:
    return f"‹script of {len(text.strip().splitlines())} lines›"


def shown(value: Any) -> str:
    """One line of text for a fact."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {shown(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(shown(item) for item in value) or "none"
    if isinstance(value, float):
        return f"{value:,.3f}".rstrip("0").rstrip(".")
    return str(value)


@dataclass(frozen=True, slots=True)
class Command:
    """An argv with what its runner needs to know; never a shell string, never a secret.

    `env` adds to the environment; secrets go there as references resolved by the caller just before the run.
    `stdout` sends standard output to a file instead of the log. `stall_s`: after so many seconds without a byte of output it
    is ended; None lets it be silent.
    """

    argv: tuple[str, ...]
    timeout_s: float = 600.0
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    stdout: Path | None = None
    ok_exits: tuple[int, ...] = (0,)
    stall_s: float | None = None


@dataclass(frozen=True, slots=True)
class Completed:
    """A command's end: its exit status, its log and how long it took by the monotonic clock."""

    argv: tuple[str, ...]
    exit_code: int
    log: Path
    duration_s: float

    @property
    def output(self) -> str:
        """The whole log as text, undecodable bytes replaced."""
        return self.log.read_text(errors="replace")

    def tail(self, lines: int = 15) -> str:
        """The last lines of the log, for people."""
        return "\n".join(self.output.splitlines()[-lines:])


@dataclass(frozen=True)
class Event:
    """One line of the ledger; `hash` covers all other fields, `prev` is the hash of the line before."""

    run_id: str
    seq: int
    time: str
    kind: str
    data: Mapping[str, Any]
    prev: str
    hash: str

    @property
    def moment(self) -> Moment:
        """When it was written, by both clocks."""
        return Moment.of(self.time, self.data.get("clock", {}))

    @property
    def files(self) -> list[tuple[str, str]]:
        """The files in the run's folder that it names, each with its SHA-256."""
        data = self.data
        found = [(a["path"], a["sha256"]) for a in data.get("result", {}).get("artifacts", [])]
        found += [(data[key]["path"], data[key]["sha256"]) for key in ("artifact", "evidence") if key in data]
        if "statement" in data and "signature_sha256" in data:
            found += [(data["statement"], data["sha256"]), (data["statement"] + ".sig", data["signature_sha256"])]
        if self.kind == "run_opened" and "params_sha256" in data:
            found.append(("params.json", data["params_sha256"]))
        return found

    @cached_property
    def digest(self) -> str:
        """What the hash must be."""
        return digest(self.body())

    def body(self) -> dict[str, Any]:
        """What the hash is taken over."""
        return {
            "run_id": self.run_id,
            "seq": self.seq,
            "time": self.time,
            "kind": self.kind,
            "data": self.data,
            "prev": self.prev,
        }

    def as_json(self) -> dict[str, Any]:
        """The line as it stands in ledger.jsonl."""
        return {**self.body(), "hash": self.hash}


@dataclass(frozen=True, slots=True)
class GateRule:
    """Who must say yes: roles of which each approver holds one, and how many people."""

    name: str
    number: int
    title: str
    asks: str
    roles: tuple[str, ...]
    quorum: int
    timeout_s: float
