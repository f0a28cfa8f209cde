"""The installed command `runbook`: every verb of the outside contract.

Heavy parts are imported inside the verbs: a gate door must open in well under a second.
"""

from __future__ import annotations

import contextlib
import json as json_module
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runbook_lib import backup_verbs, terminal
from runbook_lib.errors import (
    FolderLostError,
    PausedError,
    RunbookError,
    UsageError,
    VerificationError,
)
from runbook_lib.terminal import Json, beside, print_json, say

if TYPE_CHECKING:
    from runbook_lib.executor import Outcome
    from runbook_lib.fsck import Stored
    from runbook_lib.ledger import Ledger
    from runbook_lib.model import Event
    from runbook_lib.params import Params
    from runbook_lib.run import Run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Production releases as notebooks that execute, gate, survive and prove themselves.",
    pretty_exceptions_enable=False,
)
stack_app = typer.Typer(no_args_is_help=True, help="The rehearsal stack: a local production twin.")
gate_app = typer.Typer(no_args_is_help=True, help="See a gate's evidence, and sign a decision.")
app.add_typer(stack_app, name="stack")
app.add_typer(gate_app, name="gate")
app.add_typer(backup_verbs.app, name="backup")

Version = Annotated[str, typer.Option("--version", help="The release tag; in the rehearsal 'next' by default.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Override a parameter: dotted.key=value.")]
Person = Annotated[str, typer.Option("--as", help="Your name in the params file.")]
Key = Annotated[Path | None, typer.Option("--key", help="Your SSH key file (or the .pub of an agent's key).")]
Comment = Annotated[str, typer.Option("--comment", help="What you looked at, or why not.")]

_FAULTS = {"bad-release": ("bad", "rolled_back")}


def main() -> None:
    """Run the command; a user's mistake is one line on stderr and an exit code, never a traceback."""
    try:
        # Without standalone mode an Exit comes back as the return value; 130 is Typer's word for Ctrl-C.
        code = app(standalone_mode=False) or 0
        if code == 130:
            raise KeyboardInterrupt
        sys.exit(code)
    except RunbookError as error:
        say(f"runbook: {error}")
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        say("runbook: interrupted. Next: runbook status, runbook resume RUN")
        sys.exit(PausedError.exit_code)
    except OSError as error:  # a full or read-only disk, no descriptor left: the machine's fault, not a bug
        say(
            f"runbook: this machine: {error.strerror}: {error.filename or 'no file'}. Next: mend it, runbook resume RUN"
        )
        sys.exit(PausedError.exit_code)
    except Exception as error:
        shown = getattr(error, "format_message", None)
        if shown is None:
            raise
        if shown():  # no words at all: the help was shown
            say(f"runbook: {shown()}")
        sys.exit(2)


def _settings(pairs: list[str] | None) -> dict[str, str]:
    found = {}
    for pair in pairs or []:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise UsageError(f"--set {pair!r} is not key=value", remedy="for example --set watch.duration_s=20")
        if key in found:
            raise UsageError(f"--set {key} stands twice", remedy="give it once")
        found[key] = value
    return found


# --- where a run stands ------------------------------------------------------------------------------------------


def _summary(run: Run, outcome: Outcome | None = None) -> dict[str, Any]:
    from runbook_lib.render import next_move

    state = run.state
    status, phase, at = state.status, state.phase, None
    if outcome is not None:
        phase, at = outcome.phase, outcome.gate
        if not state.ended:
            status = "paused" if outcome.exit_code in (0, 75) else "failed"
    elif not state.ended:
        from runbook_lib.adapters import processes

        at = _open_gate(run)
        doing = [s.intent["executor"] for s in state.steps.values() if s.status == "running"]
        if any(processes.alive(executor) for executor in doing):
            status = "running"
    move = next_move(state, at)
    if outcome is not None and outcome.message and not state.ended:
        move = f"{outcome.message.partition('. Next: ')[2] or move}"
    return {
        "run_id": run.run_id,
        "state": status,
        "phase": phase,
        "gate": at,
        "record": str(run.folder),
        "trust": str(run.trust),
        "next": move,
    }


def _open_gate(run: Run) -> str | None:
    from runbook_lib import gate

    state = run.state
    for name in gate.NAMES:
        now = state.gate(name)
        if now.round and not state.green(gate.step_key(name)) and state.rejected_gate != name:
            return name
    return None


