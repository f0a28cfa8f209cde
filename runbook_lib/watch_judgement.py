"""What the judge hands out: the verdict with its sentences, figures and thresholds, ready for strict JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from runbook_lib.watch_rules import Verdict


@dataclass(frozen=True, slots=True)
class MetricJudgement:
    """One metric's verdict, the sentences behind it and the figures that a chart or a person needs."""

    verdict: Verdict
    reasons: tuple[str, ...]
    figures: Mapping[str, object] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    instances: Mapping[str, MetricJudgement] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """Return plain JSON values; a figure that is not finite becomes null."""
        rows: dict[str, object] = {"verdict": self.verdict, "reasons": list(self.reasons)}
        rows |= {key: _plain(value) for key, value in self.figures.items()}
        if self.instances:
            rows["instances"] = {name: one.as_json() for name, one in self.instances.items()}
        return rows


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on a watch. `ignored` names metrics in the series that nobody asked to judge."""

    verdict: Verdict
    metrics: Mapping[str, MetricJudgement]
    thresholds: Mapping[str, Mapping[str, object]]
    window: Mapping[str, object] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        """Return what `runbook judge` prints."""
        return {
            "verdict": self.verdict,
            "metrics": {name: metric.as_json() for name, metric in self.metrics.items()},
            "thresholds": {name: _plain(table) for name, table in self.thresholds.items()},
            "window": _plain(self.window),
            "ignored": list(self.ignored),
        }


def _plain(value: object) -> object:
    """Make a value fit for strict JSON."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case tuple() | list():
            return [_plain(item) for item in value]
    return value
