"""`runbook backup prove` as a person or a script meets it: what it says, how it ends, and what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from rehearsal import postgres as twin_postgres
from runbook_lib import progress, restore, wiring
from runbook_lib.canonical import sha256_file
from tests.contracts.test_proof import SHOP, ZSTD, Proofs, proofs  # noqa: F401
from tests.project import ROOT, wait_until

# The source is no scratch database: there nothing sleeps.
_SLEEPS = (
    "CASE WHEN pg_catalog.current_database() LIKE 'runbook_scratch_%' THEN pg_catalog.pg_sleep(120)::text ELSE 'x' END"
)
RESTORED_SLOWLY = f"""
CREATE FUNCTION slow(text) RETURNS bool LANGUAGE sql IMMUTABLE AS $$ SELECT {_SLEEPS} <> $1 || ' ' $$;
CREATE TABLE held (t text CHECK (slow(t))); INSERT INTO held VALUES ('x');
"""


@dataclass
class World:
    """A server, an environment whose database it is, and a good dump with its manifest."""

    proofs: Proofs
    name: str
    dump: Path
    manifest: dict[str, Any]

    def argv(self, *more: str) -> tuple[str, ...]:
        path = self.proofs.folder / "manifest.json"
        path.write_text(json.dumps(self.manifest))
        return ("backup", "prove", str(self.dump), "--manifest", str(path), *more)

    def start(self) -> subprocess.Popen[str]:
        argv = (sys.executable, "-m", "runbook_lib", *self.argv())
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def sessions(self, where: str) -> int:
        with self.proofs.server.session() as session:
            query = f"SELECT count(*) FROM pg_stat_activity WHERE datname LIKE 'runbook_scratch_%' AND {where}"
            return int(session.execute(query).fetchone()[0])

    def left(self) -> list[str]:
        """Scratch databases, and what lies beside the dump."""
        with self.proofs.server.session() as session:
            found = session.execute("SELECT datname FROM pg_database WHERE datname LIKE 'runbook_scratch_%'").fetchall()
        return [row[0] for row in found] + [path.name for path in self.proofs.folder.glob("*.part")]


def world_of(proofs: Proofs, monkeypatch: pytest.MonkeyPatch, script: str = SHOP) -> World:  # noqa: F811
    name = proofs.make(script)
    one = proofs.dump(name, ZSTD)
    home, server = proofs.folder / "home", proofs.server.server
    for folder in ("params", "runbooks"):
        (home / folder).mkdir(parents=True)
    params = yaml.safe_load((ROOT / "params" / "staging.yml").read_text())
    params["database"] |= {
        "host": "127.0.0.1",
        "port": server.port,
        "passfile": str(server.passfile),
        "production": name,
        "admin_role": twin_postgres.ADMIN,
    }
    params["backup"] |= {"directory": str(proofs.folder), "free_ratio": 0.01}
    (home / "params" / "staging.yml").write_text(yaml.safe_dump(params))
    monkeypatch.setenv("RUNBOOK_HOME", str(home))
    return World(proofs, name, one.path, {**one.manifest(sha256_file(one.path)), "environment": "staging"})


def test_who_ends_a_proof_leaves_nothing_of_production_behind(
    proofs: Proofs,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = world_of(proofs, monkeypatch, RESTORED_SLOWLY)
    proof = world.start()
    try:
        wait_until(lambda: world.sessions("wait_event = 'PgSleep'") or proof.poll() is not None, "a restore", 60)
        assert proof.poll() is None, proof.communicate()
        assert len(world.left()) == 2
        proof.send_signal(signal.SIGTERM)
        said = proof.communicate(timeout=60)[1]
    finally:
        proof.kill()
        proof.wait()

    assert proof.returncode == 75
    assert "the proof was interrupted" in said
    assert (world.left(), world.sessions("true")) == ([], 0)


@pytest.mark.timeout(90)
def test_who_is_interrupted_while_comparing_does_not_wait_for_the_rest_of_it(
    proofs: Proofs,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = world_of(proofs, monkeypatch)
    scratch = restore.ScratchDatabase(
        proofs.database, wiring.load_params("staging").database, f"{restore.SCRATCH_PREFIX}held", "held"
    )
    scratch.create()
    proofs.run(scratch.name, SHOP)

    def interrupt() -> None:
        wait_until(lambda: world.sessions("wait_event_type = 'Lock'"), "a session that reads", 30)
        os.kill(os.getpid(), signal.SIGINT)  # as a terminal does: the main thread gets it

    with closing(proofs.connect(scratch.name)) as other, ThreadPoolExecutor(1) as beside:
        other.autocommit = False
        other.execute("LOCK TABLE orders")
        asked = beside.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            restore._compared(scratch, 1, 2, progress.untold)
        asked.result()
        left = world.left()
        scratch.drop()

    assert left == []
