"""Verifies a sealed record with nothing but the record and a trust file; reads only, and never raises.

What a record holds is somebody else's word until its signatures are checked: every part is read defensively, and what
cannot be read is a failed check with its reason.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runbook_lib import signatures
from runbook_lib.canonical import canonical_json, sha256, sha256_file
from runbook_lib.clock import epoch_s
from runbook_lib.errors import RunbookError, VerificationError
from runbook_lib.ledger import GENESIS, check_chain, check_format
from runbook_lib.model import Event
from runbook_lib.pages import visible
from runbook_lib.state import RunState, fold
from runbook_lib.static_html import active_content
from runbook_lib.verify_decisions import Decisions

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
RECORD_TYPE = "https://runbook.dev/release-record/v1"
REVIEW_TYPE = "https://runbook.dev/release-review/v1"
STATEMENT, SIGNATURE, SUMS, LEDGER = "statement.json", "statement.json.sig", "SHA256SUMS", "ledger.jsonl"
REVIEW = "review"
_MAX_JSON_BYTES = 64 * 1024 * 1024
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked: whether it holds; if not, where and why."""

    name: str
    ok: bool
    where: str = ""
    why: str = ""


class Found:
    """The checks made so far."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    def wrong(self, name: str, where: str, why: str) -> None:
        """Note what does not hold."""
        self.checks.append(Check(name, ok=False, where=visible(where)[:300], why=visible(why)[:500]))

    @contextmanager
    def part(self, name: str, where: str) -> Iterator[None]:
        """Run one check: it holds when nothing was noted and nothing was raised within."""
        before = len(self.checks)
        try:
            yield
        except RunbookError as error:
            self.wrong(name, where, error.message)
        except Exception as error:  # odd input is a finding, whatever it breaks
            self.wrong(name, where, f"cannot be read: {type(error).__name__}: {error}")
        if len(self.checks) == before:
            self.checks.append(Check(name, ok=True, where=visible(where)))


@dataclass(slots=True)
class Tree:
    """A folder's regular files with their digests; what else lies there is in `odd` as (path, what)."""

    root: Path
    digests: dict[str, str] = field(default_factory=dict)
    odd: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, root: Path, *, leave_out: frozenset[str] = frozenset()) -> Tree:
        """Walk a folder without following links and hash what is in it; `leave_out` names top-level entries."""
        tree = cls(root)
        folders = [""]
        while folders:
            folder = folders.pop()
            entries = [e for e in os.scandir(root / folder) if folder or e.name not in leave_out]
            if folder and not entries:
                tree.odd.append((folder.rstrip("/"), "an empty folder"))
            for entry in entries:
                path = folder + entry.name
                if entry.is_symlink():
                    tree.odd.append((path, "a symbolic link"))
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(path + "/")
                elif not entry.is_file(follow_symlinks=False):
                    tree.odd.append((path, "neither a file nor a folder"))
                else:
                    try:
                        tree.digests[path] = sha256_file(root / path)
                    except OSError as error:
                        tree.odd.append((path, f"not readable: {error.strerror}"))
        return tree

    def read(self, path: str) -> bytes:
        """A file's bytes, the very ones that were hashed.

        Raises:
            VerificationError: it is not there, too large to be parsed, or changed since.
        """
        if path not in self.digests:
            raise VerificationError(f"{path} is missing")
        file = self.root / path
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise VerificationError(f"{path} is larger than {_MAX_JSON_BYTES} bytes")
        data = file.read_bytes()
        if sha256(data) != self.digests[path]:
            raise VerificationError(f"{path} changed while it was being verified")
        return data

    def read_json(self, path: str) -> Any:
        """A file's content, which must be canonical JSON to the byte."""
        return parse_canonical(self.read(path), path)


def parse_canonical(data: bytes, what: str) -> Any:
    """Parse JSON that must be in its canonical form.

    Raises:
        VerificationError: it is not.
    """
    try:
        value = json.loads(data)
        same = canonical_json(value) == data
    except (ValueError, RecursionError) as error:
        raise VerificationError(f"{what} is no canonical JSON: {type(error).__name__}") from error
    if not same:
        raise VerificationError(f"{what} is not in canonical form")
    return value


def sums(digests: Mapping[str, str]) -> bytes:
    """The content of SHA256SUMS, as `sha256sum --check` reads it."""
    return "".join(f"{value}  {path}\n" for path, value in sorted(digests.items())).encode(errors="surrogateescape")