def _finish(run: Run, outcome: Outcome, *, json: bool) -> None:
    facts = _summary(run, outcome)
    say(f"{facts['state']}: {outcome.message}")
    if json:
        print_json(facts)
    else:
        print(f"run    {run.run_id}\nstate  {facts['state']} (phase {facts['phase']})\nrecord {run.folder}")
        if facts["gate"]:
            print(f"gate   {facts['gate']}")
        if facts["next"]:
            print(f"next   {facts['next']}")
    raise typer.Exit(outcome.exit_code)


@contextmanager
def _progress(run: Run) -> Iterator[None]:
    """Tell each step as the ledger learns of it, on stderr, while the work goes on."""
    from rich.console import Console

    from runbook_lib import progress
    from runbook_lib.phases import FORWARD
    from runbook_lib.plan import expected_s

    console = Console(stderr=True, highlight=False)
    expected = {key: expected_s(run, s) / len(s.keys(run)) for m in FORWARD for s in m.STEPS for key in s.keys(run)}
    total = sum(expected.values())
    stop = threading.Event()
    seen = run.state.seq

    def tell() -> None:
        nonlocal seen
        for event in run.ledger.events(run.run_id)[seen:]:
            data = event.data
            if event.kind == "phase_started":
                console.print(f"[bold]── {data['phase']} ──[/bold]")
            elif event.kind == "step_intent":
                console.print(f"   ● {data['step']} … (expected {expected.get(data['step'], 0):.0f} s)", style="dim")
            elif event.kind == "step_outcome":
                green = data["status"] == "green"
                state = run.state
                done = sum(s for key, s in expected.items() if state.green(key))
                console.print(
                    f"   {'✔' if green else '✖'} {data['step']}  {data['duration_s']:.1f} s"
                    f"  [{100 * done / total:.0f} %]" + ("" if green else f"  {data.get('error', '')}"),
                    style="green" if green else "red",
                    markup=False,
                )
            elif event.kind == "gate_opened":
                console.print(
                    f"   ? gate {data['gate']} round {data['round']}: waits for {'/'.join(data['roles'])}", markup=False
                )
            elif event.kind == "gate_decision":
                console.print(f"   ! gate {data['gate']}: {data['person']} {data['decision']}s", markup=False)
            elif event.kind == "note":
                console.print(f"   ! {data['text']}", style="yellow", markup=False)
            elif event.kind in ("rollback_requested", "step_blocked", "gate_timed_out"):
                console.print(f"   ! {event.kind}: {data}", style="red", markup=False)
            seen = event.seq

    def follow() -> None:
        told_at, silent = 0.0, False
        while not stop.wait(0.5):
            try:
                tell()
            except RunbookError as error:  # a ledger that is away, and said once: the work itself says what to do
                if not silent:
                    console.print(f"   ! {error.message}", style="yellow", markup=False)
                silent = True
            else:
                silent = False
            if time.monotonic() - told_at >= terminal.PROGRESS_EVERY_S and (lines := progress.now(run.scratch)):
                told_at = time.monotonic()
                for line in lines:
                    console.print(f"     {line}", style="dim", markup=False)

    try:
        with beside(follow, stop):
            yield
    finally:
        with contextlib.suppress(OSError, RunbookError):  # a terminal, or a ledger, that is gone
            tell()


def _execute(run: Run, work: Callable[[], Outcome]) -> Outcome:
    """Let the executor work, with progress; Ctrl-C, SIGTERM and a terminal that goes away end it where it stands."""
    from runbook_lib import executor

    came = terminal.ended_by_signals()
    try:
        with _progress(run):
            return work()
    except KeyboardInterrupt:
        return executor.interrupted(run, say=say, again=lambda: came() > 1)


# --- rehearsal ---------------------------------------------------------------------------------------------------


def _stack(*arguments: str) -> dict[str, Any]:
    import subprocess

    from runbook_lib.wiring import root

    done = subprocess.run(  # noqa: S603
        (sys.executable, "-m", "rehearsal", *arguments, "--dir", str(root() / ".rehearsal"), "--json"),
        cwd=root(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(root())},
    )
    if done.returncode:
        raise UsageError(
            f"the rehearsal stack did not go {arguments[0]} (exit {done.returncode})",
            remedy="read what it said above; its logs are in .rehearsal/log",
        )
    return dict(json_module.loads(done.stdout.strip().splitlines()[-1]))


