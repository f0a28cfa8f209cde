"""Judge a telemetry watch: samples in, verdict out. Pure; the rules and their reasons are in ADR 0007.

Green needs proof. For every metric: first the data contract (broken → inconclusive), then the hard limit, then
the comparison with the baseline by size and persistence. One red → red; all green → green; else inconclusive.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import TypeVar

from runbook_lib.watch_config import (
    DEFAULT_METRICS,
    ERRORS,
    P95,
    REQUESTS,
    SHORTEST_STEP_S,
    Effect,
    WatchConfig,
    config_from_mapping,
)
from runbook_lib.watch_judgement import Judgement, MetricJudgement
from runbook_lib.watch_rules import (
    ERROR_MINUTES,
    RED_MINUTES,
    Failures,
    Finding,
    Reading,
    Verdict,
    by_level,
    by_limit,
    by_share,
    over_stretches,
    pooled,
    read_means,
    read_medians,
    show,
    together,
)
from runbook_lib.watch_series import (
    MIN_POINTS,
    MIN_PRESENT,
    MINUTES,
    Sample,
    Span,
    Track,
    baseline_pieces,
    combined,
    own_span,
    read_series,
    tracks_of,
)

__all__ = [
    "Effect",
    "Judgement",
    "MetricJudgement",
    "Sample",
    "Verdict",
    "WatchConfig",
    "config_from_mapping",
    "judge",
    "read_series",
]


# So many errors beyond the baseline's are proof even where traffic is too thin to be judged otherwise.
PLENTY_OF_ERRORS = 20
NOTHING = Track((), ())
Pieces = Sequence[tuple[Track, str | None]]  # stretches of the baseline, each with its instance
_T = TypeVar("_T")


def judge(samples: Iterable[Sample], config: WatchConfig | None = None, *, now_s: float | None = None) -> Judgement:
    """Judge the samples of a watch against its baseline. Never raises on samples that `read_series` returns.

    Args:
        samples: in any order; both windows together.
        config: what is expected; the defaults of `WatchConfig` when left out.
        now_s: the present in UTC epoch seconds for a watch that is still running; None for a recorded one, which
            ends with its last row.
    """
    bench = _Bench(config or WatchConfig(), samples, now_s)
    metrics = {metric: bench.metric(metric) for metric in bench.config.metrics}
    return Judgement(
        together(one.verdict for one in metrics.values()),
        metrics,
        {metric: bench.thresholds(metric, judged) for metric, judged in metrics.items()},
        {"start_s": bench.start_s, "duration_s": bench.config.duration_s, "minutes": MINUTES},
        tuple(sorted({metric for metric, _ in bench.tracks} - set(bench.config.metrics))),
    )


class _Bench:
    """One judging: the config, the tracks and the clock that all metrics share."""

    def __init__(self, config: WatchConfig, samples: Iterable[Sample], now_s: float | None) -> None:
        self.config = config
        self.tracks = tracks_of(samples)
        current = [
            track.times_s
            for (metric, window), by_instance in self.tracks.items()
            for track in by_instance.values()
            if window == "current" and metric in config.metrics and track.times_s
        ]
        self.start_s = min((times[0] for times in current), default=0.0)
        last_s = max((times[-1] for times in current), default=0.0)
        self.last_s = last_s if now_s is None else max(last_s, now_s)
        self.named = any(name for by_instance in self.tracks.values() for name in by_instance)
        self.thin_traffic = self._thin_traffic()

    def metric(self, metric: str) -> MetricJudgement:
        """Judge one metric: as a whole, then every instance that reports on its own."""
        current = self.tracks.get((metric, "current"), {})
        baseline = self.tracks.get((metric, "baseline"), {})
        whole = self._whole(metric, "current")
        if whole is None:
            where = "current window, though the baseline has some" if baseline else "series"
            return MetricJudgement("inconclusive", (f"no samples in the {where}",))
        names = sorted(name for name in current if name is not None)
        parts: dict[str, MetricJudgement] = {}
        if len(names) > 1 or (names and None in current):
            peers = tuple(name for name in baseline if name is not None)
            for name in names:
                known = (name,) if name in baseline else peers
                parts[name] = self._judge(metric, current[name], name, [(baseline[n], n) for n in known])
        reference = self._whole(metric, "baseline")
        result = self._judge(
            metric,
            whole,
            None,
            [(reference, None)] if reference else [],
            made=None not in current and len(names) > 1,
        )
        absent = list(self._absent_instances(names, [name for name in baseline if name is not None]))
        verdicts: list[Verdict] = [result.verdict, *(one.verdict for one in parts.values())]
        if absent:
            verdicts.append("inconclusive")
        spoken = [f"{name}: {why}" for name, one in parts.items() for why in one.reasons]
        reasons = tuple(dict.fromkeys([*absent, *result.reasons, *spoken]))
        return MetricJudgement(together(verdicts), reasons, result.figures, result.thresholds, parts)

    def thresholds(self, metric: str, judged: MetricJudgement) -> dict[str, object]:
        """Every number that the verdict on `metric` hangs on."""
        effect = self.config.effect(metric)
        table: dict[str, object] = {
            "worse": effect.worse,
            "relative": effect.relative,
            "absolute": effect.absolute,
            "hard_limit": self.config.hard_limits.get(metric),
            "red_minutes": ERROR_MINUTES if metric == ERRORS else RED_MINUTES,
            "interval_s": self._interval_s(metric),
            **judged.thresholds,
        }
        if metric == REQUESTS:
            table |= {"floor_rps": self.config.floor_rps, "max_traffic_ratio": self.config.max_traffic_ratio}
        return table

    def _span(self, metric: str) -> Span:
        """Where the window of the watch lies, with the step at which `metric` is due."""
        interval_s = self._interval_s(metric)
        reach_s = self.last_s - self.start_s
        # A last row exactly at the end belongs to the window; a longer watch is judged whole.
        inclusive = reach_s <= self.config.duration_s + interval_s / 2
        return Span(self.start_s, self.config.duration_s if inclusive else reach_s + interval_s, interval_s)

    def _interval_s(self, metric: str) -> float:
        if self.config.interval_s is not None:
            return self.config.interval_s
        for window in ("baseline", "current"):
            for name in dict.fromkeys((metric, *self.config.metrics)):
                by_instance = self.tracks.get((name, window), {})
                steps = [step for track in by_instance.values() if (step := track.step_s())]
                if steps:
                    return max(SHORTEST_STEP_S, median(steps))
        return self.config.duration_s

    def _whole(self, metric: str, window: str) -> Track | None:
        """All instances of a metric as one track; rows without an instance are that track already."""
        by_instance = self.tracks.get((metric, window), {})
        if None in by_instance:
            return by_instance[None]
        tracks = list(by_instance.values())
        if len(tracks) < 2:
            return tracks[0] if tracks else None
        span = self._span(metric)
        if window == "baseline":
            first, last = min(t.times_s[0] for t in tracks), max(t.times_s[-1] for t in tracks)
            span = Span(first, last - first + span.interval_s, span.interval_s)
        return combined(tracks, span, self.config.effect(metric).combine, strict=window == "current")

    def _thin_traffic(self) -> str | None:
        """Say why traffic is too thin to judge by; None when it is not, or when nobody can tell."""
        track = self._whole(REQUESTS, "current") if REQUESTS in self.config.metrics else None
        if track is None or track.infinite:
            return None
        # A missing sample counts as no traffic: green needs proof.
        rate = sum(track.finite) / max(1, len(track.values))
        if rate >= self.config.floor_rps:
            return None
        return f"mean traffic {show(rate)}/s is under the floor of {show(self.config.floor_rps)}/s"

    def _absent_instances(self, names: Sequence[str], before: Sequence[str]) -> Iterator[str]:
        expected = self.config.expected_instances
        # A metric that never names instances is left alone where others do name them: a queue is shared.
        if expected and (names or before or not self.named):
            absent = [name for name in expected if name not in names]
            if absent:
                yield f"expected instances without samples: {', '.join(absent)}"
        elif len(names) < len(before):
            yield f"{len(names)} instances report, the baseline has {len(before)}"

    def _judge(
        self, metric: str, track: Track, name: str | None, references: Sequence[tuple[Track, str | None]], *,
        made: bool = False,
    ) -> MetricJudgement:  # fmt: skip
        """Judge one track. `made` marks a sum over instances: their own contracts speak for its holes."""
        broken = tuple(self._broken_contract(metric, track, made=made))
        if broken:
            return MetricJudgement("inconclusive", broken)
        effect, span = self.config.effect(metric), self._span(metric)
        minutes = span.minutes(track)
        reading = read_means(minutes, effect.sign) if metric == ERRORS else read_medians(minutes, effect.sign)
        findings = []
        limit = self.config.hard_limits.get(metric)
        # The limit of a sum is a limit of the whole service, not of each of its instances.
        if limit is not None and (name is None or effect.combine == "mean"):
            findings.append(by_limit(reading, limit, effect.sign))
        pieces = [(stretch, peer) for reference, peer in references for stretch in self._usable(metric, reference)]
        if not pieces:
            why = "the baseline has no stretch of 20 finite samples, 90 % complete" if references else "no baseline"
            findings.append(Finding("inconclusive", (why,), {"minutes": reading.known}))
        else:
            compare = self._by_share if metric == ERRORS else self._by_level
            findings.append(self._doubted(metric, track, compare(metric, reading, name, pieces), pieces))
        if metric in (P95, ERRORS) and self.thin_traffic:
            findings = [self._thinned(finding) for finding in findings]
        return MetricJudgement(
            together(finding.verdict for finding in findings),
            tuple(dict.fromkeys(why for finding in findings for why in finding.reasons)),
            {
                "points": len(track.finite),
                "points_expected": span.expected,
                "minute_s": span.length_s / MINUTES,
            }
            | {key: value for finding in findings for key, value in finding.figures.items()},
            {key: value for finding in findings for key, value in finding.thresholds.items()},
        )

    def _broken_contract(self, metric: str, track: Track, *, made: bool) -> Iterator[str]:
        """Say what in the current window keeps it from being judged at all."""
        span = self._span(metric)
        if track.infinite:
            yield f"{track.infinite} infinite samples: the query divides by zero or runs over"
        if metric in DEFAULT_METRICS and any(value < 0 for value in track.finite):
            yield f"negative samples, the least {show(min(track.finite))}: the query is wrong, not the service"
        if made:
            # A moment at which one instance is silent is a hole in the sum but not in anybody's reporting.
            track = Track(track.times_s, (0.0,) * len(track.times_s))
        points, ratio = len(track.finite), span.present_ratio(track)
        conflicts = f", {track.conflicts} moments with two values" if track.conflicts else ""
        if points < MIN_POINTS:
            yield f"{points} of {span.expected} points{conflicts}; under {MIN_POINTS} nothing can be said"
        elif ratio < MIN_PRESENT:
            yield f"{points} of {span.expected} points{conflicts}, {show(100 * ratio)} % complete; 90 % are needed"
        else:
            # One minute of silence may be jitter; more at the end leaves open how it goes on.
            age_s = max(span.end_s, self.last_s) - track.newest_s - span.interval_s
            if age_s > span.length_s / MINUTES:
                yield f"nothing for the last {show(age_s)} s of the window: not fresh"

    def _usable(self, metric: str, track: Track) -> list[Track]:
        """Return the stretches of a baseline track that are whole enough to compare with."""
        interval_s = self._interval_s(metric)
        return [
            stretch
            for stretch in track.stretches(interval_s)
            if len(stretch.finite) >= MIN_POINTS
            and own_span(stretch, interval_s).present_ratio(stretch) >= MIN_PRESENT
            and not (metric in DEFAULT_METRICS and min(stretch.finite) < 0)
        ]

    def _by_level(self, metric: str, reading: Reading, _name: str | None, pieces: Pieces) -> Finding:
        span = self._span(metric)
        groups = []
        for stretch, _ in pieces:
            cuts = baseline_pieces(stretch, span.length_s / MINUTES, span.interval_s)
            groups.append([median(stretch.between(start_s, start_s + long_s)) for start_s, long_s in cuts])
        return over_stretches(
            [by_level(reading, group, self.config.effect(metric)) for group in _merged(groups, pieces)]
        )

    def _by_share(self, metric: str, reading: Reading, name: str | None, pieces: Pieces) -> Finding:
        """Judge errors as a share of requests where both windows know them, else as errors per second."""
        span, effect = self._span(metric), self.config.effect(metric)
        minute_s = span.length_s / MINUTES
        traffic, absolute, per = self._traffic(name), self.config.error_share, "requests"
        before = [(stretch, self._requests(peer, "baseline") or NOTHING) for stretch, peer in pieces]
        groups = [_failures(stretch, requests, minute_s, span.interval_s) for stretch, requests in before]
        if traffic is None or not all(group and math.isfinite(pooled(group)) for group in groups):
            traffic, absolute, per = Reading((1.0,) * MINUTES, (1.0,) * MINUTES), effect.absolute, "second"
            groups = [_failures(stretch, None, minute_s, span.interval_s) for stretch, _ in before]
        known = [
            None if errors is None or requests is None else Failures(errors, requests, minute_s)
            for errors, requests in zip(reading.known, traffic.known, strict=True)
        ]
        feared = [
            Failures(errors, requests, minute_s)
            for errors, requests in zip(reading.feared, traffic.feared, strict=True)
        ]
        return over_stretches(
            [
                by_share(known, feared, group, relative=effect.relative, absolute=absolute, per=per)
                for group in _merged(groups, pieces)
            ]
        )

    def _requests(self, name: str | None, window: str) -> Track | None:
        """Return the request rate beside an error rate: of the same instance, or of all."""
        if name is None:
            return self._whole(REQUESTS, window)
        return self.tracks.get((REQUESTS, window), {}).get(name)

    def _traffic(self, name: str | None) -> Reading | None:
        track = self._requests(name, "current")
        if track is None or any(self._broken_contract(REQUESTS, track, made=False)):
            return None
        return read_means(self._span(REQUESTS).minutes(track), -1)

    def _doubted(self, metric: str, track: Track, finding: Finding, pieces: Pieces) -> Finding:
        """Take back what the figures alone cannot prove: see each sentence."""
        if metric == REQUESTS:
            # Fewer users prove no fault (maintenance, the hour of day), and no health either: never red.
            finding = finding if finding.verdict != "red" else replace(finding, verdict="inconclusive")
            before = median(value for stretch, _ in pieces for value in stretch.finite)
            ratio = median(track.finite) / before if before > 0 else 1.0
            if ratio > self.config.max_traffic_ratio:
                finding = finding.doubted(f"traffic is {show(ratio)} times the baseline's: not comparable")
            if self.thin_traffic:
                finding = finding.doubted(self.thin_traffic)
        steady = set(track.finite)
        varied = any(len(set(stretch.finite)) > len(stretch.finite) / 2 for stretch, _ in pieces)
        if varied and len(steady) == 1 and steady != {0.0}:
            finding = finding.doubted(f"every sample is {show(*steady)} where the baseline varies: is it stuck?")
        return finding

    def _thinned(self, finding: Finding) -> Finding:
        """With too little traffic nothing is green, and red are only errors that can be counted."""
        excess = finding.figures.get("errors_beyond_baseline")
        if finding.verdict == "red" and isinstance(excess, float) and excess >= PLENTY_OF_ERRORS:
            return finding
        return replace(finding.doubted(f"{self.thin_traffic}"), verdict="inconclusive")


def _failures(stretch: Track, requests: Track | None, minute_s: float, interval_s: float) -> list[Failures]:
    """Pair a baseline's errors with its requests; without `requests` the share is a rate per second."""
    found = []
    for start_s, long_s in baseline_pieces(stretch, minute_s, interval_s):
        beside = [1.0] if requests is None else requests.between(start_s, start_s + long_s)
        if beside:
            found.append(Failures(fmean(stretch.between(start_s, start_s + long_s)), fmean(beside), long_s))
    return found


def _merged(groups: list[list[_T]], pieces: Pieces) -> list[list[_T]]:
    """Pool peers: they describe one time. Stretches of one track describe several times and stay apart."""
    several = len({peer for _, peer in pieces}) > 1
    return [[value for group in groups for value in group]] if several else groups
