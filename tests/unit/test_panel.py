"""A panel signs like the command, shows what the ledger says, and acts on no click alone."""

from __future__ import annotations

import asyncio
import html
import os
import pty
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from runbook_lib import decisions, gate, panel, panel_page, signatures
from runbook_lib.card import Card
from runbook_lib.errors import PausedError
from runbook_lib.model import StepResult
from runbook_lib.panel import ChecksPanel, GatePanel
from runbook_lib.phases import backup, begin, deploy, migrate, prepare, verify
from runbook_lib.run import Run
from tests.project import ROOT
from tests.unit.conftest import OPENER, OpenRun
from tests.unit.test_gate import FILE, asked_in, green

Settled = list[Card]


def settling(run: Run, name: str, settled: Settled) -> Callable[[], Card]:
    """What the gate's cell does when it is called: the outcome of its decisions."""

    def settle() -> Card:
        gate._ready(run, name)
        result = Card(facts={"approved": "yes"}, title="Gate 1: backup")
        settled.append(result)
        return result

    return settle


@pytest.fixture(autouse=True)
def no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


@pytest.fixture
def settled() -> Settled:
    return []


@pytest.fixture
def run(open_run: OpenRun) -> Run:
    return asked_in(open_run())


@pytest.fixture
def shown(run: Run, settled: Settled) -> GatePanel:
    made = panel.gate_panel(run, "backup", settling(run, "backup", settled))
    assert isinstance(made, GatePanel)
    return made


def choose(shown: Any, person: str, key: Path | None = None, comment: str = "") -> None:
    shown.signer.who.value = person
    if key is not None:
        shown.signer.key.value = str(key)
    if comment:
        shown.comment.value = comment


def words(markup: str) -> str:
    shown = re.sub(r"<style>.*?</style>|<[^>]+>", " ", markup, flags=re.DOTALL)
    return " ".join(html.unescape(shown).split())


def recorded(run: Run) -> list[tuple[str, str]]:
    return [(d["person"], d["decision"]) for d in run.state.gate("backup").decisions]


def is_refused(shown: Any, why: str) -> None:
    assert "role='alert'" in shown.message.value
    assert why in words(shown.message.value)
    assert "Next" in shown.message.value


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """A real ssh-agent of its own; called with a key file it holds that key."""
    started = subprocess.run(
        ("ssh-agent", "-s", "-a", str(tmp_path / "agent")), capture_output=True, text=True, check=True
    ).stdout
    pid = int(re.search(r"SSH_AGENT_PID=(\d+)", started)[1])  # type: ignore[index]
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))

    def add(key: Path) -> None:
        subprocess.run(("ssh-add", "-q", str(key)), check=True, stdin=subprocess.DEVNULL)

    yield add
    os.kill(pid, 15)


@pytest.fixture
def locked_key(tmp_path: Path, people: dict[str, Path]) -> Path:
    """Ada's key with a passphrase."""
    path = tmp_path / "locked"
    path.write_bytes(people["ada"].read_bytes())
    path.chmod(0o600)
    argv = ("ssh-keygen", "-q", "-p", "-P", "", "-N", "open sesame", "-f", str(path))
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return path


# --- what is shown -----------------------------------------------------------------------------------------------


def test_question_evidence_digests_people_and_time_are_shown_by_panel_and_twin(run: Run, shown: GatePanel) -> None:
    facts = gate.show(run, "backup")

    for markup in (shown.head.value, shown._twin()):
        said = words(markup)
        assert facts["asks"] in said
        assert facts["evidence_sha256"] in said
        assert facts["check_code"] in said
        for card in facts["evidence"]:
            assert card["name"] in said
            assert card["sha256"] in said
            assert f"check code {card['sha256'][:8]}" in said
        assert FILE in said
        assert "green proved good" in said
        assert "1 of deploy_lead" in said
        assert "ada, bea (lea opened this run and cannot approve it)" in said
    assert "Time left: 59 min" in words(shown.clock.value) or "Time left: 1 h" in words(shown.clock.value)
    assert f"runbook gate approve {run.run_id} backup --as PERSON" in words(shown._twin())


