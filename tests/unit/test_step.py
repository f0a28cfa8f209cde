"""A step is written down before it acts, acts once, in its place, and never under somebody else's nose."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from runbook_lib import fence, fsck, lease, wiring
from runbook_lib.adapters import processes
from runbook_lib.errors import (
    DeniedError,
    FencedError,
    LedgerUnavailableError,
    PausedError,
    StepFailedError,
    StepInDoubtError,
    UnavailableError,
    UsageError,
    VerificationError,
)
from runbook_lib.ledger import Ledger
from runbook_lib.model import Recovery, Status, StepResult
from runbook_lib.run import Run
from runbook_lib.step import Step, step
from tests.ledgers import LedgerServer
from tests.project import wait_until

KEY = "prepare.act"


class Acts:
    """Counts how often a step acted, and does one more thing when it does."""

    def __init__(self, more: Callable[[Run], object] = lambda run: None) -> None:
        self.times = 0
        self.more = more

    def step(self, phase: str = "prepare", recovery: Recovery = Recovery.REPEAT) -> Step:
        def act(run: Run) -> StepResult:
            self.times += 1
            self.more(run)
            return StepResult(facts={"times": self.times})

        made = step("Act", recovery=recovery)(act)
        made.phase = phase
        return made


def another(run: Run) -> Ledger:
    """The ledger as another process has it."""
    return Ledger(run.ledger.url)


def begun(run: Run, executor: Mapping[str, Any], attempt: int = 1) -> None:
    """An intent as the executor of that name would have left it."""
    intent = {"step": KEY, "phase": "prepare", "attempt": attempt, "executor": dict(executor), "children": "logs/x"}
    another(run).append(run.run_id, "step_intent", {**intent, "pre_state": {}})


def gone() -> dict[str, Any]:
    """A process of this machine that runs no more."""
    return {**processes.me(), "start": 1}


def test_the_intent_is_committed_before_the_effect(run: Run) -> None:
    seen: list[Status] = []

    Acts(lambda run: seen.append(another(run).state(run.run_id).step(KEY).status)).step()(run)

    assert seen == [Status.RUNNING]


def test_a_green_step_answers_from_the_ledger_and_does_nothing(run: Run) -> None:
    acts = Acts()
    first = acts.step()(run)
    before = run.state.seq

    again = acts.step()(run)

    assert (again.facts, acts.times, run.state.seq) == (first.facts, 1, before)


def test_after_the_end_a_green_step_is_still_shown_and_no_other_one_starts(run: Run) -> None:
    acts = Acts()
    made = acts.step()
    first = made(run)
    run.ledger.append(run.run_id, "run_ended", {"state": "aborted"})

    assert made(run).facts == first.facts
    made.name = "another"
    with pytest.raises(PausedError, match="has ended"):
        made(run)
    assert acts.times == 1


def test_from_a_request_to_go_back_on_no_step_of_the_way_forth_starts(run: Run) -> None:
    acts = Acts()
    before, after = acts.step(), acts.step()
    after.name = "after"
    looked: list[str] = []

    @after.pre_state
    def _(run: Run) -> Mapping[str, Any]:
        looked.append("at its target")
        return {}

    first = before(run)
    run.ledger.append(run.run_id, "rollback_requested", {"reason": "it is slow", "exit_code": 1})

    with pytest.raises(PausedError, match=rf"goes back \(it is slow\). Next: runbook resume {run.run_id}"):
        after(run)
    assert before(run).facts == first.facts
    assert (acts.times, looked) == (1, [])


def test_a_request_to_go_back_that_comes_meanwhile_is_seen_before_the_intent(run: Run) -> None:
    acts = Acts()
    made = acts.step()

    @made.pre_state
    def _(run: Run) -> Mapping[str, Any]:
        another(run).append(run.run_id, "rollback_requested", {"reason": "it is slow", "exit_code": 1})
        return {}

    with pytest.raises(PausedError, match="goes back"):
        made(run)
    assert (acts.times, run.state.step(KEY).attempt) == (0, 0)


def test_no_step_starts_before_the_one_in_front_of_it_is_green(run: Run) -> None:
    front, acts = Acts().step(), Acts()
    front.name = "front"
    behind = acts.step()
    behind.before = (front,)

    with pytest.raises(PausedError, match=r"does not start: prepare\.front"):
        behind(run)
    assert (acts.times, run.state.step(KEY).status) == (0, Status.PENDING)

    front(run)
    assert behind(run).status == "green"


def test_what_changed_while_a_step_got_ready_is_seen_before_its_intent(run: Run) -> None:
    acts = Acts()
    made = acts.step()

    @made.pre_state
    def _(run: Run) -> Mapping[str, Any]:
        another(run).append(run.run_id, "run_ended", {"state": "aborted"})
        return {}

    with pytest.raises(PausedError, match="has ended"):
        made(run)

    assert (acts.times, run.state.step(KEY).status) == (0, Status.PENDING)


def test_of_two_that_begin_a_step_at_once_one_does_it(run: Run) -> None:
    acts = Acts()
    made = acts.step()

    @made.pre_state
    def _(run: Run) -> Mapping[str, Any]:
        begun(run, processes.me())
        return {}

    with pytest.raises(PausedError, match="was just taken by another executor"):
        made(run)

    assert acts.times == 0
    assert [e.kind for e in run.ledger.events(run.run_id)].count("step_intent") == 1


def test_a_run_that_does_not_hold_its_environment_changes_nothing_there(run: Run) -> None:
    acts = Acts()
    with pytest.raises(PausedError, match="does not hold staging"):
        acts.step(phase="begin")(run)
    assert acts.times == 0

    run.ledger.take_lock(run.run_id, "staging")
    assert acts.step(phase="begin")(run).status == "green"


@pytest.mark.parametrize("begins_again", [False, True])
def test_an_outcome_is_only_written_while_its_own_attempt_runs(run: Run, begins_again: bool) -> None:
    def settle_it_meanwhile(run: Run) -> None:
        another(run).append(run.run_id, "step_reset", {"step": KEY, "attempt": 1, "why": "not applied"})
        if begins_again:
            begun(run, processes.me(), attempt=2)

    with pytest.raises(PausedError, match="was settled by another executor"):
        Acts(settle_it_meanwhile).step()(run)

    assert run.state.step(KEY).status is (Status.RUNNING if begins_again else Status.PENDING)


def test_a_blocked_step_waits_for_a_person(run: Run) -> None:
    acts = Acts()
    begun(run, gone())
    another(run).append(run.run_id, "step_blocked", {"step": KEY, "attempt": 1, "why": "cannot tell"})

    with pytest.raises(StepInDoubtError, match="cannot tell"):
        acts.step()(run)

    assert acts.times == 0


def test_a_ledger_that_is_away_in_the_middle_leaves_the_step_in_doubt(run: Run) -> None:
    def away(run: Run) -> None:
        raise LedgerUnavailableError("its server is away", remedy="mend that")

    with pytest.raises(LedgerUnavailableError):
        Acts(away).step()(run)

    # What was done meanwhile nobody knows: failed would be a guess.
    assert run.state.step(KEY).status is Status.RUNNING


def test_a_secret_in_an_error_does_not_come_into_the_ledger(run: Run) -> None:
    run.secrets.remember("hunter2-secret")

    def leak(run: Run) -> None:
        raise StepFailedError("login with hunter2-secret failed", remedy="look")

    with pytest.raises(StepFailedError):
        Acts(leak).step()(run)

    assert "login with [redacted] failed" in run.state.step(KEY).error
    assert "hunter2" not in str(run.ledger.events(run.run_id))


def test_a_secret_in_a_probes_error_does_not_come_into_the_ledger(run_with_database: Run) -> None:
    run = run_with_database
    run.secrets.remember("hunter2-secret")
    fails = Seen(OSError("login with hunter2-secret failed"))
    begun(run, gone())

    with pytest.raises(StepInDoubtError, match=r"login with \[redacted\] failed"):
        fails.made(run)

    assert "hunter2" not in str(run.ledger.events(run.run_id))


# --- in doubt ----------------------------------------------------------------------------------------------------


def test_a_step_whose_intent_the_ledger_has_lost_does_not_act_again(run: Run) -> None:
    """Its effect may have happened, and nobody would ask."""
    begun(run, gone())
    here, acts = wiring.attach(run.run_id), Acts()
    forget(run, KEY)

    for handle in (here, run):
        with pytest.raises(VerificationError, match=r"the ledger ends with event 2 of run .* event 3, .* is lost"):
            acts.step()(handle)
    with pytest.raises(VerificationError, match="is lost"):
        wiring.attach(run.run_id)

    assert acts.times == 0


def forget(run: Run, key: str) -> None:
    """Take away a step's events, the last ones of the ledger, behind its triggers."""
    with run.ledger._engine.begin() as connection:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("DROP TRIGGER events_no_delete")
        else:
            connection.exec_driver_sql("SET session_replication_role = replica")
        connection.execute(sa.text("DELETE FROM events WHERE data LIKE :words"), {"words": f'%"step":"{key}"%'})


