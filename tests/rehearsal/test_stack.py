"""The rehearsal's stack: up, down, its parts' promises, its playbooks. One twin is shared; faults get their own."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import requests

from rehearsal import people, postgres, supervisor

PROJECT = Path(__file__).resolve().parents[2]
# The twin serves every release test of `make test`; its own lifecycle in all its corners takes minutes.
pytestmark = [pytest.mark.timeout(300), pytest.mark.soak]


def rehearsal(verb: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (sys.executable, "-m", "rehearsal", verb, "--dir", str(folder), "--json"),
        cwd=PROJECT,
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def facts_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("twin") / "t"
    facts_of(rehearsal("up", folder))
    yield folder
    assert facts_of(rehearsal("down", folder)) == {"up": False}
    assert supervisor.processes_of(folder) == []
    assert facts_of(rehearsal("status", folder)) == {"up": False}


@pytest.fixture(scope="module")
def twin(folder: Path) -> dict[str, Any]:
    return facts_of(rehearsal("status", folder))


@pytest.fixture(scope="module")
def next_release(twin: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The next release's commit, its migrations applied to production."""
    commit, tree = str(twin["commits"][twin["versions"]["next"]]), tmp_path_factory.mktemp("tree")
    archive = ("git", f"--git-dir={twin['repository']}", "archive", commit)
    exported = subprocess.run(archive, check=True, capture_output=True).stdout
    subprocess.run(("tar", "-x", "-C", str(tree)), input=exported, check=True)
    database = twin["database"]
    cluster = postgres.Server(Path(database["bin"]), Path(), database["port"], Path(database["passfile"]))
    postgres.migrate(cluster, "prod_db", dbmate=twin["dbmate"], migrations=tree / "db" / "migrations")
    return commit