def test_without_a_loop_the_twin_alone_is_shown(shown: GatePanel, monkeypatch: pytest.MonkeyPatch) -> None:
    bundles: list[Any] = []
    monkeypatch.setattr(panel.cell.Output, "show", lambda self, bundle: bundles.append(bundle))

    shown._ipython_display_()

    assert [set(bundle) for bundle in bundles] == [{"text/html", "text/plain"}]
    assert "Begin the deployment?" in bundles[0]["text/html"]
    assert "rb-twin-" not in bundles[0]["text/html"]


def test_what_others_wrote_is_text(run: Run, people: dict[str, Path], settled: Settled) -> None:
    evil = "<img src=x onerror=alert(1)>'\"\u202e"
    key = "backup.compare_hashes"
    attempt = run.state.step(key).attempt
    hostile = StepResult(facts={evil: evil}, title=evil).as_json()
    outcome = {"step": key, "attempt": attempt, "status": "green", "result": hostile}
    run.ledger.append(run.run_id, "step_outcome", outcome)
    gate.open_round(run, "backup")
    shown = GatePanel(run, "backup", settling(run, "backup", settled))
    choose(shown, "bea", people["bea"], comment=evil)
    shown.reject.click()
    shown.message.value = panel_page.said(evil, tone="bad")

    assert "&lt;img" in shown.head.value
    for markup in (shown.head.value, shown.message.value, shown._twin(), shown._last["text/html"]):
        assert "<img" not in markup
        assert "\u202e" not in markup
        assert "onerror=alert(1)>'" not in markup


