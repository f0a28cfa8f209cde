"""A run with a shared ledger goes on from another machine's folder, which has nothing but the params and the keys."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.ledgers import LedgerServer
from tests.project import ROOT, Project

Machine = Callable[[str], Project]


@pytest.fixture
def machine(project: Project, ledger_server: LedgerServer, tmp_path: Path) -> Machine:
    """Makes project folders that release to the same twin and share a ledger."""
    url = ledger_server.new_ledger()

    def make(name: str) -> Project:
        root = tmp_path / name
        for folder in ("params", "runbooks"):
            shutil.copytree(ROOT / folder, root / folder)
        path = root / "params" / "rehearsal.yml"
        params = yaml.safe_load(path.read_text())
        params |= {"facts": str(project.root / ".rehearsal" / "stack.json"), "ledger": url}
        path.write_text(yaml.safe_dump(params))
        return Project(root)

    return make


def test_another_machine_goes_on_where_the_first_one_paused(machine: Machine, project: Project) -> None:
    first, second = machine("first"), machine("second")
    done = first.runbook("run", "rehearsal", "--json")
    paused = first.last_json(done)
    assert (done.returncode, paused["gate"]) == (75, "backup"), done.stderr
    run_id = paused["run_id"]

    asked = second.runbook("gate", "show", run_id, "1", "--json")
    assert asked.returncode == 0, asked.stderr
    key = project.facts["people"]["ada"]["key"]
    signed = second.runbook("gate", "approve", run_id, "1", "--as", "ada", "--key", key, "--comment", "seen")
    assert signed.returncode == 0, signed.stderr
    done = second.runbook("resume", run_id, "--json")

    paused = second.last_json(done)
    assert (done.returncode, paused["gate"]) == (75, "migration"), done.stderr
    assert Path(paused["record"]).is_relative_to(second.root)
    # The first machine's folder is behind now: it is brought up to date before anything looks at it.
    sound = first.runbook("fsck", run_id)
    assert sound.returncode == 0, sound.stdout
    asked = first.runbook("gate", "show", run_id, "2", "--json")
    assert first.last_json(asked)["blockers"] == [], asked.stderr
    back = second.runbook("rollback", run_id, "--reason", "rehearsed", "--json")
    record = second.last_json(back)
    assert record["state"] == "rolled_back", back.stderr
    verified = second.runbook("verify", record["record"], "--trust", record["trust"], "--json")
    assert verified.returncode == 0, verified.stdout


def test_a_copy_that_was_changed_in_the_store_is_refused(machine: Machine, project: Project) -> None:
    import boto3

    first, second = machine("first"), machine("second")
    done = first.runbook("run", "rehearsal", "--until", "prepare", "--json")
    run_id = first.last_json(done)["run_id"]
    s3 = project.facts["s3"]
    session = boto3.Session()
    session._session.set_config_variable("credentials_file", s3["credentials_file"])
    client = session.client("s3", endpoint_url=s3["endpoint"], region_name=s3["region"])
    listed = client.list_objects_v2(Bucket=s3["bucket"], Prefix=f"runbook/runs/{run_id}/")["Contents"]
    for item in listed:
        client.put_object(Bucket=s3["bucket"], Key=item["Key"], Body=json.dumps({"files": {}}).encode())

    refused = second.runbook("resume", run_id)

    assert refused.returncode == 4, refused.stderr
    assert "came back as something else" in refused.stderr
    assert second.runs() == []
    assert first.runbook("abort", run_id, "--reason", "rehearsed").returncode == 0