@stack_app.command("up")
def stack_up(json: Json = False) -> None:
    """Bring the rehearsal stack up; nothing happens when it is."""
    _stack_facts(_stack("up"), json=json)


@stack_app.command("down")
def stack_down(json: Json = False) -> None:
    """Abort live rehearsal runs on which nobody else is at work, and stop every process of the stack."""
    from runbook_lib import lease

    for ledger, _ in _ledgers():
        for state in ledger.runs("rehearsal"):
            if state.ended:
                continue
            try:
                lease.refuse_held(state)
                _abort_run(ledger, state.run_id, "the rehearsal stack was taken down")
            except PausedError as error:  # a ledger may be a team's, and the run a colleague's, on a twin elsewhere
                say(f"run {state.run_id} is left: {error}")
    _stack("down")
    if json:
        print_json({"up": False})


@stack_app.command("status")
def stack_status(json: Json = False) -> None:
    """Tell whether the stack is up, its versions, people and endpoints."""
    _stack_facts(_stack("status"), json=json)


def _stack_facts(facts: dict[str, Any], *, json: bool) -> None:
    if json:
        print_json(facts)
        return
    print(f"up: {facts.get('up', False)}")
    for block in ("versions", "endpoints"):
        for name, value in facts.get(block, {}).items():
            print(f"{block[:-1]} {name}: {value}")
    for name, person in facts.get("people", {}).items():
        print(f"person {name}: {', '.join(person['roles']) or 'no role'}")


@app.command()
def rehearse(
    version: Version = "",
    fault: Annotated[str, typer.Option(help=f"Rehearse a fault: {', '.join(_FAULTS)}.")] = "",
    watch: Annotated[float, typer.Option(help="Length of the watch in seconds.", min=5, max=86400)] = 20.0,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the stack up afterwards.")] = False,
    json: Json = False,
) -> None:
    """Bring the twin up, run a whole release on it headless, say where the record lies, take the twin down."""
    from runbook_lib import executor, wiring
    from runbook_lib.executor import Outcome
    from runbook_lib.params import version_text
    from runbook_lib.plan import plan_of

    if watch != watch:  # NaN, which no bound holds  # noqa: PLR0124
        raise UsageError("--watch nan is no length", remedy="give seconds")
    if fault and fault not in _FAULTS:
        raise UsageError(f"there is no fault {fault!r}", remedy=f"use one of {', '.join(_FAULTS)}")
    wanted_version, wanted_state = _FAULTS.get(fault, (version or "next", "completed"))
    if wanted_version not in wiring.ALIASES:
        version_text(wanted_version)
    was_up = _stack("status").get("up", False)
    if not was_up:
        say("bringing the rehearsal stack up …")
        _stack("up")
    try:
        # The judge wants twenty samples at least.
        settings = {"watch.duration_s": str(watch), "watch.interval_s": str(min(1.0, watch / 20))}
        draft = wiring.preview("rehearsal", wanted_version, settings=settings)
        wiring.refuse_second(draft)
        run = wiring.create(draft, plan=plan_of(draft), people_sign=True)
        outcome = _execute(run, lambda: executor.go(run, wait=True))
        if run.state.ended:
            reviewed = _execute(run, lambda: executor.review(run))
            if reviewed.exit_code:
                outcome = reviewed
        reached = run.state.status
        facts = _summary(run, outcome)
        good = reached == wanted_state
        outcome = Outcome(0 if good else outcome.exit_code or 1, outcome.message, outcome.phase, outcome.gate)
        if fault:
            say(f"fault {fault}: the run ended {reached}, {'as it must' if good else f'but must end {wanted_state}'}")
        facts["state"] = reached
        if json:
            print_json(facts)
        else:
            print(f"state  {reached}: {outcome.message}\nrecord {run.folder}\nopen   {run.folder / 'index.html'}")
            print(f"verify runbook verify {run.folder} --trust {run.trust}")
    finally:
        if not was_up and not keep:
            stack_down()
    raise typer.Exit(outcome.exit_code)


# --- plan, run, resume -------------------------------------------------------------------------------------------


