"""A release that is slow and fails under load goes back by itself, exactly, and its record tells it."""

from __future__ import annotations

import json
from pathlib import Path

import psycopg

from tests.project import Project


def served(facts: dict) -> set[str]:
    import urllib.request

    urls = [host["url"] for host in facts["hosts"].values() if "url" in host] + [facts["endpoints"]["front"]]
    return {json.load(urllib.request.urlopen(url + "/version", timeout=5))["commit"] for url in urls}


def schema(facts: dict) -> list[tuple]:
    with psycopg.connect(facts["endpoints"]["database"]) as session:
        columns = session.execute(
            "SELECT table_name, column_name, data_type FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, 2"
        ).fetchall()
        versions = session.execute("SELECT version FROM schema_migrations ORDER BY version").fetchall()
        indexes = session.execute("SELECT indexname FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1").fetchall()
        fence = session.execute(
            "SELECT count(*) FROM pg_db_role_setting s JOIN pg_roles r ON r.oid = s.setrole WHERE r.rolname = 'shop_app'"
        ).fetchone()
    return [*columns, *versions, *indexes, ("fence", fence)]


def test_a_bad_release_is_rolled_back_and_the_record_tells_it(project: Project) -> None:
    facts = project.facts
    before, running = schema(facts), facts["commits"][facts["versions"]["running"]]
    assert served(facts) == {running}

    done = project.runbook("rehearse", "--fault", "bad-release", "--json", timeout=500)

    said = project.last_json(done)
    assert (done.returncode, said["state"]) == (0, "rolled_back"), done.stderr[-3000:]
    assert served(facts) == {running}
    assert schema(facts) == before
    assert not [h for h in facts["hosts"].values() if Path(h["home"], "shared", "maintenance").exists()]

    record = Path(said["record"])
    state = {
        s["data"]["step"]: s["data"]["status"]
        for s in map(json.loads, (record / "ledger.jsonl").read_text().splitlines())
        if s["kind"] == "step_outcome"
    }
    assert state["verify.sign_off"] == "failed"
    assert state["rollback.smoke_tests_again"] == "green"
    verdict = json.loads((record / "artifacts/watch/judgement.json").read_text())
    assert verdict["verdict"] == "red"
    incident = (record / "artifacts/rollback/incident.md").read_text()
    assert "p95_latency_s" in incident
    assert "FairUseError" in incident
    assert any("Incident" in message for message in project.messages())
    assert [p.name[:2] for p in sorted((record / "notebooks").glob("*.ipynb"))] == [
        "00",
        "01",
        "02",
        "03",
        "04",
        "05",
        "06",
    ]
    for path in (record / "notebooks").glob("*.ipynb"):
        assert all(c["execution_count"] for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"), (
            path.name
        )
    assert (record / "review" / "08_review.ipynb").exists()
    assert project.runbook("verify", str(record), "--trust", said["trust"]).returncode == 0
