"""Telemetry samples: reading them, and cutting them into the fifteen "minutes" that every rule counts in."""

from __future__ import annotations

import csv
import io
import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from statistics import median
from typing import Literal, cast

Window = Literal["baseline", "current"]
COLUMNS = ("time", "metric", "value", "window")
MINUTES = 15  # a "minute" is this part of the window, so that a short rehearsal is judged by the same rules
MIN_POINTS = 20
MIN_PRESENT = 0.9
# The baseline may hold the hour before and the same hour a week ago; a longer silence than this parts the two.
STRETCH_GAP_S = 6 * 3600.0
_MAX_TIME_S = 1e12  # far beyond any calendar; keeps the arithmetic finite
_MAX_VALUE = 1e100  # anything larger is as good as infinite


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured value. `time_s` is UTC epoch seconds; `value` is NaN when the sample is missing."""

    time_s: float
    metric: str
    value: float
    window: Window
    instance: str | None = None


def read_series(text: str) -> list[Sample]:
    """Read a series file: CSV with the columns time, metric, value, window and, if wanted, instance.

    `time` is ISO 8601 (taken as UTC when it names no offset) or epoch seconds; an empty or NaN `value` is a
    missing sample; other columns are ignored.

    Raises:
        ValueError: a column is missing or a line cannot be read; the message names the line.
    """
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""))
    samples: list[Sample] = []
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        missing = [name for name in COLUMNS if name not in header]
        if missing:
            raise ValueError(f"line 1: no column {', '.join(missing)}; a series needs {','.join(COLUMNS)}")
        samples.extend(
            _sample(dict(zip(header, map(str.strip, row), strict=False)), reader.line_num)
            for row in reader
            if any(cell.strip() for cell in row)
        )
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: not CSV: {error}") from error
    return samples


def _sample(row: dict[str, str], line: int) -> Sample:
    """Turn one CSV row into a sample; `line` is only for the message."""
    for name in COLUMNS:
        if name not in row:
            raise ValueError(f"line {line}: no {name}; the row is cut short")
    if not row["metric"]:
        raise ValueError(f"line {line}: metric is empty")
    if row["window"] not in ("baseline", "current"):
        raise ValueError(f"line {line}: window {row['window']!r} is neither 'baseline' nor 'current'")
    try:
        value = float(row["value"]) if row["value"] else math.nan
    except ValueError:
        raise ValueError(f"line {line}: value {row['value']!r} is not a number") from None
    window = cast("Window", row["window"])
    return Sample(_time_s(row["time"], line), row["metric"], value, window, row.get("instance") or None)


def _time_s(text: str, line: int) -> float:
    try:
        time_s = float(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise ValueError(f"line {line}: time {text!r} is neither ISO 8601 nor epoch seconds") from None
        time_s = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not abs(time_s) <= _MAX_TIME_S:
        raise ValueError(f"line {line}: time {text!r} is out of range for epoch seconds")
    return time_s


@dataclass(frozen=True, slots=True)
class Track:
    """One metric of one instance in one window: distinct times, oldest first; NaN where nothing is known."""

    times_s: tuple[float, ...]
    values: tuple[float, ...]
    infinite: int = 0
    conflicts: int = 0  # moments with two different values: which one is true is not known, so they are missing

    @property
    def finite(self) -> tuple[float, ...]:
        """The values that are there."""
        return tuple(value for value in self.values if not math.isnan(value))

    @property
    def newest_s(self) -> float:
        """Time of the newest finite sample; minus infinity when there is none."""
        pairs = zip(reversed(self.times_s), reversed(self.values), strict=True)
        return next((time for time, value in pairs if not math.isnan(value)), -math.inf)

    def step_s(self) -> float | None:
        """Median distance of two samples in seconds; None with fewer than two."""
        steps = [after - before for before, after in pairwise(self.times_s)]
        return median(steps) if steps else None

    def newest(self, before_s: float, reach_s: float) -> float:
        """Return the newest value before a moment; NaN when it is missing or lies further back than `reach_s`."""
        at = bisect_left(self.times_s, before_s) - 1
        return self.values[at] if at >= 0 and before_s - self.times_s[at] < reach_s else math.nan

    def between(self, start_s: float, end_s: float) -> list[float]:
        """Return the finite values of a half-open piece of time."""
        part = self.values[bisect_left(self.times_s, start_s) : bisect_left(self.times_s, end_s)]
        return [value for value in part if not math.isnan(value)]

    def stretches(self, interval_s: float) -> list[Track]:
        """Cut where the samples pause for hours."""
        limit_s = max(STRETCH_GAP_S, MIN_POINTS * interval_s)
        cuts = [i + 1 for i, (a, b) in enumerate(pairwise(self.times_s)) if b - a > limit_s]
        return [
            Track(self.times_s[a:b], self.values[a:b], self.infinite, self.conflicts)
            for a, b in pairwise([0, *cuts, len(self.times_s)])
        ]


Tracks = dict[tuple[str, str], dict[str | None, Track]]


def tracks_of(samples: Iterable[Sample]) -> Tracks:
    """Sort samples into (metric, window) → instance → track; order and exact duplicates do not matter."""
    cells: defaultdict[tuple[str, str], defaultdict[str | None, defaultdict[float, set[float]]]]
    cells = defaultdict(lambda: defaultdict(lambda: defaultdict(set)))
    for sample in samples:
        # The empty set says: a row for this moment exists, its value does not.
        known = cells[sample.metric, sample.window][sample.instance][sample.time_s]
        if not math.isnan(sample.value):
            known.add(sample.value)
    return {
        key: {instance: _track(moments) for instance, moments in by_instance.items()}
        for key, by_instance in cells.items()
    }


def _track(moments: dict[float, set[float]]) -> Track:
    times = sorted(time for time in moments if abs(time) <= _MAX_TIME_S)
    values = [next(iter(moments[time])) if len(moments[time]) == 1 else math.nan for time in times]
    return Track(
        tuple(times),
        tuple(value if abs(value) <= _MAX_VALUE else math.nan for value in values),
        infinite=sum(any(abs(value) > _MAX_VALUE for value in moments[time]) for time in times),
        conflicts=sum(len(moments[time]) > 1 for time in times),
    )


@dataclass(frozen=True, slots=True)
class Span:
    """A window on the clock, in epoch seconds, and the step at which samples are due."""

    start_s: float
    length_s: float
    interval_s: float

    @property
    def end_s(self) -> float:
        """First moment after the window."""
        return self.start_s + self.length_s

    @property
    def expected(self) -> int:
        """Samples due in the window."""
        return max(1, round(self.length_s / self.interval_s))

    def absent(self, times_s: Sequence[float]) -> list[tuple[float, int]]:
        """Where rows are due and not there, as (last time before, number)."""
        step = self.interval_s
        if not times_s:
            return [(self.start_s - step, self.expected)]
        edges = [self.start_s - step, *times_s, max(self.end_s, times_s[-1] + step)]
        gaps = []
        for before, after in pairwise(edges):
            # Up to half a step late is jitter, not a missing sample.
            lost = math.ceil((after - before) / step - 0.5) - 1
            if lost > 0:
                gaps.append((before, lost))
        return gaps

    def present_ratio(self, track: Track) -> float:
        """Share of the due samples that are there and finite, 0 to 1."""
        absent = sum(lost for _, lost in self.absent(track.times_s))
        by_rows = len(track.finite) / max(1, len(track.times_s) + absent)
        # Rows denser than due must not pay for a hole in time.
        return max(0.0, min(by_rows, 1 - absent / self.expected))

    def minutes(self, track: Track) -> list[list[float]]:
        """The samples of each fifteenth of the window, NaN for every one that is due and missing."""
        bins: list[list[float]] = [[] for _ in range(MINUTES)]
        for time, value in zip(track.times_s, track.values, strict=True):
            bins[self._index(time)].append(value)
        for before, lost in self.absent(track.times_s):
            for n in range(1, lost + 1):
                bins[self._index(before + n * self.interval_s)].append(math.nan)
        return bins

    def _index(self, time_s: float) -> int:
        # The small addition keeps a sample on a border in the later minute in spite of rounding.
        return min(MINUTES - 1, max(0, int((time_s - self.start_s) / self.length_s * MINUTES + 1e-9)))


def combined(tracks: Sequence[Track], span: Span, how: str, *, strict: bool) -> Track:
    """Add up or average instances on the grid of `span`, each by its newest sample, as a metrics server does.

    A sum over instances of which one is silent is not known: with `strict` it is missing. Without, the
    instances that report are taken: fleets grow and shrink during a baseline.
    """
    # A look back of one step and a half: scrapes jitter, and a sample that is older than that is missing.
    step = span.interval_s
    slots = sorted({math.floor((time - span.start_s) / step + 1e-9) for track in tracks for time in track.times_s})
    values = []
    for slot in slots:
        due_s = span.start_s + (slot + 1 - 1e-9) * step
        found = [track.newest(due_s, 1.5 * step) for track in tracks]
        known = [value for value in found if not math.isnan(value)]
        whole = bool(known) and (not strict or len(known) == len(found))
        values.append((sum(known) / (len(known) if how == "mean" else 1)) if whole else math.nan)
    return Track(tuple(span.start_s + slot * step for slot in slots), tuple(values))


def own_span(track: Track, interval_s: float) -> Span:
    """Return the span that a track itself covers."""
    return Span(track.times_s[0], track.times_s[-1] - track.times_s[0] + interval_s, interval_s)


def baseline_pieces(track: Track, minute_s: float, interval_s: float) -> list[tuple[float, float]]:
    """Cut a stretch of the baseline into pieces as long as one minute of the watch, as (start, seconds).

    A baseline shorter than ten such pieces is used sample by sample: single samples scatter more than minutes,
    so its usual range is wider and the judge is duller. Ten pieces are the least from which a range can be read.
    """
    start_s = track.times_s[0]
    known = [time for time, value in zip(track.times_s, track.values, strict=True) if not math.isnan(value)]
    numbers = sorted({int((time - start_s) / minute_s + 1e-9) for time in known})
    if len(numbers) >= 10:
        return [(start_s + number * minute_s, minute_s) for number in numbers]
    return [(time, interval_s) for time in known]
