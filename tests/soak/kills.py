"""SIGKILL at a random moment to the executor, the kernel, a command, or all of them; then one resume, and a look.

    python -m tests.soak.kills --state FOLDER [--ledger sqlite|postgresql] [--kills 1000]

A case puts back the world before a step, lets an executor take the rest of the phase by its notebook, kills what is drawn
when it is drawn, lets a second executor go on, and compares the world with the one that an undisturbed phase leaves.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import statistics
import sys
import time
import traceback
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import psycopg

from tests.project import ROOT
from tests.soak import forked
from tests.soak.killpoints import Walk, wait, walked
from tests.soak.worlds import differences

TARGETS = ("executor", "kernel", "command", "group")
_PHASE_S = 300.0
# Of so many cases one walks the cell after the drawn step too: it may be killed between the two, or in the second one.
_ONWARDS = 3
_TRIES = 3
_ORPHAN_S = 5.0


# What a word to people that was not delivered leaves undone, and nothing else.
_WORDS = ("repository/commits: ", "outward/")


@dataclass
class Kill:
    """One case."""

    number: int
    step: str
    target: str
    ledger: str
    killed: bool
    first_exit: int
    resume_exit: int
    green: bool
    blocked: bool
    differs: list[str]
    wrong_green: bool
    broken: list[str]
    left_over: list[str]
    resume_s: float
    work_s: float
    said: str = ""
    undelivered: bool = (
        False  # a word to people that a killed command did not say: the step tells it, the review tries again
    )

    @property
    def lost(self) -> bool:
        """Something is not as it should be, but for the word itself that was told as not delivered."""
        words = _WORDS if self.undelivered else ()
        return any(not where.startswith(words) for where in self.differs)

    @property
    def good(self) -> bool:
        wrong = self.lost or self.wrong_green or self.broken or self.left_over
        return not wrong and (self.green or self.blocked) and self.resume_s - self.work_s <= 10.0


# --- an executor of one phase ------------------------------------------------------------------------------------


def run_phase(run_id: str, phase: str, *, log: Path) -> int:
    """Fork an executor that takes one phase by its notebook, in a kernel; returns its pid."""
    from runbook_lib import executor, lease, wiring

    forked.import_all()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        forked.Ahead().install()
        run = wiring.attach(run_id)
        with lease.held(run):
            kernels = _one_kernel()(run.root, lease.handed_down(run))
            try:
                stop = executor._run_phase(run, phase, kernels)
            finally:
                kernels.close()
        code = 0 if stop is None else stop.exit_code
        print(stop or "green", flush=True)
    except BaseException as error:
        traceback.print_exc()
        code = getattr(error, "exit_code", 70)
    finally:
        os._exit(code)


def _one_kernel() -> type:
    from runbook_lib.kernels import Kernels

    class OneKernel(Kernels):
        """Starts no kernel for the phase after: nobody takes it."""

        def start_next(self) -> None:
            if self._count == 0:
                super().start_next()

    return OneKernel


# --- whom and when -----------------------------------------------------------------------------------------------


def processes_of(executor: int) -> dict[int, str]:
    """The executor and all that descends from it, by pid, with its command line."""
    parents: dict[int, int] = {}
    lines: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(") ")[2].split()
                lines[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if fields[0] not in "ZX":
                parents[int(entry.name)] = int(fields[1])
    found = {executor: lines.get(executor, "")}
    grown = True
    while grown:
        more = {pid: lines[pid] for pid, parent in parents.items() if parent in found and pid not in found}
        found |= more
        grown = bool(more)
    return found


def kill(executor: int, target: str, draw: random.Random) -> bool:
    """Kill what is drawn, if it is there now."""
    tree = processes_of(executor)
    kernels = [pid for pid, line in tree.items() if line == tree[executor] and pid != executor]  # forked, see `forked`
    commands = [pid for pid, line in tree.items() if pid != executor and pid not in kernels and line]
    match target:
        case "executor":
            chosen = [executor]
        case "kernel":
            chosen = kernels
        case "command":
            chosen = [draw.choice(sorted(commands))] if commands else []
        case _:
            chosen = list(tree)
    for pid in chosen:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            chosen = [other for other in chosen if other != pid]
    return bool(chosen)


class Watching:
    """Counts a run's events from outside of the code under test."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk

    def events(self, kind: str) -> int:
        """How many events of a kind there are now."""
        if self.walk.world.ledger:
            with psycopg.connect(self.walk.world.ledger) as session:
                row = session.execute("SELECT count(*) FROM events WHERE kind = %s", (kind,)).fetchone()
        else:
            path = self.walk.world.project.root / "outputs" / "ledger.sqlite"
            with closing(sqlite3.connect(path, timeout=30)) as session:
                row = session.execute("SELECT count(*) FROM events WHERE kind = ?", (kind,)).fetchone()
        assert row is not None
        return int(row[0])


