"""The promises of the charts: they always draw, they show what was judged, and the same data give the same bytes."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import matplotlib.image
import pytest

from runbook_lib.charts import chart, chart_data, describe, overview
from runbook_lib.watch import Sample, WatchConfig, judge, read_series
from runbook_lib.watch_config import ERRORS, P95, QUEUE, REQUESTS

START_S = 1_750_000_000.0
LEVELS = {P95: 0.2, REQUESTS: 50.0, ERRORS: 0.0, QUEUE: 4.0}


def watch(factor: float = 1.0, instances: tuple[str | None, ...] = (None,)) -> list[Sample]:
    """An hour of baseline and fifteen minutes of watch; `factor` is how much slower the watch is."""
    return [
        Sample(
            START_S + n * 15,
            metric,
            (level + 0.01 * level * (n % 7)) * (factor if metric == P95 and n >= 0 else 1),
            "baseline" if n < 0 else "current",
            instance,
        )
        for metric, level in LEVELS.items()
        for instance in instances
        for n in range(-240, 60)
    ]


def size_of(png: bytes) -> tuple[int, int]:
    """Decode a PNG and return its width and height in pixels."""
    height, width = matplotlib.image.imread(io.BytesIO(png), format="png").shape[:2]
    return int(width), int(height)


@pytest.mark.parametrize("metric", list(LEVELS))
def test_every_metric_gets_a_chart(metric: str) -> None:
    samples = watch(3)

    png = chart(metric, samples, judge(samples, WatchConfig(hard_limits={P95: 0.5})), title="2.14.0", unit="s")

    assert png.startswith(b"\x89PNG")
    assert size_of(png)[0] > 800


def test_the_overview_grows_with_the_metrics() -> None:
    samples = watch(1, ("a", "b", "c"))

    four = size_of(overview(samples, judge(samples)))
    one = size_of(overview(samples, judge(samples, WatchConfig(metrics=(P95,)))))

    assert four[0] > one[0]
    assert four[1] > one[1]


def test_the_same_data_give_the_same_bytes() -> None:
    samples = watch()
    judgement = judge(samples)

    assert chart(P95, samples, judgement) == chart(P95, list(reversed(samples)), judgement)


def test_another_verdict_gives_another_picture() -> None:
    samples = watch(3)

    assert chart(P95, samples, judge(samples)) != chart(P95, samples, judge(watch()))


def test_the_data_beside_a_chart_can_be_judged_again() -> None:
    config = WatchConfig(metrics=(P95,))
    samples = [sample for sample in watch(3, ("a", "b")) if sample.metric == P95]
    samples[70] = replace(samples[70], value=math.nan)

    again = read_series(chart_data(P95, samples))

    assert judge(again, config) == judge(samples, config)


def test_the_alternative_text_says_verdict_and_reason() -> None:
    samples = watch(3)

    assert describe(P95, judge(samples)).startswith("Latency, 95th percentile: red. 15 of 15 minutes above ")
    assert describe("cpu", judge(samples)) == "cpu: not judged"


WEEK_S = 7 * 86400.0
ODD: dict[str, list[Sample]] = {
    "nothing": [],
    "one sample": [Sample(START_S, P95, 1.0, "current")],
    "only missing": [replace(s, value=math.nan) for s in watch()],
    "infinite": [replace(s, value=math.inf) for s in watch()],
    "no baseline": [s for s in watch() if s.window == "current"],
    "no current": [s for s in watch() if s.window == "baseline"],
    "no calendar": [replace(s, time_s=s.time_s - 2 * START_S) for s in watch()],
    "far future": [replace(s, time_s=s.time_s + 9e11) for s in watch()],
    "last week too": watch() + [replace(s, time_s=s.time_s - WEEK_S) for s in watch() if s.window == "baseline"],
    "negative": [replace(s, value=-s.value) for s in watch()],
    "endless digits": [replace(s, value=9e99) for s in watch()],
    "many instances": watch(1, tuple(f"web-{n}" for n in range(12))),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("samples", ODD.values(), ids=ODD.keys())
def test_odd_series_are_drawn_without_a_word(samples: list[Sample]) -> None:
    judgement = judge(samples)

    assert chart(P95, samples, judgement).startswith(b"\x89PNG")
    assert overview(samples, judgement).startswith(b"\x89PNG")
    assert read_series(chart_data(P95, samples)) is not None
