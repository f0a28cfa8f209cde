"""Charts of a telemetry watch as PNG: baseline beside current, the limits between them, the verdict in words.

Legible without colour: the two windows differ in line style and marker too, limits carry their figures as text.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING

from runbook_lib.watch import Judgement, MetricJudgement, Sample
from runbook_lib.watch_config import ERRORS, P95, QUEUE, REQUESTS
from runbook_lib.watch_series import STRETCH_GAP_S

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNITS: Mapping[str, str] = {P95: "seconds", REQUESTS: "requests / s", ERRORS: "errors / s", QUEUE: "jobs"}
TITLES: Mapping[str, str] = {
    P95: "Latency, 95th percentile",
    REQUESTS: "Traffic",
    ERRORS: "Server errors (5xx)",
    QUEUE: "Queue depth",
}
# Okabe and Ito's palette: told apart with every common colour blindness, and in grey.
BASELINE, CURRENT, JUDGED, LIMIT, HARD = "#0072B2", "#D55E00", "#444444", "#000000", "#AA4499"
GRID = "#DDDDDD"
VERDICT_COLOURS: Mapping[str, str] = {"green": "#006B4F", "red": "#B03000", "inconclusive": "#7A5200"}
VERDICT_MARKS: Mapping[str, str] = {"green": "✔ GREEN", "red": "✖ RED", "inconclusive": "? INCONCLUSIVE"}
MARKERS = "osD^vPX*"
DPI = 110
DAY_S = 86400.0
YEAR_2200_S = 7_258_118_400.0
FINITE = 1e100  # the judge takes larger values for infinite; they cannot be drawn


def chart(
    metric: str, samples: Iterable[Sample], judgement: Judgement, *, title: str | None = None, unit: str | None = None
) -> bytes:  # fmt: skip
    """Draw one metric and return a PNG.

    Args:
        metric: its name in the samples and in the judgement.
        samples: what was judged; other metrics are passed over, missing values leave gaps.
        judgement: what `judge` said of the same samples.
        title: words for people; the metric's own by default.
        unit: label of the value axis; the metric's own by default.
    """
    figure = _figure(9.0, 4.2)
    axes = figure.subplots()
    _draw(axes, metric, list(samples), judgement, title, unit)
    # Below the panel: inside it would cover data.
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    return _png(figure)


def overview(
    samples: Iterable[Sample], judgement: Judgement, *, title: str = "Telemetry watch", so_far: str = ""
) -> bytes:  # fmt: skip
    """Draw every judged metric as small multiples with one legend, and return a PNG.

    Args:
        samples: what was judged.
        judgement: what `judge` said of the same samples.
        title: words for people.
        so_far: how far a watch is that still goes on, in words that stand where its verdict will.
    """
    rows = list(samples)
    metrics = list(judgement.metrics)
    columns = 1 if len(metrics) == 1 else 2
    lines = max(1, math.ceil(len(metrics) / columns))
    figure = _figure(6.4 * columns, 3.1 * lines + 0.9)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, metric in zip(grid, metrics, strict=False):
        _draw(axes, metric, rows, judgement, None, None, verdict=not so_far)
    for axes in grid[len(metrics) :]:
        axes.set_axis_off()
    # Limits carry their figures in each panel and instances have charts of their own: each kind is named once.
    instances = sorted({sample.instance for sample in rows if sample.instance}, key=len, reverse=True)
    shared: dict[str, Artist] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            kind = next((label.removesuffix(f" {name}") for name in instances if label.endswith(f" {name}")), label)
            shared.setdefault(kind.split(" = ")[0], handle)
    if shared:
        figure.legend(list(shared.values()), list(shared), loc="outside lower center", ncols=6, fontsize=8)
    colour = LIMIT if so_far else VERDICT_COLOURS[judgement.verdict]
    said = so_far or VERDICT_MARKS[judgement.verdict]
    figure.suptitle(f"{title}: {said}", fontweight="bold", color=colour)
    return _png(figure)


def chart_data(metric: str, samples: Iterable[Sample]) -> str:
    """Return the data that a chart shows, as a CSV that `runbook judge` reads again."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("time", "metric", "value", "window", "instance"))
    chosen = [sample for sample in samples if sample.metric == metric]
    for s in sorted(chosen, key=lambda s: (s.time_s, s.window, s.instance or "")):
        value = "" if math.isnan(s.value) else repr(s.value)
        writer.writerow((_iso(s.time_s), metric, value, s.window, s.instance or ""))
    return out.getvalue()


