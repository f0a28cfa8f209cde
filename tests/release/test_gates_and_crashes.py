"""One real release, refused at its gates and killed in its middle; effects are counted at their targets."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
from collections import Counter
from pathlib import Path

import boto3
import psycopg
import pytest
import yaml
from botocore.config import Config

from tests.project import Project, alive, wait_until

HELD = ("pg_dump", "dbmate", "ansible-playbook")


class Tools:
    """Wrappers before the real tools that can hold one of them in its middle; the real one runs exactly as called."""

    def __init__(self, project: Project, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        real = Path(project.facts["database"]["bin"])
        for tool in real.iterdir():
            (folder / tool.name).symlink_to(tool)
        places = {"pg_dump": real / "pg_dump", "dbmate": Path(project.facts["dbmate"])}
        places["ansible-playbook"] = Path(project.facts["dbmate"]).parent / "ansible-playbook"
        for name, program in places.items():
            wrapper = folder / name
            wrapper.unlink(missing_ok=True)
            wrapper.write_text(
                "#!/bin/sh\n"
                f'case "$*" in *"$(cat {folder}/hold-{name} 2>/dev/null || echo never-this)"*)\n'
                f"  echo held >> {folder}/reached-{name}\n"
                f"  while [ -e {folder}/hold-{name} ]; do sleep 0.05; done;;\n"
                f'esac\nexec {program} "$@"\n'
            )
            wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)

    def hold(self, tool: str, when: str) -> None:
        (self.folder / f"reached-{tool}").unlink(missing_ok=True)
        (self.folder / f"hold-{tool}").write_text(when)

    def reached(self, tool: str) -> bool:
        return (self.folder / f"reached-{tool}").exists()

    def release(self, tool: str) -> None:
        (self.folder / f"hold-{tool}").unlink()


@pytest.fixture(scope="module")
def tools(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Tools:
    made = Tools(project, tmp_path_factory.mktemp("tools") / "bin")
    path = project.root / "params" / "rehearsal.yml"
    params = yaml.safe_load(path.read_text())
    params["database"]["bin"] = str(made.folder)
    params["migrations"]["executable"] = str(made.folder / "dbmate")
    path.write_text(yaml.safe_dump(params))
    return made


def kill_when(project: Project, tools: Tools, tool: str, when: str, *words: str) -> None:
    """Start the command, wait until the tool is held, SIGKILL the executor, let the tool go on unseen."""
    tools.hold(tool, when)
    executor = project.start(*words)
    wait_until(lambda: tools.reached(tool), f"{tool} {when}")
    os.kill(executor.pid, signal.SIGKILL)
    executor.wait()
    tools.release(tool)


def read_only(project: Project) -> bool:
    return any(Path(host["home"], "shared", "maintenance").exists() for host in project.facts["hosts"].values())


def started(project: Project) -> bool:
    return any("starting now" in message for message in project.messages())


def test_a_run_that_only_prepared_goes_back_too(project: Project, tools: Tools) -> None:
    freeze = Path(project.facts["repository"], "runbook-freeze.json")
    assert project.runbook("run", "rehearsal", "--until", "prepare").returncode == 0
    assert freeze.exists()

    back = project.runbook("rollback", project.runs()[-1].name, "--reason", "not today", "--json")

    assert (back.returncode, project.last_json(back)["state"]) == (1, "rolled_back"), back.stderr
    assert not freeze.exists()


def test_two_signals_at_once_end_the_command_too(project: Project, tools: Tools) -> None:
    tools.hold("pg_dump", "--snapshot=")
    executor = project.start("run", "rehearsal")
    wait_until(lambda: tools.reached("pg_dump"), "the dump")

    executor.send_signal(signal.SIGINT)
    executor.send_signal(signal.SIGTERM)  # before the first one's tidying has ended

    assert executor.wait(60) == 75
    assert alive("pg_dump --format=custom") == []
    tools.release("pg_dump")
    done = project.runbook("abort", project.runs()[-1].name, "--reason", "interrupted on purpose")
    assert done.returncode == 0, done.stderr


def test_ctrl_c_pauses_the_run_and_a_second_executor_is_told_who_has_it(project: Project, tools: Tools) -> None:
    tools.hold("pg_dump", "--snapshot=")
    executor = project.start("run", "rehearsal")
    wait_until(lambda: tools.reached("pg_dump"), "the dump")
    run_id = project.runs()[-1].name

    second = project.runbook("resume", run_id)
    executor.send_signal(signal.SIGINT)  # the dump goes on, and is waited for
    wait_until(lambda: project.state(run_id).executor is None, "the lease given back")
    still_there = executor.poll() is None
    executor.send_signal(signal.SIGTERM)  # ends it
    code = executor.wait(60)
    running = alive("pg_dump --format=custom")
    tools.release("pg_dump")

    assert (second.returncode, f"by process {executor.pid}" in second.stderr) == (75, True), second.stderr
    assert (still_there, code, running) == (True, 75, [])
    assert project.state(run_id).step("backup.dump_database").status == "running"
    done = project.runbook("abort", run_id, "--reason", "interrupted on purpose")
    assert done.returncode == 0, done.stderr


def test_sys_exit_in_a_cell_does_not_pass_for_success(project: Project, tools: Tools) -> None:
    path = project.root / "runbooks" / "01_backup.ipynb"
    original = path.read_text()
    notebook = json.loads(original)
    cell = next(c for c in notebook["cells"] if "dump_database" in "".join(c["source"]) and c["cell_type"] == "code")
    cell["source"] = "import sys\nsys.exit(0)"
    path.write_text(json.dumps(notebook))

    done = project.runbook("run", "rehearsal", "--set", "gates.backup.timeout_s=1", "--json")

    path.write_text(original)
    facts = project.last_json(done)
    assert (done.returncode, facts["state"], facts["phase"]) == (1, "failed", "backup"), done.stderr


def test_a_notebook_that_was_changed_since_the_run_was_opened_is_not_run(project: Project, tools: Tools) -> None:
    run_id = project.runs()[-1].name  # opened with the notebook of the test above, which was put back since
    before = project.state(run_id).seq

    done = project.runbook("resume", run_id)

    assert (done.returncode, "01_backup.ipynb is not what run" in done.stderr) == (2, True), done.stderr
    assert project.state(run_id).seq - before <= 2  # the lease, taken and given back
    assert project.runbook("abort", run_id, "--reason", "another playbook").returncode == 0


def test_a_time_out_at_a_gate_approves_nothing_and_undoes_nothing(project: Project, tools: Tools) -> None:
    asked = project.runbook("run", "rehearsal", "--set", "gates.backup.timeout_s=1", "--json")
    run_id = project.last_json(asked)["run_id"]
    assert (asked.returncode, project.last_json(asked)["gate"]) == (75, "backup"), asked.stderr

    late = project.runbook("resume", run_id, "--json")  # the gate's second passes while the command starts

    assert late.returncode == 3, late.stderr
    assert "timed out" in late.stderr
    assert project.approve(run_id, "1", "ada").returncode == 2
    assert Path(project.facts["repository"], "runbook-freeze.json").exists()  # nothing was undone

    back = project.runbook("rollback", run_id, "--reason", "nobody came", "--json")
    assert (back.returncode, project.last_json(back)["state"]) == (3, "rolled_back"), back.stderr
    assert not Path(project.facts["repository"], "runbook-freeze.json").exists()


def test_a_killed_dump_is_found_again_and_the_run_stops_at_gate_1(project: Project, tools: Tools) -> None:
    kill_when(project, tools, "pg_dump", "--snapshot=", "run", "rehearsal")
    run_id = project.runs()[-1].name

    done = project.runbook("resume", run_id, "--json")

    facts = project.last_json(done)
    assert (done.returncode, facts["state"], facts["gate"]) == (75, "paused", "backup"), done.stderr
    assert not started(project)
    assert not read_only(project)


def test_a_second_run_is_refused_and_names_the_holder(project: Project) -> None:
    before = project.runs()

    done = project.runbook("run", "rehearsal")

    assert done.returncode == 2
    assert before[-1].name in done.stderr
    assert project.runs() == before


@pytest.mark.parametrize(
    ("person", "key_of", "said"),
    [
        ("dan", "dan", "needs deploy_lead"),
        ("robin", "robin", "needs deploy_lead"),
        ("ada", "dan", "signature"),
        ("nobody", "ada", "nobody"),
    ],
)
def test_a_decision_by_the_wrong_person_or_key_is_refused(
    project: Project, person: str, key_of: str, said: str
) -> None:
    run_id = project.runs()[-1].name

    done = project.approve(run_id, "1", person, key_of=key_of)

    assert done.returncode == 2
    assert said in done.stderr
    assert not list((project.runs()[-1] / "decisions").glob("*.json"))


def test_signed_statements_for_another_run_round_or_gate_open_nothing(project: Project, tmp_path: Path) -> None:
    run = project.runs()[-1]
    shown = project.runbook("gate", "show", run.name, "1", "--statement", "approve", "--as", "ada")
    others = {"run": f"{run.name[:-1]}x", "round": 2, "nonce": "0" * 32, "gate": "migration", "ledger_head": "0" * 64}
    for field, value in others.items():
        statement = json.loads(shown.stdout)
        assert statement["predicate"][field] != value
        statement["predicate"][field] = value
        path = tmp_path / f"{field}.json"
        path.write_text(json.dumps(statement, sort_keys=True, separators=(",", ":")))
        drop(project, run, path, "ada")

    done = project.runbook("resume", run.name, "--json")

    assert (done.returncode, project.last_json(done)["gate"]) == (75, "backup")
    assert not list((run / "decisions" / "inbox").glob("*"))
    assert not started(project)
    assert not read_only(project)


def drop(project: Project, run: Path, path: Path, person: str) -> None:
    """Sign a statement with a person's key and put both files into the run's inbox."""
    sign(project, path, person)
    inbox = run / "decisions" / "inbox"
    inbox.mkdir(parents=True, exist_ok=True)
    for file in (path.with_name(f"{path.name}.sig"), path):
        file.rename(inbox / file.name)


def sign(project: Project, path: Path, person: str) -> None:
    key = project.facts["people"][person]["key"]
    subprocess.run(
        ("ssh-keygen", "-q", "-Y", "sign", "-f", key, "-n", "runbook-gate", path), check=True, capture_output=True
    )


def test_a_statement_signed_elsewhere_opens_the_gate_and_a_killed_migration_is_done_once(
    project: Project, tools: Tools, tmp_path: Path
) -> None:
    run = project.runs()[-1]
    shown = project.runbook("gate", "show", run.name, "backup", "--statement", "approve", "--as", "ada")
    path = tmp_path / "decision.json"
    path.write_text(shown.stdout)
    drop(project, run, path, "ada")

    kill_when(project, tools, "dbmate", "/prod_db", "resume", run.name)
    done = project.runbook("resume", run.name, "--json")

    assert (done.returncode, project.last_json(done)["gate"]) == (75, "migration"), done.stderr


def test_a_killed_deployment_of_the_second_host_goes_on_to_the_end(project: Project, tools: Tools) -> None:
    run = project.runs()[-1]
    assert project.approve(run.name, "2", "dan").returncode == 0
    assert project.approve(run.name, "2", "dan").returncode == 0  # pressed twice

    kill_when(project, tools, "ansible-playbook", "--limit app-02", "resume", run.name)
    done = project.runbook("resume", run.name, "--json")

    assert (done.returncode, project.last_json(done)["gate"]) == (75, "release"), done.stderr
    assert project.approve(run.name, "3", "quinn").returncode == 0
    ended = project.runbook("resume", run.name, "--json")
    assert (ended.returncode, project.last_json(ended)["state"]) == (0, "completed"), ended.stderr


def test_after_three_kills_each_effect_happened_once(project: Project) -> None:
    run, facts = project.runs()[-1], project.facts
    commit = facts["commits"][facts["versions"]["next"]]

    # Beside each backup lies a note of what was verified.
    kept = sorted(p.name for p in Path(facts["backups"]).iterdir() if run.name in p.name and p.suffix != ".json")
    assert kept == sorted([f"{run.name}.dump.zst", *(f"{run.name}-{host}.tar.zst" for host in facts["hosts"])])

    assert set(versions_in_s3(facts, run.name).values()) == {1}

    database = facts["database"]
    with psycopg.connect(facts["endpoints"]["database"]) as session:
        rows = session.execute("SELECT version FROM schema_migrations ORDER BY version").fetchall()
        scratch = session.execute("SELECT datname FROM pg_database WHERE datname LIKE 'runbook%'").fetchall()
    tree = subprocess.run(
        ("git", "-C", facts["repository"], "ls-tree", "--name-only", commit, "db/migrations/"),
        check=True,
        capture_output=True,
        text=True,
    )
    assert [r[0] for r in rows] == [line.rpartition("/")[2].partition("_")[0] for line in tree.stdout.split()]
    assert scratch == []
    assert database["production"] == "prod_db"

    for name, host in facts["hosts"].items():
        lines = [line for line in Path(host["home"], "revisions.log").read_text().splitlines() if commit in line]
        assert len(lines) == 1, (name, lines)
        starts = [line for line in Path(host["home"], "log", "starts.log").read_text().splitlines() if commit in line]
        assert len(starts) == 1, (name, starts)

    said = Counter(text for text in project.messages() if facts["versions"]["next"] in text)
    assert max(said.values()) == 1
    assert sum("starting now" in text for text in said) == 1
    assert sum("successfully deployed" in text for text in said) == 1

    log = subprocess.run(
        ("git", "-C", facts["repository"], "log", "--format=%B", "main"), check=True, capture_output=True, text=True
    ).stdout
    assert log.count(run.name) == 1
    assert not Path(facts["repository"], "runbook-freeze.json").exists()
    assert not read_only(project)


def versions_in_s3(facts: dict, run_id: str) -> Counter:
    words = dict(
        line.split(" = ", 1) for line in Path(facts["s3"]["credentials_file"]).read_text().splitlines() if " = " in line
    )
    client = boto3.client(
        "s3",
        endpoint_url=facts["s3"]["endpoint"],
        region_name=facts["s3"]["region"],
        aws_access_key_id=words["aws_access_key_id"],
        aws_secret_access_key=words["aws_secret_access_key"],
        config=Config(signature_version="s3v4"),
    )
    listed = client.list_object_versions(Bucket=facts["s3"]["bucket"])
    assert not listed.get("IsTruncated")
    found = Counter(v["Key"] for v in listed["Versions"] if run_id in v["Key"])
    assert found
    return found


def test_the_record_verifies_with_public_tools_and_any_changed_byte_is_seen(project: Project) -> None:
    record = project.runs()[-1]
    trust = record.parent / "allowed_signers"

    assert project.runbook("verify", str(record), "--trust", str(trust)).returncode == 0
    assert subprocess.run(("sha256sum", "-c", "--quiet", "SHA256SUMS"), cwd=record).returncode == 0
    statement = record / "statement.json"
    verify = (
        "ssh-keygen",
        "-Y",
        "verify",
        "-f",
        trust,
        "-I",
        "recorder",
        "-n",
        "runbook-record",
        "-s",
        f"{statement}.sig",
    )
    assert subprocess.run(verify, stdin=statement.open("rb"), capture_output=True).returncode == 0

    for name in (
        "index.html",
        "ledger.jsonl",
        "SHA256SUMS",
        "statement.json",
        "statement.json.sig",
        "artifacts/watch/series.csv",
    ):
        path = record / name
        good = path.read_bytes()
        at = len(good) // 2
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert project.runbook("verify", str(record), "--trust", str(trust)).returncode == 4, name
        path.write_bytes(good)
    assert project.runbook("verify", str(record), "--trust", str(trust)).returncode == 0


def test_every_code_cell_of_the_record_ran(project: Project) -> None:
    notebooks = sorted((project.runs()[-1] / "notebooks").glob("*.ipynb"))

    assert [p.name[:2] for p in notebooks] == ["00", "01", "02", "03", "04", "05", "07"]
    for path in notebooks:
        code = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        assert all(c["execution_count"] for c in code), path.name
        assert not [o for c in code for o in c["outputs"] if o["output_type"] == "error"], path.name


def test_no_secret_of_the_twin_is_in_the_record(project: Project) -> None:
    facts = project.facts
    secrets = [line.rpartition(":")[2].encode() for line in Path(facts["database"]["passfile"]).read_text().split()]
    for name in ("bypass_token_file", "vault_password_file"):
        secrets.append(Path(facts[name]).read_text().strip().encode())
    assert min(map(len, secrets)) > 8

    for path in project.runs()[-1].rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [s for s in secrets if s in content], path
