"""Who signs, and with which key: the fields that both panels share. They hold names of keys, never a key."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ipywidgets

from runbook_lib import signatures
from runbook_lib.errors import UsageError
from runbook_lib.pages import visible
from runbook_lib.run import Run

WIDE = ipywidgets.Layout(width="100%", max_width="720px")
LABEL = {"description_width": "132px"}
_FROM_FILE = ""


class Signer:
    """The fields; `box` shows them.

    Args:
        run: whose people are offered.
        able: who may sign here; everybody else can be chosen, and is refused with the rule.
        changed: called when another person, key or file is chosen.
    """

    def __init__(self, run: Run, able: Sequence[str], changed: Callable[[], None]) -> None:
        self._people = run.params.people
        rest = sorted(set(self._people) - set(able))
        options = [("nobody chosen", "")]
        options += [(self._named(p), p) for p in able]
        options += [(f"{self._named(p)}: may not sign here", p) for p in rest]
        self._held: list[str] = []
        self.who = ipywidgets.Dropdown(description="Who signs", options=options, value="", style=LABEL, layout=WIDE)
        self.key = ipywidgets.Dropdown(description="Key", options=self._keys(), style=LABEL, layout=WIDE)
        # Not on every letter: what is typed arrives before the click that leaves the field.
        self.file = ipywidgets.Text(description="Key file", continuous_update=False, style=LABEL, layout=WIDE)
        self.box = ipywidgets.VBox((self.who, self.key, self.file))
        self._changed = changed
        self.who.observe(lambda _: self.offer(self._held), "value")
        for field in (self.who, self.key, self.file):
            field.observe(lambda _: changed(), "value")

    @property
    def person(self) -> str:
        """Who signs.

        Raises:
            UsageError: nobody is chosen.
        """
        if not self.who.value:
            raise UsageError("nothing was signed: nobody is chosen", remedy="choose yourself under Who signs")
        return str(self.who.value)

    def offer(self, held: Sequence[str]) -> None:
        """Show these keys of ssh-agent, as far as they are the chosen person's; a choice that is still there stays."""
        self._held = list(held)
        options, chosen = self._keys(), self.key.value
        if options != list(self.key.options):
            self.key.options = options
            self.key.value = chosen if chosen in [value for _, value in options] else _FROM_FILE

    @contextmanager
    def key_file(self) -> Iterator[Path]:
        """What `signatures.sign` takes: the key file, or the public half of the agent's key for the body's length.

        Raises:
            UsageError: no key is chosen.
        """
        if self.key.value != _FROM_FILE:
            with tempfile.TemporaryDirectory(prefix="runbook-key-") as folder:
                public = Path(folder) / "agent.pub"
                public.write_text(f"{self.key.value}\n")
                yield public
            return
        yield self.named_file()

    def named_file(self) -> Path:
        """The path that was typed.

        Raises:
            UsageError: there is none.
        """
        typed = self.file.value.strip()
        if not typed:
            raise UsageError(
                "nothing was signed: a click alone is no signature",
                remedy="choose your key of ssh-agent under Key, or give the path of your key under Key file",
            )
        return Path(typed).expanduser()

    def words(self) -> tuple[str, str]:
        """Person and key as they stand in a command for another machine; `PERSON` and a usual path where none is chosen."""
        return self.who.value or "PERSON", self.file.value.strip() or "~/.ssh/id_ed25519"

    def _named(self, person: str) -> str:
        who = self._people[person]
        return visible(f"{person} – {who.name} ({', '.join(who.roles) or 'no role'})")

    def _keys(self) -> list[tuple[str, str]]:
        person = self.who.value if hasattr(self, "who") else ""
        own = {" ".join(key.split()[:2]) for key in self._people[person].keys} if person else set()
        mine = [key for key in self._held if key in own]
        none = f" (ssh-agent holds no key of {person})" if person and not mine else ""
        return [
            (f"the key file named below{none}", _FROM_FILE),
            *((f"ssh-agent: {signatures.fingerprint(key)}", key) for key in mine),
        ]
