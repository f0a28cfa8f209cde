"""SSH signatures of bytes (SSHSIG), made and checked by `ssh-keygen -Y`; nothing is left on disk.

Who may sign what is in an `allowed_signers` file (ssh-keygen(1)): one line a key, with the namespaces it is good for.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from runbook_lib.errors import UsageError, VerificationError

GATE_NAMESPACE = "runbook-gate"
RECORD_NAMESPACE = "runbook-record"
RECORDER = "recorder"

_BEGIN, _END = "-----BEGIN SSH SIGNATURE-----\n", "-----END SSH SIGNATURE-----\n"
_LINE_CHARACTERS = 70
_MAX_SIGNATURE_BYTES = 64 * 1024
# A person signs: time for a passphrase or for touching a hardware key.
_SIGN_TIMEOUT_S = 120.0
_AGENT_TIMEOUT_S = 5.0
_CHECK_TIMEOUT_S = 30.0
# Names go into a file in which blanks, commas, `*`, `?`, `!` and `#` mean something.
_PRINCIPAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
_KEY = re.compile(r"(?P<kind>(?:ssh|sk-ssh|ecdsa|sk-ecdsa)-[a-z0-9@.-]+) (?P<body>[A-Za-z0-9+/]+={0,2})(?: .*)?")


def sign(data: bytes, *, key: Path, namespace: str, ask: bool = True) -> bytes:
    """Sign bytes and return the armored signature, as it stands in a `.sig` file.

    Args:
        data: what is signed.
        key: a private key, or the public half (`.pub`) of a key that ssh-agent holds.
        namespace: what the signature is good for.
        ask: False where nobody sits at a terminal: no passphrase is asked for, a locked key is refused.

    Raises:
        UsageError: the key is not there or cannot sign.
    """
    if not key.is_file():
        raise UsageError(f"there is no key file {key}", remedy="give the path of your own key")
    done = _run(("-Y", "sign", "-n", namespace, "-f", str(key)), data, timeout_s=_SIGN_TIMEOUT_S, ask=ask)
    if done.returncode and not ask and "passphrase" in _reason(done):
        raise UsageError(
            f"{key} has a passphrase, and ssh-agent does not hold this key",
            remedy=f"in a terminal: ssh-add {shlex.quote(str(key))}, then sign again",
        )
    if done.returncode or not canonical_signature(done.stdout):
        raise UsageError(f"{key} does not sign: {_reason(done)}", remedy="check the key, its mode and ssh-agent")
    return done.stdout


def agent_keys() -> list[str]:
    """The public keys that ssh-agent holds, as `kind base64`; none when no agent answers."""
    try:
        done = subprocess.run(
            ("ssh-add", "-L"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_AGENT_TIMEOUT_S,
            check=False,
            env={**_environment(), "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = (_KEY.fullmatch(line.strip()) for line in done.stdout.decode(errors="replace").splitlines())
    return [f"{key['kind']} {key['body']}" for key in found if key is not None]


def fingerprint(public_key: str) -> str:
    """How people tell a key: its kind and the SHA-256 that ssh-add shows."""
    kind, body, *_ = public_key.split()
    hashed = base64.b64encode(hashlib.sha256(base64.b64decode(body)).digest()).decode().rstrip("=")
    return f"{kind} SHA256:{hashed}"


def verify(
    data: bytes, signature: bytes, *, principal: str, namespace: str, trust: Path, at: float | None = None
) -> None:
    """Check that a key of `principal` signed these bytes for `namespace`.

    Args:
        data: what was signed.
        signature: the content of the `.sig` file.
        principal: the signer's name in the trust file.
        namespace: what the signature must be good for.
        trust: an `allowed_signers` file.
        at: epoch seconds at which the key had to be valid; None means now.

    Raises:
        VerificationError: it did not; the reason is ssh-keygen's own.
    """
    if not _PRINCIPAL.fullmatch(principal):
        raise VerificationError(f"{principal[:64]!r} is no signer's name")
    _check_trust(trust)
    with _scratch_file(signature) as file:
        arguments = ["-Y", "verify", "-f", str(trust), "-I", principal, "-n", namespace, "-s", file.name]
        if at is not None:
            arguments.append(f"-Overify-time={_ssh_time(at)}")
        done = _run(arguments, data, timeout_s=_CHECK_TIMEOUT_S)
    if done.returncode:
        raise VerificationError(f"no valid signature of {principal} for {namespace}: {_reason(done)}")


def find_principals(signature: bytes, *, trust: Path, at: float | None = None) -> list[str]:
    """Names in the trust file whose key made this signature; empty when nobody's did.

    Only the key is looked at: `verify` tells whether it signed the bytes in question.
    """
    _check_trust(trust)
    with _scratch_file(signature) as file:
        arguments = ["-Y", "find-principals", "-f", str(trust), "-s", file.name]
        if at is not None:
            arguments.append(f"-Overify-time={_ssh_time(at)}")
        done = _run(arguments, b"", timeout_s=_CHECK_TIMEOUT_S)
    return done.stdout.decode(errors="replace").split() if done.returncode == 0 else []


def public_key_of(key: Path) -> str:
    """The public half of a key file as `kind base64`, without its comment.

    Raises:
        UsageError: it is no SSH key.
    """
    if not key.is_file():
        raise UsageError(f"there is no key file {key}", remedy="make one: ssh-keygen -t ed25519 -f FILE")
    if key.suffix == ".pub":
        text = key.read_text(errors="replace")
    else:
        # An empty passphrase is given so that a locked key is an error here, not a question on the terminal.
        done = _run(("-y", "-P", "", "-f", str(key)), b"", timeout_s=_CHECK_TIMEOUT_S)
        public = key.with_name(key.name + ".pub")
        if done.returncode == 0:
            text = done.stdout.decode(errors="replace")
        elif public.is_file():
            text = public.read_text(errors="replace")
        else:
            raise UsageError(f"{key} is no readable SSH key: {_reason(done)}", remedy="put its .pub beside it")
    return _bare(text.strip(), where=str(key))


def allowed_signers(people: Mapping[str, Sequence[str]], *, recorder_key: str) -> str:
    """The trust file: people sign at gates, the recorder signs records, nobody signs for another.

    Args:
        people: name -> public keys.
        recorder_key: the public key that seals records.

    Raises:
        UsageError: a name or key cannot be used, or one key would speak for two.
    """
    owners = {_bare(recorder_key, where=RECORDER): RECORDER}
    lines = []
    for name in sorted(people):
        if not _PRINCIPAL.fullmatch(name) or name == RECORDER:
            raise UsageError(f"{name[:64]!r} cannot be a signer's name", remedy="rename the person in the params file")
        for key in people[name]:
            bare = _bare(key, where=name)
            if bare in owners:
                if owners[bare] == name:
                    continue
                raise UsageError(
                    f"{name} and {owners[bare]} have the same key: one could sign for the other",
                    remedy="give each their own key",
                )
            owners[bare] = name
            lines.append(f'{name} namespaces="{GATE_NAMESPACE}" {bare}\n')
    return "".join(lines) + f'{RECORDER} namespaces="{RECORD_NAMESPACE}" {_bare(recorder_key, where=RECORDER)}\n'


def canonical_signature(signature: bytes) -> bool:
    """Tell whether these are exactly the bytes that ssh-keygen writes for the signature in them.

    `ssh-keygen -Y verify` is lenient: it passes over blanks, spare base64 bits, text around the armor, an older
    version number and the reserved field. With this check no byte of a `.sig` can be changed unseen.
    """
    if len(signature) > _MAX_SIGNATURE_BYTES:
        return False
    try:
        text = signature.decode("ascii")
        if not (text.startswith(_BEGIN) and text.endswith(_END)):
            return False
        blob = base64.b64decode(text[len(_BEGIN) : -len(_END)].replace("\n", ""), validate=True)
    except (UnicodeDecodeError, binascii.Error):
        return False
    return armored(blob) == signature and _well_formed(blob)


def armored(blob: bytes) -> bytes:
    """The text form that ssh-keygen gives a signature's bytes."""
    body = base64.b64encode(blob).decode()
    lines = (body[at : at + _LINE_CHARACTERS] + "\n" for at in range(0, len(body), _LINE_CHARACTERS))
    return (_BEGIN + "".join(lines) + _END).encode()


