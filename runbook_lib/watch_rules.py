"""The rules of the watch on fifteen "minutes": hard limit, level against baseline, share of failed requests.

Every rule looks at two readings of the window: `known`, where a missing sample is absent, and `feared`, where
it is as bad as can be. Red must be true of the known, green of the feared, so a gap never makes a service better.
Sizes and counts were calibrated on the development half of public series: docs/judge.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from statistics import fmean, median
from typing import Literal

from runbook_lib.watch_config import Effect
from runbook_lib.watch_series import MINUTES

Verdict = Literal["green", "red", "inconclusive"]

# All counts are in minutes of MINUTES.
HARD_BROKEN = 3  # a hard limit broken in so many is red
RED_MINUTES = 9  # so many bad minutes are red wherever they lie
RED_TAIL = 6  # or so many at the end without a good one between: it broke during the watch and stays broken
SHIFT_MINUTES = 12  # or so many beyond every level that the baseline held as long as a watch lasts
DOUBTFUL_SHIFT = 10  # fewer of those, yet never green
GROWING_TAIL = 3  # or so many at the end of a rise without a pause, for what piles up
GREEN_MINUTES = 3  # more bad minutes than this are never green; a cron job or a garbage collection takes less
GREEN_RUN = 2  # nor are more than this in a row, nor so many at the very end, where nobody knows how it goes on
USUAL = 0.9  # share of the baseline's own minutes that count as usual
ERROR_MINUTES = 4  # errors must be spread over so many minutes to be red
ERROR_COUNT = 5  # and be so many more than the baseline leads to expect
SICK_SHARE = 0.05  # a service that fails one request in twenty is never green, whatever its baseline did


@dataclass(frozen=True, slots=True)
class Finding:
    """What one rule says, with the figures and thresholds it used."""

    verdict: Verdict
    reasons: tuple[str, ...] = ()
    figures: Mapping[str, object] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)

    def doubted(self, why: str) -> Finding:
        """Return this finding with a doubt added: green becomes inconclusive, red stays red."""
        verdict: Verdict = "red" if self.verdict == "red" else "inconclusive"
        return replace(self, verdict=verdict, reasons=(*self.reasons, why))


def over_stretches(findings: Sequence[Finding]) -> Finding:
    """Join the comparisons with several times, as last hour and last week: red and green only where all agree."""
    last = findings[-1]
    verdicts = {finding.verdict for finding in findings}
    if len(verdicts) == 1:
        return last
    reasons = tuple(why for finding in findings for why in finding.reasons)
    return replace(last, verdict="inconclusive", reasons=(*reasons, "the stretches of the baseline disagree"))


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """One red → red; all green → green; otherwise, and for none at all, inconclusive."""
    found = set(verdicts)
    if "red" in found:
        return "red"
    return "green" if found == {"green"} else "inconclusive"


@dataclass(frozen=True, slots=True)
class Reading:
    """One value a minute, twice; `known` is None where no sample is known."""

    known: tuple[float | None, ...]
    feared: tuple[float, ...]


def read_medians(minutes: Sequence[Sequence[float]], sign: int) -> Reading:
    """Read each minute by its median; `sign` is +1 where more is worse, -1 where less is."""
    known, feared = [], []
    for values in minutes:
        there = [value for value in values if not math.isnan(value)]
        known.append(median(there) if there else None)
        worst = [sign * math.inf if math.isnan(value) else value for value in values]
        feared.append(median(worst) if worst else sign * math.inf)
    return Reading(tuple(known), tuple(feared))


def read_means(minutes: Sequence[Sequence[float]], sign: int) -> Reading:
    """Read each minute of a count per second by its mean; a missing sample is feared to be the worst one seen.

    Not infinite, as for medians: one lost scrape of sixty would then leave no error rate to be green.
    """
    seen = [value for values in minutes for value in values if not math.isnan(value)]
    worst = sign * max((sign * value for value in seen), default=math.inf)
    known, feared = [], []
    for values in minutes:
        there = [value for value in values if not math.isnan(value)]
        known.append(fmean(there) if there else None)
        feared.append(fmean([worst if math.isnan(value) else value for value in values]) if values else worst)
    return Reading(tuple(known), tuple(feared))


def by_limit(reading: Reading, limit: float, sign: int) -> Finding:
    """Red when the limit is broken in three minutes; two, or two that may have been, are inconclusive."""
    broken = sum(value is not None and sign * value > sign * limit for value in reading.known)
    feared = sum(sign * value > sign * limit for value in reading.feared)
    side = "above" if sign > 0 else "below"
    said = f"{broken} of {MINUTES} minutes {side} the hard limit {show(limit)}"
    figures = {"minutes_beyond_hard_limit": broken}
    if broken >= HARD_BROKEN:
        return Finding("red", (said,), figures)
    if feared >= HARD_BROKEN - 1:
        unknown = f", {feared - broken} more unknown" if feared > broken else ""
        return Finding("inconclusive", (f"{said}{unknown}",), figures)
    return Finding("green", (), figures)


def by_level(reading: Reading, reference: Sequence[float], effect: Effect) -> Finding:
    """Compare the minutes with the baseline's own: bad is beyond both the least effect and the usual range."""
    sign = effect.sign
    oriented = [sign * value for value in reference]
    level, usual = median(oriented), quantile(sorted(oriented), USUAL)
    least = max(effect.relative * abs(level), effect.absolute)
    bad_at = max(level + least, usual)
    # A baseline full of spikes has a usual range that hides a doubling, but its level over a time as long as the
    # watch moves less. Nearly all minutes beyond the highest such level are a shift.
    shift_at = min(bad_at, highest_level(oriented) + least)
    suspect_at = level + least / 2
    known = [None if value is None else sign * value for value in reading.known]
    feared = [sign * value for value in reading.feared]
    bad = [value is not None and value > bad_at for value in known]
    tail = tail_length(known, bad)
    middle, now = median(feared), median([value for value in known if value is not None] or [math.nan])
    figures: dict[str, object] = {
        "baseline_median": sign * level,
        "current_median": sign * now,
        "bad_minutes": sum(bad),
        "minutes": reading.known,
    }
    thresholds = {"red_beyond": sign * bad_at, "green_within": sign * suspect_at}
    side = "above" if sign > 0 else "below"
    said = f"{sum(bad)} of {MINUTES} minutes {side} {show(sign * bad_at)} (baseline {show(sign * level)})"
    if sum(bad) >= RED_MINUTES:
        return Finding("red", (said,), figures, thresholds)
    if tail >= RED_TAIL:
        return Finding("red", (f"{said}, the last {tail} without a pause",), figures, thresholds)
    if effect.combine == "sum" and tail >= GROWING_TAIL and rising(known):
        return Finding("red", (f"{said}, growing without a pause",), figures, thresholds)
    shifted = sum(value is not None and value > shift_at for value in known)
    shift = f"{shifted} of {MINUTES} minutes {side} {show(sign * shift_at)} (baseline {show(sign * level)})"
    if shifted >= SHIFT_MINUTES:
        return Finding("red", (shift,), figures, thresholds)
    doubt = [*lasting([value > bad_at for value in feared], said)]
    if sum(value > shift_at for value in feared) >= DOUBTFUL_SHIFT:
        doubt.append(shift)
    if not middle <= max(suspect_at, min(usual, shift_at)):
        doubt.append(f"median {show(sign * now)} is {side} {show(sign * suspect_at)} (baseline {show(sign * level)})")
    if doubt:
        return Finding("inconclusive", tuple(doubt), figures, thresholds)
    return Finding("green", (), figures, thresholds)