@app.command()
def plan(environment: str, version: Version = "", settings: Settings = None, json: Json = False) -> None:
    """Show every step with its commands, hosts, gates, expected duration and way back; changes nothing."""
    from runbook_lib import wiring
    from runbook_lib.plan import plan_of
    from runbook_lib.render import plan_text

    facts = plan_of(wiring.preview(environment, version, settings=_settings(settings)))
    if json:
        print_json(facts)
    else:
        print(plan_text(facts))


@app.command("run")
def run_command(
    environment: str,
    version: Version = "",
    settings: Settings = None,
    plan_digest: Annotated[str, typer.Option("--plan", help="Refuse to start unless the plan has this digest.")] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Wait at gates instead of pausing.")] = False,
    until: Annotated[str, typer.Option(help="The last phase to run.")] = "",
    person: Person = "",
    json: Json = False,
) -> None:
    """Open a run and take it to its end or to its next gate."""
    from runbook_lib import executor, wiring
    from runbook_lib.plan import plan_of

    _known_phase(until)
    if plan_digest and not re.fullmatch("[0-9a-f]{64}", plan_digest):
        raise UsageError(f"--plan {plan_digest}: that is no plan's digest", remedy=f"runbook plan {environment}")
    draft = wiring.preview(environment, version, settings=_settings(settings), opened_by=person)
    planned = plan_of(draft)
    if plan_digest and plan_digest != planned["digest"]:
        raise UsageError(
            f"the plan is {planned['digest']} now, not {plan_digest}",
            remedy=f"runbook plan {environment} --version {draft.release.version}",
        )
    if until != "prepare":
        wiring.refuse_second(draft)
    run = wiring.create(draft, plan=planned, opened_by=person)
    say(f"run {run.run_id} opened by {run.state.opened['opened_by']}")
    outcome = _execute(run, lambda: executor.go(run, wait=wait, until=until or None))
    _finish(run, outcome, json=json)


def _known_phase(until: str) -> None:
    from runbook_lib.phases import FORWARD, name_of

    phases = [name_of(module) for module in FORWARD]
    if until and until not in phases:
        raise UsageError(f"--until {until}: there is no such phase", remedy=f"use one of {', '.join(phases)}")


@app.command()
def resume(
    run_id: Annotated[str, typer.Argument(metavar="RUN")],
    wait: Annotated[bool, typer.Option("--wait", help="Wait at gates instead of pausing.")] = False,
    until: Annotated[str, typer.Option(help="The last phase to run; on the way back it is not asked for.")] = "",
    json: Json = False,
) -> None:
    """Go on after a pause, a crash or a reboot."""
    from runbook_lib import executor, wiring

    _known_phase(until)
    run = wiring.attach(run_id)
    outcome = _execute(run, lambda: executor.go(run, wait=wait, until=until or None))
    _finish(run, outcome, json=json)


@app.command()
def rollback(
    run_id: Annotated[str, typer.Argument(metavar="RUN")],
    reason: Annotated[str, typer.Option(help="Why, for the incident note.")] = "",
    json: Json = False,
) -> None:
    """Take the compiled way back, from whatever point the run is at; exits 3 after a gate, else 1."""
    from runbook_lib import executor, wiring

    run = wiring.attach(run_id)
    state = run.state
    if state.ended:
        raise UsageError(f"run {run_id} has ended: {state.ended}", remedy="runbook list")
    closed = bool(state.rejected_gate) or any(g.timed_out for g in state.gates.values())
    cause = 3 if closed else 1
    outcome = _execute(run, lambda: executor.roll_back(run, reason or "asked for", cause=cause))
    _finish(run, outcome, json=json)


