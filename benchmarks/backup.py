"""Measure phase 1 side by side with the playbook's literal commands: same data, same machine, one run after the other.

Usage: python benchmarks/backup.py FOLDER [--data usual|random] [--runs 3] [--database-mb 1000] [--files-mb 600] [--json]

FOLDER gets the servers (PostgreSQL, SeaweedFS), the data and the backups, and is left empty. Each side's disk caches are
as the other side left them; the order changes with every run. Elapsed seconds are medians; CPU is user and system time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from backup_data import KINDS

from rehearsal import postgres, s3

ROOT = Path(__file__).resolve().parents[1]
TICKS = os.sysconf("SC_CLK_TCK")
LITERAL = ("tar czf", "pg_dump -Fc", "pg_restore --list", "sha256sum", "copy to S3")


@dataclass
class Part:
    """What one part of a side took."""

    elapsed_s: list[float] = field(default_factory=list)
    ours_s: list[float] = field(default_factory=list)
    server_s: list[float] = field(default_factory=list)


@dataclass
class Place:
    """The servers and the data."""

    folder: Path
    database: postgres.Server
    postmaster: subprocess.Popen[bytes]
    store: s3.ObjectServer
    weed: subprocess.Popen[bytes]

    @property
    def home(self) -> Path:
        return self.folder / "app"

    def params(self) -> dict[str, Any]:
        key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEXAMPLE0000000000000000000000000000000000"
        data: dict[str, Any] = yaml.safe_load((ROOT / "params" / "example.yml").read_text())
        data["people"] = {"ada": {"name": "Ada", "roles": ["deploy_lead", "dba", "qa"], "keys": [key]}}
        data |= {"environment": "bench", "opened_by": None, "ledger": None}
        data["hosts"] = {
            "web": {"app-01": {"address": f"local:{self.home}", "files": ["."], "url": "http://127.0.0.1:9"}}
        }
        data["database"] |= {
            "host": "127.0.0.1",
            "port": self.database.port,
            "passfile": str(self.database.passfile),
            "bin": str(self.database.bin),
            "production": "prod_db",
            **{f"{role}_role": postgres.ADMIN for role in ("admin", "backup", "migrate", "app")},
        }
        data["backup"] = {
            "directory": str(self.folder / "backups"),
            "store": {
                "bucket": s3.BUCKET,
                "endpoint": self.store.endpoint,
                "credentials_file": str(self.store.credentials),
            },
        }
        return data


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(ready: Callable[[], object], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            ready()
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)
        else:
            return


@contextmanager
def place(folder: Path) -> Iterator[Place]:
    """Both servers, up for the length of the body."""
    for name in ("log", "secrets", "backups", "app"):
        (folder / name).mkdir(parents=True)
    database = postgres.initialise(folder / "data", free_port(), folder / "secrets")
    store = s3.initialise(folder, free_port)
    started: list[subprocess.Popen[bytes]] = []
    try:
        with (folder / "log" / "servers").open("wb") as log:
            # A real server waits for its disk.
            argv = [*database.argv(), *(w for o in ("fsync=on", "synchronous_commit=on", "shared_buffers=512MB",
                    "max_wal_size=4GB", "full_page_writes=on") for w in ("-c", o))]  # fmt: skip
            started += [
                subprocess.Popen(words, stdout=log, stderr=log, cwd=folder, start_new_session=True)
                for words in (argv, store.argv())
            ]
        wait_for(lambda: database.connect(postgres.ADMIN, "postgres").close())
        wait_for(lambda: s3.make_bucket(store.client()))
        yield Place(folder, database, started[0], store, started[1])
    finally:
        for process in started:
            process.send_signal(signal.SIGINT)
        for process in started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        s3.forget(folder)


def fill(at: Place, kind: str, database_mb: int, files_mb: int) -> dict[str, int]:
    """Make the data; returns what it came to in bytes."""
    make_database, make_files = KINDS[kind]
    with at.database.connect(postgres.ADMIN, "postgres") as session:
        session.execute("CREATE DATABASE prod_db")
    with at.database.connect(postgres.ADMIN, "prod_db") as session:
        make_database(session, database_mb)
        session.execute("VACUUM ANALYZE")
        session.execute("CHECKPOINT")
        row = session.execute("SELECT pg_database_size('prod_db')").fetchone()
    make_files(at.home, files_mb)
    sizes = [path.stat().st_size for path in at.home.rglob("*") if path.is_file()]
    return {"database_bytes": int(row[0] if row else 0), "files_bytes": sum(sizes), "files": len(sizes)}


def cpu_of(pid: int) -> float:
    """CPU seconds of a server and of all that it started, the ended ones too."""
    total = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(") ")[2].split()
            except OSError:
                continue
            if int(entry.name) == pid:
                total += sum(map(int, fields[11:15]))
            elif int(fields[1]) == pid:
                total += sum(map(int, fields[11:13]))
    return total / TICKS


def cpu_of_mine() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Peak(threading.Thread):
    """Samples the memory of this process and all below it, in bytes: proportional set size.

    Once a second, and only of these: to look at each process of the machine ten times a second took more of the two
    cores than any part that is measured here.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self._stop_it = 0, threading.Event()

    def run(self) -> None:
        while not self._stop_it.wait(1.0):
            self.bytes = max(self.bytes, sum(map(self._of, self._tree(os.getpid()))))

    def end(self) -> int:
        self._stop_it.set()
        self.join()
        return max(self.bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    @classmethod
    def _tree(cls, root: int) -> Iterator[int]:
        yield root
        below: list[str] = []
        with contextlib.suppress(OSError):  # it has just ended, as each thread may
            for task in list(Path(f"/proc/{root}/task").iterdir()):
                with contextlib.suppress(OSError):
                    below += (task / "children").read_text().split()
        for pid in map(int, below):
            yield from cls._tree(pid)

    @staticmethod
    def _of(pid: int) -> int:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:")), 0)


@contextmanager
def measured(parts: dict[str, Part], name: str, servers: tuple[int, ...]) -> Iterator[None]:
    mine, theirs, began = cpu_of_mine(), sum(map(cpu_of, servers)), time.monotonic()
    yield
    part = parts.setdefault(name, Part())
    part.elapsed_s.append(time.monotonic() - began)
    part.ours_s.append(cpu_of_mine() - mine)
    part.server_s.append(sum(map(cpu_of, servers)) - theirs)


def literal(at: Place, parts: dict[str, Part]) -> None:
    """The playbook's commands as they stand there."""
    folder = at.folder / "literal"
    folder.mkdir()
    tar, dump = folder / "app_files.tgz", folder / "prod_db.dump"
    servers = (at.postmaster.pid, at.weed.pid)
    connection = ("-h", "127.0.0.1", "-p", str(at.database.port), "-U", postgres.ADMIN)
    env = {**os.environ, "PGPASSFILE": str(at.database.passfile)}
    binary = {tool: str(at.database.bin / tool) for tool in ("pg_dump", "pg_restore")}

    def run(*argv: str) -> None:
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, env=env)

    with measured(parts, LITERAL[0], servers):
        run("tar", "czf", str(tar), "-C", str(at.home), ".")
    with measured(parts, LITERAL[1], servers):
        run(binary["pg_dump"], "-Fc", "--no-acl", "--no-owner", *connection, "-f", str(dump), "prod_db")
    with measured(parts, LITERAL[2], servers):
        run(binary["pg_restore"], "--list", str(dump))
    with measured(parts, LITERAL[3], servers):
        run("sha256sum", str(tar), str(dump))
    with measured(parts, LITERAL[4], servers):  # what `aws s3 cp` does, by the same library
        client = at.store.client()
        for path in (tar, dump):
            client.upload_file(str(path), s3.BUCKET, f"literal/{time.time_ns()}/{path.name}")
    shutil.rmtree(folder)


