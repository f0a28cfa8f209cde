"""Faults of the machine and of what it talks to, while a step runs: it must fail closed, say what it was, and go on after.

    python -m tests.soak.faults --state FOLDER [--ledger sqlite|postgresql] [--each N]

A case puts back the world before a step, runs the step under a fault, ends the fault, runs the step again, and compares
the world with the one that an undisturbed step leaves. The faults are real where a test can make them: a disk that is
full or read-only, limits of the kernel, a restarted server, a proxy before the object store and the databases, a network
whose link is down; only the wall clock is a stand-in.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

from tests.project import Project
from tests.soak.killpoints import Walk, run_step, wait, walked
from tests.soak.proxies import Proxy, has_own_devices
from tests.soak.worlds import differences

Begin = Callable[[Walk, int], Callable[[], object]]
_SLOW = ("verify.watch_telemetry", "sign_off")


# --- faults ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What is wrong while the step runs.

    Attributes:
        within: called in the step's process before the step.
        first: called before the step's process begins; returns what ends the fault.
        beside: called once the process has begun; returns what ends the fault.
        only: steps whose key holds one of these; empty for all.
        names: what the step's process says of it, as a regular expression; any error of ours when the fault need not hurt,
            and one that nothing fits when it must not.
        ledger: the kind of ledger that it is for; empty for both.
        root: it needs a disk or a network of its own.
    """

    name: str
    names: str
    within: Callable[[], None] | None = None
    first: Begin | None = None
    beside: Begin | None = None
    only: tuple[str, ...] = ()
    must_hurt: bool = False
    ledger: str = ""
    root: bool = False


def _limit(what: int, value: int) -> Callable[[], None]:
    def arm() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(what, (value, resource.getrlimit(what)[1]))

    return arm


def _clock(shift: timedelta) -> Callable[[], None]:
    def arm() -> None:
        real = time.time
        time.time = lambda: real() + shift.total_seconds()

    return arm


def _jump(shift: timedelta) -> Callable[[], None]:
    """The clock is set while the step runs: half a second after its process began."""

    def arm() -> None:
        real, since = time.time, time.monotonic()
        time.time = lambda: real() + (shift.total_seconds() if time.monotonic() - since > 0.5 else 0.0)

    return arm


def _proxy(name: str, mode: str) -> Begin:
    def begin(_walk: Walk, _number: int) -> Callable[[], None]:
        PROXIES[name].mode = mode
        return lambda: setattr(PROXIES[name], "mode", "pass")

    return begin


def _full_disk(walk: Walk, number: int) -> Callable[[], None]:
    """Fill the disk of outputs/ to so many pages as are drawn: each write of the step meets its end in some case."""
    disk = walk.world.project.root / "outputs"
    stat = os.statvfs(disk)
    left = random.Random(number).randint(0, 40)
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, stat.f_bavail - left) * stat.f_bsize)
    return lambda: ballast.unlink(missing_ok=True)


def _full_backups(walk: Walk, number: int) -> Callable[[], None]:
    """Fill the disk that backups are written to, likewise: an archive of the twin takes 600 pages, its dump 30."""
    disk = walk.world.twin / "backups"
    stat = os.statvfs(disk)
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        left = random.Random(number).randint(0, 25)
        os.posix_fallocate(file.fileno(), 0, max(1, stat.f_bavail - left) * stat.f_bsize)
    return lambda: ballast.unlink(missing_ok=True)


def _sent_ahead() -> None:
    """The twin's backups are small: in this process they are big enough to be sent while they are made."""
    from runbook_lib.adapters import objects, uploads

    objects._ONE_REQUEST_BYTES = objects._PART_BYTES = 16 << 10
    uploads._LOOK_EVERY_S = 0.002


def _read_only_disk(walk: Walk, _number: int) -> Callable[[], None]:
    disk = str(walk.world.project.root / "outputs")
    subprocess.run(("mount", "-o", "remount,ro", disk), check=True)
    return lambda: subprocess.run(("mount", "-o", "remount,rw", disk), check=True) and None


def _restart_database(walk: Walk, _pid: int) -> Callable[[], None]:
    walk.world.restart_database()  # or the step would be run again before the fault has ended
    return lambda: None


def _restart_ledger(walk: Walk, _pid: int) -> Callable[[], None]:
    assert walk.server is not None
    walk.server.restart()
    return lambda: None


def _asleep(seconds: float) -> Begin:
    def begin(_walk: Walk, pid: int) -> Callable[[], None]:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)  # the fault itself: a machine that sleeps
        os.kill(pid, signal.SIGCONT)
        return lambda: None

    return begin