Play = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def play(twin: dict[str, Any]) -> Play:
    def run(name: str, *, limit: str = "all", **values: str) -> subprocess.CompletedProcess[str]:
        extra = [word for key, value in values.items() for word in ("-e", f"{key}={value}")]
        return subprocess.run(
            (
                str(Path(sys.executable).parent / "ansible-playbook"),
                "-i",
                twin["inventory"],
                f"{twin['playbooks']}/{name}.yml",
                f"--vault-password-file={twin['vault_password_file']}",
                "--limit",
                limit,
                *extra,
            ),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run


def home(twin: dict[str, Any], host: str) -> Path:
    return Path(twin["hosts"][host]["home"])


def commits_logged(twin: dict[str, Any], host: str) -> list[str]:
    return [line.split()[1] for line in (home(twin, host) / "revisions.log").read_text().splitlines()]


def starts(twin: dict[str, Any], host: str) -> list[str]:
    return (home(twin, host) / "log" / "starts.log").read_text().splitlines()


def changed_nothing(done: subprocess.CompletedProcess[str]) -> bool:
    assert done.returncode == 0, done.stdout + done.stderr
    return "changed=0" in done.stdout and not any(f"changed={n}" in done.stdout for n in range(1, 9))


def get(url: str) -> Any:
    return requests.get(url, timeout=5, proxies={"http": ""}).json()


# --- the twin as a whole -----------------------------------------------------------------------------------------


def test_up_leaves_a_twin_that_is_up_as_it_is(folder: Path, twin: dict[str, Any]) -> None:
    before = supervisor.running(folder)

    assert facts_of(rehearsal("up", folder)) == twin
    assert supervisor.running(folder) == before


def test_status_holds_what_others_rely_on(twin: dict[str, Any]) -> None:
    assert twin["up"] is True
    assert twin["versions"] == {"running": "v1.4.0", "next": "v1.5.0", "bad": "v1.6.0"}
    assert set(twin["endpoints"]) == {"front", "database", "s3", "outbox"}
    roles = {name: person["roles"] for name, person in twin["people"].items()}
    assert roles == {"ada": ["deploy_lead"], "dan": ["dba"], "quinn": ["qa"], "olga": ["on_call"], "robin": []}
    for path in (twin["backups"], twin["playbooks"], twin["inventory"], twin["dbmate"], twin["people"]["ada"]["key"]):
        assert Path(path).exists(), path
    with psycopg.connect(twin["endpoints"]["database"]) as session:
        assert session.execute("SELECT count(*) >= 20000 FROM orders").fetchone() == (True,)


def test_users_are_served_by_the_running_release_on_every_host(twin: dict[str, Any]) -> None:
    front = twin["endpoints"]["front"]

    seen = {get(f"{front}/version")["instance"] for _ in range(12)}

    assert seen == {"app-01", "app-02", "app-03"}
    assert Path(twin["balancer"]["access_log"]).read_text().count("load/1.0") > 0


def test_every_listener_is_on_loopback(folder: Path, twin: dict[str, Any]) -> None:
    inodes = set()
    for pid in supervisor.processes_of(folder):
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            inodes.add(os.readlink(handle))
    listening = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, _, _, _, _, _, inode, *_ = line.split()
            if state == "0A" and f"socket:[{inode}]" in inodes:
                listening.append(local.partition(":")[0])

    assert len(listening) >= 14
    assert set(listening) == {"0100007F"}


def test_secrets_are_private_and_in_no_command_line(folder: Path, twin: dict[str, Any]) -> None:
    words = [line.rpartition(":")[2] for line in Path(twin["database"]["passfile"]).read_text().splitlines()]
    words += [(folder / "secrets" / name).read_text() for name in ("bypass_token", "vault_password", "secret_key")]
    lines = [Path(f"/proc/{pid}/cmdline").read_text() for pid in supervisor.processes_of(folder)]

    assert not [word for word in words for line in lines if word in line]
    for path in [
        folder / "supervisord.conf",
        *(folder / "secrets").iterdir(),
        *(folder / "hosts").glob("*/shared/env"),
    ]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert (folder / "secrets" / "vault.yml").read_text().startswith("$ANSIBLE_VAULT;1.1;AES256")


def test_the_application_can_write_rows_and_not_tables(twin: dict[str, Any]) -> None:
    database = twin["database"]
    cluster = postgres.Server(Path(database["bin"]), Path(), database["port"], Path(database["passfile"]))

    with cluster.connect("shop_app", "prod_db") as session, pytest.raises(psycopg.errors.InsufficientPrivilege):
        session.execute("CREATE TABLE mine ()")
    with cluster.connect("backup_user", "prod_db") as session:
        session.execute("SELECT count(*) FROM orders")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            session.execute("DELETE FROM orders")


def test_the_bucket_keeps_versions_and_refuses_strangers(twin: dict[str, Any]) -> None:
    boto3 = pytest.importorskip("boto3")
    from botocore.config import Config
    from botocore.exceptions import ClientError

    config = Config(s3={"addressing_style": "path"}, proxies={})
    place = {"endpoint_url": twin["s3"]["endpoint"], "region_name": twin["s3"]["region"], "config": config}
    key_id, key = (
        line.partition(" = ")[2] for line in Path(twin["s3"]["credentials_file"]).read_text().splitlines()[1:]
    )
    client = boto3.client("s3", aws_access_key_id=key_id, aws_secret_access_key=key, **place)
    first, second = (client.put_object(Bucket="prod-backups", Key="k", Body=b)["VersionId"] for b in (b"1", b"2"))

    assert client.get_object(Bucket="prod-backups", Key="k", VersionId=first)["Body"].read() == b"1"
    assert first != second
    stranger = boto3.client("s3", aws_access_key_id=key_id, aws_secret_access_key="wrong", **place)
    with pytest.raises(ClientError):
        stranger.list_objects_v2(Bucket="prod-backups")


# --- the playbooks -----------------------------------------------------------------------------------------------


def test_a_deployment_happens_once(twin: dict[str, Any], play: Play, next_release: str) -> None:
    before = starts(twin, "app-01")
    done = play("deploy_release", limit="app-01", git_ref=next_release, run_id="run-1")
    assert done.returncode == 0, done.stdout
    once = starts(twin, "app-01")

    assert changed_nothing(play("deploy_release", limit="app-01", git_ref=next_release, run_id="run-2"))

    assert get(twin["hosts"]["app-01"]["url"] + "/version")["commit"] == next_release
    assert commits_logged(twin, "app-01") == [twin["commits"]["v1.4.0"], next_release]
    assert (home(twin, "app-01") / "revisions.log").read_text().split()[-1] == "run-1"
    assert starts(twin, "app-01") == once == [*before, once[-1]]
    assert "PAYMENT_WEBHOOK_URL=https://" in (home(twin, "app-01") / "shared" / "env").read_text()
    assert get(twin["hosts"]["app-02"]["url"] + "/version")["version"] == "v1.4.0"


def test_a_deployment_that_was_cut_off_is_finished_by_the_next(
    twin: dict[str, Any], play: Play, next_release: str
) -> None:
    # Half an export, and `current` switched without its line in the log or a restart.
    place = home(twin, "app-02")
    half = place / "releases" / f"{next_release}.part"
    half.mkdir()
    (half / "web.py").write_text("half")
    assert play("deploy_release", limit="app-02", git_ref=next_release).returncode == 0
    lines = (place / "revisions.log").read_text().splitlines(keepends=True)
    (place / "revisions.log").write_text("".join(lines[:-1]))
    (place / ".started-with").unlink()
    before = starts(twin, "app-02")

    assert play("deploy_release", limit="app-02", git_ref=next_release).returncode == 0

    assert commits_logged(twin, "app-02") == [twin["commits"]["v1.4.0"], next_release]
    assert len(starts(twin, "app-02")) == len(before) + 1
    assert not half.exists()
    assert get(twin["hosts"]["app-02"]["url"] + "/version")["commit"] == next_release


def test_a_worker_is_deployed_and_started_even_when_it_rests(
    twin: dict[str, Any], play: Play, next_release: str
) -> None:
    assert play("enable_maintenance", limit="worker-01").returncode == 0

    assert play("deploy_release", limit="worker-01", git_ref=next_release).returncode == 0

    assert supervisor.state_of(Path(twin["dir"]), "worker-01") == "RUNNING"
    assert starts(twin, "worker-01")[-1].endswith(next_release)
    assert changed_nothing(play("deploy_release", limit="worker-01", git_ref=next_release))


@pytest.mark.parametrize(
    ("git_ref", "said"), [("main", "40 hex digits"), ("f" * 40, "is no commit of")], ids=["a branch", "unknown"]
)
def test_what_is_no_commit_is_refused(twin: dict[str, Any], play: Play, git_ref: str, said: str) -> None:
    before = commits_logged(twin, "app-03")

    done = play("deploy_release", limit="app-03", git_ref=git_ref)

    assert done.returncode != 0
    assert said in done.stdout
    assert commits_logged(twin, "app-03") == before


def test_read_only_mode_comes_and_goes(twin: dict[str, Any], play: Play) -> None:
    front, folder = twin["endpoints"]["front"], Path(twin["dir"])

    def order() -> requests.Response:
        return requests.post(f"{front}/orders", data={"product_id": 1}, timeout=5, proxies={"http": ""})

    assert play("enable_maintenance").returncode == 0
    assert changed_nothing(play("enable_maintenance"))
    refused = [order() for _ in range(3)]
    assert {(answer.status_code, answer.headers.get("X-Maintenance")) for answer in refused} == {(503, "on")}
    assert supervisor.state_of(folder, "worker-01") == "STOPPED"

    assert play("disable_maintenance").returncode == 0
    assert changed_nothing(play("disable_maintenance"))
    assert {order().status_code for _ in range(3)} == {401}  # nobody is logged in: the mode is off
    assert supervisor.state_of(folder, "worker-01") == "RUNNING"


# --- the people --------------------------------------------------------------------------------------------------


class Desk:
    """Stands for the release tool's command: shows one gate and notes what people told it."""

    def __init__(self, **gate: Any) -> None:
        evidence = [{"name": "a", "verdict": "green"}, {"name": "b", "verdict": None}]
        self.gate = {"gate": "backup", "roles": ["deploy_lead"], "quorum": 1, "opened_by": "robin", "open": True}
        self.gate |= {"evidence": evidence, **gate}
        self.told: list[tuple[str, ...]] = []

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        if words[:2] == ("gate", "show"):
            return subprocess.CompletedProcess(words, 0, f"noise\n{json.dumps(self.gate)}\n", "")
        self.told.append(words)
        return subprocess.CompletedProcess(words, 0, "", "")


def told(desk: Desk) -> list[tuple[str, str, str]]:
    return [(words[1], words[words.index("--as") + 1], words[-1]) for words in desk.told]


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        ({}, [("approve", "ada", "looked at: a, b")]),
        ({"evidence": [{"name": "dump", "verdict": "red"}]}, [("reject", "ada", "red: dump")]),
        (
            {"roles": ["qa", "on_call"], "quorum": 2},
            [("approve", "olga", "looked at: a, b"), ("approve", "quinn", "looked at: a, b")],
        ),
        ({"roles": ["qa", "on_call"], "opened_by": "quinn"}, [("approve", "olga", "looked at: a, b")]),
        ({"open": False}, []),
        ({"quorum": 2}, []),
    ],
    ids=["approves", "rejects red", "quorum of two", "not who opened it", "closed", "too few people"],
)
def test_people_sign_what_their_role_allows(
    twin: dict[str, Any], monkeypatch: pytest.MonkeyPatch, gate: dict[str, Any], expected: list[tuple[str, str, str]]
) -> None:
    desk = Desk(**gate)
    monkeypatch.setattr(people, "runbook", desk)

    code = people.sign("run-1", "backup", twin["people"])

    assert told(desk) == expected
    assert (code == 0) == bool(expected)


