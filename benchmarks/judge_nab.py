"""Measure the telemetry judge: false alarms on calm public series, detection of labelled and injected faults.

Usage: python benchmarks/judge_nab.py NAB_FOLDER [--split held-out|development] [--json]

NAB_FOLDER holds `data/**.csv` and `labels/combined_windows.json` of the Numenta Anomaly Benchmark. Its points lie
five minutes apart, so one point stands for one sample: 60 points of baseline, 20, 30 or 60 points of watch. Which
series is held out was fixed by the parity of the SHA-256 of its path before any of them was looked at.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from runbook_lib.watch import Sample, Verdict, WatchConfig, judge
from runbook_lib.watch_config import ERRORS, P95, QUEUE, REQUESTS
from runbook_lib.watch_series import Window

STEP_S = 300.0
BASELINE_POINTS = 60
WATCH_POINTS = (20, 30, 60)
SYNTHETIC_POINTS = 30
STRIDE_POINTS = 15
Fault = Callable[[list[float]], list[float]]


@dataclass(frozen=True, slots=True)
class Series:
    """One public series on its own clock; `sick` are the labelled windows in epoch seconds."""

    name: str
    times_s: list[float]
    values: list[float]
    sick: list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Case:
    """A stretch of one series: the baseline, then the watch."""

    times_s: list[float]
    baseline: list[float]
    current: list[float]

    @property
    def steady(self) -> bool:
        """Tell whether the baseline itself stays within half of its median, nine points in ten."""
        middle = median(self.baseline)
        near = sum(abs(value - middle) <= 0.5 * middle for value in self.baseline)
        return middle > 0 and near >= 0.9 * len(self.baseline)


def epoch_s(text: str) -> float:
    """Read NAB's timestamps, which name no zone and are UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def held_out(name: str) -> bool:
    """Tell on which side of the split a series lies; `name` is its path below `data/`."""
    return hashlib.sha256(name.encode()).digest()[-1] % 2 == 1


def load(folder: Path) -> Iterator[Series]:
    """Read every series with its labels."""
    labels = json.loads((folder / "labels" / "combined_windows.json").read_text())
    for path in sorted((folder / "data").glob("*/*.csv")):
        name = path.relative_to(folder / "data").as_posix()
        rows = list(csv.DictReader(path.read_text().splitlines()))
        sick = [(epoch_s(start), epoch_s(end)) for start, end in labels.get(name, [])]
        yield Series(name, [epoch_s(r["timestamp"]) for r in rows], [float(r["value"]) for r in rows], sick)


def cases(series: Series, points: int, *, calm: bool) -> Iterator[Case]:
    """Slide over a series; calm cases touch no label, the others have a calm baseline and a watch inside one."""
    for at in range(0, len(series.times_s) - BASELINE_POINTS - points, STRIDE_POINTS):
        middle, end = at + BASELINE_POINTS, at + BASELINE_POINTS + points
        times = series.times_s[at:end]
        # A hole in the recording says nothing of the judge's rules.
        if times[-1] - times[0] > 1.05 * (len(times) - 1) * STEP_S:
            continue
        touched = [any(a <= t <= b for a, b in series.sick) for t in times]
        wanted = not any(touched) if calm else not any(touched[:BASELINE_POINTS]) and any(touched)
        if wanted:
            yield Case(times, series.values[at:middle], series.values[middle:end])


def inside(series: Series, start_s: float, end_s: float) -> Iterator[Case]:
    """Slide a watch of the synthetic length through one labelled window; its baseline may touch the label."""
    points = SYNTHETIC_POINTS
    for middle in range(BASELINE_POINTS, len(series.times_s) - points, 5):
        at, end = middle - BASELINE_POINTS, middle + points
        if start_s <= series.times_s[middle] and series.times_s[end - 1] <= end_s:
            yield Case(series.times_s[at:end], series.values[at:middle], series.values[middle:end])


def samples(metric: str, case: Case, current: Sequence[float]) -> list[Sample]:
    """Lay a case out as the judge reads it, on an even clock."""
    return [
        Sample(n * STEP_S, metric, value, "baseline" if n < BASELINE_POINTS else "current")
        for n, value in enumerate([*case.baseline, *current])
    ]


def verdict(metric: str, case: Case, current: Sequence[float]) -> Verdict:
    """Judge one metric alone."""
    config = WatchConfig(duration_s=len(current) * STEP_S, metrics=(metric,))
    return judge(samples(metric, case, current), config).verdict


def times_over(factor: float) -> Fault:
    """Every sample of the watch is `factor` times what it was."""
    return lambda values: [factor * value for value in values]


def halfway(factor: float) -> Fault:
    """It breaks in the middle of the watch and stays broken."""
    return lambda values: [value * (factor if 2 * n >= len(values) else 1) for n, value in enumerate(values)]


def drift(factor: float) -> Fault:
    """It slides to `factor` times over the watch."""
    return lambda values: [value * (1 + (factor - 1) * n / len(values)) for n, value in enumerate(values)]