@app.command()
def takeover(
    run_id: Annotated[str, typer.Argument(metavar="RUN")],
    reason: Annotated[str, typer.Option(help="Why its executor cannot be asked.")],
    json: Json = False,
) -> None:
    """Shut a run's executor out of the ledger and of every target, when it is lost or does not answer.

    A run that holds no environment (before phase 1, or ended) only changes hands.
    """
    from runbook_lib import lease, wiring
    from runbook_lib.canonical import digest

    if not reason.strip():
        raise UsageError("a takeover needs its reason", remedy="give --reason TEXT")
    try:
        run = wiring.attach(run_id)
    except FolderLostError:
        with wiring.without_folder(run_id) as run:
            fenced = lease.take_over(run, reason=reason)
            state = run.state
            if digest(run.params.frozen()) != state.opened["params_sha256"]:
                say("the params file has changed since the run was opened: look whether the run had other targets")
            following = "list" if state.ended else f"abort {run_id}"
            summary = {"run": run_id, "state": state.status, "record": None}
    else:
        fenced = lease.take_over(run, reason=reason)
        following, summary = f"{'review' if run.state.ended else 'resume'} {run_id}", _summary(run)
    where = ", ".join(fenced) or "the ledger alone, since the run holds no environment"
    say(f"shut out at: {where}. Next: runbook {following}")
    if json:
        print_json({**summary, "fenced": fenced})


@app.command()
def abort(
    run_id: Annotated[str, typer.Argument(metavar="RUN")],
    reason: Annotated[str, typer.Option(help="Why.")],
    json: Json = False,
) -> None:
    """End a run where it stands and list what stays changed."""
    from runbook_lib import executor, wiring
    from runbook_lib.executor import Outcome

    try:
        run = wiring.attach(run_id)
    except FolderLostError:
        _close_lost(wiring.ledger_with(run_id)[0], run_id, reason, json=json)
        return
    stays = executor.abort(run, reason=reason)
    for line in stays:
        say(f"stays: {line}")
    _finish(run, Outcome(0, f"aborted: {reason}; {len(stays)} things stay", run.state.phase), json=json)


def _close_lost(ledger: Ledger, run_id: str, reason: str, *, json: bool) -> None:
    """End a run in the ledger whose folder is lost: nothing can be looked at or sealed, and its environment is free.

    Raises:
        PausedError: somebody is at work on it, or may be where nobody can look.
        UsageError: it has ended.
    """
    from runbook_lib import lease

    if ledger.state(run_id).ended:
        raise UsageError(f"run {run_id} has ended, and its folder is not in outputs/", remedy="runbook list")
    ledger.append(run_id, "run_ended", {"state": "aborted", "reason": reason}, guard=lease.refuse_live)
    say(
        f"run {run_id} is ended in the ledger; its folder is not here: nobody looked at what it changed, and nothing is sealed"
    )
    if json:
        print_json({"run": run_id, "state": "aborted", "record": None})


def _ledgers() -> Iterator[tuple[Ledger, Params | None]]:
    """Every ledger that is known here; one that does not answer is said, and stops nobody."""
    from runbook_lib import wiring

    silent: list[str] = []
    yield from wiring.known_ledgers(silent)
    for said in silent:
        say(f"not asked: {said}")


def _abort_run(ledger: Ledger, run_id: str, reason: str) -> None:
    """End a run without looking at its targets; a run whose folder is gone is only closed in the ledger.

    Raises:
        PausedError: somebody else is at work on it.
    """
    from runbook_lib import executor, lease, wiring

    try:
        executor.end(wiring.attach(run_id), "aborted", reason=reason)
    except RunbookError as error:
        say(f"run {run_id} could not be sealed: {error}")
        if not ledger.state(run_id).ended:
            ledger.append(run_id, "run_ended", {"state": "aborted", "reason": reason}, guard=lease.refuse_live)


@app.command()
def review(run_id: Annotated[str, typer.Argument(metavar="RUN")], json: Json = False) -> None:
    """Phase 8: look back at an ended run; signed apart from the record."""
    from runbook_lib import executor, wiring

    run = wiring.attach(run_id)
    outcome = _execute(run, lambda: executor.review(run))
    _finish(run, outcome, json=json)


@app.command("seal")
def seal_command(run_id: Annotated[str, typer.Argument(metavar="RUN")], json: Json = False) -> None:
    """Seal the record of an ended run."""
    from runbook_lib import executor, wiring
    from runbook_lib.executor import Outcome

    run = wiring.attach(run_id)
    if not run.state.ended:
        raise UsageError(f"run {run_id} has not ended", remedy=f"runbook resume {run_id}")
    executor.close(run)
    _finish(run, Outcome(0, "the record is sealed", run.state.phase), json=json)


# --- JupyterLab --------------------------------------------------------------------------------------------------