def describe(metric: str, judgement: Judgement) -> str:
    """Say in one line what the chart of `metric` shows, for an image's alternative text."""
    judged = judgement.metrics.get(metric)
    if judged is None:
        return f"{TITLES.get(metric, metric)}: not judged"
    said = "; ".join(judged.reasons) or "no reason for doubt"
    return f"{TITLES.get(metric, metric)}: {judged.verdict}. {said}."


def _iso(time_s: float) -> str:
    """Write a time for people; what no calendar holds stays a number, which the reader takes as well."""
    try:
        return datetime.fromtimestamp(time_s, UTC).isoformat().replace("+00:00", "Z")
    except (OverflowError, ValueError, OSError):
        return repr(time_s)


def _figure(width_in: float, height_in: float) -> Figure:
    # The object interface leaves matplotlib's global state and the notebook's own backend alone; importing it
    # here keeps half a second off every command that draws nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    # No version or date inside: the same data give the same bytes, so a record can be drawn again and compared.
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of a panel, on the clock that it is drawn at."""

    label: str
    window: str
    marker: str
    points: tuple[tuple[float, float], ...]
    shifted: bool = False


def _lines(rows: Sequence[Sample]) -> list[_Line]:
    """Turn samples into lines; a baseline of another day is moved by whole days to lie beside this one."""
    tracks: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        value = row.value if abs(row.value) < FINITE else math.nan
        tracks.setdefault((row.window, row.instance or ""), []).append((row.time_s, value))
    start_s = min((row.time_s for row in rows if row.window == "current"), default=0.0)
    instances = sorted({instance for _, instance in tracks})
    lines = []
    for (window, instance), track in sorted(tracks.items()):
        marker = MARKERS[instances.index(instance) % len(MARKERS)]
        for piece in _pieces(sorted(track)):
            days = math.ceil((start_s - piece[-1][0] - STRETCH_GAP_S) / DAY_S) if window == "baseline" else 0
            moved = tuple((time_s + max(0, days) * DAY_S, value) for time_s, value in _with_gaps(piece))
            name = f"{window}, {days} d earlier" if days > 0 else window
            lines.append(_Line(" ".join(part for part in (name, instance) if part), window, marker, moved, days > 0))
    return lines


def _pieces(track: Sequence[tuple[float, float]]) -> list[Sequence[tuple[float, float]]]:
    cuts = [n + 1 for n, (a, b) in enumerate(pairwise(track)) if b[0] - a[0] > STRETCH_GAP_S]
    return [track[a:b] for a, b in pairwise([0, *cuts, len(track)])]


def _with_gaps(piece: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Break the line where samples are missing: a straight stroke over a gap would be invented data."""
    steps = sorted(b[0] - a[0] for a, b in pairwise(piece))
    usual_s = steps[len(steps) // 2] if steps else 0.0
    broken = list(piece[:1])
    for before, after in pairwise(piece):
        if after[0] - before[0] > 2.5 * usual_s:
            broken.append((before[0] + usual_s, math.nan))
        broken.append(after)
    return broken


def _draw(
    axes: Axes, metric: str, samples: Sequence[Sample], judgement: Judgement, title: str | None, unit: str | None,
    *, verdict: bool = True,
) -> None:  # fmt: skip
    """Draw one metric into one panel."""
    rows = [sample for sample in samples if sample.metric == metric]
    judged = judgement.metrics.get(metric)
    lines = _lines(rows)
    scale = _clock(axes, [time_s for line in lines for time_s, _ in line.points])
    for line in lines:
        axes.plot(
            [scale(time_s) for time_s, _ in line.points],
            [value for _, value in line.points],
            linestyle=":" if line.shifted else "--" if line.window == "baseline" else "-",
            color=BASELINE if line.window == "baseline" else CURRENT,
            linewidth=1.2,
            marker=line.marker,
            # Few markers: they tell instances apart, the line tells the story.
            markevery=max(1, len(line.points) // 12),
            markersize=4,
            label=line.label,
        )
    start_s = judgement.window.get("start_s")
    if judged and verdict:
        _draw_minutes(axes, judged, judgement, scale)
    elif isinstance(start_s, float) and any(line.window == "current" for line in lines):
        # What is still to come is empty ground.
        axes.axvspan(
            scale(start_s),
            scale(start_s + float(str(judgement.window["duration_s"]))),
            color=GRID,
            alpha=0.35,
            linewidth=0,
        )
    _draw_limits(axes, judgement.thresholds.get(metric, {}))
    if not rows:
        axes.text(0.5, 0.5, "no samples", transform=axes.transAxes, ha="center")
    axes.set_ylabel(unit if unit is not None else UNITS.get(metric, ""))
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.02, y=0.12)
    if not any(value < 0 for line in lines for _, value in line.points):
        axes.set_ylim(bottom=0, top=None if any(axes.get_ylim()) and axes.get_ylim()[1] > 0.01 else 1)
    name = title if title is not None else TITLES.get(metric, metric)
    word = judged.verdict if judged else "inconclusive"
    axes.set_title(
        f"{name}: {VERDICT_MARKS[word]}" if verdict else name,
        color=VERDICT_COLOURS[word] if verdict else LIMIT,
        fontweight="bold",
        fontsize=10,
        loc="left",
    )


def _draw_minutes(axes: Axes, judged: MetricJudgement, judgement: Judgement, scale: Callable[[float], float]) -> None:
    """Draw the fifteen values that were compared: bars of a minute's length over the raw samples."""
    minutes, minute_s, start_s = (
        judged.figures.get("minutes"),
        judged.figures.get("minute_s"),
        judgement.window.get("start_s"),
    )
    if not (isinstance(minutes, tuple) and isinstance(minute_s, float) and isinstance(start_s, float)):
        return
    there = [(n, value) for n, value in enumerate(minutes) if value is not None and abs(value) < FINITE]
    left = [scale(start_s + n * minute_s) for n, _ in there]
    right = [scale(start_s + (n + 1) * minute_s) for n, _ in there]
    said = "as judged, all instances together" if judged.instances else "as judged"
    # The watch's ground is tinted: which half is which shows without any colour of a line.
    axes.axvspan(scale(start_s), scale(start_s + len(minutes) * minute_s), color=GRID, alpha=0.35, linewidth=0)
    axes.hlines([value for _, value in there], left, right, color=JUDGED, linewidth=3, alpha=0.55, label=said)


def _draw_limits(axes: Axes, thresholds: Mapping[str, object]) -> None:
    """Draw the limits that were in force, with their figures."""
    side = "below" if thresholds.get("worse") == "down" else "above"
    for key, label, style, colour in (
        ("red_beyond", f"counts as bad {side}", "-.", LIMIT),
        ("hard_limit", "hard limit", (0, (5, 1)), HARD),
    ):
        limit = thresholds.get(key)
        if isinstance(limit, float) and abs(limit) < FINITE:
            axes.axhline(limit, linestyle=style, color=colour, linewidth=1.4, label=f"{label} = {limit:.4g}")
            axes.annotate(
                f"{limit:.4g}",
                (0, limit),
                xycoords=("axes fraction", "data"),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=7,
                color=colour,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            )


def _clock(axes: Axes, times_s: Sequence[float]) -> Callable[[float], float]:
    """Give a panel a UTC axis and return the way from epoch seconds onto it."""
    if not times_s or min(times_s) < 0 or max(times_s) > YEAR_2200_S:
        # Series that count from nowhere have no calendar.
        axes.set_xlabel("seconds")
        return lambda time_s: time_s
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(tz=UTC, minticks=3, maxticks=8)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, tz=UTC, show_offset=False))  # type: ignore[no-untyped-call]
    first, last = (datetime.fromtimestamp(at, UTC) for at in (min(times_s), max(times_s)))
    ends = f"{last:%H:%M}" if first.date() == last.date() else f"{last:%Y-%m-%d %H:%M}"
    axes.set_xlabel(f"UTC, {first:%Y-%m-%d %H:%M} to {ends}", fontsize=8)
    return lambda time_s: time_s / DAY_S
