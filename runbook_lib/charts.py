"""Charts of the watch: baseline against current, readable without colour."""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import UTC, datetime

from runbook_lib.watch import Judgement, Sample


def chart(metric: str, samples: Sequence[Sample], judgement: Judgement, *, title: str, unit: str) -> bytes:
    """One metric's two windows, one under the other in time, as PNG bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for window, style, color in (("baseline", "--", "#0072B2"), ("current", "-", "#D55E00")):
        points = sorted((s.time_s, s.value) for s in samples if s.metric == metric and s.window == window)
        times = [datetime.fromtimestamp(t, UTC) for t, _ in points]
        axes.plot(times, [v for _, v in points], style, color=color, label=window)
    axes.set_title(f"{title}: {judgement.metrics[metric].verdict}")
    axes.set_ylabel(unit)
    axes.set_xlabel("UTC")
    axes.legend()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