@dataclass(frozen=True, slots=True)
class Failures:
    """Errors and requests of one piece of time, in events per second; `seconds` long."""

    errors: float
    requests: float
    seconds: float

    @property
    def share(self) -> float:
        """Errors per request; errors without any request are a full failure."""
        if self.requests > 0:
            return self.errors / self.requests
        return math.inf if self.errors > 0 else 0.0


def by_share(
    known: Sequence[Failures | None], feared: Sequence[Failures], reference: Sequence[Failures], *, relative: float,
    absolute: float, per: str,
) -> Finding:  # fmt: skip
    """Compare failures with the baseline's: the share over the window without its worst minute, and its spread.

    Args:
        known: one a minute; None where errors or requests are not known.
        feared: the same with what is missing at its worst.
        reference: the baseline's pieces.
        relative: least growth as a share of the baseline's share.
        absolute: least growth of the share itself.
        per: what a share is a share of, for the sentences.
    """
    usual = pooled(reference)
    least = max(relative * usual, absolute)
    bad_at, suspect_at = usual + least, usual + least / 2
    minute_at = max(bad_at, quantile(sorted(piece.share for piece in reference), USUAL))
    there = [piece for piece in known if piece is not None]
    share, excess = trimmed(there, usual)
    bad = [piece is not None and piece.share > minute_at for piece in known]
    figures: dict[str, object] = {
        "baseline_share": usual,
        "current_share": pooled(there),
        "errors_beyond_baseline": excess,
        "bad_minutes": sum(bad),
        "minutes": tuple(None if piece is None else piece.errors for piece in known),
    }
    # As a rate at the traffic of the watch, so that a chart of errors per second can show it.
    rate = fmean([piece.requests for piece in there]) if there else 0.0
    thresholds = {"red_beyond_share": bad_at, "green_within_share": suspect_at, "red_beyond": bad_at * rate}
    said = (
        f"{show(100 * share)} % of {per} fail in {sum(bad)} of {MINUTES} minutes" if per == "requests"
        else f"{show(share)} errors/s in {sum(bad)} of {MINUTES} minutes"
    )  # fmt: skip
    said += f" (baseline {show(100 * usual)} %)" if per == "requests" else f" (baseline {show(usual)}/s)"
    if share > bad_at and sum(bad) >= ERROR_MINUTES and excess >= ERROR_COUNT:
        return Finding("red", (said,), figures, thresholds)
    worst_share, worst_excess = trimmed(feared, usual)
    # Two errors in a minute, not one: at low traffic a single failed request is far above any share.
    bursts = [piece.share > minute_at and excess_of(piece, usual) >= 2 for piece in feared]
    doubt = [*lasting(bursts, said)]
    if worst_share > suspect_at and worst_excess >= 2:
        doubt.append(said)
    failed = sum(piece.errors * piece.seconds for piece in feared)
    if per == "requests" and worst_share > SICK_SHARE and failed >= 2:
        doubt.append(f"one request in {max(1, round(1 / min(worst_share, 1.0)))} fails, whatever the baseline did")
    if doubt:
        return Finding("inconclusive", tuple(dict.fromkeys(doubt)), figures, thresholds)
    return Finding("green", (), figures, thresholds)


