"""ansible-playbook command lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from runbook_lib.model import Command

# Pipelining saves a file transfer a task; retries and colour have no place in a log.
_ENVIRONMENT = {
    "ANSIBLE_PIPELINING": "1",
    "ANSIBLE_RETRY_FILES_ENABLED": "0",
    "ANSIBLE_NOCOLOR": "1",
    "ANSIBLE_LOCALHOST_WARNING": "0",
    "ANSIBLE_HOST_KEY_CHECKING": "1",
    "PYTHONWARNINGS": "ignore",
}


def playbook(
    name: str,
    *,
    folder: Path,
    inventory: Path,
    limit: Sequence[str],
    extra: Mapping[str, str] | None = None,
    vault_password_file: Path | None = None,
    timeout_s: float,
) -> Command:
    """Run a playbook on named hosts only; a play that would reach further is cut by `--limit`."""
    argv = ["ansible-playbook", "--inventory", str(inventory), "--limit", ",".join(limit)]
    for key, value in (extra or {}).items():
        argv += ["--extra-vars", f"{key}={value}"]
    if vault_password_file is not None:
        argv += ["--vault-password-file", str(vault_password_file)]
    argv.append(str(folder / name))
    return Command(tuple(argv), timeout_s=timeout_s, env=_ENVIRONMENT, cwd=folder)