@app.command("lab")
def lab_command(
    run_id: Annotated[str, typer.Argument(metavar="[RUN]")] = "",
    environment: Annotated[str, typer.Option(help="Whose run in progress; by default the rehearsal's.")] = "",
    version: Version = "",
    person: Person = "",
    port: Annotated[int, typer.Option(help="On 127.0.0.1; by default a free one.", min=0, max=65535)] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser.")] = True,
    json: Json = False,
) -> None:
    """JupyterLab on a run's notebooks, opened at the release desk; without RUN the one in progress, or a new one."""
    import signal
    import webbrowser

    from runbook_lib import lab

    # While it starts, both mean the same: what was begun is ended again.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run = lab.run_to_walk(run_id, environment=environment, version=version, person=person)
    say(f"run {run.run_id}: starting JupyterLab …")
    opened = lab.open_lab(run, port=port, say=say)
    ending = lab.Ending()  # before the address is told: who reads it may end this at once
    if json:
        print_json({"run_id": run.run_id, "url": opened.url, "folder": str(opened.folder)})
    else:
        print(f"run    {run.run_id}\nopen   {opened.url}\nfolder {opened.folder}", flush=True)
    if browser:
        webbrowser.open(opened.page())
    if not opened.ours:
        say("JupyterLab runs already for this run, and goes on: the runbook lab that started it ends it")
        return
    say(lab.WORDS)
    opened.keep(ending, say)
    say(f"JupyterLab has ended. Next: runbook status {run.run_id}")


# --- looking -----------------------------------------------------------------------------------------------------


@app.command()
def status(run_id: Annotated[str, typer.Argument(metavar="[RUN]")] = "", json: Json = False) -> None:
    """Where a run stands (the newest when none is named), what is known, what to do next."""
    from runbook_lib import wiring
    from runbook_lib.render import in_doubt, status_text

    run = wiring.attach(run_id or _newest())
    facts = _summary(run)
    if json:
        print_json(facts)
    else:
        state = run.state
        able = {key: run.params.may_settle(key, opener=state.opened["opened_by"]) for key in in_doubt(state)}
        print(status_text(state, able))
        print(f"record {run.folder}\nnext   {facts['next']}")


def _newest() -> str:
    found = [state for ledger, _ in _ledgers() for state in ledger.runs()[:1]]
    if not found:
        raise UsageError("there is no run yet", remedy="runbook rehearse")
    return max(found, key=lambda state: state.opened_time).run_id


@app.command()
def checklist(run_id: Annotated[str, typer.Argument(metavar="RUN")], json: Json = False) -> None:
    """The playbook's summary table."""
    from dataclasses import asdict

    from runbook_lib import wiring
    from runbook_lib.render import checklist as rows
    from runbook_lib.render import checklist_text

    state = wiring.attach(run_id).state
    if json:
        print_json([asdict(row) for row in rows(state)])
    else:
        print(checklist_text(state))


@app.command("list")
def list_command(json: Json = False) -> None:
    """All runs, newest first."""
    states = [state for ledger, _ in _ledgers() for state in ledger.runs()]
    rows = [
        {
            "run_id": s.run_id,
            "environment": s.opened["environment"],
            "version": s.opened["version"],
            "state": s.status,
            "phase": s.phase,
            "opened": s.opened_time,
            "opened_by": s.opened["opened_by"],
        }
        for s in sorted(states, key=lambda state: state.opened_time, reverse=True)
    ]
    if json:
        print_json(rows)
    else:
        for row in rows:
            print(f"{row['run_id']}  {row['environment']}  {row['state']}  {row['phase']}  {row['opened_by']}")


@app.command()
def doctor(environment: str, json: Json = False) -> None:
    """Check tools, hosts, credentials and services; changes nothing."""
    from runbook_lib import wiring
    from runbook_lib.doctor import examine

    found = examine(wiring.load_params(environment))
    if json:
        print_json({"ok": all(c["ok"] for c in found), "checks": found})
    else:
        for c in found:
            print(f"{'✔' if c['ok'] else '✖'} {c['name']}: {c['why']}")
    raise typer.Exit(0 if all(c["ok"] for c in found) else 2)


# --- gates, checks, doubt ----------------------------------------------------------------------------------------


