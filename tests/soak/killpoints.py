"""Kill an executor at a chosen point of a chosen step, let another one go on, and compare the world with what it must be.

    python -m tests.soak.killpoints --state FOLDER [--ledger sqlite|postgresql] [--only STEP] [--sample N]

One release is walked once; before and after each of its steps the world is written down. A case puts back the world
before its step, runs the step in a process that dies at the point, runs it again in another one, and looks: what is not
there is lost, what is there twice is doubled, and a green step without its effect is a wrong green. Results are kept a
line each, and a case that has one is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.ledgers import LedgerServer
from tests.project import ROOT, Project
from tests.soak.worlds import World, differences

# What may differ after a second attempt, and why that is no second effect.
ALLOWED: dict[str, str] = {}

# What changes the world or begins to: where a process can be killed between two of its deeds.
_DEEDS = ("open", "os.rename", "os.remove", "os.mkdir", "os.link", "subprocess.Popen", "socket.connect", "shutil.move")
_STEP_S = 240


@dataclass(frozen=True)
class Point:
    """Where a process dies: at an event of the ledger, at its n-th deed within the step, or while a child runs."""

    name: str
    kind: str = ""
    after: bool = False
    deed: int = 0


BEFORE_INTENT = Point("before intent", "step_intent")
AFTER_INTENT = Point("after intent", "step_intent", after=True)
BEFORE_OUTCOME = Point("after effect, before outcome", "step_outcome")
AFTER_OUTCOME = Point("after outcome", "step_outcome", after=True)
CHILD = Point("while its command runs")


@dataclass
class Result:
    """One case."""

    step: str
    point: str
    ledger: str
    died: bool
    green: bool
    blocked: bool
    lost_or_doubled: list[str]
    wrong_green: bool
    broken: list[str]
    resume_s: float
    said: str = ""
    work_s: float = 0.0  # of the resume: what the step itself took when it was begun again

    @property
    def good(self) -> bool:
        return not (self.lost_or_doubled or self.wrong_green or self.broken) and (self.green or self.blocked)


# --- a process that runs one step --------------------------------------------------------------------------------


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stall() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _arm(key: str, point: Point | None, counter: int, end: Callable[[], None]) -> None:
    """Count the deeds between the step's intent and its outcome, and end where the point says."""
    from runbook_lib.ledger import Ledger

    append = Ledger.append
    within = {"it": False, "deeds": 0}

    def watched(ledger: Ledger, run_id: str, kind: str, data: Any, **named: Any) -> Any:
        mine = data.get("step") == key
        if mine and kind == "step_outcome":
            within["it"] = False
            os.pwrite(counter, str(within["deeds"]).encode().ljust(12), 0)
        if mine and point is not None and point.kind == kind and not point.after:
            end()
        event = append(ledger, run_id, kind, data, **named)
        if mine and point is not None and point.kind == kind and point.after:
            end()
        within["it"] = within["it"] or (mine and kind == "step_intent")
        return event

    def deed(event: str, words: tuple[Any, ...]) -> None:
        if not within["it"] or event not in _DEEDS or (event == "open" and not _writes(words)):
            return
        within["deeds"] += 1
        if point is not None and point.deed == within["deeds"]:
            end()

    Ledger.append = watched  # type: ignore[method-assign]
    sys.addaudithook(deed)


def _writes(words: tuple[Any, ...]) -> bool:
    mode, flags = words[1], words[2]
    return (isinstance(mode, str) and any(c in mode for c in "wax+")) or bool(
        isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
    )


def _find(key: str) -> tuple[Any, str | None]:
    from runbook_lib.phases import ALL

    name, _, item = key.partition("@")
    return next(step for module in ALL for step in module.STEPS if step.key() == name), item or None


def run_step(
    run_id: str,
    key: str,
    *,
    point: Point | None,
    counter: Path,
    log: Path,
    elsewhere: Path | None = None,
    before: Callable[[], None] | None = None,
) -> int:
    """Fork a process that runs one step as its notebook does; returns its pid.

    Args:
        elsewhere: another machine's project folder: the process goes by its name, and stops at the point, not dies.
        before: what is done to the process before its step.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        _arm(key, point, os.open(counter, os.O_CREAT | os.O_WRONLY), _die if elsewhere is None else _stall)
        from runbook_lib import lease, wiring
        from runbook_lib.adapters import processes
        from runbook_lib.errors import RunbookError

        if before is not None:
            before()
        if elsewhere is not None:
            os.environ["RUNBOOK_HOME"] = str(elsewhere)
            here = processes._machine()
            processes._machine = lambda: {**here, "host": "another"}
        step, item = _find(key)
        try:
            run = wiring.attach(run_id)
            with lease.held(run):
                step._one(run, item)
            code = 0
        except RunbookError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            code = error.exit_code
        except OSError as error:  # the command says it so as well
            print(f"{type(error).__name__}: {error}", flush=True)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int, seconds: float = _STEP_S) -> int:
    """The process's end as a shell would say it; killed when it takes too long."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


