"""Faults of the machine and of what it talks to, while a step runs: it must fail closed, say what it was, and go on after.

    python -m tests.soak.faults --state FOLDER [--each N]

A case puts back the world before a step, runs the step under a fault, ends the fault, runs the step again, and compares
the world with the one that an undisturbed step leaves. The faults are real where a test can make them: SQLite's own
errors, limits of the kernel, a restarted server, a proxy before the object store; only the wall clock is a stand-in.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tests.soak.killpoints import Walk, run_step, wait, walked
from tests.soak.worlds import differences

_SLOW = ("verify.watch_telemetry", "sign_off")


# --- faults ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What is wrong while the step runs.

    Attributes:
        within: called in the step's process before the step.
        beside: called by the test once the process has begun; returns what ends the fault.
        only: steps whose key holds one of these; empty for all.
        names: what the step's process says of it, as a regular expression; any error of ours when the fault need not hurt.
    """

    name: str
    names: str
    within: Callable[[], None] | None = None
    beside: Callable[[Walk, int], Callable[[], None]] | None = None
    only: tuple[str, ...] = ()
    must_hurt: bool = False


def _sqlite(pragma: str) -> Callable[[], None]:
    def arm() -> None:
        import sqlalchemy as sa

        from runbook_lib import ledger

        def on_connect(connection: object, _record: object) -> None:
            cursor = connection.cursor()  # type: ignore[attr-defined]
            pages = cursor.execute("PRAGMA page_count").fetchone()[0]
            cursor.execute(pragma.format(pages=pages + 1))
            cursor.close()

        create = sa.create_engine

        def made(*words: object, **named: object) -> object:
            engine = create(*words, **named)  # type: ignore[call-overload]
            sa.event.listen(engine, "connect", on_connect)
            return engine

        ledger.sa.create_engine = made  # type: ignore[assignment]

    return arm


def _limit(what: int, value: int) -> Callable[[], None]:
    def arm() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(what, (value, resource.getrlimit(what)[1]))

    return arm


def _clock(shift: timedelta) -> Callable[[], None]:
    def arm() -> None:
        from runbook_lib import ledger

        real = time.time
        time.time = lambda: real() + shift.total_seconds()
        ledger.utc_now = lambda: (datetime.now(UTC) + shift).isoformat(timespec="microseconds").replace("+00:00", "Z")

    return arm


def _store(mode: str) -> Callable[[Walk, int], Callable[[], None]]:
    def begin(walk: Walk, _pid: int) -> Callable[[], None]:
        proxy = PROXIES[walk.run_id]
        proxy.mode = mode

        def end() -> None:
            proxy.mode = "pass"

        return end

    return begin


def _restart_database(walk: Walk, _pid: int) -> Callable[[], None]:
    walk.world.stop_and_start("postgres")
    return lambda: None


def _asleep(seconds: float) -> Callable[[Walk, int], Callable[[], None]]:
    def begin(_walk: Walk, pid: int) -> Callable[[], None]:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)  # the fault itself: a machine that sleeps
        os.kill(pid, signal.SIGCONT)
        return lambda: None

    return begin


_S3_STEPS = ("backup.replicate_off_site", "prepare.check_capacity", "backup.recheck_preparation")
_DATABASE_STEPS = ("dump_database", "validate_backup", "migrate.", "fence", "rollback.restore_schema", "check_capacity")
_LEDGER = r"LedgerUnavailableError: the ledger .* cannot be used: .*(full|readonly|disk I/O|unable to open)"
_ANY = r"[A-Z][A-Za-z]+Error: "
PROXIES: dict[str, Proxy] = {}

FAULTS = (
    Fault("ledger: disk full", _LEDGER, within=_sqlite("PRAGMA max_page_count={pages}"), must_hurt=False),
    Fault("ledger: read-only", _LEDGER, within=_sqlite("PRAGMA query_only=1"), must_hurt=True),
    Fault("no file may grow", _ANY, within=_limit(resource.RLIMIT_FSIZE, 8192)),
    Fault("descriptors used up", _ANY, within=_limit(resource.RLIMIT_NOFILE, 24)),
    Fault("clock + 1 h", _ANY, within=_clock(timedelta(hours=1))),
    Fault("clock - 1 h", _ANY, within=_clock(timedelta(hours=-1))),
    Fault("clock + 1 d", _ANY, within=_clock(timedelta(days=1))),
    Fault("clock - 1 d", _ANY, within=_clock(timedelta(days=-1))),
    Fault("asleep for 2 s", _ANY, beside=_asleep(2)),
    Fault("asleep for 60 s", _ANY, beside=_asleep(60), only=("backup.dump_database", "migrate.migrate_production")),
    Fault("database restarted", _ANY, beside=_restart_database, only=_DATABASE_STEPS),
    Fault("store refuses", "UnavailableError: .*s3://", beside=_store("refuse"), only=_S3_STEPS, must_hurt=True),
    Fault("store answers 503", "UnavailableError: .*s3://", beside=_store("503"), only=_S3_STEPS, must_hurt=True),
    Fault("store cuts answers", _ANY, beside=_store("cut"), only=_S3_STEPS),
    Fault("store is slow", _ANY, beside=_store("slow"), only=_S3_STEPS),
    Fault("store gives other bytes", _ANY, beside=_store("other bytes"), only=_S3_STEPS),
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
    end: Callable[[], None] = lambda: None  # noqa: E731
    if fault.beside is not None and fault.name.startswith("store"):
        end = fault.beside(walk, 0)
        pid = run_step(walk.run_id, key, point=None, counter=counter, log=log)
    else:
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


def plan(walk: Walk, each: int) -> list[tuple[str, Fault]]:
    """For each step that many of the faults for all, drawn at random, and all that are meant for it."""
    chosen = []
    for number, key in enumerate(reversed(walk.steps)):
        if any(slow in key for slow in _SLOW):
            continue
        common = [fault for fault in FAULTS if not fault.only]
        chosen += [(key, fault) for fault in random.Random(number).sample(common, min(each, len(common)))]
        chosen += [(key, fault) for fault in FAULTS if any(word in key for word in fault.only)]
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
    parser.add_argument("--each", type=int, default=5, help="faults a step, of those for all steps")
    parser.add_argument("--only", default="", help="steps whose key holds this")
    given = parser.parse_args()
    given.state.mkdir(parents=True, exist_ok=True)
    kept = given.state / "faults.jsonl"
    results = [Case(**json.loads(line)) for line in kept.read_text().splitlines()] if kept.exists() else []
    known = {(r.step, r.fault) for r in results}
    with proxied(given.state / "world-faults") as walk, kept.open("a") as file:
        cases = [(key, fault) for key, fault in plan(walk, given.each) if given.only in key]
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
def proxied(folder: Path) -> Iterator[Walk]:
    """`walked`, with a proxy before its object store."""
    made: list[Proxy] = []

    def settings(facts: dict[str, Any]) -> dict[str, str]:
        host, _, port = facts["s3"]["endpoint"].rpartition("/")[2].partition(":")
        made.append(Proxy((host, int(port)), folder / "proxy-mode").start())
        return {"backup.store.endpoint": f"http://127.0.0.1:{made[0].port}"}

    try:
        with walked(folder, more=settings) as walk:
            PROXIES[walk.run_id] = made[0]
            yield walk
    finally:
        for proxy in made:
            proxy.stop()


if __name__ == "__main__":
    main()
