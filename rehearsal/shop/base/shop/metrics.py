"""Counts of this process, written as Prometheus text."""

import threading
from collections import Counter

from shop.settings import Settings

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metrics:
    """Requests by method, status and maintenance answer; a histogram of their durations in seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int, str]] = Counter()
        self._buckets: Counter[float] = Counter()
        self._sum_s = 0.0

    def observe(self, method: str, status: int, maintenance: str, duration_s: float) -> None:
        """Count one answered request."""
        with self._lock:
            self._requests[method, status, maintenance] += 1
            self._sum_s += duration_s
            self._buckets.update(bound for bound in BUCKETS_S if duration_s <= bound)

    def text(self, settings: Settings, queue: dict[str, int] | None) -> str:
        """Write everything out; `queue` is left out while the database does not answer."""
        with self._lock:
            requests, buckets, sum_s = dict(self._requests), dict(self._buckets), self._sum_s
        count = sum(requests.values())
        about = f'instance="{settings.instance}",version="{settings.version}",commit="{settings.commit}"'
        lines = [
            "# TYPE shop_info gauge",
            f"shop_info{{{about}}} 1",
            "# TYPE http_requests_total counter",
        ]
        for (method, status, maintenance), number in sorted(requests.items()):
            labels = f'method="{method}",status="{status}",maintenance="{maintenance}"'
            lines.append(f"http_requests_total{{{labels}}} {number}")
        lines.append("# TYPE http_request_duration_seconds histogram")
        lines += [
            f'http_request_duration_seconds_bucket{{le="{bound}"}} {buckets.get(bound, 0)}'
            for bound in BUCKETS_S
        ]
        lines += [
            f'http_request_duration_seconds_bucket{{le="+Inf"}} {count}',
            f"http_request_duration_seconds_sum {sum_s:.6f}",
            f"http_request_duration_seconds_count {count}",
        ]
        if queue is not None:
            lines += [
                "# TYPE queue_depth_jobs gauge",
                f"queue_depth_jobs {queue['waiting']}",
                "# TYPE jobs_done_total counter",
                f"jobs_done_total {queue['done']}",
            ]
        return "\n".join(lines) + "\n"
