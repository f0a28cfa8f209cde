"""The application's own smoke tests, as pytest runs them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from runbook_lib.model import Command


def smoke_tests(tree: Path, *, base_url: str, report: Path, timeout_s: float, settings: bool = True) -> Command:
    """`pytest tests/smoke --base-url URL` of the release in `tree`, in this interpreter's environment.

    Args:
        settings: the tree has settings for pytest. Without its own, pytest would take those of whatever project lies
            around the tree, so it is given an empty file then.
    """
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
        *(() if settings else ("-c", os.devnull)),
        "tests/smoke",
        "--base-url",
        base_url,
        f"--junit-xml={report}",
    )
    return Command(argv, timeout_s=timeout_s, cwd=tree, ok_exits=(0, 1))