def _ended(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def disturb(walk: Walk, executor: int, target: str, delay_s: float, draw: random.Random) -> tuple[bool, int | None]:
    """Wait until the kernel begins a step, then so long as is drawn, and kill; (killed, exit code when it ended first)."""
    watching = Watching(walk)
    before, deadline = watching.events("step_intent"), time.monotonic() + _PHASE_S
    while watching.events("step_intent") == before:
        if (code := _ended(executor)) is not None:
            return False, code
        assert time.monotonic() < deadline, "no step was begun"
        time.sleep(0.02)
    at = time.monotonic() + delay_s
    while time.monotonic() < at:
        if (code := _ended(executor)) is not None:
            return False, code
        time.sleep(0.005)
    while not kill(executor, target, draw):  # a command is there only now and then
        if (code := _ended(executor)) is not None:
            return False, code
        time.sleep(0.005)
    return True, None


# --- a case ------------------------------------------------------------------------------------------------------


def try_kill(walk: Walk, number: int, key: str) -> Kill:
    """Run one case; all that is not given is drawn from its number."""
    from runbook_lib import wiring
    from runbook_lib.fsck import examine
    from runbook_lib.outward import UNDELIVERED

    draw = random.Random(number)
    target = draw.choice(TARGETS)
    phase, rest = key.partition(".")[0], _rest(walk, key, 2 if number % _ONWARDS == 0 else 1)
    _shorten(walk, phase, rest[-1])
    before = walk.world.put_back(walk.steps[key]["checkpoint"])
    log = walk.folder / f"kill-{(walk.world.ledger and 'postgresql') or 'sqlite'}.log"
    log.unlink(missing_ok=True)
    delay_s = draw.random() * sum(walk.steps[other]["seconds"] for other in rest)
    for again in range(_TRIES):
        if again:  # it ended before it could be killed: earlier now, and at last what is there for certain
            walk.world.put_back(walk.steps[key]["checkpoint"])
            target = target if again < _TRIES - 1 else "executor"
        executor = run_phase(walk.run_id, phase, log=log)
        known = processes_of(executor)
        killed, code = disturb(walk, executor, target, delay_s / 2**again, draw)
        known |= processes_of(executor)
        if killed:
            break
    first = code if code is not None else wait(executor, _PHASE_S)
    watching = Watching(walk)
    started, outcomes = time.monotonic(), watching.events("step_outcome")
    resumed = wait(run_phase(walk.run_id, phase, log=log), _PHASE_S)
    resume_s = time.monotonic() - started
    run = wiring.attach(walk.run_id)
    events, state = run.ledger.events(walk.run_id), run.state
    run.ledger._engine.dispose()
    done = [event for event in events if event.kind == "step_outcome"][outcomes:]
    broken = [f"{f.invariant}: {f.where} {f.why}" for f in examine(events, run.folder) if not f.ok]
    green = all(state.green(other) for other in rest)
    found = walk.world.look()
    undelivered = green and any(UNDELIVERED in state.step(other).result.facts for other in rest)
    differs = differences(walk.steps[rest[-1]]["after"], found)
    return Kill(
        number=number,
        step=key,
        target=target,
        ledger="postgresql" if walk.world.ledger else "sqlite",
        killed=killed,
        first_exit=first,
        resume_exit=resumed,
        green=green,
        blocked=any(state.step(other).status == "blocked" for other in rest),
        differs=differs if green else [],
        wrong_green=green and bool(differs) and not undelivered and not differences(before, found),
        broken=broken,
        left_over=_left_over(known),
        resume_s=round(resume_s, 2),
        work_s=round(sum(event.data["duration_s"] for event in done), 2),
        said="" if green and not resumed else log.read_text()[-1500:],
        undelivered=undelivered,
    )


def _step(walk: Walk, number: int) -> str:
    """Each step is as likely as any other, however many hosts it is done for."""
    draw = random.Random(f"step {number}")
    items: dict[str, list[str]] = {}
    for key in walk.steps:
        if not key.endswith("sign_off"):
            items.setdefault(key.partition("@")[0], []).append(key)
    return draw.choice(items[draw.choice(list(items))])


def _rest(walk: Walk, key: str, count: int) -> list[str]:
    """The keys of the cells that are walked from the drawn step on, all hosts of a step included."""
    phase, keys = key.partition(".")[0], list(walk.steps)
    after = [k for k in keys[keys.index(key) :] if k.partition(".")[0] == phase and not k.endswith("sign_off")]
    cells = list(dict.fromkeys(k.partition("@")[0] for k in after))[:count]
    return [k for k in after if k.partition("@")[0] in cells]


def _shorten(walk: Walk, phase: str, last: str) -> None:
    """Let the phase's notebook end with this step: what comes after it says nothing more, and takes its time."""
    from runbook_lib.phases import notebook_of

    notebook = json.loads((ROOT / "runbooks" / notebook_of(phase)).read_text())
    name = last.partition(".")[2].partition("@")[0]
    ends = [n for n, cell in enumerate(notebook["cells"]) if f".{name}(" in "".join(cell["source"])]
    notebook["cells"] = notebook["cells"][: ends[-1] + 1]
    (walk.world.project.root / "runbooks" / notebook_of(phase)).write_text(json.dumps(notebook))


def _left_over(known: dict[int, str]) -> list[str]:
    """Command lines of what goes on. A kernel whose executor was killed notices within a second, and may idle until then."""
    deadline = time.monotonic() + _ORPHAN_S
    while (left := [line[:120] for pid, line in known.items() if _still(pid, line)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _still(pid: int, line: str) -> bool:
    """True when that very process goes on; who has the same pid and another command line is another one."""
    try:
        path = Path("/proc") / str(pid)
        dead = (path / "stat").read_text().rpartition(") ")[2].split()[0] in "ZX"
        return not dead and bool(line) and (path / "cmdline").read_bytes().replace(b"\0", b" ").decode() == line
    except OSError:
        return False


def table(results: list[Kill]) -> str:
    """The results as a Markdown table; what ended before it could be killed is counted apart."""
    rows = [
        "| killed | ledger | kills | lost or doubled | wrong green | ledger unsound | left running | not green again | blocked "
        "| resume beside the work: median | longest |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for target in TARGETS:
        for ledger in ("sqlite", "postgresql"):
            of = [r for r in results if r.killed and (r.target, r.ledger) == (target, ledger)]
            if not of:
                continue
            over = [r.resume_s - r.work_s for r in of]
            rows.append(
                f"| {target} | {ledger} | {len(of)} | {sum(r.lost for r in of)} | {sum(r.wrong_green for r in of)} | "
                f"{sum(bool(r.broken) for r in of)} | {sum(bool(r.left_over) for r in of)} | "
                f"{sum(not r.green and not r.blocked for r in of)} | {sum(r.blocked for r in of)} | "
                f"{statistics.median(over):.1f} s | {max(over):.1f} s |"
            )
    struck = Counter(r.step.partition(".")[0] for r in results if r.killed)
    rows += ["", f"Kills by phase: {', '.join(f'{phase} {count}' for phase, count in struck.items())}."]
    told = sum(r.undelivered for r in results)
    rows += ["", f"Told as not delivered, for the review to try again: {told}."]
    return "\n".join(rows)


def read(state: Path) -> list[Kill]:
    """The results that are kept, of all parts."""
    return [
        Kill(**json.loads(line))
        for file in sorted(state.glob("kills-*.jsonl"))
        for line in file.read_text().splitlines()
    ]


def main() -> None:
    """Kill until there are so many, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--ledger", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--kills", type=int, default=500, help="with this ledger")
    given = parser.parse_args()
    given.state.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = str(ROOT)  # the kernels of the forked executors
    kept = given.state / f"kills-{given.ledger}.jsonl"
    results = [Kill(**json.loads(line)) for line in kept.read_text().splitlines()] if kept.exists() else []
    first = 0 if given.ledger == "sqlite" else 1_000_000
    known = {r.number for r in results}
    with walked(given.state / f"world-kills-{given.ledger}", ledger=given.ledger) as walk, kept.open("a") as file:
        # The last step first, see `killpoints.all_cases`; a few end before they can be killed.
        keys, numbers = list(walk.steps), range(first, first + given.kills * 51 // 50 + 1)
        for number in sorted(set(numbers) - known, key=lambda n: -keys.index(_step(walk, n))):
            result = try_kill(walk, number, _step(walk, number))
            results.append(result)
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            mark = "ok" if result.good else f"BAD {asdict(result)}"
            print(f"{len(results)}/{len(numbers)} {result.step} {result.target} {mark}", flush=True)
    print(table(results))
    sys.exit(0 if all(r.good for r in results) else 1)


if __name__ == "__main__":
    main()
