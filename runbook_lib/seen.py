"""The newest event of a run that this machine has seen: what a ledger that has lost its end is known by.

The chain shows an event that was changed or taken out; nothing in it shows that it was longer once. A standby that was
promoted without the last commits has such a chain, and so has a ledger that came back from a backup.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runbook_lib.canonical import canonical_json, write_atomically
from runbook_lib.errors import VerificationError
from runbook_lib.model import Event

NAME = "ledger-seen.json"


@dataclass(frozen=True, slots=True)
class Seen:
    """A file of this machine, outside of the ledger and of the record.

    Attributes:
        run_id: of which run.
        file: in the run's scratch folder; who removes it lets the run go on without what was lost.
    """

    run_id: str
    file: Path

    def newest(self) -> tuple[int, str] | None:
        """Number and hash of the event; None when nothing is known. To be asked before the events are read."""
        try:
            data = json.loads(self.file.read_bytes())
            return int(data["seq"]), str(data["hash"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, event: Event) -> None:
        """Remember an event that the ledger has acknowledged, unless a later one is known."""
        known = self.newest()
        if known is None or known[0] < event.seq:
            # A disk that takes no more does not undo what is in the ledger: the event before is remembered then.
            with suppress(OSError):
                write_atomically(self.file, canonical_json({"seq": event.seq, "hash": event.hash}))

    def refuse_lost(self, known: tuple[int, str] | None, events: Sequence[Event]) -> None:
        """See that a run's events still hold the one that was known before they were read.

        Raises:
            VerificationError: they do not; both numbers are named.
        """
        if known is None:
            return
        seq, digest = known
        last = events[-1].seq if events else 0
        there = next((event for event in events if event.seq == seq), None)
        if there is not None and there.hash == digest:
            return
        said = "is another one there" if there is not None else "is lost"
        raise VerificationError(
            f"the ledger ends with event {last} of run {self.run_id}; event {seq}, which this machine has seen, {said}",
            remedy=f"bring it back from the server that had it; when it is gone for good: docs/failures.md, {self.file}",
        )
