"""The list of guards is one that `python -m tests.soak.guards` can work through: nothing in it has rotted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.project import ROOT
from tests.soak.guarded import GUARDS, Guard
from tests.soak.guards import run_tests, table, without


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_a_guard_stands_once_in_its_file_and_can_be_taken_out(guard: Guard) -> None:
    text = (ROOT / guard.file).read_text()

    assert without(guard, text) != text
    assert guard.tests


def test_every_test_that_a_guard_names_exists() -> None:
    tests = sorted({test for guard in GUARDS for test in guard.tests})

    done = subprocess.run(
        (sys.executable, "-m", "pytest", "--collect-only", *tests), cwd=ROOT, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_guards_have_names_of_their_own() -> None:
    assert len({guard.name for guard in GUARDS}) == len(GUARDS)


def test_the_document_has_the_table() -> None:
    text = (ROOT / "docs" / "guards.md").read_text()

    assert table(GUARDS) in text
    assert f"{len(GUARDS)} guards" in text


def test_only_a_test_that_was_called_and_failed_counts_as_failed(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "test_ends.py").write_text(
        """
import time, pytest

@pytest.fixture
def broken():
    raise RuntimeError

def test_passes(): pass
def test_fails(): assert 1 == 2
def test_raises(): raise ValueError("no")
def test_cannot_be_set_up(broken): pass
def test_is_torn(): no_such_name
def test_imports_nothing(): import no_such_module
def test_is_skipped(): pytest.skip("not here")
@pytest.mark.timeout(0.2)
def test_hangs(): time.sleep(60)
"""
    )
    (copy / "test_broken.py").write_text("def test_never(): assert False\nraise RuntimeError\n")

    cases = run_tests(copy, ["test_ends.py", "test_broken.py", "--continue-on-collection-errors"])

    assert {case.name for case in cases if case.end == "failed"} == {
        "test_ends.py::test_fails",
        "test_ends.py::test_raises",
    }
    assert [case.name for case in cases if case.end == "passed"] == ["test_ends.py::test_passes"]
    assert run_tests(copy, ["test_ends.py::test_not_there"]) == []
