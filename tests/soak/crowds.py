"""Several executors on one run at once: two to eight that start together, and takeovers while the old holder lives.

    python -m tests.soak.crowds --state FOLDER [--schedules 500]

Each schedule puts back the world before a step, lets the crowd at it, lets one more executor finish, and compares the
world with the one that a single executor leaves: each effect at most once, nothing written under a lower epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.project import wait_until
from tests.soak import killpoints
from tests.soak.killpoints import Walk, run_step, wait, walked
from tests.soak.worlds import differences

KINDS = ("together", "takeover")
# They wait for a clock or for people, and say nothing about two executors that the others do not.
_SLOW = ("verify.watch_telemetry", "verify.spot_checks", "sign_off")


@dataclass
class Schedule:
    """One crowd and what it left."""

    number: int
    step: str
    kind: str
    executors: int
    ends: dict[str, int]
    differs: list[str]
    broken: list[str]
    green: bool
    said: str = ""

    @property
    def good(self) -> bool:
        return self.green and not self.differs and not self.broken


def plan(walk: Walk, count: int) -> list[tuple[int, str, str, int]]:
    """The schedules, the last step first; see `killpoints.all_cases`."""
    keys = [key for key in reversed(walk.steps) if not any(slow in key for slow in _SLOW)]
    chosen = []
    for number in range(count):
        draw = random.Random(number)
        chosen.append((number, keys[number % len(keys)], draw.choice(KINDS), draw.randint(2, 8)))
    return sorted(chosen, key=lambda one: keys.index(one[1]))


def try_schedule(walk: Walk, number: int, key: str, kind: str, executors: int) -> Schedule:
    """Let one crowd at a step."""
    from runbook_lib import wiring
    from runbook_lib.fsck import examine

    walk.world.put_back(walk.steps[key]["checkpoint"])
    log, counter = walk.folder / "crowd.log", walk.folder / "deeds"
    log.unlink(missing_ok=True)
    if kind == "together":
        crowd = [run_step(walk.run_id, key, point=None, counter=counter, log=log) for _ in range(executors)]
        ends = Counter(str(wait(pid)) for pid in crowd)
    else:
        ends = _take_over(walk, key, number, counter, log)
    code = wait(run_step(walk.run_id, key, point=None, counter=counter, log=log))
    run = wiring.attach(walk.run_id)
    broken = [
        f"{f.invariant}: {f.where} {f.why}" for f in examine(run.ledger.events(walk.run_id), run.folder) if not f.ok
    ]
    green = run.state.green(key)
    run.ledger._engine.dispose()
    differs = differences(walk.steps[key]["after"], walk.world.look())
    said = log.read_text()[-1500:] if code else ""
    return Schedule(number, key, kind, executors, dict(ends), differs, broken, green, said)


def _take_over(walk: Walk, key: str, number: int, counter: Path, log: Path) -> Counter[str]:
    """Stop an executor of another machine in the middle, take its run, do the step, and wake it up again."""
    deeds = walk.steps[key]["deeds"]
    point = (
        killpoints.Point("stalled", deed=random.Random(number).randint(1, deeds))
        if deeds
        else killpoints.BEFORE_OUTCOME
    )
    stalled = run_step(walk.run_id, key, point=point, counter=counter, log=log, elsewhere=_elsewhere(walk))
    ends: Counter[str] = Counter()
    if not _stopped(stalled):
        ends["ended before it could be stopped"] += 1
        return ends
    took = os.fork()
    if took == 0:
        code = 70
        try:
            from runbook_lib import lease, wiring

            out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            lease.take_over(wiring.attach(walk.run_id), reason="asleep")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    ends[f"takeover {wait(took)}"] += 1
    early = random.Random(number).random() < 0.5
    if early:  # it wakes up before anybody else did anything
        os.kill(stalled, signal.SIGCONT)
        ends[f"woken {wait(stalled)}"] += 1
    ends[f"next {wait(run_step(walk.run_id, key, point=None, counter=counter, log=log))}"] += 1
    if not early:
        os.kill(stalled, signal.SIGCONT)
        ends[f"woken {wait(stalled)}"] += 1
    return ends


def _elsewhere(walk: Walk) -> Path:
    """Another machine's project folder, with a copy of the run's folder, on the same ledger."""
    home, here = walk.folder / "elsewhere", walk.world.project.root
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(here / "outputs", home / "outputs", ignore=shutil.ignore_patterns("ledger.sqlite*"))
    for part in ("params", "runbooks", ".rehearsal"):
        (home / part).symlink_to(here / part)
    return home


def _stopped(pid: int) -> bool:
    """Wait until a child is stopped (True) or has ended."""
    state: dict[str, bool] = {}

    def seen() -> bool:
        done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if done:
            state["stopped"] = os.WIFSTOPPED(status)
        return bool(done)

    wait_until(seen, "the stop", 240)
    return state["stopped"]


def table(results: list[Schedule]) -> str:
    """The results as a Markdown table."""
    rows = [
        "| schedule | cases | an effect lost or twice | ledger unsound | not green at the end |",
        "|---|---|---|---|---|",
    ]
    for kind in KINDS:
        of = [r for r in results if r.kind == kind]
        rows.append(
            f"| {kind} | {len(of)} | {sum(bool(r.differs) for r in of)} | {sum(bool(r.broken) for r in of)} | {sum(not r.green for r in of)} |"
        )
    ends: Counter[str] = Counter()
    for result in results:
        ends.update(result.ends)
    return "\n".join([*rows, "", f"Ends of the executors: {dict(ends.most_common())}"])


def main() -> None:
    """Run the schedules that have no result yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--schedules", type=int, default=500)
    given = parser.parse_args()
    given.state.mkdir(parents=True, exist_ok=True)
    kept = given.state / "crowds.jsonl"
    results = [Schedule(**json.loads(line)) for line in kept.read_text().splitlines()] if kept.exists() else []
    known = {result.number for result in results}
    with walked(given.state / "world-crowds") as walk, kept.open("a") as file:
        for number, key, kind, executors in plan(walk, given.schedules):
            if number in known:
                continue
            result = try_schedule(walk, number, key, kind, executors)
            results.append(result)
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            mark = "ok" if result.good else f"BAD {result.differs[:2]} {result.broken[:2]} {result.said[-400:]}"
            print(f"{len(results)}/{given.schedules} {key} {kind} {executors} {result.ends}: {mark}", flush=True)
    print(table(results))
    sys.exit(0 if all(r.good for r in results) else 1)


if __name__ == "__main__":
    main()