_S3_STEPS = (
    "backup.replicate_off_site",
    "backup.compare_hashes",
    "prepare.check_capacity",
    "backup.recheck_preparation",
)
# They send what is on disk of a backup, and a store that is ill is none of their business.
_AHEAD_STEPS = ("backup.archive_files", "backup.dump_database")
_BACKUP_STEPS = (*_AHEAD_STEPS, "backup.validate_backup")
_DATABASE_STEPS = ("dump_database", "validate_backup", "migrate.", "fence", "rollback.restore_schema", "check_capacity")
_SILENT_STEPS = ("dump_database", "migrate_production", "fence_writes", "check_locks")
_LEDGER = r"LedgerUnavailableError: the ledger .* cannot be used: "
_NOTHING = "(?!)"
_DISK_FULL = "No space left on device|bytes when it is unpacked beside itself"
_ANY = r"[A-Z][A-Za-z]+Error: "
_STORE = "UnavailableError: .*s3://"
PROXIES: dict[str, Proxy] = {}

FAULTS = (
    Fault("disk of outputs/ full", _ANY, first=_full_disk, root=True),
    Fault(
        "disk of outputs/ full, a few pages more",
        _ANY,
        first=lambda walk, number: _full_disk(walk, number + 1),
        root=True,
    ),
    Fault("disk of outputs/ read-only", _ANY, first=_read_only_disk, must_hurt=True, root=True),
    Fault("disk of the backups full", _DISK_FULL, first=_full_backups, only=_BACKUP_STEPS, must_hurt=True, root=True),
    Fault("no file may grow", _ANY, within=_limit(resource.RLIMIT_FSIZE, 8192)),
    Fault("descriptors used up", _ANY, within=_limit(resource.RLIMIT_NOFILE, 24)),
    Fault("clock + 1 h", _ANY, within=_clock(timedelta(hours=1))),
    Fault("clock - 1 h", _ANY, within=_clock(timedelta(hours=-1))),
    Fault("clock + 1 d", _ANY, within=_clock(timedelta(days=1))),
    Fault("clock - 1 d", _ANY, within=_clock(timedelta(days=-1))),
    Fault("clock set by + 1 h meanwhile", _ANY, within=_jump(timedelta(hours=1))),
    Fault("clock set by - 1 d meanwhile", _ANY, within=_jump(timedelta(days=-1))),
    Fault("asleep for 2 s", _ANY, beside=_asleep(2)),
    Fault("asleep for 60 s", _ANY, beside=_asleep(60), only=("backup.dump_database", "migrate.migrate_production")),
    Fault("database restarted", _ANY, beside=_restart_database, only=_DATABASE_STEPS),
    Fault("database refuses", _ANY, first=_proxy("database", "refuse"), only=_DATABASE_STEPS),
    Fault("database cut in its greeting", _ANY, first=_proxy("database", "cut 300"), only=_DATABASE_STEPS),
    Fault("database cut later", _ANY, first=_proxy("database", "cut 3000"), only=_DATABASE_STEPS),
    Fault("database cut meanwhile", _ANY, beside=_proxy("database", "cut 0"), only=_DATABASE_STEPS),
    Fault("database slow", _ANY, first=_proxy("database", "slow"), only=_DATABASE_STEPS),
    Fault("database half-open meanwhile", _ANY, beside=_proxy("database", "half-open"), only=_SILENT_STEPS, root=True),
    Fault("store refuses", _STORE, first=_proxy("store", "refuse"), only=_S3_STEPS, must_hurt=True),
    Fault("store answers 503", _STORE, first=_proxy("store", "503"), only=_S3_STEPS, must_hurt=True),
    Fault("store cuts answers", _ANY, first=_proxy("store", "cut 300"), only=_S3_STEPS),
    Fault("store is slow", _ANY, first=_proxy("store", "slow"), only=_S3_STEPS),
    Fault("store gives other bytes", _ANY, first=_proxy("store", "other bytes"), only=_S3_STEPS),
    Fault("store half-open", _STORE, first=_proxy("store", "half-open"), only=_S3_STEPS, must_hurt=True, root=True),
    *(
        Fault(f"store {said}, while it is sent ahead", _NOTHING, within=_sent_ahead, first=begin, only=_AHEAD_STEPS)
        for said, begin in (
            ("refuses", _proxy("store", "refuse")),
            ("answers 503", _proxy("store", "503")),
            ("cuts answers", _proxy("store", "cut 300")),
            ("is cut off in a part", _proxy("store", "cut sent 20000")),
            ("is slow", _proxy("store", "slow")),
            ("gets other bytes", _proxy("store", "other bytes sent")),
        )
    ),
    Fault(
        "store half-open, while it is sent ahead",
        _NOTHING,
        within=_sent_ahead,
        first=_proxy("store", "half-open"),
        only=_AHEAD_STEPS,
        root=True,
    ),
    Fault("ledger refuses", _LEDGER, first=_proxy("ledger", "refuse"), must_hurt=True, ledger="postgresql"),
    Fault(
        "ledger cut in its greeting", _LEDGER, first=_proxy("ledger", "cut 300"), must_hurt=True, ledger="postgresql"
    ),
    Fault("ledger cut later", _LEDGER, first=_proxy("ledger", "cut 20000"), ledger="postgresql"),
    Fault("ledger cut meanwhile", _LEDGER, beside=_proxy("ledger", "cut 0"), ledger="postgresql"),
    Fault("ledger slow", _LEDGER, first=_proxy("ledger", "slow"), ledger="postgresql"),
    Fault("ledger restarted", _LEDGER, beside=_restart_ledger, ledger="postgresql"),
    Fault(
        "ledger half-open meanwhile",
        _LEDGER,
        beside=_proxy("ledger", "half-open"),
        only=("backup.dump_database", "migrate.migrate_production", "deploy.deploy_release@app-02"),
        ledger="postgresql",
        root=True,
    ),
)


