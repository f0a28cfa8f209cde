"""Seals a run's folder as a record, and its review as a signed addendum.

A record is sealed by its last file: until `statement.json.sig` is there, nothing verifies, and sealing again after a
crash makes everything anew from the ledger. Nothing in it depends on the clock, so the same content gives the same
record. A sealed record is never written to.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from runbook_lib import signatures
from runbook_lib.canonical import canonical_json, sha256, write_atomically
from runbook_lib.clock import epoch_s
from runbook_lib.errors import UsageError, VerificationError
from runbook_lib.model import Event
from runbook_lib.pages import page
from runbook_lib.record_page import FileFact, record_html
from runbook_lib.render import checklist, checklist_html
from runbook_lib.state import RunState
from runbook_lib.verification import (
    LEDGER,
    RECORD_TYPE,
    REVIEW,
    REVIEW_TYPE,
    SIGNATURE,
    STATEMENT,
    STATEMENT_TYPE,
    SUMS,
    Check,
    Tree,
    sums,
    verify,
)

__all__ = ["Check", "seal", "seal_review", "verify"]

_RELEASE = ("environment", "version", "ref", "commit", "previous_version", "previous_commit")
_LEFT_OVER = re.compile(r"\..+\.[a-z0-9_]{8}")  # what `write_atomically` leaves when it is killed
_MADE_HERE = ("index.html", SUMS, STATEMENT, SIGNATURE)


def seal(folder: Path, *, events: Sequence[Event], state: RunState, recorder_key: Path, trust: Path) -> Path:
    """Turn the folder of an ended run into a record and return its statement's path.

    Args:
        folder: the run's folder.
        events: all events of the run up to now, oldest first, chain checked.
        state: their fold.
        recorder_key: the private key that signs records.
        trust: the `allowed_signers` file in force.

    Raises:
        UsageError: the run has not ended, or the recorder's key cannot sign.
        VerificationError: the record, sealed now or before, does not verify; nothing sealed was changed.
    """
    if not (folder / SIGNATURE).exists():
        if not state.ended or not events:
            raise UsageError(
                f"run {state.run_id} has not ended: there is nothing to seal", remedy=f"runbook resume {state.run_id}"
            )
        _tidy(folder)
        _write_views(folder, events, state)
        release = {name: state.opened.get(name, "") for name in _RELEASE}
        predicate = {
            **_common(state.run_id, events),
            "state": state.status,
            "release": release,
            "params_sha256": state.opened["params_sha256"],
        }
        _sign(folder, frozenset({REVIEW}), RECORD_TYPE, predicate, recorder_key, trust)
    statement = _must_hold(folder, trust)
    said = statement["predicate"]["ledger"]
    if len(events) < said["events"] or events[said["events"] - 1].hash != said["head"]:
        raise VerificationError(
            f"the record {folder.name} was sealed over another ledger",
            remedy="compare its ledger.jsonl with the ledger in use",
        )
    return folder / STATEMENT


def seal_review(folder: Path, *, events: Sequence[Event], recorder_key: Path, trust: Path) -> Path:
    """Sign the review beside a sealed record and return its statement's path; the record itself stays as it is.

    Args:
        folder: the record; its review/ holds what the review made.
        events: all events of the run, those of the review behind the sealed ones.
        recorder_key: the private key that signs records.
        trust: the `allowed_signers` file in force.

    Raises:
        UsageError: the record is not sealed, or there is no review.
        VerificationError: record or review do not verify.
    """
    review = folder / REVIEW
    if not (folder / SIGNATURE).exists() or not review.is_dir():
        raise UsageError(
            f"{folder.name} is not sealed, or has no review yet", remedy="runbook seal RUN, then runbook review RUN"
        )
    if not (review / SIGNATURE).exists():
        sealed = json.loads((folder / STATEMENT).read_bytes())["predicate"]["ledger"]["events"]
        _tidy(review)
        _write_ledger(review, events[sealed:])
        for notebook in sorted(review.glob("*.ipynb")):
            _write_notebook(notebook, review / f"{notebook.stem}.html")
        main = Tree.of(folder, leave_out=frozenset({REVIEW})).digests[STATEMENT]
        predicate = {**_common(events[0].run_id, events), "record": {"sha256": main}}
        _sign(review, frozenset(), REVIEW_TYPE, predicate, recorder_key, trust)
    _must_hold(folder, trust, review=True)
    return review / STATEMENT


def _common(run_id: str, events: Sequence[Event]) -> dict[str, Any]:
    last = events[-1]
    return {
        "run_id": run_id,
        "ledger": {"head": last.hash, "events": len(events)},
        # The time of the last event that the record holds, not of this call: sealing again gives the same bytes.
        "sealed": last.time,
        "versions": {"runbook": _version(), "python": platform.python_version()},
    }


def _version() -> str:
    try:
        return metadata.version("runbook")
    except metadata.PackageNotFoundError:
        return "0"


def _tidy(folder: Path) -> None:
    """Remove what a killed process left half written, and folders without a file: neither can be listed in a manifest.

    A signature is written before its statement: one that stands alone belongs to nothing that was said.
    """
    for path in sorted(folder.rglob("*"), key=lambda p: len(p.parts), reverse=True):
        if path.is_symlink():
            continue
        alone = path.name.endswith(".json.sig") and not path.with_suffix("").exists()
        if path.is_file() and (alone or _LEFT_OVER.fullmatch(path.name)):
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _write_ledger(folder: Path, events: Sequence[Event]) -> None:
    write_atomically(folder / LEDGER, b"".join(canonical_json(event.as_json()) + b"\n" for event in events))


def _write_views(folder: Path, events: Sequence[Event], state: RunState) -> None:
    _write_ledger(folder, events)
    rows = [asdict(row) for row in checklist(state)]
    write_atomically(folder / "checklist.json", canonical_json({"run_id": state.run_id, "rows": rows}))
    title = f"Checklist of {state.run_id}"
    body = f'<header><h1>{title}</h1></header><main id="main"><div class="card">{checklist_html(state)}</div></main>'
    write_atomically(folder / "checklist.html", page(title, body))
    for notebook in sorted((folder / "notebooks").glob("*.ipynb")):
        _write_notebook(notebook, folder / "html" / f"{notebook.stem}.html")
    tree = Tree.of(folder, leave_out=frozenset({REVIEW, *_MADE_HERE}))
    facts = {path: FileFact(value, (folder / path).stat().st_size) for path, value in tree.digests.items()}
    write_atomically(folder / "index.html", record_html(state, events, facts))


def _write_notebook(notebook: Path, target: Path) -> None:
    from runbook_lib.notebook_html import notebook_html, unreadable_html

    title = notebook.stem.replace("_", " ")
    try:
        content = notebook_html(notebook, title=title)
    except ValueError as error:
        # The notebook itself is in the record; that it cannot be shown must not keep the record from being sealed.
        content = unreadable_html(title, str(error))
    write_atomically(target, content)


def _sign(
    folder: Path, leave_out: frozenset[str], kind: str, predicate: Mapping[str, Any], key: Path, trust: Path
) -> None:
    tree = Tree.of(folder, leave_out=leave_out | {STATEMENT, SIGNATURE, SUMS})
    if tree.odd:
        path, what = tree.odd[0]
        raise VerificationError(
            f"{path} is {what}: it cannot be part of a record", remedy="move it away, then: runbook seal RUN"
        )
    for path in tree.digests:
        # sha256sum would write these names in an escaped form of its own.
        if not path.isprintable() or "\\" in path:
            raise VerificationError(f"{path!r} cannot stand in SHA256SUMS", remedy="rename it, then: runbook seal RUN")
    listed = sums(tree.digests)
    write_atomically(folder / SUMS, listed)
    digests = {**tree.digests, SUMS: sha256(listed)}
    statement = canonical_json(
        {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": path, "digest": {"sha256": value}} for path, value in sorted(digests.items())],
            "predicateType": kind,
            "predicate": dict(predicate),
        }
    )
    signature = signatures.sign(statement, key=key, namespace=signatures.RECORD_NAMESPACE)
    # A record signed by a key that nobody trusts would be worth nothing: better to learn it now.
    signatures.verify(
        statement,
        signature,
        principal=signatures.RECORDER,
        namespace=signatures.RECORD_NAMESPACE,
        trust=trust,
        at=epoch_s(predicate["sealed"]),
    )
    write_atomically(folder / STATEMENT, statement)
    write_atomically(folder / SIGNATURE, signature)


def _must_hold(folder: Path, trust: Path, *, review: bool = False) -> dict[str, Any]:
    # A review that is being written is not signed yet, and is nothing against the record beside it.
    wrong = [c for c in verify(folder, trust) if not c.ok and (review or not c.where.startswith(f"{REVIEW}/"))]
    if wrong:
        first = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise VerificationError(
            f"the record {folder.name} is sealed and does not verify: {first.name}: {first.where}: {first.why}{more}",
            remedy="keep it as it is, and find out what changed it: runbook verify RECORD --trust FILE",
        )
    return dict(json.loads((folder / STATEMENT).read_bytes()))