@gate_app.command("show")
def gate_show(
    run_id: Annotated[str, typer.Argument(metavar="RUN")],
    gate_name: Annotated[str, typer.Argument(metavar="GATE")],
    statement: Annotated[str, typer.Option(help="Print the bytes to sign for this decision: approve or reject.")] = "",
    person: Person = "",
    comment: Comment = "",
    json: Json = False,
) -> None:
    """The question, the evidence with its digest, who may sign and who has."""
    from runbook_lib import gate, wiring
    from runbook_lib.render import gate_text

    name, run = gate.named(gate_name), wiring.attach(run_id)
    if statement:
        sys.stdout.buffer.write(gate.decision_statement(run, name, statement, person, comment))
        sys.stdout.flush()
        return
    facts = gate.show(run, name)
    if json:
        print_json(facts)
    else:
        print(gate_text(facts))


def _decide(
    run_id: str, gate_name: str, decision: str, person: str, key: Path | None, comment: str, *, json: bool
) -> None:
    from runbook_lib import decisions, gate, wiring

    name, run = gate.named(gate_name), wiring.attach(run_id)
    if not person or key is None:
        raise UsageError("a decision needs its person and their key", remedy="give --as PERSON --key FILE")
    data = gate.decision_statement(run, name, decision, person, comment)
    recorded = gate.decide(run, name, data, decisions.signed(data, key=key))
    say(f"gate {name}: {person} {decision}s, round {recorded['round']}. Next: runbook resume {run_id}")
    if json:
        print_json(recorded)


@gate_app.command("approve")
def gate_approve(
    run_id: Annotated[str, typer.Argument(metavar="RUN")],
    gate_name: Annotated[str, typer.Argument(metavar="GATE")],
    person: Person = "",
    key: Key = None,
    comment: Comment = "",
    json: Json = False,
) -> None:
    """Sign that the gate may open."""
    _decide(run_id, gate_name, "approve", person, key, comment, json=json)


@gate_app.command("reject")
def gate_reject(
    run_id: Annotated[str, typer.Argument(metavar="RUN")],
    gate_name: Annotated[str, typer.Argument(metavar="GATE")],
    person: Person = "",
    key: Key = None,
    comment: Comment = "",
    json: Json = False,
) -> None:
    """Sign that it may not, with the reason."""
    _decide(run_id, gate_name, "reject", person, key, comment, json=json)


@app.command()
def check(
    run_id: Annotated[str, typer.Argument(metavar="RUN")],
    name: Annotated[str, typer.Argument(metavar="CHECK")],
    passed: Annotated[bool | None, typer.Option("--pass/--fail", help="What you saw.")] = None,
    note: Annotated[str, typer.Option(help="What you did and saw.")] = "",
    person: Person = "",
    key: Key = None,
    json: Json = False,
) -> None:
    """Record one manual spot check, signed."""
    from runbook_lib import testimony, wiring

    if passed is None or not person or key is None:
        raise UsageError(
            "a spot check needs --pass or --fail, its person and their key", remedy="give --pass --as PERSON --key FILE"
        )
    recorded = testimony.record_check(wiring.attach(run_id), name, passed=passed, note=note, person=person, key=key)
    say(f"spot check {name}: {'passed' if passed else 'failed'}, {person}")
    if json:
        print_json(recorded)


@app.command()
def resolve(
    run_id: Annotated[str, typer.Argument(metavar="RUN")],
    step: Annotated[str, typer.Argument(metavar="STEP")],
    done: Annotated[bool | None, typer.Option("--done/--not-done", help="Whether the effect is there.")] = None,
    comment: Comment = "",
    person: Person = "",
    key: Key = None,
    json: Json = False,
) -> None:
    """Settle a blocked step by a signed statement of what is true at its target."""
    from runbook_lib import testimony, wiring

    if done is None or not person or key is None or not comment.strip():
        raise UsageError(
            "settling a step needs --done or --not-done, --as, --key and --comment", remedy="say what you saw"
        )
    recorded = testimony.resolve(wiring.attach(run_id), step, done=done, comment=comment, person=person, key=key)
    say(f"{step} is settled as {'done' if done else 'not done'}. Next: runbook resume {run_id}")
    if json:
        print_json(recorded)


