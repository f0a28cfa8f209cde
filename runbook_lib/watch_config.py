"""What the watch expects and what counts as worse: the `watch` section of the params file, as frozen values."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

P95 = "p95_latency_s"
REQUESTS = "requests_per_s"
ERRORS = "errors_5xx_per_s"
QUEUE = "queue_depth_jobs"
DEFAULT_METRICS = (P95, REQUESTS, ERRORS, QUEUE)


SHORTEST_STEP_S = 0.001  # nobody samples a service faster; keeps counts of due samples finite
LONGEST_S = 31 * 86400  # a watch of a month is a slip of units


@dataclass(frozen=True, slots=True)
class Effect:
    """The least change of one metric that matters to a user; smaller changes are never red.

    Both floors must be passed: a relative one alone condemns 2 ms for being twice 1 ms, an absolute one alone
    fits one service only.
    """

    worse: Literal["up", "down"] = "up"
    relative: float = 0.5  # share of the baseline's level; 0.5 = half as much again
    absolute: float = 0.0  # in the metric's own unit
    combine: Literal["mean", "sum"] = "mean"  # how instances become one series

    @property
    def sign(self) -> int:
        """+1 or -1: a value times this grows as the service gets worse."""
        return 1 if self.worse == "up" else -1


DEFAULT_EFFECTS: Mapping[str, Effect] = {
    # 20 ms is below what a person notices, whatever the ratio says.
    P95: Effect("up", relative=0.5, absolute=0.02),
    # Traffic falls to under half: no proof of a fault, but no proof of health either (never red, see ADR 0007).
    REQUESTS: Effect("down", relative=0.5, absolute=0.0, combine="sum"),
    # The absolute floor counts only where no request rate is known; otherwise `error_share` does.
    ERRORS: Effect("up", relative=1.0, absolute=0.05, combine="sum"),
    QUEUE: Effect("up", relative=1.0, absolute=10.0, combine="sum"),
}


@dataclass(frozen=True, slots=True)
class WatchConfig:
    """Everything the judge may be told. Defaults have their reasons in ADR 0007."""

    duration_s: float = 900.0
    interval_s: float | None = None  # None: the baseline's median step, per metric
    metrics: tuple[str, ...] = DEFAULT_METRICS  # all of them must be green for a green verdict
    hard_limits: Mapping[str, float] = field(default_factory=dict)  # worst value allowed, in the metric's unit
    floor_rps: float = 0.5  # least mean request rate that can be judged: 450 requests in 15 minutes
    max_traffic_ratio: float = 3.0  # current / baseline; above it the two are not comparable
    error_share: float = 0.005  # least growth of errors / requests that can be red
    expected_instances: tuple[str, ...] = ()  # empty: at least as many as the baseline has
    effects: Mapping[str, Effect] = field(default_factory=dict)  # overrides and own metrics

    def effect(self, metric: str) -> Effect:
        """Return the effect in force for `metric`: the override, else the default, else `Effect()`."""
        return self.effects.get(metric) or DEFAULT_EFFECTS.get(metric) or Effect()


def config_from_mapping(mapping: Mapping[str, object]) -> WatchConfig:
    """Read a `watch` section, given alone or under the one key `watch`.

    Raises:
        ValueError: an unknown key, a wrong type or a value out of range; the message names the key.
    """
    # A file may hold anything; say so in words. Dotted keys are how `--set` and the manual write them.
    mapping = {key.removeprefix("watch."): value for key, value in _table(mapping, "watch").items()}
    if set(mapping) == {"watch"}:
        return config_from_mapping(_table(mapping["watch"], "watch"))
    known = [item.name for item in fields(WatchConfig)]
    for key in mapping:
        if key not in known:
            raise ValueError(f"watch.{key}: unknown key; known are {', '.join(known)}")
    default = WatchConfig()

    def number(key: str, *, above_zero: bool = False) -> float:
        return _number(mapping.get(key, getattr(default, key)), f"watch.{key}", above_zero=above_zero)

    interval = mapping.get("interval_s")
    duration_s = number("duration_s", above_zero=True)
    if not 1 <= duration_s <= LONGEST_S:
        raise ValueError(f"watch.duration_s: {duration_s!r} is not between 1 and {LONGEST_S}")
    if interval is not None and _number(interval, "watch.interval_s") < SHORTEST_STEP_S:
        raise ValueError(f"watch.interval_s: {interval!r} is under {SHORTEST_STEP_S}")
    metrics = _names(mapping.get("metrics", default.metrics), "watch.metrics")
    if not metrics:
        raise ValueError("watch.metrics: empty; name at least one metric")
    limits = _table(mapping.get("hard_limits", {}), "watch.hard_limits")
    effects = _table(mapping.get("effects", {}), "watch.effects")
    for section, table in (("hard_limits", limits), ("effects", effects)):
        for metric in table:
            if metric not in metrics:
                raise ValueError(f"watch.{section}.{metric}: not one of watch.metrics ({', '.join(metrics)})")
    return WatchConfig(
        duration_s=duration_s,
        interval_s=None if interval is None else _number(interval, "watch.interval_s", above_zero=True),
        metrics=metrics,
        hard_limits={name: _number(limit, f"watch.hard_limits.{name}") for name, limit in limits.items()},
        floor_rps=number("floor_rps"),
        max_traffic_ratio=number("max_traffic_ratio", above_zero=True),
        error_share=number("error_share", above_zero=True),
        expected_instances=_names(mapping.get("expected_instances", ()), "watch.expected_instances"),
        effects={name: _effect(name, table) for name, table in effects.items()},
    )


def _effect(metric: str, value: object) -> Effect:
    """Lay the given keys over the metric's default effect."""
    where = f"watch.effects.{metric}"
    table = _table(value, where)
    base = DEFAULT_EFFECTS.get(metric, Effect())
    known = [item.name for item in fields(Effect)]
    for key in table:
        if key not in known:
            raise ValueError(f"{where}.{key}: unknown key; known are {', '.join(known)}")
    worse, combine = table.get("worse", base.worse), table.get("combine", base.combine)
    if worse not in ("up", "down"):
        raise ValueError(f"{where}.worse: {worse!r} is neither 'up' nor 'down'")
    if combine not in ("mean", "sum"):
        raise ValueError(f"{where}.combine: {combine!r} is neither 'mean' nor 'sum'")
    return Effect(
        "up" if worse == "up" else "down",
        relative=_number(table.get("relative", base.relative), f"{where}.relative"),
        absolute=_number(table.get("absolute", base.absolute), f"{where}.absolute"),
        combine="mean" if combine == "mean" else "sum",
    )


def _table(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{where}: {value!r} is not a table of names")
    return value


def _names(value: object, where: str) -> tuple[str, ...]:
    # A bare string is a sequence too: without this check `metrics: p95_latency_s` becomes 13 metrics.
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"{where}: {value!r} is not a list of names")
    if len(set(value)) != len(value):
        raise ValueError(f"{where}: {value!r} names something twice")
    return tuple(value)


def _number(value: object, where: str, *, above_zero: bool = False) -> float:
    # bool is an int in Python, but `duration_s: yes` is a mistake.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: {value!r} is not a number")  # noqa: TRY004  (one error type for a bad file)
    # A whole number past the floating-point range is no number here.
    if abs(value) > sys.float_info.max or math.isnan(value) or value < 0 or (above_zero and value == 0):
        raise ValueError(f"{where}: {value!r} must be {'above' if above_zero else 'at least'} 0 and finite")
    return float(value)
