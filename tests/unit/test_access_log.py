"""The watch's samples from an access log: what counts, and what a torn or long log does not do to them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from runbook_lib.adapters import access_log
from runbook_lib.errors import UnavailableError


def line(time_s: float, *, status: int = 200, duration_s: float = 0.01, **more: Any) -> dict[str, Any]:
    return {"time": time_s, "status": status, "duration_s": duration_s, "maintenance": None, "bypass": False, **more}


def log(path: Path, lines: list[dict[str, Any]], *, torn: str = "") -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines) + torn)
    return path


def values(lines: list[dict[str, Any]], metric: str, *, seconds: int = 2) -> list[float]:
    return [s.value for s in access_log.samples(lines, 100.0, 100.0 + seconds, 1.0, "current") if s.metric == metric]


def test_each_interval_has_each_series_at_its_end() -> None:
    found = access_log.samples([line(100.5), line(101.5, status=500)], 100.0, 102.0, 1.0, "current")

    assert sorted({s.metric for s in found}) == [
        "errors_5xx_per_s",
        "p95_latency_s",
        "refused_per_s",
        "requests_per_s",
    ]
    assert sorted({s.time_s for s in found}) == [101.0, 102.0]
    assert {s.window for s in found} == {"current"}


def test_refusals_of_the_maintenance_mode_are_neither_errors_nor_latency() -> None:
    lines = [line(100.1, duration_s=0.2), *[line(100.2, status=503, duration_s=9.0, maintenance="on")] * 5]

    assert values(lines, "errors_5xx_per_s")[0] == 0
    assert values(lines, "p95_latency_s")[0] == 0.2
    assert values(lines, "requests_per_s")[0] == 1
    assert values(lines, "refused_per_s")[0] == 5


def test_an_unmarked_503_is_an_error() -> None:
    assert values([line(100.1, status=503)], "errors_5xx_per_s") == [1, 0]


def test_smoke_tests_and_spot_checks_are_not_measured() -> None:
    assert values([line(100.1, status=500, bypass=True)], "errors_5xx_per_s") == [0, 0]


def test_a_silent_interval_has_no_latency_rather_than_a_good_one() -> None:
    first, second = values([line(100.1, duration_s=0.3)], "p95_latency_s")

    assert first == 0.3
    assert math.isnan(second)


def test_p95_is_the_nearest_rank() -> None:
    lines = [line(100.0 + n / 1000, duration_s=float(n)) for n in range(1, 21)]

    assert values(lines, "p95_latency_s")[0] == 19.0


def test_a_log_that_is_torn_anywhere_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    whole = json.dumps(line(101.0))
    path.write_bytes(
        b'\x00\x00{"time": 10\n[]\n{"time": "noon", "status": 200, "duration_s": 1}\n' + f"{whole}\n{whole}".encode()
    )

    assert access_log.read_lines(path, 100.0) == [line(101.0)]


def test_a_long_log_is_read_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = log(tmp_path / "access.log", [line(float(n)) for n in range(100_000)])
    parsed = 0
    whole = access_log._whole

    def counted(raw: bytes) -> Any:
        nonlocal parsed
        parsed += 1
        return whole(raw)

    monkeypatch.setattr(access_log, "_whole", counted)

    found = access_log.read_lines(path, 99_000.0)

    assert [one["time"] for one in found] == [float(n) for n in range(99_000, 100_000)]
    assert parsed < 30_000


def test_a_slow_request_at_a_blocks_border_hides_nothing_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Lines are written when requests end: one that began 5 s earlier stands behind those that it outlasted.
    lines = [line(100.0 + n / 100) for n in range(500)] + [line(99.0, duration_s=6.0), line(105.0)]
    path = log(tmp_path / "access.log", lines)
    monkeypatch.setattr(access_log, "_BLOCK_BYTES", len(json.dumps(lines[-2])) + len(json.dumps(lines[-1])) + 2 + 1)

    assert len(access_log.read_lines(path, 100.0)) == 501


def test_a_log_that_cannot_be_read_is_said_with_the_next_move(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"No such file.*Next: mend watch\.access_log"):
        access_log.read_lines(tmp_path / "nowhere.log", 0.0)