@app.command()
def fsck(run_id: Annotated[str, typer.Argument(metavar="[RUN]")] = "", json: Json = False) -> None:
    """Check the ledger's invariants, of one run or of all; changes nothing, exits 4 when one is broken."""
    from dataclasses import asdict
    from functools import partial

    from runbook_lib import wiring
    from runbook_lib.fsck import Finding, examine, examine_together
    from runbook_lib.state import fold

    found, known = [], set()
    for ledger, params in [wiring.ledger_with(run_id)] if run_id else _ledgers():
        states = []
        for name in [run_id] if run_id else ledger.every_run_id():
            known.add(name)
            seen = wiring.seen_of(name)
            remembered = partial(seen.refuse_lost, seen.newest()) if seen else None
            try:
                events = ledger.unchecked(name)
            except (VerificationError, UsageError) as error:
                # What a later version wrote is looked at by that one: its words say so.
                why = str(error) if isinstance(error, UsageError) else error.message
                found.append(Finding(name, "every event can be read", ok=False, why=why))
                continue
            found += examine(events, *_folder_to_examine(params, events), remembered=remembered)
            with contextlib.suppress(VerificationError):  # found already
                states.append(fold(events))
        if not run_id:
            found += examine_together(states)
    for folder in [] if run_id else wiring.folders_of_no_run(known):
        found.append(
            Finding(
                folder.name, "a ledger knows the run of each folder", ok=False, where=str(folder), why="no event of it"
            )
        )
    ok = all(finding.ok for finding in found)
    if json:
        print_json({"ok": ok, "findings": [asdict(finding) for finding in found]})
    else:
        for f in found:
            said = "" if f.ok else f": {': '.join(word for word in (f.where, f.why) if word)}"
            print(f"{'✔' if f.ok else '✖'} {f.run_id} {f.invariant}{said}")
        if not ok:
            print("next   keep the ledger and the folder as they are, and compare them with the mirror or the record")
    raise typer.Exit(0 if ok else 4)


def _folder_to_examine(params: Params | None, events: list[Event]) -> tuple[Path | None, Stored | None]:
    """A run's folder where it lies, and what the store has of it; nothing is fetched."""
    from runbook_lib import mirror, wiring

    run_id, outputs = events[0].run_id, wiring.root() / "outputs"
    here = next(outputs.glob(f"*/{run_id}"), None)  # also when the opening is gone, which names the environment
    outputs = here.parent if here is not None else outputs / str(events[0].data.get("environment", ""))
    folder, scratch = outputs / run_id, outputs / ".scratch" / run_id
    if params is None or not mirror.is_shared(params):
        return folder, None
    if not folder.exists():
        say(f"the folder of {run_id} is on another machine; runbook status {run_id} brings it here")
        return None, None
    return folder, mirror.stored(wiring.draft_of(params).services.store, events, scratch)


# --- records and telemetry ---------------------------------------------------------------------------------------


@app.command()
def verify(
    record: Path,
    trust: Annotated[Path, typer.Option(help="The allowed_signers file that you trust.")],
    json: Json = False,
) -> None:
    """Verify a record with no access to anything else; exits 4 when anything differs."""
    from dataclasses import asdict

    from runbook_lib import archive

    for path, what in ((record, "record folder"), (trust, "allowed_signers file")):
        if not os.path.exists(path):  # noqa: PTH110  # never raises: no file can have some names
            raise UsageError(f"there is no {what} {path}", remedy="give its path")
    checks = archive.verify(record, trust)
    ok = all(c.ok for c in checks)
    if json:
        print_json({"ok": ok, "checks": [asdict(c) for c in checks]})
    else:
        for c in checks:
            print(f"{'✔' if c.ok else '✖'} {c.name}" + ("" if c.ok else f": {c.where}: {c.why}"))
    raise typer.Exit(0 if ok else 4)


@app.command()
def judge(
    series: Path,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON with the rules.")] = None,
) -> None:
    """The telemetry verdict on a recorded series, as JSON; exits 0 green, 1 red, 75 inconclusive."""
    import yaml

    from runbook_lib import watch

    try:
        rules = yaml.safe_load(config.read_text()) if config else {}
        samples = watch.read_series(series.read_text())
        judgement = watch.judge(samples, watch.config_from_mapping(rules or {}))
    except Exception as error:  # PyYAML raises anything
        raise UsageError(" ".join(str(error).split()), remedy="columns are time,metric,value,window") from error
    print_json(judgement.as_json())
    raise typer.Exit({"green": 0, "red": 1}.get(judgement.verdict, 75))