def one_phase(folder: Path, postmaster: int, weed: int, number: int) -> None:
    """Walk phase 1 in this process, as a notebook's kernel would; prints what it took as JSON."""
    home = folder / f"home-{number}"
    (home / "params").mkdir(parents=True)
    (home / "runbooks").mkdir()
    os.environ["RUNBOOK_HOME"] = str(home)
    from runbook_lib import params as params_module
    from runbook_lib import wiring
    from runbook_lib.canonical import digest
    from runbook_lib.model import Release
    from runbook_lib.phases import backup

    params = params_module.check(json.loads((folder / "params.json").read_text()), where="bench")
    run_id = f"20260101T{number:06d}Z-v1-{number:06x}"
    release = Release("bench", "v1", "v1", "0" * 40, "v0", "1" * 40)
    run = wiring._run(params, wiring.ledger_of(params), run_id, release)
    opened = {"version": "v1", "environment": "bench", "params_sha256": digest(params.frozen()), "opened_by": "bench"}
    run.folder.mkdir(parents=True)
    run.ledger.append(run_id, "run_opened", opened, environment="bench")
    run.keep("plan.json", json.dumps({"digest": "0" * 64, "steps": []}))
    peak = Peak()
    peak.start()
    parts: dict[str, Part] = {}
    for step in backup.STEPS[1:-1]:
        step.before, step.guard = (), None
        with measured(parts, step.name, (postmaster, weed)):
            step(run)
    proof = json.loads((run.folder / "artifacts/backup/restore_report.json").read_bytes())["dump"]
    facts = {"packed by": run.state.fact("backup.dump_database", "packed by"), "proof": proof["equal"]}
    facts["stored bytes"] = sum(path.stat().st_size for path in (folder / "backups").iterdir())
    facts["without_proof_s"] = proof["restore_s"] + proof["compare_s"]
    print(json.dumps({"peak": peak.end(), "parts": {k: v.__dict__ for k, v in parts.items()}, "facts": facts}))


