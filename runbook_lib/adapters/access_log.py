"""Telemetry read from a load balancer's access log in JSON lines.

A line: `time` (epoch seconds), `status`, `duration_s`, `maintenance` (what the maintenance mode marked its refusal
with, or null), `bypass` (a smoke test's or spot check's request).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from runbook_lib.errors import UnavailableError
from runbook_lib.watch import Sample

_BLOCK_BYTES = 1 << 20
# A line is written when its request ends and carries when it began: lines are out of order by as much as one lasts.
_LONGEST_REQUEST_S = 120.0


def read_lines(path: Path, since_s: float) -> list[dict[str, Any]]:
    """The log's lines from `since_s` (epoch seconds) on; read backwards, so that a large log costs little.

    Raises:
        UnavailableError: the log cannot be read.
    """
    try:
        with path.open("rb") as file:
            end, tail = file.seek(0, 2), b""
            while end > 0:
                start = max(0, end - _BLOCK_BYTES)
                file.seek(start)
                tail = file.read(end - start) + tail
                end = start
                first = tail.find(b"\n") + 1 if end else 0
                oldest = _whole(tail[first : tail.find(b"\n", first) + 1])
                if oldest is not None and oldest["time"] < since_s - _LONGEST_REQUEST_S:
                    break
    except OSError as error:
        raise UnavailableError(
            f"the access log {path} cannot be read: {error.strerror}", remedy="mend watch.access_log"
        ) from error
    found = []
    for raw in tail.splitlines(keepends=True):
        if not raw.endswith(b"\n"):
            continue  # still being written
        line = _whole(raw)
        if line is not None and line["time"] >= since_s:
            found.append(line)
    return found


def _whole(raw: bytes) -> dict[str, Any] | None:
    """One line of the log; None when it is torn, as the first of a block or the last before a crash is."""
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    if not isinstance(line, dict):
        return None
    numbers = (line.get("time"), line.get("status"), line.get("duration_s"))
    return line if all(isinstance(number, int | float) for number in numbers) else None


def samples(lines: list[dict[str, Any]], start_s: float, end_s: float, interval_s: float, window: str) -> list[Sample]:
    """One sample a metric and interval: p95_latency_s, requests_per_s, errors_5xx_per_s, refused_per_s.

    Refusals of the maintenance mode are a series of their own: neither errors nor part of the latency.
    Requests of smoke tests and spot checks are left out. p95 by the nearest-rank method.
    """
    count = round((end_s - start_s) / interval_s)
    buckets: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        index = math.floor((line["time"] - start_s) / interval_s)
        if 0 <= index < count and not line.get("bypass"):
            buckets[index].append(line)
    found = []
    for index in range(count):
        time_s = start_s + (index + 1) * interval_s
        refused = [line for line in buckets[index] if line.get("maintenance")]
        served = [line for line in buckets[index] if not line.get("maintenance")]
        durations = sorted(line["duration_s"] for line in served)
        values = {
            "p95_latency_s": durations[math.ceil(0.95 * len(durations)) - 1] if durations else math.nan,
            "requests_per_s": len(served) / interval_s,
            "errors_5xx_per_s": sum(line["status"] >= 500 for line in served) / interval_s,
            "refused_per_s": len(refused) / interval_s,
        }
        found += [Sample(time_s, metric, value, window) for metric, value in values.items()]  # type: ignore[arg-type]
    return found