def test_what_only_a_person_can_tell_is_not_done_again(run_with_database: Run) -> None:
    run, acts = run_with_database, Acts()
    begun(run, gone())

    with pytest.raises(StepInDoubtError, match="only a person can tell"):
        acts.step(recovery=Recovery.ASK)(run)

    assert (acts.times, run.state.step(KEY).status) == (0, Status.BLOCKED)


def broken_rules(run: Run) -> list[str]:
    """What of its invariants the run's story breaks."""
    return [str(finding) for finding in fsck.examine(list(run.ledger.events(run.run_id)), None) if not finding.ok]


class Seen:
    """A step that fails once and acts from then on, and what its probe says when it is asked."""

    def __init__(self, says: StepResult | Exception | None) -> None:
        self.acts, self.asked, self.says = Acts(self.fail_first), list[Mapping[str, Any]](), says
        self.made = self.acts.step(recovery=Recovery.PROBE)
        self.made.probe(self.probe)

    def fail_first(self, run: Run) -> None:
        if self.acts.times == 1:
            raise StepFailedError("psql was ended after 1 s")

    def probe(self, run: Run, intent: Mapping[str, Any]) -> StepResult | None:
        self.asked.append(intent)
        if isinstance(self.says, Exception):
            raise self.says
        return self.says

    def failed(self, run: Run) -> None:
        with pytest.raises(StepFailedError):
            self.made(run)