def _well_formed(blob: bytes) -> bool:
    # PROTOCOL.sshsig: magic, version, public key, namespace, reserved, hash name, signature; nothing after it.
    if not blob.startswith(b"SSHSIG\x00\x00\x00\x01"):
        return False
    fields, rest = [], blob[10:]
    while rest:
        size = int.from_bytes(rest[:4], "big")
        if len(rest) < 4 + size:
            return False
        fields.append(rest[4 : 4 + size])
        rest = rest[4 + size :]
    return len(fields) == 5 and fields[2] == b"" and fields[3] in (b"sha256", b"sha512")


def _bare(text: str, *, where: str) -> str:
    found = _KEY.fullmatch(text)
    if found is None:
        raise UsageError(f"{where}: {text[:40]!r} is no SSH public key", remedy="give the line of the .pub file")
    return f"{found['kind']} {found['body']}"


def _check_trust(trust: Path) -> None:
    if not trust.is_file():
        raise VerificationError(f"there is no trust file {trust}", remedy="give an allowed_signers file")


def _ssh_time(epoch_s: float) -> str:
    # Without the suffix Z, which OpenSSH knows since 9.1 only: `_run` sets the time zone to UTC instead.
    try:
        return datetime.fromtimestamp(epoch_s, UTC).strftime("%Y%m%d%H%M%S")
    except (ValueError, OverflowError, OSError) as error:
        raise VerificationError(f"{epoch_s!r} is no time") from error


def _scratch_file(content: bytes) -> tempfile._TemporaryFileWrapper[bytes]:
    file = tempfile.NamedTemporaryFile(prefix="sig-")  # noqa: SIM115  # the caller's `with` removes it
    file.write(content)
    file.flush()
    return file


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in ("PATH", "HOME", "SSH_AUTH_SOCK", "TMPDIR") if name in os.environ}


def _run(
    arguments: Sequence[str], data: bytes, *, timeout_s: float, ask: bool = True
) -> subprocess.CompletedProcess[bytes]:
    # Without a terminal and a window to ask in, ssh-keygen takes the empty passphrase and fails at once.
    silent = {} if ask else {"SSH_ASKPASS_REQUIRE": "never"}
    try:
        return subprocess.run(  # argv list, no shell
            ("ssh-keygen", *arguments),
            input=data,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            env={**_environment(), **silent, "LC_ALL": "C", "TZ": "UTC"},
            start_new_session=not ask,
        )
    except FileNotFoundError as error:
        raise UsageError("ssh-keygen is not installed", remedy="install the OpenSSH client, 8.9 or newer") from error
    except (subprocess.TimeoutExpired, ValueError, OSError) as error:
        raise VerificationError(f"ssh-keygen gave no answer: {error}") from error


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    said = (done.stderr + b"\n" + done.stdout).decode(errors="replace").replace("\r", "")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return "; ".join(lines[:3])[:300].rstrip(".") or f"exit status {done.returncode}"