def test_the_command_to_copy_is_the_chosen_persons_and_works(
    run: Run, shown: GatePanel, people: dict[str, Path]
) -> None:
    choose(shown, "ada", people["ada"], comment="it's fine; $(reboot)")
    field = shown.commands["To approve"]
    argv = shlex.split(field.value)
    field.value = "runbook gate approve something else"
    assert shlex.split(field.value) == argv, "what is typed over it is put back"

    done = subprocess.run(
        (sys.executable, "-m", "runbook_lib", *argv[1:]),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert run.state.gate("backup").decisions[0]["comment"] == "it's fine; $(reboot)"


# --- what a click does -------------------------------------------------------------------------------------------


def test_a_click_alone_signs_nothing(run: Run, shown: GatePanel) -> None:
    before = run.state.seq

    shown.approve.click()
    is_refused(shown, "nothing was signed: nobody is chosen")
    choose(shown, "ada")
    shown.approve.click()

    is_refused(shown, "a click alone is no signature")
    assert run.state.seq == before


def test_the_right_persons_key_opens_the_gate_and_the_card_takes_the_panels_place(
    run: Run, shown: GatePanel, people: dict[str, Path], settled: Settled
) -> None:
    choose(shown, "ada", people["ada"], comment="seen")
    shown.approve.click()

    assert recorded(run) == [("ada", "approve")]
    assert run.state.gate("backup").decisions[0]["comment"] == "seen"
    assert len(settled) == 1
    assert shown.ended
    assert "Gate 1: backup" in shown.box.children[0].value
    assert panel.gate_panel(run, "backup", lambda: None) is not shown


@pytest.mark.parametrize(
    ("person", "key", "why"),
    [
        pytest.param("ada", "bea", "the signature is not ada's", id="another's key"),
        pytest.param("dan", "dan", "dan holds dba; gate backup needs deploy_lead", id="without the role"),
        pytest.param(OPENER, OPENER, "lea opened this run and cannot approve it", id="who opened it"),
        pytest.param("ada", "nowhere", "there is no key file", id="no such file"),
        pytest.param("eve", "ada", "'eve' is nobody in the params file", id="nobody"),
    ],
)
def test_who_may_not_is_refused_with_the_rule(
    run: Run, shown: GatePanel, people: dict[str, Path], person: str, key: str, why: str
) -> None:
    before = run.state.seq

    choose(shown, person, people.get(key, Path("/nowhere/key")))
    shown.approve.click()

    is_refused(shown, why)
    assert run.state.seq == before


def test_a_rejection_needs_its_reason_and_says_who_why_and_what_next(
    run: Run, shown: GatePanel, people: dict[str, Path], settled: Settled
) -> None:
    choose(shown, "bea", people["bea"])
    shown.reject.click()
    is_refused(shown, "nothing was signed: a rejection needs its reason. Next: write it under Comment")
    assert recorded(run) == []

    shown.comment.value = "the dump is too old"
    shown.reject.click()

    assert recorded(run) == [("bea", "reject")]
    assert settled == []
    assert shown.ended
    said = words(shown._last["text/html"])
    assert "gate backup was rejected by bea: the dump is too old" in said
    assert f"runbook rollback {run.run_id}" in said


def test_a_quorum_is_of_different_people_and_a_second_click_is_none(
    open_run: OpenRun, people: dict[str, Path], settled: Settled
) -> None:
    run = asked_in(open_run(gates__backup__quorum="2"))
    shown = GatePanel(run, "backup", settling(run, "backup", settled))

    choose(shown, "ada", people["ada"])
    shown.approve.click()
    shown.approve.click()
    assert "counts once" in words(shown.message.value)
    assert recorded(run) == [("ada", "approve")]
    assert settled == []
    choose(shown, "bea", people["bea"])
    shown.approve.click()

    assert recorded(run) == [("ada", "approve"), ("bea", "approve")]
    assert len(settled) == 1


def test_a_key_that_ssh_agent_holds_signs(
    run: Run, shown: GatePanel, people: dict[str, Path], agent: Callable[[Path], None]
) -> None:
    agent(people["ada"])
    agent(people["bea"])
    shown.signer.offer(signatures.agent_keys())
    assert shown.signer.key.options == ()  # nobody is chosen yet
    choose(shown, "ada")
    (own,) = shown.signer.key.options
    assert own == signatures.fingerprint(signatures.public_key_of(people["ada"]))
    shown.signer.key.value = own
    choose(shown, "bea")
    assert shown.signer.key.value == "", "another's key does not stay chosen"
    choose(shown, "ada")

    shown.signer.key.value = own
    shown.approve.click()

    assert recorded(run) == [("ada", "approve")]


def test_a_locked_key_is_refused_at_once_and_signs_when_ssh_agent_holds_it(
    run: Run, shown: GatePanel, people: dict[str, Path], locked_key: Path, agent: Callable[[Path], None]
) -> None:
    choose(shown, "ada", locked_key)
    began = time.monotonic()
    shown.approve.click()
    assert time.monotonic() - began < 20
    is_refused(shown, "has a passphrase, and ssh-agent does not hold this key")
    assert f"ssh-add {locked_key}" in words(shown.message.value)
    assert recorded(run) == []

    agent(people["ada"])
    shown.approve.click()

    assert recorded(run) == [("ada", "approve")]


def test_a_locked_key_asks_nothing_on_the_terminal_of_the_kernel(locked_key: Path, tmp_path: Path) -> None:
    """With a terminal to ask on, as a kernel has that was started from one, there is still no question."""
    script = tmp_path / "sign.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom runbook_lib import decisions\n"
        "try:\n    decisions.signed(b'x', key=Path(sys.argv[1]), ask=False)\n"
        "except Exception as error:\n    print('REFUSED', error)\n"
    )
    said = b""

    pid, fd = pty.fork()
    if pid == 0:
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, (sys.executable, str(script), str(locked_key)))
    try:
        while data := os.read(fd, 1024):
            said += data
            assert b"Enter passphrase" not in said
    except OSError:
        pass  # the terminal is closed with its process
    finally:
        os.close(fd)
        os.waitpid(pid, 0)
    assert b"REFUSED" in said
    assert b"ssh-add" in said