# --- the release that is walked once -----------------------------------------------------------------------------


class Walk:
    """A release with a checkpoint before each step and the view that each step leaves."""

    def __init__(self, world: World, folder: Path, settings: dict[str, str]) -> None:
        self.world, self.folder, self.settings = world, folder, settings
        self.server: LedgerServer | None = None
        self.run_id = ""
        self.steps: dict[str, dict[str, Any]] = {}  # key -> checkpoint, view after it, deeds, seconds

    def forward(self, wanted: Callable[[str], bool] = lambda _key: True) -> None:
        """Take every step of a good release, with a checkpoint before each that is wanted, to the last of them."""
        self.run_id = self._open()
        keys = self._keys()
        last = max(number for number, key in enumerate(keys) if wanted(key))
        for key in keys[: last + 1]:
            self._take(key, kept=wanted(key))

    def back(self) -> None:
        """Take every step of the way back of the same release, from the point where all is deployed."""
        from runbook_lib import lease, wiring
        from runbook_lib.phases import rollback

        self.world.put_back(self.steps["verify.smoke_tests"]["checkpoint"])
        run = wiring.attach(self.run_id)
        with lease.held(run):
            run.ledger.append(self.run_id, "rollback_requested", {"reason": "rehearsed", "exit_code": 1})
        _forget(run)
        for step in rollback.STEPS:
            self._take(step.key())

    def review(self) -> None:
        """End the run where the way forward ended, and take every step of its review."""
        from runbook_lib.phases import review

        self.world.put_back("end")
        _wait_for_end(self, None, self.folder / "deeds")
        for step in review.STEPS:
            self._take(step.key())

    def _open(self) -> str:
        from runbook_lib import wiring
        from runbook_lib.plan import plan_of

        settings = self.settings | {"watch.duration_s": "5", "watch.interval_s": "0.25", "watch.baseline_s": "5"}
        outputs = self.world.project.root / "outputs"
        outputs.mkdir(exist_ok=True)
        settings.setdefault("ledger", self.world.ledger or f"sqlite:///{outputs / 'ledger.sqlite'}")
        draft = wiring.preview("rehearsal", "next", settings=settings)
        run = wiring.create(draft, plan=plan_of(draft), people_sign=True)
        _forget(run)
        return run.run_id

    def _keys(self) -> list[str]:
        from runbook_lib import wiring
        from runbook_lib.phases import FORWARD

        run = wiring.attach(self.run_id)
        keys = [key for module in FORWARD for step in module.STEPS for key in step.keys(run)]
        _forget(run)
        return keys

    def _take(self, key: str, *, kept: bool = True) -> None:
        name = f"{len(self.steps):03d}"
        if kept:
            self.world.take(name)
        counter, log = self.folder / "deeds", self.folder / "walk.log"
        counter.unlink(missing_ok=True)
        started = time.monotonic()
        code = wait(run_step(self.run_id, key, point=None, counter=counter, log=log))
        seconds = time.monotonic() - started
        assert code == 0, f"{key} did not go: {code}\n{log.read_text()[-2000:]}"
        if kept:
            deeds = int(counter.read_text() or "0")
            self.steps[key] = {"checkpoint": name, "after": self.world.look(), "deeds": deeds, "seconds": seconds}


def _forget(run: Any) -> None:
    """Close what this process opened: it forks, and a database session must not be shared."""
    run.ledger._engine.dispose()


