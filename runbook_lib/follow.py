"""Keeping up with a run that others work on: each look reads only what is new in the ledger."""

from __future__ import annotations

from dataclasses import dataclass, field

from runbook_lib.model import Event
from runbook_lib.run import Run
from runbook_lib.state import RunState, fold


@dataclass(slots=True)
class Follower:
    """A run's events and their fold, as of the last look."""

    run: Run
    state: RunState = field(default_factory=RunState)
    events: list[Event] = field(default_factory=list)

    def look(self) -> bool:
        """Read what was written since the last look; True when there was anything.

        Raises:
            LedgerUnavailableError: the ledger did not answer; the last look stands.
            VerificationError: what is there does not follow from what was there.
        """
        new = self.run.ledger.after(self.run.run_id, self.state)
        self.events += new
        self.state = fold(new, self.state)
        return bool(new)