def pooled(pieces: Sequence[Failures]) -> float:
    """Share over all pieces together."""
    errors, requests = sum(p.errors * p.seconds for p in pieces), sum(p.requests * p.seconds for p in pieces)
    return Failures(errors, requests, 1.0).share


def excess_of(piece: Failures, usual: float) -> float:
    """Errors in this piece beyond what the usual share leads to expect, as a count."""
    return (piece.errors - usual * piece.requests) * piece.seconds if math.isfinite(usual) else 0.0


def trimmed(pieces: Sequence[Failures], usual: float) -> tuple[float, float]:
    """Share and excess count without the worst minute: one burst is an incident, not a broken release."""
    rest = sorted(pieces, key=lambda piece: excess_of(piece, usual))[:-1]
    share = pooled(rest)
    return (share, sum(excess_of(piece, usual) for piece in rest))


def lasting(bad: Sequence[bool], said: str) -> Iterable[str]:
    """Say why bad minutes are too many, too long or too late for green; `bad` counts unknown minutes as bad."""
    longest = max((len(list(run)) for is_bad, run in groupby(bad) if is_bad), default=0)
    if sum(bad) > GREEN_MINUTES or longest > GREEN_RUN:
        yield said if sum(bad) else f"{said}; {sum(bad)} with what is missing"
    elif all(bad[-GREEN_RUN:]):
        yield f"{said}, the last {GREEN_RUN} among them"


def tail_length(known: Sequence[float | None], bad: Sequence[bool]) -> int:
    """Bad minutes at the end, up to the last one that is known to be good."""
    length = 0
    for value, is_bad in zip(reversed(known), reversed(bad), strict=True):
        if value is not None and not is_bad:
            break
        length += is_bad
    return length


def rising(known: Sequence[float | None]) -> bool:
    """Tell whether nine in ten pairs of minutes stand in rising order."""
    there = [value for value in known if value is not None]
    pairs = [(a, b) for i, a in enumerate(there) for b in there[i + 1 :]]
    return bool(pairs) and sum(b > a for a, b in pairs) >= 0.9 * len(pairs)


def highest_level(oriented: Sequence[float]) -> float:
    """Return the highest median of any stretch of the baseline that is as long as the watch."""
    return max(median(oriented[n : n + MINUTES]) for n in range(max(1, len(oriented) - MINUTES + 1)))


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which `share` of `ordered` lies: one of its values, never between two.

    Taking a value that was seen keeps infinite ones out of arithmetic.
    """
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def show(value: float) -> str:
    """Write a figure for people, four digits."""
    return f"{value:.4g}"