def ours(at: Place, parts: dict[str, Part], number: int) -> dict[str, Any]:
    (at.folder / "params.json").write_text(json.dumps(at.params()))
    words = (str(at.folder), "--phase", f"{at.postmaster.pid},{at.weed.pid},{number}")
    done = subprocess.run(
        (sys.executable, __file__, *words), check=True, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    said = json.loads(done.stdout.splitlines()[-1])
    for name, part in said["parts"].items():
        known = parts.setdefault(name, Part())
        for key, values in part.items():
            getattr(known, key).extend(values)
    for path in (at.folder / "backups").iterdir():
        path.unlink()
    shutil.rmtree(at.folder / f"home-{number}")
    return {**said["facts"], "peak": said["peak"]}


def table(parts: dict[str, Part], title: str) -> list[str]:
    lines = [f"| {title} | elapsed s | our CPU s | servers' CPU s |", "|---|---|---|---|"]
    for name, part in parts.items():
        row = (median(values) for values in (part.elapsed_s, part.ours_s, part.server_s))
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(f"{value:.1f}" for value in row) + " |")
    return lines


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", choices=sorted(KINDS), default="usual")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--database-mb", type=int, default=1000)
    parser.add_argument("--files-mb", type=int, default=600)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--phase", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.phase:
        one_phase(given.folder, *map(int, given.phase.split(",")))  # type: ignore[arg-type]
        return
    sides: dict[str, dict[str, Part]] = {"literal": {}, "ours": {}}
    facts: list[dict[str, Any]] = []
    with place(given.folder) as at:
        size = fill(at, given.data, given.database_mb, given.files_mb)
        print(json.dumps(size), file=sys.stderr)
        for number in range(given.runs):
            turns = [lambda: literal(at, sides["literal"]), lambda n=number: facts.append(ours(at, sides["ours"], n))]
            for turn in turns if number % 2 == 0 else reversed(turns):
                turn()
                print(".", end="", file=sys.stderr, flush=True)
    shutil.rmtree(given.folder)
    by_run = {side: [sum(values) for values in zip(*(p.elapsed_s for p in parts.values()), strict=True)]
              for side, parts in sides.items()}  # fmt: skip
    whole = {side: median(values) for side, values in by_run.items()}
    without = median(total - fact["without_proof_s"] for total, fact in zip(by_run["ours"], facts, strict=True))
    summary = {
        "data": given.data,
        **size,
        "literal_s": round(whole["literal"], 1),
        "ours_without_proof_s": round(without, 1),
        "ours_with_proof_s": round(whole["ours"], 1),
        "times_faster_without_proof": round(whole["literal"] / without, 2),
        "times_faster_with_proof": round(whole["literal"] / whole["ours"], 2),
        "peak_mb": round(max(fact["peak"] for fact in facts) / 1e6),
        "packed_by": facts[0]["packed by"],
        "runs": given.runs,
    }
    if given.json:
        print(json.dumps({"summary": summary, **{s: {k: v.__dict__ for k, v in p.items()} for s, p in sides.items()}}))
        return
    print("\n".join([*table(sides["literal"], "the playbook's commands"), "", *table(sides["ours"], "phase 1"), ""]))
    print("\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in summary.items()))


if __name__ == "__main__":
    main()
