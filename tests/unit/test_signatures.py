"""Signatures: made and checked by ssh-keygen; no byte of a .sig can be changed unseen."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path

import pytest

from runbook_lib import signatures
from runbook_lib.errors import UsageError, VerificationError

DATA = b'{"decision":"approve"}'


def make_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    argv = ("ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", "a comment", "-f", str(path))
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
    return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("keys")
    return {name: make_key(folder / name) for name in ("ada", "bob", "recorder")}


@pytest.fixture
def trust(tmp_path: Path, keys: dict[str, Path]) -> Path:
    people = {name: [signatures.public_key_of(keys[name])] for name in ("ada", "bob")}
    path = tmp_path / "allowed_signers"
    path.write_text(signatures.allowed_signers(people, recorder_key=signatures.public_key_of(keys["recorder"])))
    return path


@pytest.fixture
def signature(keys: dict[str, Path]) -> bytes:
    return signatures.sign(DATA, key=keys["ada"], namespace="runbook-gate")


def test_a_signature_is_verified_under_its_signers_name(trust: Path, signature: bytes) -> None:
    signatures.verify(DATA, signature, principal="ada", namespace="runbook-gate", trust=trust)

    assert signatures.canonical_signature(signature)
    assert signatures.find_principals(signature, trust=trust) == ["ada"]


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_other_kinds_of_keys_sign_too(tmp_path: Path, keys: dict[str, Path], kind: str) -> None:
    key = make_key(tmp_path / kind, kind)
    trust = tmp_path / "trust"
    recorder = signatures.public_key_of(keys["recorder"])
    trust.write_text(signatures.allowed_signers({"cyd": [signatures.public_key_of(key)]}, recorder_key=recorder))

    signature = signatures.sign(DATA, key=key, namespace="runbook-gate")

    assert signatures.canonical_signature(signature)
    signatures.verify(DATA, signature, principal="cyd", namespace="runbook-gate", trust=trust)


@pytest.mark.parametrize(
    ("data", "principal", "namespace"),
    [
        (DATA + b" ", "ada", "runbook-gate"),
        (DATA, "bob", "runbook-gate"),
        (DATA, "ada", "runbook-record"),
        (DATA, "nobody", "runbook-gate"),
        (DATA, "*", "runbook-gate"),
        (DATA, "ada,bob", "runbook-gate"),
        (DATA, "", "runbook-gate"),
        (DATA, "ada\0", "runbook-gate"),
    ],
)
def test_anything_else_is_refused(trust: Path, signature: bytes, data: bytes, principal: str, namespace: str) -> None:
    with pytest.raises(VerificationError):
        signatures.verify(data, signature, principal=principal, namespace=namespace, trust=trust)


def test_a_person_cannot_sign_records_and_the_recorder_cannot_sign_at_gates(trust: Path, keys: dict[str, Path]) -> None:
    for name, namespace in (("ada", "runbook-record"), ("recorder", "runbook-gate")):
        signature = signatures.sign(DATA, key=keys[name], namespace=namespace)
        with pytest.raises(VerificationError):
            signatures.verify(DATA, signature, principal=name, namespace=namespace, trust=trust)


def test_a_key_must_be_valid_at_the_time_asked_for(tmp_path: Path, keys: dict[str, Path], signature: bytes) -> None:
    trust = tmp_path / "dated"
    public = signatures.public_key_of(keys["ada"])
    trust.write_text(f'ada namespaces="runbook-gate",valid-before="20300101" {public}\n')

    signatures.verify(DATA, signature, principal="ada", namespace="runbook-gate", trust=trust, at=1_893_455_999)
    with pytest.raises(VerificationError):
        signatures.verify(DATA, signature, principal="ada", namespace="runbook-gate", trust=trust, at=1_893_456_001)
    with pytest.raises(VerificationError):
        signatures.verify(DATA, signature, principal="ada", namespace="runbook-gate", trust=trust, at=1e300)


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 100, b"A" * 200_000])
def test_junk_is_no_signature(trust: Path, content: bytes) -> None:
    with pytest.raises(VerificationError):
        signatures.verify(DATA, content, principal="ada", namespace="runbook-gate", trust=trust)
    assert not signatures.canonical_signature(content)


def test_a_missing_or_odd_trust_file_is_an_error_not_a_crash(tmp_path: Path, signature: bytes) -> None:
    odd = tmp_path / "odd"
    odd.write_bytes(b"\x00\xff\n" * 50)
    for trust in (tmp_path / "missing", tmp_path, odd):
        with pytest.raises(VerificationError):
            signatures.verify(DATA, signature, principal="ada", namespace="runbook-gate", trust=trust)


def test_every_changed_byte_of_a_signature_is_seen(trust: Path, signature: bytes) -> None:
    for at in range(len(signature)):
        for flipped in (signature[at] ^ 1, signature[at] ^ 0x20, ord("\n"), ord(" "), ord("A")):
            changed = signature[:at] + bytes([flipped]) + signature[at + 1 :]
            if changed == signature or not signatures.canonical_signature(changed):
                continue
            # What is still well-formed differs in its key, namespace or signature: ssh-keygen refuses that.
            if at % 5:
                continue  # a process each: every fifth place is asked
            with pytest.raises(VerificationError):
                signatures.verify(DATA, changed, principal="ada", namespace="runbook-gate", trust=trust)


def test_what_ssh_keygen_passes_over_is_not_canonical(trust: Path, signature: bytes) -> None:
    lines = signature.decode().splitlines()
    blob = base64.b64decode("".join(lines[1:-1]))
    reserved_at = blob.index(b"\0\0\0\x06sha512") - 4
    lenient = {
        "text before": b"hello\n" + signature,
        "text after": signature + b"\n",
        "no final newline": signature[:-1],
        "carriage returns": signature.replace(b"\n", b"\r\n"),
        "one long line": f"{lines[0]}\n{''.join(lines[1:-1])}\n{lines[-1]}\n".encode(),
        "version 0": signatures.armored(blob[:9] + b"\0" + blob[10:]),
        "reserved field": signatures.armored(blob[:reserved_at] + b"\0\0\0\x01x" + blob[reserved_at + 4 :]),
        "text behind the fields": signatures.armored(blob + b"\0\0\0\0"),
    }

    assert {name for name, changed in lenient.items() if signatures.canonical_signature(changed)} == set()


def test_signing_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trust: Path) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    key = make_key(tmp_path / "key")

    signature = signatures.sign(DATA, key=key, namespace="runbook-gate")
    signatures.find_principals(signature, trust=trust)

    assert list(folder.iterdir()) == []
    assert sorted(p.name for p in tmp_path.glob("key*")) == ["key", "key.pub"]


def test_a_key_in_the_agent_signs_by_its_public_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Path], trust: Path
) -> None:
    socket = tmp_path / "agent"
    agent = subprocess.Popen(("ssh-agent", "-D", "-a", str(socket)), stdout=subprocess.DEVNULL)
    try:
        while not socket.exists():
            assert agent.poll() is None
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        subprocess.run(("ssh-add", "-q", str(keys["ada"])), check=True)
        public = tmp_path / "ada.pub"
        public.write_text(keys["ada"].with_suffix(".pub").read_text())

        signature = signatures.sign(DATA, key=public, namespace="runbook-gate")
    finally:
        agent.terminate()
        agent.wait()

    signatures.verify(DATA, signature, principal="ada", namespace="runbook-gate", trust=trust)


def test_a_key_that_is_not_there_or_no_key_cannot_sign(tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_text("no key")
    for key in (tmp_path / "missing", junk):
        with pytest.raises(UsageError):
            signatures.sign(DATA, key=key, namespace="runbook-gate")
        with pytest.raises(UsageError):
            signatures.public_key_of(key)


def test_the_public_half_of_a_locked_key_is_read_from_its_pub_file(tmp_path: Path) -> None:
    key = make_key(tmp_path / "locked", passphrase="a long enough phrase")

    public = signatures.public_key_of(key)

    assert key.with_suffix(".pub").read_text().startswith(public + " ")


def test_the_trust_file_has_one_line_a_key(keys: dict[str, Path]) -> None:
    ada, bob, recorder = (signatures.public_key_of(keys[name]) for name in ("ada", "bob", "recorder"))

    text = signatures.allowed_signers({"bob": [bob], "ada": [f"{ada} ada@home", ada]}, recorder_key=recorder)

    assert text == (
        f'ada namespaces="runbook-gate" {ada}\nbob namespaces="runbook-gate" {bob}\n'
        f'recorder namespaces="runbook-record" {recorder}\n'
    )


@pytest.mark.parametrize("name", ["a b", "*", "a,b", "#ada", "!ada", "recorder", "", 'a"b', "ada\nbob"])
def test_a_name_that_means_something_in_the_trust_file_is_refused(keys: dict[str, Path], name: str) -> None:
    ada, recorder = (signatures.public_key_of(keys[n]) for n in ("ada", "recorder"))

    with pytest.raises(UsageError):
        signatures.allowed_signers({name: [ada]}, recorder_key=recorder)


def test_one_key_cannot_speak_for_two(keys: dict[str, Path]) -> None:
    ada, recorder = (signatures.public_key_of(keys[n]) for n in ("ada", "recorder"))

    for people in ({"ada": [ada], "bob": [ada]}, {"ada": [recorder]}):
        with pytest.raises(UsageError, match="same key"):
            signatures.allowed_signers(people, recorder_key=recorder)


def test_a_key_cannot_bring_lines_of_its_own_into_the_trust_file(keys: dict[str, Path]) -> None:
    ada, recorder = (signatures.public_key_of(keys[n]) for n in ("ada", "recorder"))

    for key in (f"{ada}\nbob {ada}", f"cert-authority {ada}", "ssh-ed25519", ""):
        with pytest.raises(UsageError, match="no SSH public key"):
            signatures.allowed_signers({"ada": [key]}, recorder_key=recorder)
