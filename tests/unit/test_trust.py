"""The trust file: who may sign now, and who could."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from runbook_lib import signatures
from runbook_lib.errors import VerificationError
from runbook_lib.gate import write_trust


def key(folder: Path, name: str) -> tuple[Path, str]:
    path = folder / name
    subprocess.run(("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path), check=True, capture_output=True)
    return path, " ".join(path.with_suffix(".pub").read_text().split()[:2])


def test_an_ended_key_opens_nothing_any_more_and_what_it_signed_still_verifies(tmp_path: Path) -> None:
    old, old_public = key(tmp_path, "old")
    _, new_public = key(tmp_path, "new")
    _, recorder = key(tmp_path, "recorder")
    write_trust(tmp_path, signatures.allowed_signers({"ada": [old_public]}, recorder_key=recorder))
    signature = signatures.sign(b"yes", key=old, namespace="runbook-gate")

    trust = write_trust(tmp_path, signatures.allowed_signers({"ada": [new_public]}, recorder_key=recorder))

    with pytest.raises(VerificationError):
        signatures.verify(b"yes", signature, principal="ada", namespace="runbook-gate", trust=trust, at=4102444800.0)
    signatures.verify(b"yes", signature, principal="ada", namespace="runbook-gate", trust=trust, at=1577836800.0)
    before = trust.read_text()
    write_trust(tmp_path, signatures.allowed_signers({"ada": [new_public]}, recorder_key=recorder))
    assert trust.read_text() == before