def verify(record: Path, trust: Path) -> list[Check]:
    """Verify a record, and its review when there is one.

    Args:
        record: the run's folder.
        trust: the `allowed_signers` file that the verifier trusts; never taken from the record.

    Returns:
        Every check made; the record holds when all are ok.
    """
    found = Found()
    tree, statement, events = Tree(record), {}, []
    with found.part("readable", "."):
        tree = Tree.of(record, leave_out=frozenset({REVIEW}))
        for path, what in tree.odd:
            found.wrong("readable", path, what)
    at: float | None = None
    with found.part("statement", STATEMENT):
        statement = _statement(tree, RECORD_TYPE)
        at = epoch_s(statement["predicate"]["sealed"])
    with found.part("signature", SIGNATURE):
        _check_signature(tree, trust, at)
    _check_files(found, "", tree, statement)
    with found.part("ledger", LEDGER):
        events = _ledger(tree, GENESIS, 0)
        if events:
            check_format(events[0].data.get("format", 1), "the record")
        check_chain(events)
    state = RunState()
    with found.part("ledger and statement agree", LEDGER):
        if not events or not statement:
            raise VerificationError("there are no ledger and statement to compare")
        state = fold(events)
        _agree(statement["predicate"], events, state)
    params: Mapping[str, Any] = {}
    with found.part("params", "params.json"):
        params = tree.read_json("params.json")
        if tree.digests["params.json"] != state.opened.get("params_sha256"):
            raise VerificationError("the parameters are not those that the run was opened with")
    Decisions(found, tree, trust, events, state, params, sealed_epoch_s=at).check()
    _check_artifacts(found, tree, state, "")
    _check_html(found, "", tree)
    if os.path.lexists(record / REVIEW):
        _check_review(found, record, trust, events, tree.digests.get(STATEMENT, ""))
    return found.checks


def _statement(tree: Tree, kind: str) -> dict[str, Any]:
    value = tree.read_json(STATEMENT)
    if value["_type"] != STATEMENT_TYPE or value["predicateType"] != kind:
        raise VerificationError(f"it is a {value['predicateType']!r}, not a {kind!r}")
    return dict(value)


def _check_signature(tree: Tree, trust: Path, at: float | None) -> None:
    """The recorder signed the statement with a key that was valid at the time that the statement names."""
    data, signature = tree.read(STATEMENT), tree.read(SIGNATURE)
    if not signatures.canonical_signature(signature):
        raise VerificationError("it is not in the form that ssh-keygen writes")
    signatures.verify(
        data, signature, principal=signatures.RECORDER, namespace=signatures.RECORD_NAMESPACE, trust=trust, at=at
    )


def _check_files(found: Found, prefix: str, tree: Tree, statement: Mapping[str, Any]) -> None:
    """Every file is in the statement with its digest, and nothing else is there."""
    signed: dict[str, str] = {}
    actual = {path: value for path, value in tree.digests.items() if path not in (STATEMENT, SIGNATURE)}
    with found.part("files" if not prefix else "review files", prefix or "."):
        name = "files" if not prefix else "review files"
        if not statement:
            raise VerificationError("there is no statement to compare them with")
        for subject in statement["subject"]:
            path, value = subject["name"], subject["digest"]["sha256"]
            if path in signed or not isinstance(path, str) or not _HEX.fullmatch(value):
                raise VerificationError(f"the statement names {path!r} twice or without a digest")
            signed[path] = value
        for path in sorted(signed.keys() | actual.keys()):
            if path not in actual:
                found.wrong(name, prefix + path, "is missing")
            elif path not in signed:
                found.wrong(name, prefix + path, "was added: the statement does not name it")
            elif actual[path] != signed[path]:
                found.wrong(
                    name, prefix + path, f"was changed: sha256 is {actual[path][:16]}…, signed is {signed[path][:16]}…"
                )
    with found.part("SHA256SUMS" if not prefix else "review SHA256SUMS", prefix + SUMS):
        if tree.read(SUMS) != sums({path: value for path, value in actual.items() if path != SUMS}):
            raise VerificationError("it is not the list of the files that are there")