def test_a_failed_attempt_whose_effect_is_there_after_all_is_not_made_again(run_with_database: Run) -> None:
    run, fails = run_with_database, Seen(StepResult(facts={"found": True}))
    fails.failed(run)

    assert fails.made(run).facts == {"found": True}
    assert (fails.acts.times, run.state.step(KEY).settled_by) == (1, "probe")
    assert broken_rules(run) == []


def test_a_failed_attempt_that_may_be_half_done_waits_for_a_person(run_with_database: Run) -> None:
    run, fails = run_with_database, Seen(StepInDoubtError("half done"))
    fails.failed(run)

    with pytest.raises(StepInDoubtError, match="half done"):
        fails.made(run)
    assert (fails.acts.times, run.state.step(KEY).status) == (1, Status.BLOCKED)
    assert run.state.step(KEY).intent["children"] == fails.asked[0]["children"] == f"logs/{KEY}/1"
    assert broken_rules(run) == []


@pytest.mark.parametrize(
    ("says", "ends"), [(StepInDoubtError("half done"), Status.BLOCKED), (StepResult(), Status.GREEN)], ids=repr
)
def test_the_way_back_settles_a_failed_attempt_behind_a_gate_that_does_not_stand_any_more(
    run_with_database: Run, says: StepResult | Exception, ends: Status
) -> None:
    run, fails = run_with_database, Seen(says)
    fails.failed(run)
    gate = Acts().step()
    gate.name = "sign_off"
    fails.made.before = (gate,)

    def refuses(*_: object) -> Mapping[str, Any]:
        raise PausedError("the decision does not stand: its evidence is not here")

    fails.made.guard = refuses
    with pytest.raises(PausedError, match=r"does not start: prepare\.sign_off"):
        fails.made(run)

    for _ in range(2):  # killed behind it, the way back asks again
        with pytest.raises(StepInDoubtError, match="half done") if ends is Status.BLOCKED else nullcontext():
            fails.made.settle_left_over(run)

    assert (run.state.step(KEY).status, fails.acts.times) == (ends, 1)
    assert broken_rules(run) == []


def test_what_became_of_a_failed_attempt_is_not_said_after_the_end(run_with_database: Run) -> None:
    run, fails = run_with_database, Seen(StepResult())
    fails.failed(run)
    run.ledger.append(run.run_id, "run_ended", {"state": "aborted"})

    with pytest.raises(PausedError, match="has ended"):
        fails.made.settle_left_over(run)

    assert run.state.step(KEY).status is Status.FAILED


@pytest.mark.parametrize("says", [None, StepFailedError("it is there, and red")])
def test_a_failed_attempt_of_which_nothing_good_is_there_is_made_again(
    run_with_database: Run, says: Exception | None
) -> None:
    run, fails = run_with_database, Seen(says)
    fails.failed(run)

    assert fails.made(run).status == "green"
    assert (fails.acts.times, len(fails.asked), run.state.step(KEY).attempt) == (2, 1, 2)