@dataclass
class Case:
    """One step under one fault."""

    step: str
    fault: str
    hurt: bool
    named: bool
    closed: bool
    green: bool
    differs: list[str]
    broken: list[str]
    said: str

    @property
    def good(self) -> bool:
        return self.named and self.closed and self.green and not self.differs and not self.broken


def try_fault(walk: Walk, key: str, fault: Fault) -> Case:
    """Run one case."""
    from runbook_lib import wiring
    from runbook_lib.fsck import examine

    walk.world.put_back(walk.steps[key]["checkpoint"])
    log, counter = walk.folder / "fault.log", walk.folder / "deeds"
    log.unlink(missing_ok=True)
    end: Callable[[], object] = lambda: None  # noqa: E731
    if fault.first is not None:
        end = fault.first(walk, list(walk.steps).index(key))
    pid = run_step(walk.run_id, key, point=None, counter=counter, log=log, before=fault.within)
    if fault.beside is not None:
        end = fault.beside(walk, pid)
    code = wait(pid)
    end()
    said = log.read_text() if log.exists() else ""
    hurt = code != 0
    again = wait(run_step(walk.run_id, key, point=None, counter=counter, log=log))
    run = wiring.attach(walk.run_id)
    broken = [
        f"{f.invariant}: {f.where} {f.why}" for f in examine(run.ledger.events(walk.run_id), run.folder) if not f.ok
    ]
    green = run.state.green(key) and again == 0
    run.ledger._engine.dispose()
    differs = differences(walk.steps[key]["after"], walk.world.look())
    named = bool(re.search(fault.names, said)) if hurt else not fault.must_hurt
    text = log.read_text()[-800:] if log.exists() and not (green and named) else ""
    # 70 is an error that nobody foresaw, -9 a process that never ended.
    return Case(key, fault.name, hurt, named, code in (0, 1, 2, 3, 75), green, differs, broken, text)


def plan(walk: Walk, each: int, kind: str = "sqlite") -> list[tuple[str, Fault]]:
    """For each step that many of the faults for all, drawn at random, and all that are meant for it."""
    chosen = []
    for number, key in enumerate(reversed(walk.steps)):
        if any(slow in key for slow in _SLOW):
            continue
        here = [fault for fault in FAULTS if fault.ledger in ("", kind) and (has_own_devices() or not fault.root)]
        if kind == "postgresql":  # all else was seen with the other ledger
            here = [fault for fault in here if fault.ledger]
        common = [fault for fault in here if not fault.only]
        chosen += [(key, fault) for fault in random.Random(number).sample(common, min(each, len(common)))]
        chosen += [(key, fault) for fault in here if any(word in key for word in fault.only)]
    return chosen


