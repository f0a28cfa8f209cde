"""Time: the wall clock for people and appointments, the boot's own clock for how long something took.

A wall clock is set: by people, by NTP, by a laptop's first network after a flight. What happened in which order is the
ledger's sequence; how long ago something was is told by the uptime of the boot in which it happened, sleep included.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

# Two readings are taken a moment apart, and NTP slews by less than this between two events.
JUMP_S = 2.0


@dataclass(frozen=True, slots=True)
class Moment:
    """One reading of both clocks.

    Attributes:
        wall_s: seconds since the epoch.
        boot: the kernel's id of the boot; empty when it is not known.
        uptime_s: seconds since that boot, sleep included (CLOCK_BOOTTIME).
        asleep_s: how many of them the machine slept; None when it is not known.
    """

    wall_s: float
    boot: str = ""
    uptime_s: float = 0.0
    asleep_s: float | None = None

    @classmethod
    def now(cls) -> Moment:
        """Read both clocks."""
        awake_s, uptime_s = (time.clock_gettime(clock) for clock in (time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME))
        return cls(time.time(), boot_id(), round(uptime_s, 3), round(uptime_s - awake_s, 3))

    @classmethod
    def of(cls, text: str, clock: Mapping[str, Any]) -> Moment:
        """The moment that was written down; an earlier version wrote no `clock`."""
        asleep = clock.get("asleep_s")
        return cls(
            epoch_s(text),
            str(clock.get("boot", "")),
            float(clock.get("uptime_s", 0.0)),
            None if asleep is None else float(asleep),
        )

    @property
    def text(self) -> str:
        """The wall clock as ISO 8601 UTC with microseconds."""
        return datetime.fromtimestamp(self.wall_s, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")

    @property
    def clock(self) -> dict[str, Any]:
        """What is written beside the text."""
        return {"boot": self.boot, "uptime_s": self.uptime_s, "asleep_s": self.asleep_s}

    def since(self, other: Moment) -> float:
        """Seconds from the other moment to this one: by uptime within one boot, else by the wall clock."""
        if self.boot and self.boot == other.boot:
            return self.uptime_s - other.uptime_s
        return self.wall_s - other.wall_s

    def jump_since(self, other: Moment) -> float:
        """By how many seconds the wall clock was set in between; 0 when it was not, or when nobody can tell."""
        jump = (self.wall_s - other.wall_s) - self.since(other)
        return round(jump, 1) if abs(jump) > JUMP_S else 0.0

    def slept_since(self, other: Moment) -> float:
        """How many seconds the machine slept in between; 0 when it did not, or when nobody can tell."""
        if not self.boot or self.boot != other.boot or self.asleep_s is None or other.asleep_s is None:
            return 0.0
        slept = self.asleep_s - other.asleep_s
        return round(slept, 1) if slept > JUMP_S else 0.0


def utc_now() -> str:
    """The wall clock as ISO 8601 UTC with microseconds; for people: order is by sequence."""
    return Moment.now().text


def epoch_s(text: str) -> float:
    """Epoch seconds of an ISO 8601 time.

    Raises:
        ValueError: it is none, or has no zone.
    """
    found = datetime.fromisoformat(text)
    if found.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return found.timestamp()


@cache
def boot_id() -> str:
    """The kernel's id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
