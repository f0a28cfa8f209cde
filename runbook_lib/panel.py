"""Panels of the interactive door: a gate's question and the spot checks, shown in a cell and signed there.

A panel is drawn from the ledger by a task on the kernel's own loop, so it never acts beside a cell. A click says at
once what is done; signing waits in a thread of its own (for a hardware key to be touched), recording is done on the loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import secrets as random
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import ipywidgets

from runbook_lib import cell, decisions, gate, panel_page, signatures, testimony
from runbook_lib.card import Card
from runbook_lib.clock import Moment
from runbook_lib.errors import GateClosedError, RunbookError, UsageError
from runbook_lib.run import Run
from runbook_lib.signer import BESIDE, LABEL, WIDE, Signer
from runbook_lib.state import RunState

Settle = Callable[[], Card]
_EVERY_S = 0.5
# What nobody writes to the ledger (files, ssh-agent) is looked at more seldom: every so many looks.
_SELDOM = 6
_NOTHING = {"text/html": "<span hidden></span>", "text/plain": ""}
_living: dict[tuple[str, str], Panel] = {}


def gate_panel(run: Run, name: str, settle: Settle) -> Panel:
    """The panel of a gate whose round is open; the same one again while it lives in this kernel.

    Args:
        run: the run.
        name: the gate's name.
        settle: runs the gate's step and returns what its cell shows.

    Raises (settle's, shown by the panel):
        PausedError: it is not decided after all.
        GateClosedError: it was rejected or has timed out.
    """
    return _same(run, f"gate {name}", settle, lambda: GatePanel(run, name, settle))


def checks_panel(run: Run, settle: Settle) -> Panel:
    """The panel of the spot checks; the same one again while it lives in this kernel.

    Args:
        run: the run.
        settle: runs the step that collects them and returns what its cell shows.
    """
    return _same(run, "spot checks", settle, lambda: ChecksPanel(run, settle))


def _same(run: Run, what: str, settle: Settle, make: Callable[[], Panel]) -> Panel:
    key = (run.run_id, what)
    if key not in _living or _living[key].ended:
        _living[key] = make()
    _living[key].settle = settle
    return _living[key]


class Panel:
    """What both panels share: being shown, followed, pressed, and replaced by the step's card at the end.

    Attributes:
        ended: nothing more is asked here.
    """

    def __init__(self, run: Run, settle: Settle) -> None:
        self.run, self.settle = run, settle
        self.ended = False
        self._twin_name = f"rb-twin-{random.token_hex(4)}"
        self._outputs: list[tuple[cell.Output, cell.Output]] = []
        self._last: Mapping[str, Any] = {}
        self._busy = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._context = contextvars.copy_context()
        self._follower: asyncio.Task[None] | None = None
        self._pressed: set[asyncio.Task[None]] = set()
        self._looks, self._seq, self._trouble, self._tried = 0, -1, "", ()
        self._state: RunState = run.state
        self.message = ipywidgets.HTML()
        self.commands: dict[str, ipywidgets.Text] = {}
        self._hide = ipywidgets.HTML(panel_page.hide(self._twin_name))
        self.box = ipywidgets.VBox()
        self.box.add_class("rb-panel")

    # What each panel says for itself.

    def _draw(self) -> None:
        """Show the state; called when the ledger has something new."""
        raise NotImplementedError

    def _twin(self) -> str:
        raise NotImplementedError

    def _due(self) -> tuple[Any, ...]:
        """What makes the step worth a try, empty while nothing does; the same is tried once."""
        raise NotImplementedError

    def _seldom(self) -> None:
        """Look at what lies outside of the ledger."""

    # Being shown.

    def _ipython_display_(self) -> None:
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            cell.Output().show(self._twin_bundle(""))  # nobody would answer a click
            return
        self._context = contextvars.copy_context()
        self.look()
        outputs = (cell.Output(), cell.Output())
        if self.ended:
            outputs[0].show(self._last)
            return
        outputs[0].show(self.box._repr_mimebundle_())
        outputs[1].show(self._twin_bundle(self._twin_name))
        self._outputs.append(outputs)
        self.follow()

    def follow(self) -> None:
        """Follow the ledger from a task on the running loop; an earlier one ends."""
        self._loop = asyncio.get_running_loop()
        if self._follower is not None:
            self._follower.cancel()
        self._follower = self._loop.create_task(self._follow())

    async def _follow(self) -> None:
        while not self.ended:
            if self._looks % _SELDOM == 0:
                self._signer.offer(await asyncio.to_thread(signatures.agent_keys))
            self.look()
            await asyncio.sleep(_EVERY_S)

    def look(self) -> None:
        """Draw what is new in the ledger, and let the step run when it can be decided. Trouble is shown, never raised."""
        if self.ended:
            return
        try:
            self._look()
        except RunbookError as error:
            self._trouble_is(str(error))
        except Exception as error:  # nobody would see it: the panel says it, and looks again
            self._trouble_is(f"{type(error).__name__}: {error}")
        else:
            self._trouble = ""

    def _look(self) -> None:
        if self._looks % _SELDOM == 0:
            self._seldom()
        self._looks += 1
        if self.run.ledger.seq(self.run.run_id) != self._seq:
            self._redraw()
        due = self._due()
        if not due or due == self._tried:
            return
        self._tried = due
        try:
            shown = self.settle()
        except GateClosedError as error:
            self._redraw()
            self._closed(error)
        else:
            self._finish(shown.bundle())

    def _redraw(self) -> None:
        self._state = self.run.state
        self._seq = self._state.seq
        self._draw()
        for _, twin in self._outputs:
            twin.show(self._twin_bundle(self._twin_name))

    def _closed(self, error: GateClosedError) -> None:
        raise error

    def _trouble_is(self, words: str) -> None:
        if words != self._trouble:  # said once: what a click brought since stays
            self._trouble = words
            self._say(words, tone="bad")

    def _finish(self, bundle: Mapping[str, Any]) -> None:
        """Put what the step shows in the panel's place, in every page and in the notebook."""
        self.ended, self._last = True, bundle
        # A page that was loaded later knows the widget only.
        self.box.children = (ipywidgets.HTML(bundle.get("text/html", "")), self._hide)
        for shown, twin in self._outputs:
            shown.show(bundle)
            twin.show(_NOTHING)

    def _twin_bundle(self, name: str) -> dict[str, str]:
        content = self._twin()
        return {"text/html": panel_page.twin(name, content) if name else content, "text/plain": "see the HTML"}

    # Being pressed.

    @functools.cached_property
    def _signer(self) -> Signer:
        return Signer(self.run, self._able(), self._chosen)

    def _moves(self) -> dict[str, str]:
        """Commands for another machine: label -> command."""
        raise NotImplementedError

    def _fields_to_copy(self, what: str) -> ipywidgets.VBox:
        # Real text fields, not HTML: a new command leaves the focus where it is, and JupyterLab leaves them their keys.
        for label in self._moves():
            field = ipywidgets.Text(description=label, continuous_update=False, style=LABEL, layout=WIDE)
            field.observe(lambda _: self._chosen(), "value")  # what is typed over one is put back
            self.commands[label] = field
        return ipywidgets.VBox((ipywidgets.HTML(panel_page.note(what)), *self.commands.values()))

    def _chosen(self) -> None:
        for label, field in self.commands.items():
            field.value = self._moves()[label]

    def _able(self) -> list[str]:
        raise NotImplementedError

    def _button(self, word: str, colour: str, work: Callable[[], Awaitable[str]], tip: str) -> ipywidgets.Button:
        made = ipywidgets.Button(description=word, tooltip=tip, style={"button_color": colour, "text_color": "#ffffff"})
        made.on_click(lambda _: self._press(work))
        return made

    def _press(self, work: Callable[[], Awaitable[str]]) -> None:
        # JupyterLab may bring each page's clicks in a thread of its own: the first one counts, and the loop does the work.
        if self.ended or not self._busy.acquire(blocking=False):
            return
        self._say("signing …")
        if self._loop is None:
            asyncio.run(self._do(work))
        else:
            self._loop.call_soon_threadsafe(self._begin, work, context=self._context)

    def _begin(self, work: Callable[[], Awaitable[str]]) -> None:
        task = asyncio.get_running_loop().create_task(self._do(work))
        self._pressed.add(task)
        task.add_done_callback(self._pressed.discard)

    async def _do(self, work: Callable[[], Awaitable[str]]) -> None:
        try:
            self._say(await work(), tone="good")
        except RunbookError as error:
            self._say(str(error), tone="bad")
        except Exception as error:  # a traceback would go to a log that nobody looks at
            self._say(f"{type(error).__name__}: {error}", tone="bad")
        finally:
            self._busy.release()
        self.look()

    async def _sign(self, data: bytes) -> bytes:
        with self._signer.key_file() as key:
            return await asyncio.to_thread(functools.partial(decisions.signed, data, key=key, ask=False))

    def _say(self, words: str, *, tone: str = "plain") -> None:
        self.message.value = panel_page.said(words, tone=tone)


class GatePanel(Panel):
    """A gate's question with its evidence, and the two answers."""

    def __init__(self, run: Run, name: str, settle: Settle) -> None:
        super().__init__(run, settle)
        self.name = name
        self.head, self.clock = ipywidgets.HTML(), ipywidgets.HTML()
        self.comment = ipywidgets.Text(
            description="Comment", continuous_update=False, style=LABEL, layout=WIDE, tooltip="required to reject"
        )
        self.comment.observe(lambda _: self._chosen(), "value")
        self.approve = self._button(
            "Approve", "#116b38", lambda: self._decide("approve"), "sign that the gate may open"
        )
        self.reject = self._button("Reject", "#b01c1c", lambda: self._decide("reject"), "sign that it may not, and why")
        self.signer = self._signer
        self.box.children = (
            self.head,
            self.clock,
            self.signer.box,
            self.comment,
            ipywidgets.HTML(panel_page.note("A rejection needs its reason as comment.")),
            ipywidgets.HBox((self.approve, self.reject), layout=BESIDE),
            self.message,
            self._fields_to_copy(panel_page.ELSEWHERE),
            self._hide,
        )
        self.look()

    def _able(self) -> list[str]:
        return self.run.params.able(self.name, opener=self._state.opened["opened_by"])

    async def _decide(self, decision: str) -> str:
        person, comment = self.signer.person, self.comment.value.strip()
        if decision == "reject" and not comment:
            raise UsageError("nothing was signed: a rejection needs its reason", remedy="write it under Comment")
        now, drawn = self.run.state.gate(self.name), self._state.gate(self.name)
        if now.round != drawn.round:
            self._redraw()
            raise UsageError(
                f"nothing was signed: round {now.round} asks about other evidence than was shown here",
                remedy="look at it, then sign",
            )
        past = panel_page.PAST[decision]
        if any(d["person"] == person and d["decision"] == decision for d in now.decisions):
            return f"{person} has {past} round {now.round} already; it counts once"
        data = gate.decision_statement(self.run, self.name, decision, person, comment)
        recorded = gate.decide(self.run, self.name, data, await self._sign(data))
        return f"{person} {past} round {recorded['round']} of gate {self.name}; it is in the ledger"

    def _look(self) -> None:
        for why in gate.read_inbox(self.run):
            self.run.ledger.append(self.run.run_id, "note", {"text": f"decision refused: {why}"[:1000]})
            self._say(f"a decision that arrived was {why}", tone="bad")
        super()._look()
        if not self.ended:
            self._tick()

    def _seldom(self) -> None:
        # Evidence that changed is asked about anew; what is decided or over is not.
        now = self.run.state.gate(self.name)
        if now.round and not (now.timed_out or self._over(self.run.state) or (now.decisions and self._rejected(now))):
            gate.open_round(self.run, self.name)

    def _draw(self) -> None:
        self.head.value = panel_page.gate_head(self._facts, gate.cards(self.run, self.name))
        self._chosen()

    @property
    def _facts(self) -> dict[str, Any]:
        return gate.show(self.run, self.name)

    def _left_s(self) -> float:
        now = self._state.gate(self.name)
        return gate.rule(self.run, self.name).timeout_s - Moment.now().since(now.opened_moment)

    def _tick(self) -> None:
        now = self._state.gate(self.name)
        expires = now.opened_epoch_s + gate.rule(self.run, self.name).timeout_s
        self.clock.value = panel_page.gate_clock(0.0 if now.timed_out else self._left_s(), expires)

    def _over(self, state: RunState) -> bool:
        return bool(state.ended) or state.green(gate.step_key(self.name))

    @staticmethod
    def _rejected(now: Any) -> bool:
        return any(d["decision"] == "reject" for d in now.decisions)

    def _due(self) -> tuple[Any, ...]:
        state, now = self._state, self._state.gate(self.name)
        enough = len({d["person"] for d in now.decisions}) >= gate.rule(self.run, self.name).quorum
        late = bool(now.round) and not now.timed_out and self._left_s() <= 0
        if not (self._over(state) or enough or late or self._rejected(now)):
            return ()
        return (now.round, len(now.decisions), late, state.ended, state.executor and state.executor.get("pid"))

    def _closed(self, error: GateClosedError) -> None:
        if not self._rejected(self._state.gate(self.name)):
            raise GateClosedError(error.message, remedy="run this cell again to ask again, or roll back") from error
        # A rejection is final: who, why and the next moves stay in the notebook, as HTML alone.
        head = panel_page.gate_head(self._facts, gate.cards(self.run, self.name))
        words = panel_page.said(str(error), tone="bad")
        self._finish({"text/html": words + head, "text/plain": str(error)})

    def _moves(self) -> dict[str, str]:
        person, key = self.signer.words()
        comment = self.comment.value.strip()
        return {
            f"To {decision}": panel_page.command(
                *("gate", decision, self.run.run_id, self.name, "--as", person, "--key", key),
                *(("--comment", comment or "REASON") if comment or decision == "reject" else ()),
            )
            for decision in ("approve", "reject")
        }

    def _twin(self) -> str:
        head = panel_page.gate_head(self._facts, gate.cards(self.run, self.name))
        return head + panel_page.commands_to_read(panel_page.ELSEWHERE, self._moves())


class ChecksPanel(Panel):
    """The spot checks of the params file, each with its link, two answers and a note."""

    def __init__(self, run: Run, settle: Settle) -> None:
        super().__init__(run, settle)
        front = run.params.application.url.rstrip("/")
        self.checks = [
            {"name": c.name, "asks": c.asks, "link": c.url or f"{front}{c.path}"} for c in run.params.spot_checks.checks
        ]
        self.signer = self._signer
        self.head = ipywidgets.HTML(self._head())
        self.rows: dict[str, ipywidgets.HTML] = {}
        self.notes: dict[str, ipywidgets.Text] = {}
        self.buttons: dict[str, tuple[ipywidgets.Button, ipywidgets.Button]] = {}
        fields: list[ipywidgets.Widget] = []
        for check in self.checks:
            fields += self._fields(check["name"])
        copied = self._fields_to_copy(panel_page.CHECK_ELSEWHERE)
        self.box.children = (self.head, self.signer.box, *fields, self.message, copied, self._hide)
        self.look()

    def _fields(self, name: str) -> list[ipywidgets.Widget]:
        words = name.replace("_", " ")
        self.rows[name] = ipywidgets.HTML()
        self.notes[name] = ipywidgets.Text(
            description=f"Note, {words}", continuous_update=False, style={"description_width": "132px"}, layout=WIDE
        )
        self.notes[name].observe(lambda _: self._chosen(), "value")
        self.buttons[name] = (
            self._button("Pass", "#116b38", lambda: self._record(name, passed=True), f"sign that {words} passed"),
            self._button("Fail", "#b01c1c", lambda: self._record(name, passed=False), f"sign that {words} failed"),
        )
        return [self.rows[name], self.notes[name], ipywidgets.HBox(self.buttons[name], layout=BESIDE)]

    def _able(self) -> list[str]:
        return self.run.params.able("release")

    def _head(self) -> str:
        params = self.run.params
        return panel_page.checks_head(
            "Spot checks", params.gates.release.roles, self._able(), required=params.spot_checks.required
        )

    async def _record(self, name: str, *, passed: bool) -> str:
        person, note = self.signer.person, self.notes[name].value.strip()
        if not passed and not note:
            raise UsageError("nothing was signed: a failed check needs its note", remedy="write it under Note")
        data = testimony.check_statement(self.run, name, passed=passed, note=note, person=person)
        testimony.keep_check(self.run, data, await self._sign(data))
        return f"{name.replace('_', ' ')}: {'passed' if passed else 'failed'}, {person}; it is in the ledger"

    def _draw(self) -> None:
        for check in self.checks:
            self.rows[check["name"]].value = panel_page.check_row(check, self._state.checks.get(check["name"]))
        self._chosen()

    def _due(self) -> tuple[Any, ...]:
        state = self._state
        known = [state.checks.get(check["name"]) for check in self.checks]
        failed = any(said is not None and not said["passed"] for said in known)
        done = all(said is not None for said in known)
        # A failed check fails the step: that is for the people to decide, by calling it again or rolling back.
        if state.ended or state.green("verify.spot_checks") or (done and not failed):
            return (state.ended, repr(known), state.executor and state.executor.get("pid"))
        return ()

    def _moves(self) -> dict[str, str]:
        person, key = self.signer.words()
        moves = {}
        for check in self.checks:
            name = check["name"]
            words = ("--as", person, "--key", key, "--note", self.notes[name].value.strip() or "NOTE")
            moves[name.replace("_", " ")] = panel_page.command("check", self.run.run_id, name, "--pass", *words)
        return moves

    def _twin(self) -> str:
        said = [(check, self._state.checks.get(check["name"])) for check in self.checks]
        commands = panel_page.commands_to_read(panel_page.CHECK_ELSEWHERE, self._moves())
        return panel_page.checks_twin(self._head(), said, commands)
