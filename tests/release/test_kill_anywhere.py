"""A few cases of each class of the soak: whatever dies or fails, the next executor goes on, and each effect is there once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.project import ROOT

Case = dict[str, Any]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """The sample runs in a process of its own: it forks executors, and a forking process must have no threads."""
    state = tmp_path_factory.mktemp("soak")
    argv = (sys.executable, "-m", "tests.soak", "--state", str(state), "--sample")
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line) for line in Path(state, "sample.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("kind", "fewest"), [("kill points", 15), ("kills", 4), ("faults", 6), ("crowds", 4)])
def test_no_effect_is_lost_or_doubled_and_nothing_is_green_without_its_effect(
    cases: list[Case], kind: str, fewest: int
) -> None:
    mine = [case for case in cases if case["class"] == kind]

    bad = [case for case in mine if not case["good"]]
    assert not bad, json.dumps(bad, indent=1)
    assert len(mine) >= fewest


def test_the_processes_that_were_to_die_died(cases: list[Case]) -> None:
    assert [case for case in cases if case["class"] == "kills" and not case["killed"]] == []
    died = [case for case in cases if case["class"] == "kill points" and case["died"]]
    assert len(died) >= 15
