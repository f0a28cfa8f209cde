"""A run without a twin: real engine, ledger, keys and folders, and nothing behind them that a test does not start."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from runbook_lib import signatures, wiring
from runbook_lib.model import Release
from runbook_lib.run import Run
from tests.ledgers import LedgerServer
from tests.project import ROOT

ROLES = {"ada": ["deploy_lead"], "bea": ["deploy_lead"], "lea": ["deploy_lead"], "dan": ["dba"], "quinn": ["qa"]}
# Opens the runs: she has the role, and still cannot approve.
OPENER = "lea"
OpenRun = Callable[..., Run]


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Everybody's private key, and the recorder's."""
    folder = tmp_path_factory.mktemp("people")
    for name in (*ROLES, "recorder"):
        argv = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
        subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
    return {name: folder / name for name in (*ROLES, "recorder")}


@pytest.fixture
def open_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, people: dict[str, Path], new_ledger: Callable[[], str | None]
) -> OpenRun:
    """Opens a run of an environment with one local host; keywords are `--set` overrides, `__` for a dot."""
    home = tmp_path / "home"
    for folder in ("params", "runbooks", "backups", "app-01"):
        (home / folder).mkdir(parents=True)
    data = yaml.safe_load((ROOT / "params" / "staging.yml").read_text())
    data["people"] = {
        name: {"name": name.title(), "roles": roles, "keys": [signatures.public_key_of(people[name])]}
        for name, roles in ROLES.items()
    }
    data["gates"]["release"]["roles"] = ["qa"]
    data["hosts"]["web"] = {"app-01": {"address": f"local:{home / 'app-01'}", "url": "http://127.0.0.1:9"}}
    data["backup"]["directory"] = str(home / "backups")
    data["record"]["key"] = f"file:{people['recorder']}"
    data["ledger"] = new_ledger()
    (home / "params" / "staging.yml").write_text(yaml.safe_dump(data))
    monkeypatch.setenv("RUNBOOK_HOME", str(home))
    monkeypatch.setenv("PATH", os.environ["PATH"])  # a run puts its tools in front

    def open_one(**settings: str) -> Run:
        params = wiring.load_params("staging", {key.replace("__", "."): value for key, value in settings.items()})
        release = Release("staging", "v1.5.0", "v1.5.0", "1" * 40, "v1.4.0", "2" * 40)
        draft = replace(wiring.draft_of(params), release=release)
        return wiring.create(draft, plan={"digest": "0" * 64}, opened_by=OPENER)

    return open_one


@pytest.fixture
def run(open_run: OpenRun) -> Run:
    return open_run()


@pytest.fixture
def run_with_database(open_run: OpenRun, ledger_server: LedgerServer) -> Run:
    """A run whose database answers: a server without the application's data."""
    server = ledger_server.server
    return open_run(
        database__host="127.0.0.1",
        database__port=str(server.port),
        database__passfile=str(server.passfile),
        database__admin_role="postgres",
    )