_AWAY = (UnavailableError("nobody answers"), DeniedError("no"), psycopg.OperationalError("nobody answers"))
_BROKEN = (StepFailedError("red"), UsageError("not installed"), OSError("no such file"), KeyError("facts"))


@pytest.mark.parametrize("says", _AWAY, ids=repr)
@pytest.mark.parametrize("killed", [True, False])
def test_a_target_that_does_not_answer_pauses_and_changes_nothing(
    run_with_database: Run, says: Exception, killed: bool
) -> None:
    run, fails = run_with_database, Seen(says)
    begun(run, gone()) if killed else fails.failed(run)
    before = run.state

    with pytest.raises(PausedError, match="cannot be seen now: n") as caught:
        fails.made(run)

    assert not isinstance(caught.value, StepInDoubtError)
    assert fails.acts.times == (0 if killed else 1)
    assert run.state.steps == before.steps


@pytest.mark.parametrize("says", _BROKEN, ids=repr)
def test_a_probe_that_breaks_tells_nothing(run_with_database: Run, says: Exception) -> None:
    run, fails = run_with_database, Seen(says)
    begun(run, gone())

    with pytest.raises(StepInDoubtError, match="its probe cannot tell: "):
        fails.made(run)

    assert (fails.acts.times, run.state.step(KEY).status) == (0, Status.BLOCKED)


def test_items_that_failed_are_looked_at_before_any_goes_on(run_with_database: Run) -> None:
    run, order = run_with_database, list[str]()

    def act(run: Run, item: str) -> StepResult:
        order.append(f"act {item}")
        if order.count(f"act {item}") == 1:
            raise StepFailedError("ended")
        return StepResult()

    made = step("Act", recovery=Recovery.PROBE, each=lambda run: ("a", "b"), limit=lambda run: 2)(act)
    made.phase = "prepare"

    @made.probe
    def _(run: Run, item: str, intent: Mapping[str, Any]) -> StepResult | None:
        order.append(f"look {item}")
        return StepResult() if item == "a" else None

    with pytest.raises(StepFailedError):
        made(run)
    assert made(run).status == "green"

    assert order[2:] == ["look a", "look b", "act b"]