def _ledger(tree: Tree, prev: str, seq: int) -> list[Event]:
    data = tree.read(LEDGER)
    if data and not data.endswith(b"\n"):
        raise VerificationError("its last line is cut off")
    events = []
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        value = parse_canonical(line.removesuffix(b"\n"), f"line {number}")
        if not isinstance(value, dict) or set(value) != {"run_id", "seq", "time", "kind", "data", "prev", "hash"}:
            raise VerificationError(f"line {number} is no event")
        events.append(Event(**value))
    first = events[0] if events else None
    if first is not None and (first.prev != prev or first.seq != seq + 1):
        raise VerificationError(f"its first line does not follow from event {seq}")
    return events


def _agree(predicate: Mapping[str, Any], events: list[Event], state: RunState) -> None:
    ledger = predicate["ledger"]
    pairs = {
        "ledger head": (ledger["head"], state.head),
        "number of events": (ledger["events"], len(events)),
        "run": (predicate["run_id"], state.run_id),
        "state": (predicate["state"], state.status),
        "parameters": (predicate["params_sha256"], state.opened["params_sha256"]),
        "time": (predicate["sealed"], events[-1].time),
    }
    pairs |= {name: (value, state.opened[name]) for name, value in predicate["release"].items()}
    for name, (said, known) in pairs.items():
        if said != known:
            raise VerificationError(f"{name}: the statement says {said!r}, the ledger {known!r}")
    if {event.run_id for event in events} != {state.run_id}:
        raise VerificationError("events of another run are in it")


def _check_artifacts(found: Found, tree: Tree, state: RunState, prefix: str) -> None:
    """What a green step named is there, as it was when the step named it."""
    with found.part("review artifacts" if prefix else "artifacts", prefix + "artifacts"):
        for key, step in state.steps.items():
            if not state.green(key) or step.result is None or key.startswith("review.") != bool(prefix):
                continue
            for artifact in step.result.artifacts:
                path = artifact.path.removeprefix(prefix)
                if tree.digests.get(path) != artifact.sha256:
                    why = "is not what the step proved" if path in tree.digests else "is missing"
                    found.wrong("review artifacts" if prefix else "artifacts", artifact.path, f"{why} ({key})")


def _check_html(found: Found, prefix: str, tree: Tree) -> None:
    name = "review HTML without script" if prefix else "HTML without script"
    with found.part(name, prefix or "."):
        for path in tree.digests:
            if path.lower().endswith((".html", ".htm", ".xhtml", ".svg")):
                why = active_content(tree.read(path))
                if why:
                    found.wrong(name, prefix + path, why)


def _check_review(found: Found, record: Path, trust: Path, events: list[Event], main: str) -> None:
    """The addendum: signed apart, bound to the main statement, its ledger going on where the sealed one ended."""
    prefix = f"{REVIEW}/"
    tree, statement = Tree(record / REVIEW), {}
    at: float | None = None
    state: RunState | None = None
    with found.part("review readable", prefix):
        if (record / REVIEW).is_symlink() or not (record / REVIEW).is_dir():
            raise VerificationError("is no folder")
        tree = Tree.of(record / REVIEW)
        for path, what in tree.odd:
            found.wrong("review readable", prefix + path, what)
    with found.part("review statement", prefix + STATEMENT):
        if STATEMENT not in tree.digests or SIGNATURE not in tree.digests:
            raise VerificationError("the review is not signed: runbook review RUN finishes it")
        statement = _statement(tree, REVIEW_TYPE)
        at = epoch_s(statement["predicate"]["sealed"])
        if statement["predicate"]["record"]["sha256"] != main:
            raise VerificationError("it was made for another record")
    with found.part("review signature", prefix + SIGNATURE):
        _check_signature(tree, trust, at)
    _check_files(found, prefix, tree, statement)
    with found.part("review ledger", prefix + LEDGER):
        if not events:
            raise VerificationError("there is no sealed ledger that it could go on from")
        more = _ledger(tree, events[-1].hash, events[-1].seq)
        check_chain([*events, *more])
        last = more[-1] if more else events[-1]
        said = statement.get("predicate", {})
        if (said.get("ledger"), said.get("run_id")) != ({"head": last.hash, "events": last.seq}, events[0].run_id):
            raise VerificationError("its end is not what the review's statement says")
        state = fold([*events, *more])
    _check_artifacts(found, tree, state or RunState(), prefix)
    _check_html(found, prefix, tree)
