"""The twin's hosts: folders laid out as the deploy playbook does it, its inventory and its vault."""

from __future__ import annotations

import json
import random
import secrets
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rehearsal.errors import StackError
from rehearsal.files import write, write_secret
from rehearsal.supervisor import Program, clean_environment, control_argv

WEB = ("app-01", "app-02", "app-03")
WORKERS = ("worker-01",)
HOSTS = (*WEB, *WORKERS)
UPLOADS = 6
PICTURE_BYTES = 400_000


@dataclass(frozen=True, slots=True)
class Settings:
    """What every host's `shared/env` is made of."""

    repository: Path
    database_url: str
    passfile: Path
    bypass_token_file: Path
    vault_file: Path
    ports: Mapping[str, int]


def programs(folder: Path) -> list[Program]:
    """The application's processes, one a host."""
    started = []
    for name in HOSTS:
        home = folder / "hosts" / name
        script = home / "current" / ("web.py" if name in WEB else "worker.py")
        started.append(Program(name, (sys.executable, str(script)), {"SHOP_HOME": str(home)}))
    return started


def lay_out(folder: Path, host: str, commit: str, settings: Settings, secret_key: str) -> None:
    """Put the running release on a host that never had one.

    Raises:
        StackError: git or tar failed; their words are quoted.
    """
    home = folder / "hosts" / host
    release = home / "releases" / commit
    for part in (release, home / "shared" / "uploads", home / "log"):
        part.mkdir(parents=True)
    archive = ("git", f"--git-dir={settings.repository}", "archive", "--format=tar", commit)
    exported = subprocess.run(archive, check=False, capture_output=True, env=clean_environment())
    unpacked = subprocess.run(
        ("tar", "-x", "-f", "-", "-C", str(release)), input=exported.stdout, check=False, capture_output=True
    )
    if exported.returncode or unpacked.returncode:
        said = (exported.stderr + unpacked.stderr).decode(errors="replace").strip()
        raise StackError(f"commit {commit} can't be laid out on {host}: {said[-300:]}")
    (release / "REVISION").write_text(f"{commit}\n", encoding="utf-8")
    values = {
        "INSTANCE": host,
        **({"PORT": str(settings.ports[host])} if host in WEB else {}),
        "DATABASE_URL": settings.database_url,
        "PGPASSFILE": str(settings.passfile),
        "BYPASS_TOKEN_FILE": str(settings.bypass_token_file),
        "SECRET_KEY": secret_key,
    }
    write_secret(home / "shared" / "env", "".join(f"{key}={value}\n" for key, value in values.items()))
    # Pictures don't compress, invoices do: a backup meets both. The same bytes each time.
    noise = random.Random(host)
    for number in range(UPLOADS):
        uploads = home / "shared" / "uploads"
        (uploads / f"picture-{number}.bin").write_bytes(noise.randbytes(PICTURE_BYTES))
        lines = "".join(f"line {line}: {noise.randrange(100_000)} cents\n" for line in range(2_000))
        (uploads / f"invoice-{number}.txt").write_text(f"invoice {number} of {host}\n{lines}", encoding="utf-8")
    (home / "current").symlink_to(f"releases/{commit}")
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    (home / "revisions.log").write_text(f"{now} {commit} -\n", encoding="utf-8")


def write_inventory(folder: Path, settings: Settings) -> None:
    """Write `inventory.yml`: what the playbooks must know of each host."""

    def host(name: str) -> dict[str, object]:
        facts: dict[str, object] = {"home": str(folder / "hosts" / name)}
        for action in ("restart", "stop", "start", "status"):
            facts[f"{action}_command"] = control_argv(folder, action, name)
        if name in WEB:
            facts |= {"app_port": settings.ports[name], "url": f"http://127.0.0.1:{settings.ports[name]}"}
        return facts

    variables = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "ansible_pipelining": True,
        "repository": str(settings.repository),
        "vault_file": str(settings.vault_file),
        "database_url": settings.database_url,
        "passfile": str(settings.passfile),
        "bypass_token_file": str(settings.bypass_token_file),
    }
    groups = {"web": {"hosts": {n: host(n) for n in WEB}}, "workers": {"hosts": {n: host(n) for n in WORKERS}}}
    inventory = {"all": {"children": {"prod": {"vars": variables, "children": groups}}}}
    write(folder / "inventory.yml", json.dumps(inventory, indent=1) + "\n")  # JSON is YAML


def encrypt_vault(folder: Path, settings: Settings, secret_key: str) -> subprocess.Popen[bytes]:
    """Start `ansible-vault encrypt` over the deployment's values; the caller waits for it.

    It costs a second, so the twin starts meanwhile. The clear text goes through a pipe, never to the disk.
    """
    values = {
        "secret_key": secret_key,
        "payment_webhook_url": f"https://payments.example/hook/{secrets.token_hex(12)}",
    }
    program = Path(sys.executable).parent / "ansible-vault"
    password = folder / "secrets" / "vault_password"
    with (folder / "log" / "vault.log").open("wb") as log:
        started = subprocess.Popen(
            (program, "encrypt", f"--vault-password-file={password}", f"--output={settings.vault_file}", "-"),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**clean_environment(), "ANSIBLE_LOCAL_TEMP": str(folder / "run" / "ansible")},
        )
    if started.stdin is not None:
        with started.stdin as clear:
            clear.write(json.dumps(values).encode())
    return started