def spike(factor: float) -> Fault:
    """One sample alone is wild: not a fault."""
    return lambda values: [value * (factor if n == len(values) // 2 else 1) for n, value in enumerate(values)]


LATENCY_FAULTS: dict[str, Fault] = {
    "p95 x2": times_over(2),
    "p95 x3": times_over(3),
    "p95 x3 from the middle on": halfway(3),
    "p95 drifting to x3": drift(3),
    "one sample x20 (no fault)": spike(20),
}


def poisson(mean: float, dice: random.Random) -> int:
    """Draw a count; a normal approximation above 50 keeps it quick."""
    if mean > 50:
        return max(0, round(dice.gauss(mean, math.sqrt(mean))))
    limit, count, product = math.exp(-mean), 0, dice.random()
    while product > limit:
        product *= dice.random()
        count += 1
    return count


def error_case(case: Case, rate: float, before: float, share: float, dice: random.Random) -> Verdict:
    """Ride failures on a calm series taken as traffic, scaled to a mean of `rate` requests per second."""
    mean = sum(case.baseline) / len(case.baseline) or 1.0
    # The shape of the traffic is the series', but no service is judged by minutes without a user.
    requests = [max(0.1 * rate, rate * value / mean) for value in [*case.baseline, *case.current]]
    rows, step_s = [], 900.0 / len(case.current)
    for n, rps in enumerate(requests):
        window: Window = "baseline" if n < BASELINE_POINTS else "current"
        failing = before if window == "baseline" else share
        errors = poisson(rps * step_s * failing, dice) / step_s
        rows.append(Sample(n * step_s, REQUESTS, rps, window))
        rows.append(Sample(n * step_s, ERRORS, errors, window))
    return judge(rows, WatchConfig(metrics=(REQUESTS, ERRORS))).metrics[ERRORS].verdict


def queue_case(case: Case, gain_jobs: float, dice: random.Random) -> Verdict:
    """Let a queue of about five jobs grow by `gain_jobs` over the watch."""
    before = [float(poisson(5, dice)) for _ in case.baseline]
    after = [poisson(5, dice) + gain_jobs * n / len(case.current) for n in range(len(case.current))]
    return verdict(QUEUE, Case(case.times_s, before, after), after)


def measure(chosen: Sequence[Series]) -> dict[str, Counter[str]]:
    """Judge every case; the result counts verdicts per row of the table."""
    table: dict[str, Counter[str]] = {}

    def count(row: str, found: str) -> None:
        table.setdefault(row, Counter())[found] += 1

    for series in chosen:
        dice = random.Random(series.name)
        for points in WATCH_POINTS:
            for case in cases(series, points, calm=True):
                found = verdict(P95, case, case.current)
                count(f"calm, as p95, {points} points", found)
                count(f"calm, as p95, {Path(series.name).stem}", found)
                count("calm, as queue depth", verdict(QUEUE, case, case.current))
                count("calm, as traffic (never red)", verdict(REQUESTS, case, case.current))
                for name, fault in LATENCY_FAULTS.items():
                    if median(case.baseline) > 0:
                        found = verdict(P95, case, fault(case.current))
                        count(f"{name}, {'steady' if case.steady else 'restless'} baseline", found)
                if points != SYNTHETIC_POINTS:
                    continue  # what follows rides on the series, so one length is enough
                for rate in (2.0, 20.0):
                    count(f"errors 0 -> 0 %, {rate:g} rps", error_case(case, rate, 0, 0, dice))
                    count(f"errors 0.1 -> 0.1 %, {rate:g} rps", error_case(case, rate, 0.001, 0.001, dice))
                    count(f"errors 0 -> 1 %, {rate:g} rps", error_case(case, rate, 0, 0.01, dice))
                    count(f"errors 0.1 -> 5 %, {rate:g} rps", error_case(case, rate, 0.001, 0.05, dice))
                count("queue steady at 5", queue_case(case, 0, dice))
                count("queue 5 -> 35 growing", queue_case(case, 30, dice))
                count("queue 5 -> 65 growing", queue_case(case, 60, dice))
            for case in cases(series, points, calm=False):
                count("labelled, onset in the watch", verdict(P95, case, case.current))
        for start_s, end_s in series.sick:
            within = {verdict(P95, case, case.current) for case in inside(series, start_s, end_s)}
            worst = next((v for v in ("red", "inconclusive") if v in within), "green")
            count("labelled windows, the worst watch inside", worst)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; exit status 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=("held-out", "development"), default="held-out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    chosen = [s for s in load(options.folder) if held_out(s.name) == (options.split == "held-out")]
    table = measure(chosen)
    if options.json:
        json.dump({"split": options.split, "series": [s.name for s in chosen], "table": table}, sys.stdout)
        return 0
    sys.stdout.write(f"{options.split}: {len(chosen)} series\n\n")
    sys.stdout.write("| case | n | red % | inconclusive % | green % |\n|---|---:|---:|---:|---:|\n")
    for row, found in sorted(table.items()):
        n = found.total()
        shares = " | ".join(f"{100 * found[v] / n:.1f}" for v in ("red", "inconclusive", "green"))
        sys.stdout.write(f"| {row} | {n} | {shares} |\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
