"""`runbook backup prove` as a person or a script meets it: what it says, how it ends, and what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from rehearsal import postgres as twin_postgres
from runbook_lib import cli, doctor, progress, restore, wiring
from runbook_lib.adapters.database import in_words
from runbook_lib.canonical import sha256_file
from runbook_lib.errors import UnavailableError, UsageError
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

    def set(self, **settings: Any) -> None:
        """Change the environment's params: `section__key`."""
        path = self.proofs.folder / "home" / "params" / "staging.yml"
        params = yaml.safe_load(path.read_text())
        for name, value in settings.items():
            section, _, key = name.partition("__")
            params[section][key] = value
        path.write_text(yaml.safe_dump(params))

    def said(self, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, Any], str]:
        """The command's exit code, the JSON on its last line, and what it says beside."""
        with pytest.raises(SystemExit) as ended, pytest.MonkeyPatch.context() as patched:
            patched.setattr(sys, "argv", ["runbook", *self.argv("--json", *more)])
            cli.main()
        said = capsys.readouterr()
        return int(str(ended.value.code)), json.loads(said.out.splitlines()[-1]), said.err

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


@pytest.fixture
def handlers() -> Iterator[None]:
    """The command takes signals for as long as it lives, and here it lives in the tests' process."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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


WITH_A_ROLE = f"""
{SHOP.partition(";")[0]};
CREATE ROLE reader_of_shop; CREATE POLICY readers ON customers TO reader_of_shop;
"""


def test_what_could_not_be_tried_is_told_from_what_is_not_its_source(
    proofs: Proofs,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    handlers: None,
) -> None:
    world = world_of(proofs, monkeypatch, WITH_A_ROLE)
    weak = proofs.folder / "weak"
    weak.write_text("*:*:*:weak:w\n")
    weak.chmod(0o600)
    good = json.loads(json.dumps(world.manifest))
    proofs.run(world.name, "CREATE ROLE weak LOGIN PASSWORD 'w'; GRANT pg_monitor TO weak")
    try:
        proved = world.said(capsys)
        world.manifest["inventory"]["tables"]["public.customers"]["rows"] = 1
        other_content = world.said(capsys)
        world.manifest = {**good, "files": [{"kind": "dump", "source_sha256": "0" * 64}]}
        other_digest = world.said(capsys)
        world.manifest = good
        proofs.run(world.name, "DROP POLICY readers ON customers; DROP ROLE reader_of_shop")
        not_restored = world.said(capsys)
        world.set(database__admin_role="weak", database__passfile=str(weak), backup__scratch_capacity_bytes=10**15)
        denied = world.said(capsys)
        world.set(backup__scratch_capacity_bytes=10**6)
        no_room = world.said(capsys)
        world.set(database__port=1)
        silent = world.said(capsys)
    finally:
        proofs.run(world.name, "DROP OWNED BY weak; DROP ROLE weak")

    ends = [(code, report["outcome"]) for code, report, _ in (proved, other_content, other_digest, not_restored)]
    assert ends == [(0, "proved"), (1, "not its source"), (1, "not its source"), (1, "not restored")]
    assert 'role "reader_of_shop" does not exist' in " ".join(not_restored[1]["why"])
    assert "keep the dump" in not_restored[1]["next"]
    for (code, report, said), wanted, why, then in (
        (denied, 2, "permission denied to create database", "mend that on the server"),
        (no_room, 2, "the proof is not begun", "free room there"),
        (silent, 75, "Connection refused", "then the same again"),
    ):
        assert (code, report["ok"], report["outcome"]) == (wanted, False, "not tried")
        assert why in report["why"][0]
        assert then in report["next"]
        assert f"{report['why'][0]}. Next: {report['next']}" in said
    assert world.left() == []


def test_a_server_that_stops_says_nothing_of_the_dump_and_what_it_keeps_is_named(
    proofs: Proofs,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    handlers: None,
) -> None:
    world = world_of(proofs, monkeypatch, RESTORED_SLOWLY)

    def stop() -> None:
        wait_until(lambda: world.sessions("wait_event = 'PgSleep'"), "a restore", 60)
        proofs.server.stop()

    with ThreadPoolExecutor(1) as beside:
        stopped = beside.submit(stop)
        try:
            code, report, _ = world.said(capsys)
            stopped.result()
        finally:
            proofs.server.restart()

    assert (code, report["ok"], report["outcome"]) == (75, False, "not tried")
    assert "runbook doctor staging names a scratch database" in report["next"]
    (left,) = world.left()
    with wiring.looking_around(wiring.load_params("staging")) as run, pytest.raises(UsageError, match=left) as named:
        doctor._none_is_left(run)
    with closing(proofs.connect("postgres")) as session:
        session.execute(named.value.remedy.partition("postgres: ")[2])
    assert world.left() == []


def test_a_session_that_is_cut_is_nobodys_answer(proofs: Proofs) -> None:  # noqa: F811
    with (
        closing(proofs.connect("postgres")) as session,
        pytest.raises(UnavailableError, match="terminating connection"),
        in_words("the proof"),
    ):
        session.execute("SELECT pg_terminate_backend(pg_backend_pid())")
