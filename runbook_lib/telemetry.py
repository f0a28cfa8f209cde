"""The watch's samples: from the balancer's access log, and the queue's depth from the database."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from runbook_lib.adapters import access_log
from runbook_lib.params import Params
from runbook_lib.run import Run
from runbook_lib.watch import Sample
from runbook_lib.watch_config import WatchConfig, config_from_mapping

UNITS = {
    "p95_latency_s": "seconds",
    "requests_per_s": "requests/s",
    "errors_5xx_per_s": "errors/s",
    "queue_depth_jobs": "jobs",
}


def metrics(params: Params) -> tuple[str, ...]:
    """The metrics that this environment can measure."""
    names = ("p95_latency_s", "requests_per_s", "errors_5xx_per_s")
    return (*names, "queue_depth_jobs") if params.watch.queue_depth_sql else names


def watch_config(params: Params) -> WatchConfig:
    """What the watch expects and what counts as worse, as the params say.

    Raises:
        ValueError: naming the key of `watch.rules` that cannot be read.
    """
    settings = params.watch
    return config_from_mapping(
        {
            "duration_s": settings.duration_s,
            "interval_s": settings.interval_s,
            "metrics": list(metrics(params)),
            **({"hard_limits": dict(settings.hard_limits)} if settings.hard_limits else {}),
            **settings.rules,
        }
    )


def collect(run: Run, start_s: float, end_s: float, window: str) -> list[Sample]:
    """All samples between two moments (epoch seconds), one an interval and metric."""
    watch = run.params.watch
    lines = access_log.read_lines(Path(watch.access_log), start_s)
    found = access_log.samples(lines, start_s, end_s, watch.interval_s, window)
    if watch.queue_depth_sql:
        found += _queue_depth(run, sorted({s.time_s for s in found}), window)
    return found


def _queue_depth(run: Run, times_s: list[float], window: str) -> list[Sample]:
    d, query = run.params.database, (run.params.watch.queue_depth_sql or "").encode()
    with run.services.database.connect(
        d.backup_role, d.production, application=f"{run.session_name}: watch"
    ) as session:
        session.execute("SELECT set_config('statement_timeout', '5s', false)")
        samples = []
        for time_s in times_s:
            row = session.execute(query, {"at": time_s}).fetchone()
            value = float(row[0]) if row and row[0] is not None else float("nan")
            samples.append(Sample(time_s, "queue_depth_jobs", value, window))  # type: ignore[arg-type]
    return samples


def as_csv(samples: list[Sample]) -> str:
    """The series as `runbook judge` reads it."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("time", "metric", "value", "window"))
    for sample in sorted(samples, key=lambda s: (s.metric, s.time_s)):
        writer.writerow(
            (
                f"{sample.time_s:.3f}",
                sample.metric,
                "" if sample.value != sample.value else f"{sample.value:.6g}",
                sample.window,
            )
        )  # noqa: PLR0124  # NaN
    return out.getvalue()
