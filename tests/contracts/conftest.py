"""Real counterparts for the ports' suites: SeaweedFS, PostgreSQL, an sshd, a git repository with its hook."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rehearsal import repository as sample
from rehearsal import s3
from rehearsal.ports import free_port
from runbook_lib.adapters.objects import S3Store


@dataclass(frozen=True)
class Bucket:
    """Where the object store listens and what opens it."""

    endpoint: str
    name: str
    credentials: Path

    def store(self, prefix: str, **changes: Any) -> S3Store:
        """The bucket as the code under test has it, with other settings where a test names them."""
        settings = {
            "bucket": self.name,
            "prefix": prefix,
            "endpoint": self.endpoint,
            "credentials_file": str(self.credentials),
        }
        return S3Store(**{**settings, **changes})


def end(process: subprocess.Popen[bytes], *, grace_s: float = 3.0) -> None:
    """End a process that a fixture started."""
    process.terminate()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(grace_s)


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """SeaweedFS with one versioned bucket and a key server."""
    folder = tmp_path_factory.mktemp("objects")
    for name in ("log", "secrets"):
        (folder / name).mkdir()
    server = s3.initialise(folder, free_port)
    # Keys are made when they are named, and live in the server's memory: here nobody needs them later.
    key_server = {"default_provider": "here", "providers": {"here": {"type": "local", "enableOnDemandCreate": True}}}
    server.config.write_text(json.dumps({**json.loads(server.config.read_text()), "kms": key_server}))
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(server.argv(), stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        deadline = time.monotonic() + 60.0
        while True:
            try:
                s3.make_bucket(server.client())
                break
            except Exception:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.3)
        yield Bucket(server.endpoint, s3.BUCKET, server.credentials)
    finally:
        end(process)
        s3.forget(folder)


@pytest.fixture(scope="session")
def built_repository(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The sample application's repository, made once; its tags' commits."""
    folder = tmp_path_factory.mktemp("repository")
    return folder / "shop.git", sample.build(folder)


@pytest.fixture
def shop(built_repository: tuple[Path, dict[str, str]], tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A copy of the sample repository that a test may push to."""
    source, commits = built_repository
    return Path(shutil.copytree(source, tmp_path / "shop.git")), commits


@dataclass(frozen=True)
class SecureShell:
    """An sshd on loopback and the client's settings for it."""

    port: int
    user: str
    config: Path


def _sshd() -> str:
    found = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        pytest.skip("no sshd on this machine; sh rehearsal/install-debian.sh installs it")
    return found


@pytest.fixture(scope="session")
def secure_shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureShell]:
    """An sshd of this test's own: own keys, a free loopback port, only this user."""
    program = _sshd()
    # Not below pytest's own folder, whose mode sshd's StrictModes may not like: it is switched off for that.
    folder = tmp_path_factory.mktemp("sshd")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    for name in ("host_key", "user_key"):
        subprocess.run(("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)), check=True)
    port, user = free_port(), getpass.getuser()
    (folder / "sshd_config").write_text(
        f"""
ListenAddress 127.0.0.1:{port}
HostKey {folder}/host_key
PidFile {folder}/sshd.pid
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
AllowUsers {user}
LogLevel VERBOSE
"""
    )
    host_key = (folder / "host_key.pub").read_text().split()[:2]
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {' '.join(host_key)}\n")
    (folder / "config").write_text(
        f"Host *\n  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known_hosts\n"
    )
    with (folder / "sshd.log").open("wb") as log:
        process = subprocess.Popen(
            (program, "-D", "-e", "-f", str(folder / "sshd_config")), stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 10.0
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    pytest.fail(f"sshd did not start: {(folder / 'sshd.log').read_text()[-500:]}")
                time.sleep(0.05)
        yield SecureShell(port, user, folder / "config")
    finally:
        end(process)