# --- what comes from elsewhere -----------------------------------------------------------------------------------


async def until(look: Callable[[], object], seconds: float = 20.0) -> float:
    """Wait for something to be seen; returns how long that took, in seconds."""
    began = time.monotonic()
    while not look():
        assert time.monotonic() - began < seconds
        await asyncio.sleep(0.01)
    return time.monotonic() - began


def elsewhere(
    run: Run, people: dict[str, Path], person: str, *, inbox: bool = False, decision: str = "approve"
) -> None:
    data = gate.decision_statement(run, "backup", decision, person, "from afar")
    signature = decisions.signed(data, key=people[person])
    if not inbox:
        gate.decide(run, "backup", data, signature)
        return
    folder = run.folder / "decisions" / "inbox"
    folder.mkdir(parents=True)
    (folder / "one.json").write_bytes(data)
    (folder / "one.json.sig").write_bytes(signature)


@pytest.mark.parametrize("inbox", [False, True], ids=["ledger", "inbox"])
def test_a_decision_that_arrives_is_seen(
    run: Run, shown: GatePanel, people: dict[str, Path], settled: Settled, inbox: bool
) -> None:
    async def walk() -> float:
        shown._ipython_display_()
        await until(lambda: shown._looks > 1)
        elsewhere(run, people, "ada", inbox=inbox)
        return await until(lambda: shown.ended)

    took_s = asyncio.run(walk())

    assert recorded(run) == [("ada", "approve")]
    assert len(settled) == 1
    assert took_s < 5, "half a second and what a busy machine adds"


def test_what_arrives_and_is_refused_is_said(run: Run, shown: GatePanel, people: dict[str, Path]) -> None:
    elsewhere(run, people, "ada", inbox=True)
    (run.folder / "decisions" / "inbox" / "one.json.sig").write_bytes(b"no signature")

    shown.look()

    assert "one.json: refused: the signature is not ada's" in words(shown.message.value)
    assert recorded(run) == []


def test_two_panels_on_one_gate_record_each_once_and_both_end(
    open_run: OpenRun, people: dict[str, Path], settled: Settled
) -> None:
    run = asked_in(open_run(gates__backup__quorum="2"))
    first, second = (GatePanel(run, "backup", settling(run, "backup", settled)) for _ in range(2))

    async def walk() -> None:
        for made, person in ((first, "ada"), (second, "bea")):
            choose(made, person, people[person])
            made.follow()
        for made in (first, second, first, second):
            made.approve.click()
        assert "signing …" in first.message.value
        await until(lambda: first.ended and second.ended)

    asyncio.run(walk())

    assert sorted(recorded(run)) == [("ada", "approve"), ("bea", "approve")]


def test_one_person_at_two_panels_at_once_is_recorded_once(
    open_run: OpenRun, people: dict[str, Path], settled: Settled
) -> None:
    run = asked_in(open_run(gates__backup__quorum="2"))
    both = [GatePanel(run, "backup", settling(run, "backup", settled)) for _ in range(2)]

    async def walk() -> None:
        for made in both:
            choose(made, "ada", people["ada"])
            made.follow()
        for made in both:
            made.approve.click()
        await until(lambda: all("in the ledger" in made.message.value for made in both))
        for made in both:
            made.ended = True

    asyncio.run(walk())

    assert recorded(run) == [("ada", "approve")]


