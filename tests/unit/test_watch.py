"""The promises of the telemetry judge, on synthetic watches; its error rates are measured in benchmarks/."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runbook_lib.watch import Sample, WatchConfig, config_from_mapping, judge, read_series
from runbook_lib.watch_config import ERRORS, P95, QUEUE, REQUESTS

STEP_S = 15.0
START_S = 1_750_000_000.0
Shape = Callable[[float], float]  # share of the watch that has passed → value


def rows(
    metric: str, before: Shape, during: Shape, *, instance: str | None = None, step_s: float = STEP_S,
    duration_s: float = 900.0,
) -> list[Sample]:  # fmt: skip
    """Lay out an hour of baseline and a watch, or as many windows of baseline as make four of the watch."""
    early = range(round(4 * duration_s / step_s))
    late = range(round(duration_s / step_s))
    return [
        Sample(START_S - (len(early) - n) * step_s, metric, before(n / len(early)), "baseline", instance) for n in early
    ] + [Sample(START_S + n * step_s, metric, during(n / len(late)), "current", instance) for n in late]


def noisy(level: float, dice: random.Random, spread: float = 0.1) -> Shape:
    return lambda _: max(0.0, dice.gauss(level, spread * level))


def calm(dice: random.Random | None = None, **layout: float) -> dict[str, list[Sample]]:
    """Return a healthy watch, per metric, so that a test may replace one."""
    dice = dice or random.Random(7)
    shapes = {P95: noisy(0.2, dice), REQUESTS: noisy(50, dice), ERRORS: flat(0), QUEUE: noisy(5, dice, 0.4)}
    return {metric: rows(metric, shape, shape, **layout) for metric, shape in shapes.items()}  # type: ignore[arg-type]


def flat(value: float) -> Shape:
    return lambda _: value


def verdict(watch: dict[str, list[Sample]], config: WatchConfig | None = None) -> str:
    return judge(everything(watch), config).verdict


def everything(watch: dict[str, list[Sample]]) -> list[Sample]:
    return [sample for samples in watch.values() for sample in samples]


def current(samples: Iterable[Sample], change: Callable[[int, Sample], Sample | None]) -> list[Sample]:
    """Change the samples of the watch by their number; None takes one away."""
    kept: list[Sample] = []
    n = 0
    for sample in samples:
        changed: Sample | None = sample
        if sample.window == "current":
            changed, n = change(n, sample), n + 1
        if changed is not None:
            kept.append(changed)
    return kept


def missing(sample: Sample) -> Sample:
    return replace(sample, value=math.nan)


# --- green


def test_a_healthy_watch_is_green() -> None:
    judged = judge(everything(calm()))

    assert judged.verdict == "green"
    assert {metric.verdict for metric in judged.metrics.values()} == {"green"}


@pytest.mark.parametrize("seed", range(20))
def test_healthy_noise_is_never_red(seed: int) -> None:
    assert verdict(calm(random.Random(seed))) == "green"


def test_an_improvement_is_green() -> None:
    watch = calm()
    watch[P95] = rows(P95, noisy(0.4, random.Random(1)), noisy(0.1, random.Random(2)))

    assert verdict(watch) == "green"


def test_one_spike_is_not_a_fault() -> None:
    watch = calm()
    watch[P95] = current(watch[P95], lambda n, s: replace(s, value=30.0) if n == 31 else s)

    assert verdict(watch) == "green"


def test_a_single_failed_request_is_not_a_fault() -> None:
    watch = calm()
    watch[ERRORS] = current(watch[ERRORS], lambda n, s: replace(s, value=1 / STEP_S) if n == 20 else s)

    assert verdict(watch) == "green"


def test_a_doubling_too_small_to_notice_is_green() -> None:
    watch = calm()
    watch[P95] = rows(P95, flat(0.004), flat(0.009))

    assert verdict(watch) == "green"


def test_one_lost_scrape_in_twenty_is_still_green() -> None:
    watch = {m: current(s, lambda n, s: missing(s) if n % 20 == 7 else s) for m, s in calm().items()}

    assert verdict(watch) == "green"


# --- red


@pytest.mark.parametrize("factor", [2, 3, 10])
def test_a_persistent_slowdown_is_red(factor: float) -> None:
    watch = calm()
    watch[P95] = rows(P95, noisy(0.2, random.Random(1)), noisy(0.2 * factor, random.Random(2)))

    assert judge(everything(watch)).metrics[P95].verdict == "red"
    assert verdict(watch) == "red"


def test_a_service_that_breaks_in_the_middle_and_stays_broken_is_red() -> None:
    watch = calm()
    watch[P95] = rows(P95, flat(0.2), lambda part: 0.2 if part < 0.5 else 0.6)

    assert verdict(watch) == "red"


@pytest.mark.parametrize("share", [0.01, 0.05, 1.0])
def test_a_persistent_share_of_errors_is_red_from_a_clean_baseline(share: float) -> None:
    watch = calm()
    watch[ERRORS] = rows(ERRORS, flat(0), flat(50 * share))

    assert verdict(watch) == "red"


def test_the_same_errors_as_before_are_green_and_as_traffic_grows_so_may_they() -> None:
    watch = calm()
    watch[REQUESTS] = rows(REQUESTS, flat(50), flat(100))
    watch[ERRORS] = rows(ERRORS, flat(0.1), flat(0.2))

    assert verdict(watch) == "green"


def test_errors_are_judged_alone_where_no_requests_are_known() -> None:
    config = WatchConfig(metrics=(ERRORS,))

    assert verdict({ERRORS: rows(ERRORS, flat(0), flat(0.5))}, config) == "red"
    assert verdict({ERRORS: rows(ERRORS, flat(0), flat(0))}, config) == "green"


def test_a_queue_that_grows_without_a_pause_is_red() -> None:
    watch = calm()
    watch[QUEUE] = rows(QUEUE, flat(2), lambda part: 2 + 20 * part)

    assert verdict(watch) == "red"


def test_one_sick_instance_of_three_does_not_hide() -> None:
    watch = calm()
    watch[P95] = [s for name in "abc" for s in rows(P95, flat(0.2), flat(0.7 if name == "b" else 0.2), instance=name)]

    judged = judge(everything(watch)).metrics[P95]

    assert judged.verdict == "red"
    assert {name: one.verdict for name, one in judged.instances.items()} == {
        "a": "green",
        "b": "red",
        "c": "green",
    }


def test_one_instance_that_fails_requests_does_not_hide() -> None:
    watch = calm()
    watch[REQUESTS] = [s for name in "abc" for s in rows(REQUESTS, flat(20), flat(20), instance=name)]
    watch[ERRORS] = [s for name in "abc" for s in rows(ERRORS, flat(0), flat(0.3 * (name == "b")), instance=name)]

    assert verdict(watch) == "red"


def test_instances_that_scrape_at_different_moments_are_added_up() -> None:
    watch = calm()
    watch[REQUESTS] = [
        replace(s, time_s=s.time_s + offset)
        for name, offset in (("a", 0.0), ("b", 4.0), ("c", 11.0))
        for s in rows(REQUESTS, flat(20), flat(20), instance=name)
    ]
    judged = judge(everything(watch))

    assert judged.verdict == "green"
    assert judged.metrics[REQUESTS].figures["current_median"] == 60


# --- hard limits


@pytest.mark.parametrize(("minutes", "expected"), [(0, "green"), (1, "green"), (2, "inconclusive"), (3, "red")])
def test_a_hard_limit_is_broken_in_three_minutes(minutes: int, expected: str) -> None:
    watch = calm()
    watch[P95] = rows(P95, flat(0.2), lambda part: 0.25 if 5 / 15 <= part < (5 + minutes) / 15 else 0.2)

    assert verdict(watch, WatchConfig(hard_limits={P95: 0.24})) == expected


def test_a_hard_limit_holds_where_the_baseline_is_as_bad() -> None:
    watch = calm()
    watch[P95] = rows(P95, flat(2.0), flat(2.0))

    assert verdict(watch) == "green"
    assert verdict(watch, WatchConfig(hard_limits={P95: 1.5})) == "red"


def test_a_hard_limit_on_traffic_is_a_least_value_and_may_be_red() -> None:
    watch = calm()

    assert verdict(watch, WatchConfig(hard_limits={REQUESTS: 80})) == "red"
    assert verdict(watch, WatchConfig(hard_limits={REQUESTS: 10})) == "green"


# --- inconclusive


def test_degradation_in_the_last_minutes_alone_is_not_green() -> None:
    for last in (2, 3, 4):
        watch = calm()
        watch[P95] = rows(P95, flat(0.2), lambda part, last=last: 0.2 if part < 1 - last / 15 else 0.9)  # type: ignore[misc]
        assert verdict(watch) == "inconclusive"


def test_a_moderate_slowdown_is_put_to_a_person() -> None:
    watch = calm()
    watch[P95] = rows(P95, flat(0.2), flat(0.27))

    assert verdict(watch) == "inconclusive"


@pytest.mark.parametrize("metric", [P95, REQUESTS, ERRORS, QUEUE])
def test_a_metric_that_is_gone_is_inconclusive(metric: str) -> None:
    watch = calm()
    watch[metric] = [s for s in watch[metric] if s.window == "baseline"]

    assert verdict(watch) == "inconclusive"


@pytest.mark.parametrize("metric", [P95, REQUESTS, ERRORS, QUEUE])
def test_a_metric_without_a_baseline_is_inconclusive_but_its_hard_limit_counts(metric: str) -> None:
    watch = calm()
    watch[metric] = [s for s in watch[metric] if s.window == "current"]

    assert verdict(watch) == "inconclusive"
    if metric != ERRORS:
        limit = 1e6 if metric == REQUESTS else 0.0
        assert verdict(watch, WatchConfig(hard_limits={metric: limit})) == "red"


@pytest.mark.parametrize(("kept", "expected"), [(55, "green"), (54, "green"), (53, "inconclusive")])
def test_ninety_percent_of_the_points_are_needed(kept: int, expected: str) -> None:
    gone = set(random.Random(3).sample(range(2, 56), 60 - kept))
    watch = calm()
    watch[P95] = current(watch[P95], lambda n, s: None if n in gone else s)

    assert verdict(watch) == expected


def test_under_twenty_points_nothing_is_said() -> None:
    assert verdict(calm(step_s=60.0)) == "inconclusive"
    assert verdict(calm(step_s=45.0)) == "green"


@pytest.mark.parametrize(("latency_s", "expected"), [(0.2, "green"), (0.9, "red")])
def test_a_rehearsal_of_twenty_seconds_can_be_judged(latency_s: float, expected: str) -> None:
    watch = calm(step_s=1.0, duration_s=20.0)
    watch[P95] = rows(P95, flat(0.2), flat(latency_s), step_s=1.0, duration_s=20.0)

    assert verdict(watch, WatchConfig(duration_s=20, interval_s=1)) == expected


def test_a_watch_that_was_cut_short_is_inconclusive() -> None:
    watch = {metric: current(s, lambda n, s: s if n < 45 else None) for metric, s in calm().items()}

    assert verdict(watch) == "inconclusive"


def test_a_metric_that_falls_silent_at_the_end_is_not_fresh() -> None:
    watch = calm()
    watch[QUEUE] = current(watch[QUEUE], lambda n, s: s if n < 55 else None)
    judged = judge(everything(watch)).metrics[QUEUE]

    assert judged.verdict == "inconclusive"
    assert "not fresh" in judged.reasons[0]


def test_a_live_watch_ages_by_the_clock() -> None:
    samples = everything(calm())

    assert judge(samples, now_s=START_S + 905).verdict == "green"
    assert judge(samples, now_s=START_S + 2000).verdict == "inconclusive"


@pytest.mark.parametrize("traffic", [0.0, 0.1])
def test_a_silent_service_is_not_green_and_its_latency_proves_nothing(traffic: float) -> None:
    watch = calm()
    watch[REQUESTS] = rows(REQUESTS, flat(traffic), flat(traffic))
    watch[P95] = rows(P95, flat(0.2), flat(0.9))

    assert verdict(watch) == "inconclusive"


def test_errors_of_everybody_are_red_even_when_few_are_left() -> None:
    watch = calm()
    watch[REQUESTS] = rows(REQUESTS, flat(50), flat(0.4))
    watch[ERRORS] = rows(ERRORS, flat(0), flat(0.4))

    assert verdict(watch) == "red"


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.4, 5.0])
def test_traffic_that_collapses_or_explodes_is_inconclusive(factor: float) -> None:
    watch = calm()
    watch[REQUESTS] = rows(REQUESTS, flat(50), flat(50 * factor))

    assert verdict(watch) == "inconclusive"


def test_a_missing_instance_is_inconclusive() -> None:
    watch = calm()
    watch[P95] = [s for name in "abc" for s in rows(P95, flat(0.2), flat(0.2), instance=name)]
    gone = {**watch, P95: [s for s in watch[P95] if s.instance != "c" or s.window == "baseline"]}

    assert verdict(watch) == "green"
    assert verdict(gone) == "inconclusive"
    assert verdict(watch, WatchConfig(expected_instances=("a", "b", "d"))) == "inconclusive"


def test_new_instance_names_are_compared_with_the_old_ones_together() -> None:
    watch = calm()
    watch[P95] = [
        replace(s, instance=f"{s.window}-{name}")
        for name in "ab"
        for s in rows(P95, flat(0.2), flat(0.2 if name == "a" else 0.8))
    ]

    judged = judge(everything(watch)).metrics[P95]

    assert {name: one.verdict for name, one in judged.instances.items()} == {
        "current-a": "green",
        "current-b": "red",
    }


@pytest.mark.parametrize("value", [math.inf, -math.inf, -1.0])
def test_an_impossible_value_is_inconclusive(value: float) -> None:
    watch = calm()
    watch[P95] = current(watch[P95], lambda n, s: replace(s, value=value) if n == 30 else s)

    assert verdict(watch) == "inconclusive"


def test_a_stuck_exporter_is_inconclusive() -> None:
    watch = calm()
    watch[P95] = current(watch[P95], lambda _, s: replace(s, value=0.2))

    assert verdict(watch) == "inconclusive"


def test_one_request_in_twenty_failing_is_never_green_whatever_the_baseline_did() -> None:
    watch = calm()
    watch[ERRORS] = rows(ERRORS, flat(5), flat(5))

    assert verdict(watch) == "inconclusive"


def test_last_hour_and_last_week_must_agree() -> None:
    watch = calm()
    week_s = 7 * 86400
    now = rows(P95, flat(0.2), flat(0.6))
    busy = [replace(s, time_s=s.time_s - week_s, value=0.6) for s in now if s.window == "baseline"]
    quiet = [replace(s, time_s=s.time_s - week_s) for s in now if s.window == "baseline"]

    assert verdict({**watch, P95: now + busy}) == "inconclusive"
    assert verdict({**watch, P95: now + quiet}) == "red"


# --- reading


def test_a_series_file_is_read() -> None:
    text = "time,metric,value,window,instance\n2026-01-02T03:04:05Z,m,1.5,baseline,a\n1767323046,m,,current,\n"

    first, second = read_series(text)

    assert first == Sample(1767323045.0, "m", 1.5, "baseline", "a")
    assert (second.time_s, second.window, second.instance) == (1767323046.0, "current", None)
    assert math.isnan(second.value)


def test_columns_in_any_order_offsets_and_a_byte_order_mark_are_understood() -> None:
    text = "\ufeffwindow, value,metric,note,time\r\ncurrent,nan,m,x,2026-01-02 04:04:05+01:00\r\n\r\n"

    assert read_series(text)[0].time_s == 1767323045.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: no column time"),
        ("time,metric,value\n", "line 1: no column window"),
        ("time,metric,value,window\n1,m,1,current\n2,m,x,current\n", "line 3: value 'x'"),
        ("time,metric,value,window\nsoon,m,1,current\n", "line 2: time 'soon'"),
        ("time,metric,value,window\ninf,m,1,current\n", "line 2: time 'inf'"),
        ("time,metric,value,window\n1,m,1,later\n", "line 2: window 'later'"),
        ("time,metric,value,window\n1,,1,current\n", "line 2: metric is empty"),
        ("time,metric,value,window\n1,m\n", "line 2: no value"),
    ],
)
def test_an_unreadable_file_names_its_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        read_series(text)


@pytest.mark.parametrize(
    "text",
    [
        "time,metric,value,window\n",
        "time,metric,value,window\n1,p95_latency_s,1,current\n",
        "time,metric,value,window\n1,p95_latency_s,inf,current\n1,p95_latency_s,2,current\n",
        "time,metric,value,window\n-1e12,p95_latency_s,1e308,baseline\n1e12,p95_latency_s,1e308,current\n",
        "time,metric,value,window,instance\n1,p95_latency_s,1,current,a\n9e11,p95_latency_s,1,current,b\n",
    ],
)
def test_a_readable_file_always_gives_json(text: str) -> None:
    judged = judge(read_series(text))

    assert judged.verdict == "inconclusive"
    json.dumps(judged.as_json(), allow_nan=False)


def test_order_and_exact_duplicates_change_nothing_and_other_metrics_are_named() -> None:
    samples = everything(calm())
    shuffled = [*samples, *samples, Sample(START_S, "cpu", 1.0, "current")]
    random.Random(5).shuffle(shuffled)

    judged = judge(shuffled).as_json()

    assert judged.pop("ignored") == ["cpu"]
    assert {**judged, "ignored": []} == judge(samples).as_json()


def test_what_is_printed_has_the_contract_s_keys() -> None:
    printed = judge(everything(calm())).as_json()

    assert {"verdict", "metrics", "thresholds"} <= set(printed)
    assert json.loads(json.dumps(printed, allow_nan=False))["metrics"][P95]["reasons"] == []


# --- config


def test_a_config_is_read_alone_or_under_its_section() -> None:
    table = {
        "duration_s": 60,
        "metrics": [P95, "cpu"],
        "hard_limits": {P95: 2},
        "effects": {"cpu": {"relative": 1}},
    }
    config = config_from_mapping(table)

    assert config == config_from_mapping({"watch": table})
    assert (config.duration_s, config.hard_limits[P95], config.effect("cpu").relative) == (60.0, 2.0, 1.0)
    assert config_from_mapping({}) == WatchConfig()
    assert config_from_mapping({"watch.duration_s": 60}).duration_s == 60


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"durations": 1}, "watch.durations"),
        ({"duration_s": "900"}, "watch.duration_s"),
        ({"duration_s": True}, "watch.duration_s"),
        ({"duration_s": 0}, "watch.duration_s"),
        ({"interval_s": -1}, "watch.interval_s"),
        ({"floor_rps": math.nan}, "watch.floor_rps"),
        ({"metrics": P95}, "watch.metrics"),
        ({"metrics": []}, "watch.metrics"),
        ({"metrics": [P95, P95]}, "watch.metrics"),
        ({"hard_limits": {"cpu": 1}}, "watch.hard_limits.cpu"),
        ({"hard_limits": {P95: -1}}, f"watch.hard_limits.{P95}"),
        ({"hard_limits": [1]}, "watch.hard_limits"),
        ({"effects": {P95: {"size": 1}}}, f"watch.effects.{P95}.size"),
        ({"effects": {P95: {"worse": "left"}}}, f"watch.effects.{P95}.worse"),
        ({"watch": 3}, "watch"),
        ([1], "watch"),
        (5, "watch"),
    ],
)
def test_a_wrong_config_names_its_key(table: Any, key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}:"):
        config_from_mapping(table)


# --- whatever comes

METRICS = st.sampled_from([P95, REQUESTS, ERRORS, QUEUE, "cpu"])
VALUES = st.one_of(st.floats(), st.floats(0, 100), st.just(0.0))
TIMES = st.one_of(st.integers(0, 100), st.floats(-1e12, 1e12))
ANYTHING = st.lists(
    st.builds(
        Sample,
        TIMES,
        METRICS,
        VALUES,
        st.sampled_from(["baseline", "current"]),
        st.sampled_from([None, "a", "b"]),
    ),
    max_size=60,
)
LIMITS = st.dictionaries(st.sampled_from([P95, REQUESTS, ERRORS, QUEUE]), st.floats(0, 10), max_size=2)
CONFIGS = st.builds(
    WatchConfig, st.sampled_from([20.0, 100.0, 900.0]), st.sampled_from([None, 1.0]), hard_limits=LIMITS
)


@given(ANYTHING, CONFIGS)
def test_any_readable_series_gives_json(samples: list[Sample], config: WatchConfig) -> None:
    lines = [f"{s.time_s!r},{s.metric},{s.value!r},{s.window},{s.instance or ''}" for s in samples]
    text = "\n".join(["time,metric,value,window,instance", *lines])

    json.dumps(judge(read_series(text), config).as_json(), allow_nan=False)


LEVELS = st.lists(st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.4, 0.8]), min_size=15, max_size=15)
WORSE = st.lists(st.sampled_from([0.0, 0.0, 0.05, 0.3, 5.0]), min_size=60, max_size=60)
PLACES = st.sets(st.integers(0, 59), max_size=8)


def stepped(metric: str, levels: Sequence[float], scale: float) -> dict[str, list[Sample]]:
    """Lay a watch whose fifteen minutes have the given levels, for each kind of rule."""
    watch = calm()
    base = {P95: 0.2, REQUESTS: 50.0, ERRORS: 0.0, QUEUE: 5.0}[metric]
    watch[metric] = rows(metric, flat(base), lambda part: scale * levels[int(part * 15 + 1e-9)])
    return watch


SCALES = st.sampled_from([(P95, 1.0), (REQUESTS, 100.0), (ERRORS, 1.0), (ERRORS, 0.1), (QUEUE, 50.0)])
SOME_LIMIT = st.sampled_from([None, 0.28])


@given(SCALES, LEVELS, WORSE, SOME_LIMIT)
def test_worse_values_never_turn_red_to_green(
    kind: tuple[str, float], levels: list[float], worse: list[float], limit: float | None
) -> None:
    metric, scale = kind
    config = WatchConfig(hard_limits={P95: limit} if limit else {})
    watch = stepped(metric, levels, scale)
    sign = -1 if metric == REQUESTS else 1
    later = {
        **watch,
        metric: current(watch[metric], lambda n, s: replace(s, value=max(0.0, s.value + sign * scale * worse[n]))),
    }

    if verdict(watch, config) != "green":
        assert verdict(later, config) != "green"


@given(st.sampled_from([(P95, 1.0), (REQUESTS, 100.0), (QUEUE, 50.0)]), LEVELS, PLACES, SOME_LIMIT)
def test_losing_points_never_turns_doubt_into_green(
    kind: tuple[str, float], levels: list[float], places: set[int], limit: float | None
) -> None:
    metric, scale = kind
    config = WatchConfig(hard_limits={P95: limit} if limit else {})
    watch = stepped(metric, levels, scale)
    before = verdict(watch, config)

    def emptied(n: int, sample: Sample) -> Sample:
        return missing(sample) if n in places else sample

    def dropped(n: int, sample: Sample) -> Sample | None:
        return None if n in places else sample

    for lose in (emptied, dropped):
        if before != "green":
            assert verdict({**watch, metric: current(watch[metric], lose)}, config) != "green"


@given(LEVELS, PLACES, st.sampled_from([0.3, 1.0, 10.0]))
def test_losing_points_never_turns_red_errors_green(levels: list[float], places: set[int], scale: float) -> None:
    watch = stepped(ERRORS, levels, scale)
    holes = {**watch, ERRORS: current(watch[ERRORS], lambda n, s: missing(s) if n in places else s)}

    if verdict(watch) == "red":
        assert verdict(holes) != "green"
