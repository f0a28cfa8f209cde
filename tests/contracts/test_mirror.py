"""A run's folder comes back from a real S3 server as the ledger names it, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from runbook_lib import mirror
from runbook_lib.adapters.objects import S3Store
from runbook_lib.canonical import canonical_json, sha256
from runbook_lib.errors import VerificationError
from runbook_lib.model import Event

if TYPE_CHECKING:
    from tests.contracts.conftest import Bucket

RUN = "20260102T030405Z-v1.5.0-a1b2c3"


@pytest.fixture
def store(bucket: Bucket, request: pytest.FixtureRequest) -> S3Store:
    prefix = request.node.name
    return S3Store(bucket.name, prefix, endpoint=bucket.endpoint, credentials_file=str(bucket.credentials))


def mirrored(store: S3Store, files: dict[str, bytes]) -> list[Event]:
    """Put a folder into the store as another machine would have; the ledger's events that name it."""

    def put(content: bytes) -> str:
        digest = sha256(content)
        key = f"{store.prefix}/runs/{RUN}/{digest}"
        store._client.put_object(Bucket=store.bucket, Key=key, Body=content, Metadata={"sha256": digest})
        return digest

    listing = canonical_json({"run": RUN, "files": {name: put(content) for name, content in files.items()}})
    named = {"sha256": put(listing), "files": len(files), "epoch": 1}
    return [Event(RUN, 1, "2026-01-02T03:04:05.000000Z", mirror.EVENT, named, "0" * 64, "")]


def test_a_folder_comes_back_byte_for_byte(store: S3Store, tmp_path: Path) -> None:
    files = {"params.json": b"{}", "artifacts/plan.json": b'{"a":1}'}
    events = mirrored(store, files)

    mirror.fetch(store, events, tmp_path / "run", tmp_path / "scratch")

    assert {name: (tmp_path / "run" / name).read_bytes() for name in files} == files


def test_a_file_that_comes_back_as_something_else_is_not_taken(store: S3Store, tmp_path: Path) -> None:
    events = mirrored(store, {"params.json": b"{}"})
    key = f"{store.prefix}/runs/{RUN}/{sha256(b'{}')}"
    store._client.put_object(Bucket=store.bucket, Key=key, Body=b"[]")

    with pytest.raises(VerificationError, match="came back as something else"):
        mirror.fetch(store, events, tmp_path / "run", tmp_path / "scratch")

    assert not (tmp_path / "run" / "params.json").exists()


def test_no_file_lands_outside_of_the_runs_folder(store: S3Store, tmp_path: Path) -> None:
    events = mirrored(store, {"../outside": b"x"})

    with pytest.raises(VerificationError, match="outside of the run's folder"):
        mirror.fetch(store, events, tmp_path / "run", tmp_path / "scratch")

    assert not (tmp_path / "outside").exists()