def table(results: list[Case]) -> str:
    """The results as a Markdown table."""
    rows = [
        "| fault | cases | hurt | named its class | failed closed | green afterwards | lost or doubled | ledger unsound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        of = [r for r in results if r.fault == fault.name]
        rows.append(
            f"| {fault.name} | {len(of)} | {sum(r.hurt for r in of)} | {sum(r.named for r in of)} | {sum(r.closed for r in of)} | "
            f"{sum(r.green for r in of)} | {sum(bool(r.differs) for r in of)} | {sum(bool(r.broken) for r in of)} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Run the cases that have no result yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--ledger", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--each", type=int, default=5, help="faults a step, of those for all steps")
    parser.add_argument("--only", default="", help="steps whose key holds this")
    parser.add_argument("--fault", default="", help="faults whose name holds this")
    given = parser.parse_args()
    given.state.mkdir(parents=True, exist_ok=True)
    kept = given.state / f"faults-{given.ledger}.jsonl"
    results = [Case(**json.loads(line)) for line in kept.read_text().splitlines()] if kept.exists() else []
    known = {(r.step, r.fault) for r in results}
    with disturbed(given.state / f"world-faults-{given.ledger}", given.ledger) as walk, kept.open("a") as file:
        cases = [
            (key, fault)
            for key, fault in plan(walk, given.each, given.ledger)
            if given.only in key and given.fault in fault.name
        ]
        for key, fault in cases:
            if (key, fault.name) in known:
                continue
            result = try_fault(walk, key, fault)
            results.append(result)
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            mark = "ok" if result.good else f"BAD {asdict(result)}"
            print(f"{len(results)}/{len(cases)} {key} · {fault.name}: {mark}", flush=True)
    print(table(results))
    sys.exit(0 if all(r.good for r in results) else 1)


@contextmanager
def disturbed(
    folder: Path, ledger: str = "sqlite", *, wanted: Callable[[str], bool] = lambda _key: True, back: bool = True
) -> Iterator[Walk]:
    """`walked`, with proxies before its servers, and small disks of their own under outputs/ and for backups.

    Without root there are no such disks, and no network that loses packets.
    """
    network = has_own_devices()
    os.environ["PGSSLMODE"] = "disable"  # elsewhere than on the loopback address clients ask for TLS by themselves
    disk, backups = folder / "project" / "outputs", folder / "project" / ".rehearsal" / "backups"

    def settings(project: Project, ledger_url: str) -> dict[str, str]:
        facts = project.facts
        disk.mkdir(exist_ok=True)
        if network:
            for one in (disk, backups):
                subprocess.run(("mount", "-t", "tmpfs", "-o", "size=64m", "runbook-soak", str(one)), check=True)
        s3, database = urlsplit(facts["s3"]["endpoint"]), facts["database"]
        store = _proxied("store", folder, (str(s3.hostname), int(s3.port or 0)), 1 if network else 0)
        before = _proxied("database", folder, (database["host"], int(database["port"])), 2 if network else 0)
        passfile = folder / "pgpass"
        passfile.touch(mode=0o600)
        lines = Path(database["passfile"]).read_text().splitlines()
        passfile.write_text("".join("*:*:" + line.split(":", 2)[2] + "\n" for line in lines))
        chosen = {
            "backup.store.endpoint": f"http://{store.host}:{store.port}",
            "database.host": before.host,
            "database.port": str(before.port),
            "database.passfile": str(passfile),
            "backup.timeout_s": "90",
            "migrations.timeout_s": "60",
            # Behind its proxy the server is on another machine, whose volume nobody can look at.
            "backup.scratch_capacity_bytes": str(1 << 40),
            # A store whose size is known is asked how much it keeps.
            "backup.store.capacity_bytes": str(1 << 40),
        }
        if ledger_url:
            url = urlsplit(ledger_url)
            passfile = folder / "ledgerpass"
            passfile.touch(mode=0o600)
            words = dict(pair.split("=", 1) for pair in url.query.split("&"))
            lines = Path(words["passfile"]).read_text().splitlines()
            passfile.write_text("".join("*:*:" + line.split(":", 2)[2] + "\n" for line in lines))
            there = _proxied("ledger", folder, (str(url.hostname), int(url.port or 0)), 3 if network else 0)
            address = f"{url.username}@{there.host}:{there.port}"
            chosen["ledger"] = url._replace(netloc=address, query=f"passfile={passfile}").geturl()
        return chosen

    try:
        with walked(folder, ledger=ledger, more=settings, wanted=wanted, back=back) as walk:
            yield walk
    finally:
        for name in list(PROXIES):
            PROXIES.pop(name).stop()
        if network:
            for one in (disk, backups):
                subprocess.run(("umount", "--lazy", str(one)), check=False)


def _proxied(name: str, folder: Path, target: tuple[str, int], network: int) -> Proxy:
    # Several soaks may go on beside each other: each has networks of its own.
    number = os.getpid() % 80 * 3 + network
    proxy = Proxy(target, folder / f"proxy-{name}", f"rbsoak-{number}" if network else "").start()
    PROXIES[name] = proxy
    return proxy


if __name__ == "__main__":
    main()