def points_of(walk: Walk, key: str) -> list[Point]:
    """The points at which a step is killed."""
    deeds = walk.steps[key]["deeds"]
    chosen = sorted({max(1, deeds // 2), deeds}) if deeds else []
    middle = [Point(f"mid effect, deed {n} of {deeds}", deed=n) for n in chosen if n]
    return [BEFORE_INTENT, AFTER_INTENT, *middle, CHILD, BEFORE_OUTCOME, AFTER_OUTCOME]


def try_case(walk: Walk, key: str, point: Point) -> Result | None:
    """Run one case; None when the step has no such point (no command runs in it)."""
    from runbook_lib import wiring
    from runbook_lib.fsck import examine

    world, known = walk.world, walk.steps[key]
    before = world.put_back(known["checkpoint"])
    log, counter = walk.folder / "case.log", walk.folder / "deeds"
    log.unlink(missing_ok=True)
    pid = run_step(walk.run_id, key, point=None if point is CHILD else point, counter=counter, log=log)
    died = _kill_in_child(walk, key, pid) if point is CHILD else wait(pid) == -signal.SIGKILL
    if point is CHILD and not died:
        return None
    started = time.monotonic()
    code = wait(run_step(walk.run_id, key, point=None, counter=counter, log=log))
    resume_s = time.monotonic() - started
    run = wiring.attach(walk.run_id)
    events, green = run.ledger.events(walk.run_id), run.state.green(key)
    broken = [f"{f.invariant}: {f.where} {f.why}" for f in examine(events, run.folder) if not f.ok]
    blocked = run.state.step(key).status == "blocked"
    _forget(run)
    found = world.look()
    differs = [d for d in differences(known["after"], found) if d.partition(":")[0] not in ALLOWED]
    wrong_green = green and bool(differs) and not differences(before, found)
    done = [e.data for e in events if e.kind == "step_outcome" and e.data["step"] == key]
    return Result(
        step=key,
        point=point.name,
        ledger="postgresql" if world.ledger else "sqlite",
        died=died,
        green=green,
        blocked=blocked,
        lost_or_doubled=differs if green else [],
        wrong_green=wrong_green,
        broken=broken,
        resume_s=round(resume_s, 2),
        said=log.read_text()[-1500:] if code else "",
        work_s=done[-1]["duration_s"] if done and point is not AFTER_OUTCOME else 0.0,
    )


def _kill_in_child(walk: Walk, key: str, pid: int) -> bool:
    """Kill the process once a command of its step has begun; False when the step ended without one."""
    logs = walk.world.project.root / "outputs" / "rehearsal" / walk.run_id / "logs" / key
    known = set(logs.rglob("*.pid"))
    deadline = time.monotonic() + _STEP_S
    while time.monotonic() < deadline:
        done, _status = os.waitpid(pid, os.WNOHANG)
        if done:
            return False
        if set(logs.rglob("*.pid")) - known:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return True
        time.sleep(0.002)
    raise AssertionError(f"{key} did not end")


# --- the record's sealing ----------------------------------------------------------------------------------------


def try_archiving(walk: Walk, deed: int | None) -> tuple[int, list[str]]:
    """End the run in a process that dies at its n-th deed, seal it in another one; (deeds counted, what is wrong)."""
    from runbook_lib import archive, wiring
    from runbook_lib.fsck import examine

    walk.world.put_back("end")
    counter = walk.folder / "deeds"
    _wait_for_end(walk, deed, counter)
    deeds = int(counter.read_text() or "0") if deed is None else 0
    _wait_for_end(walk, None, counter)
    run = wiring.attach(walk.run_id)
    wrong = [f"{c.name}: {c.where} {c.why}" for c in archive.verify(run.folder, run.trust) if not c.ok]
    wrong += [f.why for f in examine(run.ledger.events(walk.run_id), run.folder) if not f.ok]
    if run.state.ended != "completed":
        wrong.append(f"the run is {run.state.ended or 'open'}")
    _forget(run)
    return deeds, wrong


def _wait_for_end(walk: Walk, deed: int | None, counter: Path) -> None:
    pid = os.fork()
    if pid:
        wait(pid)
        return
    try:
        os.setsid()
        file = os.open(counter, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        done = {"deeds": 0}

        def count(event: str, words: tuple[Any, ...]) -> None:
            if event in _DEEDS and (event != "open" or _writes(words)):
                done["deeds"] += 1
                os.pwrite(file, str(done["deeds"]).encode(), 0)
                if deed == done["deeds"]:
                    _die()

        from runbook_lib import executor, wiring

        run = wiring.attach(walk.run_id)
        sys.addaudithook(count)
        if run.state.ended:
            executor.close(run)
        else:
            executor.end(run, "completed")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


# --- all of it ---------------------------------------------------------------------------------------------------


@contextmanager
def walked(
    folder: Path,
    *,
    ledger: str = "sqlite",
    back: bool = True,
    review: bool = False,
    wanted: Callable[[str], bool] = lambda _key: True,
    more: Callable[[Project, str], dict[str, str]] | None = None,
) -> Iterator[Walk]:
    """A twin with a release walked on it; down again afterwards.

    Args:
        ledger: `sqlite`, or `postgresql`: a server of its own.
        back: walk the way back too.
        review: end the run before that, and walk its review too.
        wanted: which steps get a checkpoint.
        more: settings of the run, from the project and its ledger's address.
    """
    home = folder / "project"
    shutil.rmtree(folder, ignore_errors=True)
    home.mkdir(parents=True)
    server = _ledger_server(folder / "ledgers") if ledger == "postgresql" else None
    for part in ("params", "runbooks"):
        shutil.copytree(ROOT / part, home / part)
    project = Project(home)
    os.environ.update(RUNBOOK_HOME=str(home), PATH=project.env["PATH"])
    done = project.runbook("stack", "up", "--json")
    assert done.returncode == 0, done.stderr
    try:
        url = server.url("ledger") if server is not None else ""
        settings = more(project, url) if more is not None else {}
        walk = Walk(World(project, folder / "checkpoints", url), folder, settings)
        walk.server = server
        walk.forward(wanted)
        if back:
            walk.world.take("end")
            if review:
                walk.review()
            walk.back()
        yield walk
    finally:
        project.runbook("stack", "down")
        if server is not None:
            server.stop()


def _ledger_server(folder: Path) -> LedgerServer:
    folder.mkdir()
    server = LedgerServer.start(folder)
    with server.session() as session:
        session.execute("CREATE DATABASE ledger")
    return server


def all_cases(walk: Walk, *, only: str = "") -> list[tuple[str, Point]]:
    """Every step at every point, the last step first: the store's versions that come back never come back the same."""
    return [(key, point) for key in reversed(walk.steps) if only in key for point in points_of(walk, key)]


def table(results: list[Result], archived: dict[str, list[str]]) -> str:
    """The results as a Markdown table, a row for each kind of point."""
    rows = [
        "| point | ledger | cases | lost or doubled | wrong green | ledger unsound | not green again | blocked "
        "| resume beside the work: median | longest |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    kinds = sorted({(r.point.partition(",")[0] if "deed" in r.point else r.point, r.ledger) for r in results})
    for kind, ledger in kinds:
        of = [r for r in results if r.point.startswith(kind) and r.ledger == ledger]
        seconds = [r.resume_s - r.work_s for r in of]
        rows.append(
            f"| {kind} | {ledger} | {len(of)} | {sum(bool(r.lost_or_doubled) for r in of)} | {sum(r.wrong_green for r in of)} | "
            f"{sum(bool(r.broken) for r in of)} | {sum(not r.green and not r.blocked for r in of)} | {sum(r.blocked for r in of)} | "
            f"{statistics.median(seconds):.1f} s | {max(seconds):.1f} s |"
        )
    if archived:
        rows.append(
            f"| while archiving | {results[0].ledger if results else 'sqlite'} | {len(archived)} | "
            f"{sum(bool(w) for w in archived.values())} | 0 | 0 | 0 | 0 | | |"
        )
    return "\n".join(rows)


def main() -> None:
    """Run the cases that have no result yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="where results are kept")
    parser.add_argument("--ledger", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--only", default="", help="steps whose key holds this")
    parser.add_argument("--sample", type=int, default=0, help="so many cases, drawn at random")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    given.state.mkdir(parents=True, exist_ok=True)
    kept = given.state / f"killpoints-{given.ledger}.jsonl"
    lines = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    results = [Result(**line) for line in lines if "step" in line]
    archived: dict[str, list[str]] = {line["archiving"]: line["wrong"] for line in lines if "archiving" in line}
    with (
        walked(given.state / f"world-{given.ledger}", ledger=given.ledger, review=True) as walk,
        kept.open("a") as file,
    ):
        if not given.only and not given.sample:
            deeds, _ = try_archiving(walk, None)
            for deed in sorted({1 + deeds * share // 40 for share in range(40)}):
                if str(deed) not in archived:
                    archived[str(deed)] = try_archiving(walk, deed)[1]
                    file.write(json.dumps({"archiving": str(deed), "wrong": archived[str(deed)]}) + "\n")
                    file.flush()
                    print(f"archiving, deed {deed} of {deeds}: {archived[str(deed)] or 'ok'}", flush=True)
        cases = all_cases(walk, only=given.only)
        if given.sample:
            cases = random.Random(given.seed).sample(cases, min(given.sample, len(cases)))
        known = {(r.step, r.point) for r in results}
        for number, (key, point) in enumerate(cases, 1):
            if (key, point.name) in known:
                continue
            result = try_case(walk, key, point)
            if result is None:
                continue
            results.append(result)
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            mark = "ok" if result.good else f"BAD {result.lost_or_doubled[:2]} {result.broken[:2]} {result.said[-300:]}"
            print(f"{number}/{len(cases)} {key} · {point.name}: {mark}", flush=True)
    print(table(results, archived))
    sys.exit(0 if all(r.good for r in results) and not any(archived.values()) else 1)


if __name__ == "__main__":
    main()
