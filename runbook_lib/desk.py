"""The release desk: one cell that shows where a run stands, and starts, pauses and ends its work.

It draws what the ledger says, whoever does the work, and works by the installed command, which goes on when browser
and kernel are gone. What is a widget has a twin of plain HTML in the next output, which is seen once the kernel is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets as random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ipywidgets as w

from runbook_lib import cell, desk_page, signatures, testimony, work
from runbook_lib.desk_facts import Sources
from runbook_lib.desk_page import Facts, next_phase, open_gate, signed, standing
from runbook_lib.errors import RunbookError, UsageError
from runbook_lib.follow import Follower
from runbook_lib.pages import output, text
from runbook_lib.render import failing, in_doubt
from runbook_lib.run import Run
from runbook_lib.signer import LABEL, WIDE, Signer
from runbook_lib.state import RunState

_EVERY_S = 0.5
_EVIDENCE = "It is part of what you sign"
# Focus must be seen in both themes; a twin is seen only when no living widget hides it.
_FOCUS = (
    ".rb-desk button:focus-visible,.rb-desk input:focus-visible,.rb-desk textarea:focus-visible,"
    ".rb-desk select:focus-visible{outline:3px solid var(--jp-brand-color1,#0b57c2)!important;outline-offset:2px}"
    ".rb-desk .widget-html-content{line-height:normal}.rb-desk{max-width:1240px}"
    ".rb-desk .widget-html{height:auto;margin:0}.rb-desk button{height:30px}"
    # JupyterLab's own orange is too light for its white words.
    ".rb-desk button.mod-primary{background:#0b57c2}.rb-desk button.mod-warning{background:#8a4b00}"
    ".rb-desk button.mod-danger{background:#b01c1c}.rb-desk button[class*=mod-]{color:#fff}"
)


_SAID = ".rb .said,.rb summary{font-size:12.5px}.rb pre{max-height:160px;overflow:auto}"


def show(run: Run) -> Desk:
    """Show the desk of a run in this cell, and keep it up with the ledger as long as the kernel lives.

    Side effect: a desk that this kernel showed of the same run before is no longer kept up.
    """
    desk = Desk(run)
    desk.follow()
    return desk


_followed: dict[str, asyncio.Task[None]] = {}


class Desk:
    """The page in three regions, the buttons, and one form at a time below them.

    Attributes:
        view: the widget.
        twin: the same as plain HTML, without buttons.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._seen = Follower(run)
        self._sources = Sources(run)
        self._trouble: tuple[str, ...] = ()
        self._drawn: object = None
        self._answer = ""
        self._waited_for = False
        self._words: tuple[str, ...] = ()
        self._name = f"rb-twin-{random.token_hex(6)}"
        self._twin = cell.Output()
        self.twin = ""
        self._head, self._left, self._right, self._said = (w.HTML() for _ in range(4))
        self.run_next = _button("Run next phase", "play", "primary", self._pressed(self._run_next))
        self.pause = _button("Pause", "pause", "", self._pressed(self._pause))
        self.roll_back = _button("Roll back …", "undo", "warning", self._pressed(self._ask_roll_back))
        self.settle = _button("Resolve …", "pencil", "warning", self._pressed(self._ask_settle))
        self.abort = _button("Abort …", "stop", "danger", self._pressed(self._ask_abort))
        self.form = w.VBox([], layout=w.Layout(display="none"))
        style = f"<style>.{self._name}{{display:none}}{_FOCUS}</style>"
        buttons = [self.run_next, self.pause, self.settle, self.roll_back, self.abort]
        row = w.HBox(buttons, layout=w.Layout(flex_flow="row wrap", margin="4px 0"))
        wide, narrow = w.Layout(flex="11 1 0", min_width="0"), w.Layout(flex="9 1 0", min_width="0")
        columns = w.HBox(
            [w.Box([self._left], layout=wide), w.Box([self._right], layout=narrow)], layout=w.Layout(grid_gap="8px")
        )
        for region in (self._left, self._right):
            region.layout = w.Layout(width="100%")
        self.view = w.VBox([w.HTML(style), self._head, row, self._said, self.form, columns])
        self.view.add_class("rb-desk")
        self.draw()

    @property
    def state(self) -> RunState:
        """Where the run stands, as of the last look."""
        return self._seen.state

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.view)  # type: ignore[no-untyped-call]
        self._show_twin()

    def follow(self) -> None:
        """Look at the ledger twice a second on this kernel's loop; without a loop it stays as it is drawn."""
        before = _followed.pop(self.run.run_id, None)
        if before is not None:
            before.cancel()
        with contextlib.suppress(RuntimeError):
            _followed[self.run.run_id] = asyncio.get_running_loop().create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            try:
                self.draw()
            except Exception as error:  # the next look may do better, and a desk that stands still would lie
                self._say(f"the desk could not be drawn: {type(error).__name__}: {error}", bad=True)

    def draw(self) -> None:
        """Look, and draw what changed."""
        self._look()
        command = work.newest(self.run)
        facts = self._facts = self._sources.facts(self._seen, command, trouble=self._trouble)
        head, left, right = desk_page.parts(self.state, facts)
        self._head.value, self._left.value, self._right.value = head, left, right  # equal values are not sent
        self._offer(facts)
        self._tell(command)
        told = (self.state.head, facts.at_work, facts.lost, facts.edited, facts.trouble)
        if told != self._drawn:  # a second that passes is nothing to save
            self._drawn = told
            # A page that was opened later than this cell ran is not told what is written over: its twin may be old.
            at = f"{facts.now.text[:19].replace('T', ' ')} UTC"
            when = f"As it stood at {at}. How it stands now: <code>runbook status {text(self.run.run_id)}</code>"
            self.twin = desk_page.desk_html(self.state, facts) + output(f"<p>{when}</p>")
            if self._twin._handle:
                self._show_twin()

    def _look(self) -> None:
        try:
            self._seen.look()
            self._trouble = ()
        except RunbookError as error:
            self._trouble = (f"what is shown may be old: {error}",)

    def _show_twin(self) -> None:
        body = f'<div class="{self._name}">{self.twin}</div>'
        plain = f"{standing(self.state, self._facts).word}: run {self.run.run_id}"
        self._twin.show({"text/html": body, "text/plain": plain})

    # --- buttons -------------------------------------------------------------------------------------------------

    def _offer(self, facts: Facts) -> None:
        """Which buttons there are, what they say, and which of them can be pressed now."""
        state = self.state
        busy = bool(facts.at_work)
        self._words, label, hint = self._next_words(facts)
        self.run_next.description, self.run_next.tooltip = label, hint
        self.run_next.disabled = busy or not self._words
        self.pause.disabled = not facts.at_work
        self.pause.tooltip = "Stop where it stands, as Ctrl-C does: a command that goes on is waited for"
        self.roll_back.disabled = busy or bool(state.ended) or state.rollback is not None
        self.roll_back.tooltip = "Take the compiled way back; asks for the reason first"
        self.abort.disabled = busy or bool(state.ended)
        self.abort.tooltip = "End the run where it stands; asks for the reason first"
        self.settle.layout.display = None if in_doubt(state) and not state.ended else "none"
        self.settle.tooltip = "Sign what is true at the target of the step that is in doubt"

    def _next_words(self, facts: Facts) -> tuple[tuple[str, ...], str, str]:
        """The command behind the first button, what the button says, and its hint."""
        state, run = self.state, self.run.run_id
        phase = next_phase(state, facts)
        if state.ended:
            if facts.review_signed:
                return (), "Reviewed", "The run has ended and was reviewed"
            if all(state.green(key) for p in facts.phases if p.name == "review" for key in p.keys):
                return ("review", run), "Sign the review", "Its steps are done: takes its notebook and signs it"
            return ("review", run), "Review", "Phase 8: the review, signed apart from the record"
        if in_doubt(state):
            return (
                (),
                "Resolve first",
                "A step is in doubt: no step can be skipped, somebody who holds a role must sign",
            )
        if state.rejected_gate and state.rollback is None:
            return (), "Gate rejected", "Roll back or abort"
        if state.rollback is not None:
            return ("resume", run), "Go on with the way back", "runbook resume"
        if not phase:
            return ("resume", run), "End and seal", "All phases are green: write the run's end and seal its record"
        again = [key for key in failing(state) if key.startswith(f"{phase}.")]
        if open_gate(state, facts):
            name = open_gate(state, facts)
            if signed(state, facts, name):
                return ("resume", run, "--until", phase), f"Pass gate {name}", f"runbook resume --until {phase}"
            hint = f"Gate {name} waits for people; this looks whether they have decided, and goes no further"
            return ("resume", run, "--until", phase), f"Look at gate {name} again", hint
        label = f"Try {phase} again" if again else f"Run next phase: {phase}"
        return ("resume", run, "--until", phase), label, f"runbook resume --until {phase}"

    def _run_next(self) -> None:
        # What the button said when it was pressed: a phase that meanwhile is green is not run twice.
        self._start(self._words)

    def _start(self, words: Sequence[str]) -> None:
        before = work.newest(self.run)
        if not words or (self._waited_for and before is not None and before.alive and before.words == tuple(words)):
            return  # the second half of a double click
        work.start(self.run, words)
        self._say(f"runbook {words[0]} was started; it goes on when this page is closed")
        self._waited_for = True

    def _pause(self) -> None:
        self._say(work.pause(self.run))

    def _ask_roll_back(self) -> None:
        back = [step.title for p in self._sources.phases if p.name == "rollback" for step in p.steps]
        what = f"Takes the way back to {self.run.release.previous_version}: {'; '.join(back)}."
        self._confirm("Roll back", what, "warning", lambda why: ("rollback", self.run.run_id, f"--reason={why}"))

    def _ask_abort(self) -> None:
        what = "Ends the run where it stands and seals its record. Nothing is undone: what was changed stays changed."
        self._confirm("Abort", what, "danger", lambda why: ("abort", self.run.run_id, f"--reason={why}"))

    def _confirm(self, label: str, what: str, style: str, words: Callable[[str], Sequence[str]]) -> None:
        """A row that names what happens, and wants a reason and a second press."""
        reason = w.Text(placeholder="for the record", description="Reason", layout=w.Layout(width="60%"))

        def sure() -> None:
            if not reason.value.strip():
                self._say("the reason is missing; nothing was started", bad=True)
                return
            self._start(words(reason.value.strip()))
            self._close()

        yes = _button(f"Yes, {label.lower()}", "check", style, self._pressed(sure))
        yes.tooltip = what
        self._open(what, [reason], yes)

    def _ask_settle(self) -> None:
        steps = in_doubt(self.state)
        people = self.run.params.may_settle(steps[0], opener=self.state.opened["opened_by"])
        # A field to type in: in a notebook a menu's letters and arrows are JupyterLab's own.
        step = w.Combobox(options=steps, value=steps[0], description="Step", style=LABEL, layout=WIDE)
        signer = Signer(self.run, people, lambda: None)
        signer.offer(signatures.agent_keys())
        seen = w.Text(
            placeholder="what you looked at and saw",
            description="Evidence",
            style=LABEL,
            layout=WIDE,
            tooltip=_EVIDENCE,
        )

        def sign(*, done: bool) -> None:
            if not seen.value.strip():
                raise UsageError("nothing was signed: the evidence is missing", remedy="say what you looked at and saw")
            person = signer.person
            with signer.key_file() as key:
                testimony.resolve(
                    self.run,
                    step.value.strip(),
                    done=done,
                    comment=seen.value.strip(),
                    person=person,
                    key=key,
                    ask=False,
                )
            self._say(f"{step.value} is settled as {'done' if done else 'not done'}, signed by {person}")
            self._close()

        what = (
            f"No step can be skipped. One that is in doubt is declared done, or not done, only by a signed statement of "
            f"somebody who decides at the gate behind it: {', '.join(people) or 'nobody of the params file may'}. "
            "Look at its target first."
        )
        yes = _button("Sign: it is done", "check", "warning", self._pressed(partial(sign, done=True)))
        yes.tooltip = "Its effect is there: signs that with your key, and the step is green"
        no = _button("Sign: it is not done", "repeat", "warning", self._pressed(partial(sign, done=False)))
        no.tooltip = "Its effect is not there: signs that with your key, and the step may start again"
        self._open(what, [step, signer.box, seen], yes, no)

    def _open(self, what: str, fields: Sequence[Any], *yes: w.Button) -> None:
        no = _button("Leave it", "times", "", self._close)
        no.tooltip = "Close this; nothing happens"
        said = w.HTML(output(f'<div class="box"><p>{text(what)}</p></div>', more_style=".rb .box{max-width:1000px}"))
        self.form.children = (said, *fields, w.HBox([*yes, no], layout=w.Layout(flex_flow="row wrap")))
        self.form.layout.display = None

    def _close(self) -> None:
        self.form.children = ()
        self.form.layout.display = "none"

    def _pressed(self, act: Callable[[], None]) -> Callable[[], None]:
        """What a button does; a refusal is said, and the desk shows the truth at once."""

        def press() -> None:
            try:
                act()
            except RunbookError as error:
                self._say(str(error), bad=True)
            except OSError as error:
                self._say(f"this machine: {error.strerror}: {error.filename or 'no file'}", bad=True)
            self.draw()

        return press

    def _say(self, said: str, *, bad: bool = False) -> None:
        self._answer = f'<p class="said {"why" if bad else "soft"}">{"✖ " if bad else ""}{text(said)}</p>'

    def _tell(self, command: work.Command | None) -> None:
        """The answer to the last press, and the last words of a command that failed."""
        if command is not None and not command.alive and self._waited_for:
            self._waited_for, self._answer = False, ""
            if said := command.outcome():
                refused = said.startswith("runbook:")  # nothing else on the desk names its next move
                self._say(said if refused else said.partition(". Next: ")[0], bad=refused)
        failed = command is not None and command.failed and not self.state.ended
        log = ""
        if command is not None and failed:
            code = "without a word" if command.exit_code is None else f"with {command.exit_code}"
            log = (
                f'<details open><summary class="why">✖ runbook {text(command.words[0])} ended {code}: its last lines'
                f"</summary><pre>{text(command.tail())}</pre></details>"
            )
        self._said.value = output(self._answer + log, more_style=_SAID) if self._answer or log else ""


def _button(label: str, icon: str, style: str, act: Callable[[], None]) -> Any:
    button = w.Button(description=label, icon=icon, button_style=style, layout=w.Layout(width="auto"))
    button.on_click(lambda _: act())
    return button
