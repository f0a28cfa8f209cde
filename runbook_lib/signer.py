"""Who signs, and with which key: the fields that both panels share. They hold names of keys, never a key.

Both are fields to type in that offer what there is, no menus: in a notebook a focused menu loses its arrow keys and
letters to JupyterLab's shortcuts, and `b` there puts in a cell.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ipywidgets

from runbook_lib import panel_page, signatures
from runbook_lib.errors import UsageError
from runbook_lib.run import Run

WIDE = ipywidgets.Layout(width="100%", max_width="720px")
LABEL = {"description_width": "132px"}
# Where the fields begin, behind their labels.
BESIDE = ipywidgets.Layout(margin="0 0 4px 140px")
_USUAL_KEY = "~/.ssh/id_ed25519"


class Signer:
    """The fields; `box` shows them.

    Args:
        run: whose people are offered.
        able: who may sign here, offered first; everybody else is refused with the rule.
        changed: called when another person or key is chosen.
    """

    def __init__(self, run: Run, able: Sequence[str], changed: Callable[[], None]) -> None:
        self._run, self._able = run, list(able)
        people = [*able, *sorted(set(run.params.people) - set(able))]
        self._held: list[str] = []
        self._agent: dict[str, str] = {}
        # Not on every letter: what is typed arrives before the click that leaves the field.
        how = {"continuous_update": False, "style": LABEL, "layout": WIDE}
        self.who = ipywidgets.Combobox(description="Who signs", options=people, **how)
        self.key = ipywidgets.Combobox(description="Key", **how)
        self.about = ipywidgets.HTML()
        self.box = ipywidgets.VBox((self.who, self.key, self.about))
        self.who.observe(lambda _: self.offer(self._held), "value")
        for field in (self.who, self.key):
            field.observe(lambda _: changed(), "value")
        self.offer(())

    @property
    def person(self) -> str:
        """Who signs.

        Raises:
            UsageError: nobody is chosen, or nobody has that name.
        """
        person = self._person
        if not person:
            raise UsageError("nothing was signed: nobody is chosen", remedy="say under Who signs who you are")
        if person not in self._run.params.people:
            raise UsageError(
                f"nothing was signed: {person!r} is nobody in the params file",
                remedy=f"say under Who signs one of {', '.join(sorted(self._run.params.people))}",
            )
        return person

    def offer(self, held: Sequence[str]) -> None:
        """Offer these keys of ssh-agent, as far as they are the chosen person's."""
        self._held = list(held)
        person = self._run.params.people.get(self._person)
        own = {" ".join(key.split()[:2]) for key in person.keys} if person is not None else set()
        before, self._agent = self._agent, {signatures.fingerprint(key): key for key in self._held if key in own}
        self.key.options = tuple(self._agent)
        if self.key.value in before and self.key.value not in self._agent:
            self.key.value = ""
        self.about.value = panel_page.note(self._words())

    @contextmanager
    def key_file(self) -> Iterator[Path]:
        """What `signatures.sign` takes: the key file, or the public half of the agent's key for the body's length.

        Raises:
            UsageError: no key is chosen.
        """
        chosen = self.key.value.strip()
        if not chosen:
            raise UsageError(
                "nothing was signed: a click alone is no signature",
                remedy="choose your key of ssh-agent under Key, or give the path of your key file on this machine there",
            )
        if chosen not in self._agent:
            yield Path(chosen).expanduser()
            return
        with tempfile.TemporaryDirectory(prefix="runbook-key-") as folder:
            public = Path(folder) / "agent.pub"
            public.write_text(f"{self._agent[chosen]}\n")
            yield public

    def words(self) -> tuple[str, str]:
        """Person and key as they stand in a command for another machine; `PERSON` and a usual path where none is chosen."""
        chosen = self.key.value.strip()
        return self._person or "PERSON", chosen if chosen and chosen not in self._agent else _USUAL_KEY

    @property
    def _person(self) -> str:
        return str(self.who.value).strip()

    def _words(self) -> str:
        who = self._run.params.people.get(self._person)
        if who is None:
            return "Key: one that ssh-agent holds, or the path of a key file on this machine."
        rights = "may sign here" if self._person in self._able else "may not sign here"
        held = f"{len(self._agent)} of their keys" if self._agent else "no key of theirs"
        return f"{who.name}, {', '.join(who.roles) or 'no role'}: {rights}. In ssh-agent: {held}; a key file's path does too."
