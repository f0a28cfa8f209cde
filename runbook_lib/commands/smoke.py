"""The application's own smoke tests, as pytest runs them."""

from __future__ import annotations

import sys
from pathlib import Path

from runbook_lib.model import Command


def smoke_tests(tree: Path, *, base_url: str, report: Path, timeout_s: float) -> Command:
    """`pytest tests/smoke --base-url URL` of the release in `tree`, in this interpreter's environment."""
    argv = (
        sys.executable,
        "-B",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tree),
        "tests/smoke",
        "--base-url",
        base_url,
        f"--junit-xml={report}",
    )
    return Command(argv, timeout_s=timeout_s, cwd=tree, ok_exits=(0, 1))