def test_the_same_decision_from_two_machines_at_one_moment_is_recorded_once(
    run: Run, people: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other machine's arrives when this one's is checked and not yet written."""
    data = gate.decision_statement(run, "backup", "approve", "ada", "seen")
    signature = decisions.signed(data, key=people["ada"])
    check = decisions.check_signature

    def checked_slowly(*arguments: Any, **named: Any) -> None:
        check(*arguments, **named)
        monkeypatch.setattr(decisions, "check_signature", check)
        gate.decide(run, "backup", data, signature)

    monkeypatch.setattr(decisions, "check_signature", checked_slowly)

    said = gate.decide(run, "backup", data, signature)

    assert recorded(run) == [("ada", "approve")]
    assert said["sha256"] == run.state.gate("backup").decisions[0]["sha256"]


def test_shown_again_it_is_the_same_panel_with_one_task(run: Run, shown: GatePanel, settled: Settled) -> None:
    async def walk() -> int:
        shown._ipython_display_()
        again = panel.gate_panel(run, "backup", settling(run, "backup", settled))
        again._ipython_display_()
        assert again is shown
        await until(lambda: shown._looks > 4)
        return sum("_follow" in str(task.get_coro()) for task in asyncio.all_tasks())

    assert asyncio.run(walk()) == 1


def test_evidence_that_changed_is_asked_about_anew(run: Run, shown: GatePanel, people: dict[str, Path]) -> None:
    (run.folder / FILE).write_bytes(b'{"dump":"bad!"}')
    shown._looks = 0

    shown.look()

    assert run.state.gate("backup").round == 2
    assert "Round 2" in words(shown.head.value)
    assert "red nobody can approve this" in words(shown.head.value)
    choose(shown, "ada", people["ada"])
    shown.approve.click()
    is_refused(shown, "is red, and nobody can approve that away")


def test_when_time_is_up_the_next_move_is_said_once(open_run: OpenRun, settled: Settled) -> None:
    run = asked_in(open_run(gates__backup__timeout_s="0.01"))
    shown = GatePanel(run, "backup", settling(run, "backup", settled))
    shown.look()
    seq = run.state.seq
    shown.look()

    assert "timed out" in words(shown.message.value)
    assert "run this cell again" in words(shown.message.value)
    assert "time is up" in words(shown.clock.value)
    assert run.state.gate("backup").timed_out
    assert run.state.seq == seq
    assert not shown.ended


def test_what_stops_the_step_is_said_and_not_tried_again_without_news(run: Run, people: dict[str, Path]) -> None:
    tries: list[str] = []

    def held() -> Card:
        tries.append("tried")
        raise PausedError("another process has the run", remedy="runbook status RUN")

    shown = GatePanel(run, "backup", held)
    elsewhere(run, people, "ada")
    for _ in range(3):
        shown.look()

    assert tries == ["tried"]
    assert "another process has the run. Next: runbook status RUN" in words(shown.message.value)


def test_a_fault_of_our_own_is_one_line_and_the_panel_goes_on(run: Run, people: dict[str, Path]) -> None:
    def broken() -> Card:
        raise ZeroDivisionError("by zero")

    shown = GatePanel(run, "backup", broken)
    elsewhere(run, people, "ada")

    shown.look()

    assert "ZeroDivisionError: by zero" in words(shown.message.value)
    assert "Traceback" not in shown.message.value


# --- the spot checks ---------------------------------------------------------------------------------------------


@pytest.fixture
def checking(open_run: OpenRun, settled: Settled, tmp_path: Path) -> ChecksPanel:
    file = tmp_path / "home" / "params" / "staging.yml"
    params = yaml.safe_load(file.read_text())
    params["spot_checks"]["checks"] = [
        {"name": "log_in", "asks": "Can a user log in?", "path": "/login"},
        {"name": "dashboard", "asks": "Is today shown?", "url": "https://charts.example.com/today"},
    ]
    file.write_text(yaml.safe_dump(params))
    run = open_run()
    for module in (prepare, backup, begin, migrate, deploy):
        for made in module.STEPS:
            for key in made.keys(run):
                green(run, key)
    green(run, verify.smoke_tests.key())

    def settle() -> Card:
        result = Card.of(verify.spot_checks.action(run))
        settled.append(result)
        return result

    made = panel.checks_panel(run, settle)
    assert isinstance(made, ChecksPanel)
    return made


def test_checks_are_shown_with_link_who_and_when_by_panel_and_twin(
    checking: ChecksPanel, people: dict[str, Path]
) -> None:
    name = checking.checks[0]["name"]
    choose(checking, "quinn", people["quinn"])
    checking.notes[name].value = "saw <b>it</b>"
    checking.buttons[name][0].click()

    said = checking.run.state.checks[name]
    assert said["passed"]
    for markup in (checking.rows[name].value, checking._twin()):
        assert f"passed by quinn, {said['time'][:10]}" in words(markup)
        assert checking.checks[0]["link"] in markup
        assert "saw &lt;b&gt;it&lt;/b&gt;" in markup
    assert [check["link"] for check in checking.checks] == [
        f"{checking.run.params.application.url}/login",
        "https://charts.example.com/today",
    ]
    for check in checking.checks:
        assert check["link"] in checking._twin()
        assert check["asks"] in words(checking._twin())
        assert f"runbook check {checking.run.run_id} {check['name']} --pass" in words(checking._twin())


@pytest.mark.parametrize(
    ("person", "key", "why"),
    [
        pytest.param("", None, "nobody is chosen", id="nobody"),
        pytest.param("quinn", None, "a click alone is no signature", id="no key"),
        pytest.param("quinn", "ada", "the signature is not quinn's", id="another's key"),
        pytest.param("ada", "ada", "a spot check needs qa", id="without the role"),
    ],
)
def test_a_check_is_signed_like_a_gate(
    checking: ChecksPanel, people: dict[str, Path], person: str, key: str | None, why: str
) -> None:
    choose(checking, person, people[key] if key else None)

    checking.buttons[checking.checks[0]["name"]][0].click()

    is_refused(checking, why)
    assert checking.run.state.checks == {}


def test_a_failed_check_needs_its_note_and_is_mended_by_the_next_word(
    checking: ChecksPanel, people: dict[str, Path], settled: Settled
) -> None:
    choose(checking, "quinn", people["quinn"])
    first, *rest = [check["name"] for check in checking.checks]
    checking.buttons[first][1].click()
    is_refused(checking, "a failed check needs its note")
    checking.notes[first].value = "a blank page"
    checking.buttons[first][1].click()
    assert "failed by quinn" in words(checking.rows[first].value)
    for name in rest:
        checking.buttons[name][0].click()
    assert settled == []

    checking.buttons[first][0].click()

    assert len(settled) == 1
    assert checking.ended
    assert {name: said["passed"] for name, said in checking.run.state.checks.items()} == dict.fromkeys(
        [first, *rest], True
    )


def test_the_same_word_twice_is_recorded_once(checking: ChecksPanel, people: dict[str, Path]) -> None:
    choose(checking, "quinn", people["quinn"])
    name = checking.checks[0]["name"]
    checking.buttons[name][0].click()
    seq = checking.run.state.seq

    checking.buttons[name][0].click()

    assert checking.run.state.seq == seq
    assert len(list((checking.run.folder / "decisions").glob("check-*.json"))) == 1


def test_what_the_command_records_is_seen(checking: ChecksPanel, people: dict[str, Path]) -> None:
    name = checking.checks[0]["name"]
    argv = ("check", checking.run.run_id, name, "--pass", "--as", "quinn", "--key", str(people["quinn"]))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run((sys.executable, "-m", "runbook_lib", *argv), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    checking.look()

    assert "passed by quinn" in words(checking.rows[name].value)


def test_evidence_that_the_panel_has_not_shown_is_not_signed(
    shown: GatePanel, run: Run, people: dict[str, Path]
) -> None:
    choose(shown, "ada", people["ada"])
    green(run, "backup.compare_hashes", run.keep("backup/manifest.json", b'{"dump":"better"}'))
    assert gate.open_round(run, "backup").round == 2  # by somebody else, just before the click

    shown.approve.click()

    assert recorded(run) == []
    is_refused(shown, "round 2")
    assert "Round 2" in words(shown.head.value)

    shown.approve.click()

    assert recorded(run) == [("ada", "approve")]
