"""Signed statements of people: what each says, over what, and how it is checked and kept.

A statement is an in-toto Statement in canonical JSON, signed by the person's own SSH key (`ssh-keygen -Y sign`,
namespace `runbook-gate`) and kept as `decisions/NAME.json` with its `.sig`. The event that records it carries both: any
machine that reads the ledger writes the files again, to the byte, where they are not yet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runbook_lib import signatures
from runbook_lib.canonical import canonical_json, sha256, write_atomically
from runbook_lib.errors import RunbookError, UsageError, VerificationError
from runbook_lib.run import Run

NAMESPACE = "runbook-gate"
STATEMENT = "https://in-toto.io/Statement/v1"
GATE_DECISION = "https://runbook.dev/gate-decision/v1"
SPOT_CHECK = "https://runbook.dev/spot-check/v1"
RESOLUTION = "https://runbook.dev/step-resolution/v1"


def statement(kind: str, subject: list[dict[str, Any]], predicate: Mapping[str, Any]) -> bytes:
    """The bytes that a person signs."""
    return canonical_json({"_type": STATEMENT, "predicateType": kind, "subject": subject, "predicate": dict(predicate)})


def person_of(run: Run, person: str) -> Any:
    """The params entry of a person.

    Raises:
        UsageError: nobody of that name; the names known are listed.
    """
    known = run.params.people
    if person not in known:
        raise UsageError(
            f"{person!r} is nobody in the params file (known: {', '.join(sorted(known))})", remedy="give --as NAME"
        )
    return known[person]


def signed(data: bytes, *, key: Path, ask: bool = True) -> bytes:
    """Sign with a person's key file or agent key.

    Args:
        data: the statement.
        key: a private key, or the `.pub` of one that ssh-agent holds.
        ask: False where no passphrase can be asked for.

    Raises:
        UsageError: the key cannot sign.
    """
    try:
        return signatures.sign(data, key=key, namespace=NAMESPACE, ask=ask)
    except RunbookError as error:
        remedy = "give --key FILE of your own key" if ask else error.remedy
        raise UsageError(f"the key {key} could not sign: {error.message}", remedy=remedy) from error


def check_signature(run: Run, data: bytes, signature: bytes, *, person: str) -> None:
    """Check that the person's key, as the trust file has it, signed these bytes.

    Raises:
        UsageError: it did not; nothing is recorded.
    """
    try:
        signatures.verify(data, signature, principal=person, namespace=NAMESPACE, trust=run.trust)
    except VerificationError as error:
        raise UsageError(
            f"refused: the signature is not {person}'s: {error.message}",
            remedy="sign with the key that the params file has",
        ) from error
    if not signatures.canonical_signature(signature):
        raise UsageError("refused: the .sig is not in the form that ssh-keygen writes", remedy="sign again")


def store(run: Run, name: str, data: bytes, signature: bytes) -> dict[str, str]:
    """Keep a statement with its signature; one that is there is never overwritten.

    Returns:
        What the ledger keeps of it: its path, both digests, and both files, which are small.

    Raises:
        UsageError: another statement already has this name.
    """
    path = run.folder / "decisions" / f"{name}.json"
    if path.exists() and path.read_bytes() != data:
        raise UsageError(
            f"decisions/{name}.json is there already and differs", remedy="look at it; nothing was overwritten"
        )
    write_atomically(path.with_suffix(".json.sig"), signature)
    write_atomically(path, data)
    return {
        "statement": path.relative_to(run.folder).as_posix(),
        "sha256": sha256(data),
        "signature_sha256": sha256(signature),
        "statement_json": data.decode(),
        "signature": signature.decode(),
    }


def bring(run: Run, recorded: Mapping[str, Any]) -> None:
    """Write the files of a statement that was recorded on another machine; what is here already stays as it is.

    Nothing happens for an event that carries no statement: of an earlier version, or of another kind. A sealed record
    is never written to.

    Raises:
        VerificationError: what the ledger carries is not what it names.
    """
    if "statement_json" not in recorded or (run.folder / "statement.json.sig").exists():
        return
    path = run.folder / recorded["statement"]
    for file, text, digest in (
        (path.with_suffix(".json.sig"), recorded["signature"], recorded["signature_sha256"]),
        (path, recorded["statement_json"], recorded["sha256"]),
    ):
        content = str(text).encode()
        if sha256(content) != digest or path.parent != run.folder / "decisions":
            raise VerificationError(
                f"the ledger carries another {recorded['statement']} than it names",
                remedy=f"keep it as it is: runbook fsck {run.run_id}",
            )
        if not file.exists():
            write_atomically(file, content)


def load(run: Run, recorded: Mapping[str, Any]) -> tuple[dict[str, Any], bytes, bytes]:
    """Read a recorded statement back, checked against the digests that the ledger has.

    Raises:
        VerificationError: a file is gone or changed.
    """
    bring(run, recorded)
    path = run.folder / recorded["statement"]
    try:
        data, signature = path.read_bytes(), path.with_suffix(".json.sig").read_bytes()
    except OSError as error:
        raise VerificationError(
            f"{recorded['statement']} cannot be read: {error.strerror}", remedy="restore it"
        ) from error
    if sha256(data) != recorded["sha256"] or sha256(signature) != recorded["signature_sha256"]:
        raise VerificationError(f"{recorded['statement']} is not what was recorded", remedy="restore it")
    return json.loads(data), data, signature