def test_quinn_really_uses_the_shop(twin: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk()
    monkeypatch.setattr(people, "runbook", desk)

    assert people.spot_check("run-1", twin) == 0

    verdicts = {words[2]: words[3] for words in desk.told}
    assert verdicts == dict.fromkeys(("log_in", "place_order", "view_dashboard", "background_jobs"), "--pass")


# --- faults: each with its own twin --------------------------------------------------------------------------------


def test_a_twin_whose_keeper_was_killed_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    try:
        old = facts_of(rehearsal("up", folder))
        passwords = Path(old["database"]["passfile"]).read_text()
        keeper = supervisor.running(folder)
        assert keeper is not None
        os.kill(keeper, signal.SIGKILL)
        while supervisor.running(folder) is not None:
            time.sleep(0.05)
        orphans = supervisor.processes_of(folder)
        assert orphans
        assert facts_of(rehearsal("status", folder)) == {"up": False}

        new = facts_of(rehearsal("up", folder))

        assert new["people"]["ada"]["public_key"] == old["people"]["ada"]["public_key"]  # people stay who they are
        assert Path(new["database"]["passfile"]).read_text() != passwords
        assert not set(orphans) & set(supervisor.processes_of(folder))
        assert get(new["endpoints"]["front"] + "/health")["status"] == "ok"
    finally:
        assert rehearsal("down", folder).returncode == 0
    assert supervisor.processes_of(folder) == []


def test_a_failing_part_is_named_and_the_others_are_stopped(tmp_path: Path) -> None:
    folder, broken = tmp_path / "t", tmp_path / "bin"
    broken.mkdir()
    real = postgres.find_binaries()
    for tool in ("initdb", "pg_dump", "pg_restore", "psql"):
        (broken / tool).write_text(f'#!/bin/sh\nexec "{real}/{tool}" "$@"\n')
    (broken / "postgres").write_text(
        f'#!/bin/sh\ncase "$*" in *listen_addresses*) echo "FATAL: disk on fire" >&2; exit 1;; esac\nexec {real}/postgres "$@"\n'
    )
    for program in broken.iterdir():
        program.chmod(0o755)

    done = rehearsal("up", folder, REHEARSAL_POSTGRES_BIN=str(broken))

    assert done.returncode == 2
    assert "rehearsal: postgres is" in done.stderr
    assert "disk on fire" in done.stderr
    assert "Traceback" not in done.stderr
    assert supervisor.processes_of(folder) == []
    assert facts_of(rehearsal("status", folder)) == {"up": False}


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")

    done = rehearsal("up", tmp_path)

    assert done.returncode == 2
    assert "thesis.txt" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
