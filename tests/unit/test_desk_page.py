"""The release desk as HTML: what the deploy lead reads, with and without its colours."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from typing import Any

import pytest

from runbook_lib.clock import Moment
from runbook_lib.desk_page import (
    Facts,
    PhaseFact,
    StepFact,
    desk_html,
    next_phase,
    parts,
    phase_standing,
    read_only,
    standing,
)
from runbook_lib.model import Event, GateRule
from runbook_lib.state import RunState, fold

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(1)>\u202e'
START_S = 1_800_000_000.0
OPENED = {
    "version": "v1.5.0",
    "commit": "a" * 40,
    "environment": "staging",
    "previous_version": "v1.4.0",
    "opened_by": "lea",
}


def phase(name: str, *steps: str, gate: str = "", hosts: tuple[str, ...] = ()) -> PhaseFact:
    made = [StepFact(f"Step {step}", "Ops", 30.0, (f"{name}.{step}",)) for step in steps]
    if hosts:
        made.insert(0, StepFact("Deploy", "DevOps", 60.0, tuple(f"{name}.host@{host}" for host in hosts)))
    if gate:
        made.append(StepFact(f"Gate {gate}", "Lead", 60.0, (f"{name}.sign_off",)))
    return PhaseFact(name, f"0_{name}.ipynb", tuple(made), gate)


PHASES = (
    phase("prepare", "check"),
    phase("backup", "dump_database", gate="backup"),
    phase("begin", "enable_maintenance", "prove_read_only"),
    phase("migrate", "verify_schema", gate="migration"),
    phase("deploy", hosts=("web1", "web2", "web3")),
    phase("verify", "smoke_tests", "spot_checks", gate="release"),
    phase("complete", "lift_maintenance"),
    phase("rollback", "restore_code", "lift_fence_and_maintenance"),
    phase("review", "draft"),
)
GATES = {
    name: (
        GateRule(name, number, f"Gate {number}: {name}", f"Is {name} good?", ("dba", "qa"), 2, 3600.0),
        ("dan", "quinn"),
    )
    for number, name in enumerate(("backup", "migration", "release"), 1)
}


class Story(list[Event]):
    """Events ten seconds apart, by both clocks."""

    def add(self, kind: str, **data: Any) -> Story:
        at = 10.0 * len(self)
        moment = Moment(START_S + at, "boot", 1000.0 + at)
        data["clock"] = moment.clock
        self.append(Event("RUN-1", len(self) + 1, moment.text, kind, data, "", f"{len(self) + 1:064x}"))
        return self

    def begin(self, key: str) -> Story:
        return self.add("step_intent", step=key, phase=key.partition(".")[0], title=key, attempt=1)

    def end(self, key: str, status: str = "green", error: str = "", **facts: Any) -> Story:
        result = {"facts": facts, "artifacts": [], "verdict": "green", "title": key, "status": status}
        return self.add("step_outcome", step=key, attempt=1, status=status, result=result, duration_s=1.0, error=error)

    def green(self, *keys: str) -> Story:
        for key in keys:
            self.begin(key).end(key)
        return self

    def phases(self, *names: str) -> Story:
        for name in names:
            self.green(*next(p.keys for p in PHASES if p.name == name))
        return self

    def gate(self, name: str) -> Story:
        evidence = {"path": "p", "sha256": "d" * 64, "cards": 1}
        return self.add("gate_opened", gate=name, round=1, nonce="n", opened_epoch_s=0.0, evidence=evidence)

    def decide(self, name: str, person: str, decision: str) -> Story:
        return self.add("gate_decision", gate=name, round=1, person=person, decision=decision, comment="c")


def opened() -> Story:
    return Story().add("run_opened", **OPENED)


def facts(story: Story, *, after_s: float = 5.0, **more: Any) -> Facts:
    last = story[-1].moment
    now = Moment(last.wall_s + after_s, last.boot, last.uptime_s + after_s)
    closed = read_only(story, before_watch=False)
    able = {e.data["step"]: ("ada", "dan") for e in story if "step" in e.data}
    known: dict[str, Any] = {"now": now, "phases": PHASES, "gates": GATES, "read_only": closed, "way_back_s": 120.0}
    return Facts(**{**known, "budget_s": 600.0, "record": "/out/RUN-1", "may_settle": able, **more})


def words(page: str) -> str:
    """What is left to read when every tag and style is gone."""
    bare = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", bare)).split())


def shown(story: Story, **more: Any) -> str:
    return desk_html(fold(story), facts(story, **more))


IN_MIGRATION = ("prepare", "backup", "begin")


def test_a_fresh_run_says_what_it_is_and_what_comes_next() -> None:
    said = words(shown(opened(), window=(START_S + 3600, START_S + 7200), window_fixed=True))

    assert "v1.5.0 to staging" in said
    assert "aaaaaaaaaaaa" in said
    assert "v1.4.0" in said
    assert "State: ○ paused next: prepare" in said
    assert "prepare : ○ next backup : ○ not yet" in said
    assert "Opens in 59 min 55 s" in said
    assert "rollback :" not in said


def test_the_rail_marks_one_current_phase_in_an_ordered_list() -> None:
    page = shown(opened().phases(*IN_MIGRATION).begin("migrate.verify_schema"), at_work="runbook (process 7 on h)")

    assert page.count('aria-current="step"') == 1
    rail = page[page.index('<ol class="rail">') : page.index("</ol>")]
    assert '<li class="live" aria-current="step"><strong>migrate' in rail
    said = words(rail)
    assert "begin : ✔ done migrate : ● at work" in said


def test_a_running_step_says_since_when_how_long_and_how_many_hosts_are_done() -> None:
    story = opened().phases(*IN_MIGRATION, "migrate").green("deploy.host@web1").begin("deploy.host@web2")

    said = words(shown(story, at_work="runbook (process 7 on h)", progress=("copy: 3 MB, 1 MB/s",)))

    assert "Step Deploy (DevOps)" in said
    assert "1 of 3 done, at web2" in said
    assert "5.0 s, expected about 20 s" in said
    assert "copy: 3 MB, 1 MB/s" in said
    assert "runbook (process 7 on h)" in said


def test_a_step_whose_executor_is_gone_is_not_shown_as_running() -> None:
    story = opened().phases(*IN_MIGRATION).begin("migrate.verify_schema")

    state, known = fold(story), facts(story, lost="process 7 on h worked on the run and is gone")

    assert standing(state, known).word == "cut off"
    assert "is gone" in words(desk_html(state, known))


def test_an_open_gate_says_its_question_who_may_sign_who_has_and_where() -> None:
    story = opened().phases(*IN_MIGRATION).green("migrate.verify_schema").gate("migration")
    story.decide("migration", "dan", "approve")

    said = words(shown(story, after_s=60.0))

    assert "State: ? waits for people" in said
    assert "migrate : ? gate open" in said
    assert "Is migration good?" in said
    assert "Signed 1 of 2: dan" in said
    assert "dan, quinn (dba or qa)" in said
    assert "Time left 58 min 50 s" in said
    assert "0_migrate.ipynb" in said


def test_a_gate_with_all_its_signatures_waits_for_nobody() -> None:
    story = opened().phases(*IN_MIGRATION).green("migrate.verify_schema").gate("migration")
    story.decide("migration", "dan", "approve").decide("migration", "quinn", "approve")

    said = words(shown(story))

    assert "State: ○ paused Gate 2: migration is signed: pass it" in said
    assert "migrate : ? gate signed" in said


def test_the_maintenance_clock_tells_the_latest_safe_way_back_by_the_budget() -> None:
    story = opened().phases("prepare", "backup").begin("begin.enable_maintenance")
    begun = story[-1].moment.wall_s

    said = words(shown(story, after_s=100.0))

    assert "1 min 40 s of 10 min 00 s" in said
    # 600 s of budget less 120 s for the way back less 100 s that passed.
    assert f"{Moment(begun + 480).text[11:19]} UTC, in 6 min 20 s" in said
    assert "✔ in time" in said


@pytest.mark.parametrize(("after_s", "word"), [(200.0, "! soon too late"), (500.0, "✖ too late")])
def test_the_maintenance_clock_warns_before_and_after_the_latest_moment(after_s: float, word: str) -> None:
    story = opened().phases("prepare", "backup").begin("begin.enable_maintenance")

    assert word in words(shown(story, after_s=after_s))


def test_the_announced_windows_end_binds_when_it_comes_before_the_budgets() -> None:
    story = opened().phases("prepare", "backup").begin("begin.enable_maintenance")
    window = (START_S, story[-1].moment.wall_s + 300)

    assert "(announced window)" in words(shown(story, window=window, window_fixed=True))
    assert "(budget)" in words(shown(story, window=window, window_fixed=False))


def test_a_second_attempt_does_not_set_the_maintenance_clock_back() -> None:
    story = opened().phases("prepare", "backup").begin("begin.enable_maintenance")
    story.end("begin.enable_maintenance", "failed").begin("begin.enable_maintenance")

    assert "25 s of 10 min 00 s" in words(shown(story))


def test_a_wall_clock_that_was_set_does_not_move_the_maintenance_clock() -> None:
    story = opened().phases("prepare", "backup").begin("begin.enable_maintenance")
    known = facts(story)

    jumped = replace(known, now=replace(known.now, wall_s=known.now.wall_s + 9000))

    assert "5.0 s of 10 min 00 s" in words(desk_html(fold(story), jumped))
    assert "UTC, in 7 min 55 s" in words(desk_html(fold(story), jumped))


def test_after_maintenance_the_clock_says_how_long_it_was() -> None:
    story = opened().phases("prepare", "backup", "begin", "migrate", "deploy", "verify", "complete")

    said = words(shown(story, after_s=9000.0))

    assert "Maintenance clock: ended ✔ within budget" in said
    assert "Read-only 3 min 30 s of" in said
    assert "State: ✔ all phases are green end and seal it" in said


def test_users_shut_out_again_on_the_way_back_start_the_clock_again() -> None:
    story = opened().phases("begin", "complete").green("rollback.close_for_users")

    assert read_only(story, before_watch=False).until is None
    assert read_only(story[:-2], before_watch=False).until is not None


def test_a_failed_step_shows_why_and_every_way_on() -> None:
    story = opened().phases(*IN_MIGRATION).begin("migrate.verify_schema")
    story.end("migrate.verify_schema", "failed", error="the schema is X")

    said = words(shown(story))

    assert "State: ✖ failed migrate.verify_schema" in said
    assert "migrate : ✖ failed" in said
    assert "the schema is X" in said
    assert "No step can be skipped." in said
    for command in ("runbook resume RUN-1", "runbook rollback RUN-1 --reason TEXT", "runbook abort RUN-1"):
        assert command in said


def test_a_blocked_step_names_who_may_sign_for_it() -> None:
    story = opened().phases(*IN_MIGRATION).begin("migrate.verify_schema")
    story.add("step_blocked", step="migrate.verify_schema", why="only a person can tell")

    said = words(shown(story))

    assert "State: ? in doubt migrate.verify_schema" in said
    assert "only a person can tell" in said
    assert "one of ada, dan looked at the target of migrate.verify_schema" in said
    assert "runbook resolve RUN-1 migrate.verify_schema --done --as PERSON" in said
    assert next_phase(fold(story), facts(story)) == "migrate"


def test_a_rejected_gate_offers_the_way_back() -> None:
    story = opened().phases(*IN_MIGRATION).green("migrate.verify_schema").gate("migration")
    story.decide("migration", "dan", "reject")

    said = words(shown(story))

    assert "State: ✖ rejected gate migration: roll back or abort" in said
    assert "migrate : ✖ rejected" in said


def test_a_rollback_stands_in_the_rail_once_it_was_asked_for() -> None:
    story = opened().phases(*IN_MIGRATION).add("rollback_requested", reason="red", exit_code=1)
    going, known = fold(story), facts(story)
    story.phases("rollback").add("run_ended", state="rolled_back")

    assert next_phase(going, known) == "rollback"
    assert "rollback : ○ next" in words(desk_html(going, known))
    said = words(shown(story, sealed=True))
    assert "State: ✖ rolled back the record is sealed" in said
    assert "migrate : ○ not done" in said
    assert "rollback : ✔ done" in said


def test_a_completed_run_leads_to_its_record() -> None:
    everything = [p.name for p in PHASES if p.name not in ("rollback", "review")]
    story = opened().phases(*everything).add("run_ended", state="completed")

    said = words(shown(story, sealed=True))

    assert "State: ✔ completed" in said
    assert "/out/RUN-1/index.html" in said
    assert "review : ○ not yet" in said
    assert next_phase(fold(story), facts(story)) == ""


def test_spot_checks_that_people_still_owe_are_told() -> None:
    story = opened().phases(*IN_MIGRATION, "migrate", "deploy").green("verify.smoke_tests")
    story.add("check_recorded", check="login", passed=True, person="quinn", note="")

    said = words(shown(story, checks=("login", "order")))

    assert "login ✔ passed, quinn order not yet" in said


def test_warnings_are_told() -> None:
    story = opened()
    story.add("note", text="x")
    jumped = Moment(START_S + 500, "boot", 1030.0)
    story.append(Event("RUN-1", 3, jumped.text, "note", {"clock": jumped.clock}, "", "f" * 64))

    said = words(
        shown(story, edited=("03_migrate.ipynb: its code cell 3 was edited",), trouble=("the ledger does not answer",))
    )

    assert "the clock was set by +470.0 s before event 3" in said
    assert "03_migrate.ipynb: its code cell 3 was edited" in said
    assert "the ledger does not answer" in said


def test_every_colour_is_a_class_whose_word_says_the_same() -> None:
    story = opened().phases(*IN_MIGRATION).begin("migrate.verify_schema")
    story.end("migrate.verify_schema", "failed", error="E")
    page = shown(story)

    pills = re.findall(r'<span class="pill (\w+)">([^<]*)</span>', page)

    assert pills
    assert {tone for tone, _ in pills} <= {"good", "bad", "warn", "plain", "live"}
    for tone, said in pills:
        assert (said[0] == "✔") == (tone == "good"), said
        assert len(said.split()) > 1 or tone == "plain", said
    assert " style=" not in page


def test_it_reads_well_without_styles_and_aloud() -> None:
    story = opened().phases(*IN_MIGRATION).green("migrate.verify_schema").gate("migration")
    page = shown(story)

    assert page.count("aria-live") == 1
    assert re.search(r'<p class="state" aria-live="polite">.*?waits for people', page)
    assert next(iter(re.findall(r"<h(\d)", page))) == "2"
    assert set(re.findall(r"<h(\d)", page)) == {"2", "3"}
    assert '<th scope="col">Owner</th>' in page
    assert "<th>" not in page


def test_only_the_region_that_ticks_changes_with_the_seconds() -> None:
    story = opened().phases("prepare", "backup").begin("begin.enable_maintenance")
    state = fold(story)

    before, after = (parts(state, facts(story, after_s=s, at_work="runbook")) for s in (5.0, 6.0))

    assert before[:2] == after[:2]
    assert before[2] != after[2]


def test_hostile_words_stay_words() -> None:
    story = Story().add("run_opened", **dict.fromkeys(OPENED, HOSTILE))
    story.begin("backup.dump_database").end("backup.dump_database", "failed", error=HOSTILE).gate("backup")
    story.decide("backup", HOSTILE, "approve")

    page = shown(
        story, at_work="", lost=HOSTILE, progress=(HOSTILE,), edited=(HOSTILE,), checks=(HOSTILE,), trouble=(HOSTILE,)
    )

    assert "<script" not in page
    assert "<img" not in page
    assert "\u202e" not in page


def test_a_phase_without_steps_begun_is_not_yet() -> None:
    state: RunState = fold(opened())

    assert phase_standing(state, facts(opened()), PHASES[3]).word == "not yet"