def test_a_step_whose_process_still_runs_is_left_to_it(run_with_database: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_ORPHAN_S", 0.2)
    run, acts = run_with_database, Acts()
    with subprocess.Popen(("sleep", "60")) as other:
        begun(run, {**processes.me(), "pid": other.pid, "start": processes.start_time(other.pid)})
        try:
            with pytest.raises(PausedError, match=f"is being run by process {other.pid}"):
                acts.step()(run)
            assert acts.times == 0
        finally:
            other.kill()
    assert acts.step()(run).status == "green"


def test_what_a_failed_attempt_left_running_has_ended_before_the_next_one(run_with_database: Run) -> None:
    run = run_with_database
    run.ledger.take_lock(run.run_id, "staging")
    folder = run.folder / "logs" / "backup.act" / "1"
    seen: list[bool] = []

    def act(run: Run) -> None:
        seen.append((folder / "effect").exists())
        if len(seen) == 1:
            left = subprocess.Popen(("sh", "-c", f"sleep 1; touch {folder}/effect"))
            started = processes.start_time(left.pid)
            (folder / "left.pid").write_text(f"{left.pid} {started} {processes.boot_id()}\n")
            raise StepFailedError("its time-out ended it")

    folder.mkdir(parents=True)
    made = Acts(act).step("backup")
    with pytest.raises(StepFailedError):
        made(run)

    made(run)

    assert seen == [False, True]


def test_a_command_that_outlived_its_executor_has_ended_before_the_probe_looks(run_with_database: Run) -> None:
    run, acts = run_with_database, Acts()
    begun(run, gone())
    folder = run.folder / "logs" / "x"
    folder.mkdir(parents=True)
    seen: list[bool] = []
    made = acts.step(recovery=Recovery.PROBE)
    with subprocess.Popen(("sh", "-c", f"sleep 1; touch {folder}/effect")) as left:
        (folder / "left.pid").write_text(f"{left.pid} {processes.start_time(left.pid)} {processes.boot_id()}\n")

        @made.probe
        def _(run: Run, intent: Mapping[str, Any]) -> StepResult | None:
            seen.append((folder / "effect").exists())
            return StepResult()

        made(run)

    assert (seen, acts.times) == ([True], 0)


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "failed"])
def test_a_session_that_outlived_its_executor_has_ended_before_the_probe_looks(
    run_with_database: Run, ledger_server: LedgerServer, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    monkeypatch.setattr(fence, "_GRACE_S", 0.1)
    run, acts = run_with_database, Acts()
    begun(run, gone())
    if not killed:
        red = StepResult(verdict="red", status="failed").as_json()
        ended = {"step": KEY, "attempt": 1, "status": "failed", "result": red, "error": "ended after 1 s"}
        another(run).append(run.run_id, "step_outcome", ended)
    made = acts.step(recovery=Recovery.PROBE)
    with ledger_server.session() as session, ThreadPoolExecutor(1) as pool:
        session.execute("SELECT set_config('application_name', %s, false)", (f"{run.session_name}: left",))
        left = pool.submit(session.execute, "SELECT pg_sleep(20)")
        at_work: list[int] = []

        def sessions() -> int:
            with ledger_server.session() as looking:
                rows = looking.execute(
                    "SELECT 1 FROM pg_stat_activity WHERE starts_with(application_name, %s) AND state = 'active'",
                    (run.session_name,),
                ).fetchall()
            return len(rows)

        @made.probe
        def _(run: Run, intent: Mapping[str, Any]) -> StepResult | None:
            at_work.append(sessions())
            return StepResult()

        wait_until(lambda: sessions() == 1, "the session at work", 20)
        try:
            made(run)
        finally:
            session.cancel_safe()
        assert isinstance(left.exception(), psycopg.Error)

    assert (at_work, acts.times) == ([0], 0)


# --- several at once ---------------------------------------------------------------------------------------------


class Crowd:
    """A step for four items, two at a time, whose action goes on until it is told to end."""

    def __init__(self) -> None:
        self.began, self.ended, self.go = [], [], threading.Event()  # type: ignore[var-annotated]
        self.two = threading.Barrier(3)
        self.made = step("Act", recovery=Recovery.PROBE, each=lambda run: "abcd", limit=lambda run: 2)(self.act)
        self.made.phase = "prepare"
        self.made.probe(lambda run, item, intent: None)

    def act(self, run: Run, item: str) -> StepResult:
        self.began.append(item)
        if not self.go.is_set():
            self.two.wait(30)
        self.go.wait(30)
        self.ended.append(item)
        return StepResult()

    def interrupt(self, times: int) -> None:
        """As a kernel is interrupted, once two items are at work."""
        self.two.wait(30)
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: signal.getsignal(signal.SIGINT) is not signal.default_int_handler, "the interrupt", 30)
        for _ in range(times - 1):
            os.kill(os.getpid(), signal.SIGINT)
        self.go.set()


@pytest.mark.parametrize("times", [1, 3])
def test_an_interrupt_leaves_nothing_at_work_without_a_lease(run_with_database: Run, times: int) -> None:
    run, crowd = run_with_database, Crowd()
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        other = threading.Thread(target=crowd.interrupt, args=(times,))
        other.start()
        with pytest.raises(KeyboardInterrupt):
            crowd.made(run)
    finally:
        signal.signal(signal.SIGINT, before)
        crowd.go.set()
        other.join()

    assert sorted(crowd.began) == sorted(crowd.ended) == ["a", "b"]
    assert run.ledger.epoch is None
    assert [run.state.green(f"prepare.act@{item}") for item in "abcd"] == [True, True, False, False]
    crowd.made(run)
    assert sorted(crowd.began) == ["a", "b", "c", "d"]


def test_what_another_thread_of_this_process_does_is_not_taken_for_left_over(run_with_database: Run) -> None:
    run, crowd = run_with_database, Crowd()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(crowd.made, run)
        crowd.two.wait(30)
        try:
            with pytest.raises(PausedError, match="is being run by this very process"):
                crowd.made(run)
        finally:
            crowd.go.set()
        first.result()

    assert sorted(crowd.began) == ["a", "b", "c", "d"]


def test_an_outcome_is_not_written_by_who_has_no_lease(run: Run) -> None:
    run.ledger.take_lease(run.run_id, processes.me())

    def act(run: Run) -> None:
        run.ledger.epoch = None

    with pytest.raises(FencedError, match="is not the executor"):
        Acts(act).step()(run)

    assert run.state.step(KEY).status is Status.RUNNING
