"""A project folder of its own with a real twin, for tests that walk releases."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.project import ROOT, Project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    root = tmp_path_factory.mktemp("project")
    for folder in ("params", "runbooks"):
        shutil.copytree(ROOT / folder, root / folder)
    made = Project(root)
    done = made.runbook("stack", "up", "--json")
    assert done.returncode == 0, done.stderr
    yield made
    made.runbook("stack", "down")
