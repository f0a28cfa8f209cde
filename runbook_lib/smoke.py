"""Smoke tests as a proof: run, counted, kept."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

from runbook_lib.commands.smoke import smoke_tests
from runbook_lib.errors import StepFailedError
from runbook_lib.model import StepResult
from runbook_lib.run import Run

# Where pytest looks for its settings, and what makes a file that others use too one of them.
_SETTINGS = {
    "pytest.toml": "",
    ".pytest.toml": "",
    "pytest.ini": "",
    ".pytest.ini": "",
    "pyproject.toml": "[tool.pytest",
    "tox.ini": "[pytest]",
    "setup.cfg": "[tool:pytest]",
}


def has_settings(tree: Path) -> bool:
    """True when a release brings its own settings for pytest."""
    return any((tree / name).is_file() and mark in (tree / name).read_text() for name, mark in _SETTINGS.items())


def run_smoke(run: Run, commit: str, *, bypass: bool, name: str) -> StepResult:
    """Run the smoke tests that belong to `commit` against the front door.

    Args:
        bypass: let them through the read-only mode.
        name: of the report among the artifacts.

    Raises:
        StepFailedError: a test failed, or none ran; the result is attached.
    """
    tree = run.tree(commit)
    report = run.artifact_path(f"smoke/{name}.xml")
    report.unlink(missing_ok=True)
    command = smoke_tests(
        tree,
        base_url=run.params.application.url,
        report=report,
        timeout_s=run.params.smoke_timeout_s,
        settings=has_settings(tree),
    )
    if bypass:
        token = run.secrets.resolve(run.params.application.bypass_token)
        command = replace(command, env={**command.env, "MAINTENANCE_BYPASS": token})
    done = run.services.shell.run(command, name=name)
    if not report.exists():
        raise StepFailedError(
            f"the smoke tests of {commit[:12]} did not run: {done.tail(3)}", remedy=f"read {done.log}"
        )
    run.secrets.redact_file(report)
    suites = ET.parse(report).getroot().iter("testsuite")  # noqa: S314  # our own child's report
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in suites:
        for key in counts:
            counts[key] += int(suite.get(key, "0"))
    result = StepResult(
        facts={**counts, "commit": commit, "seconds": round(done.duration_s, 2)}, artifacts=(run.describe(report),)
    )
    if done.exit_code or counts["tests"] == 0 or counts["failures"] or counts["errors"]:
        error = StepFailedError(
            f"smoke tests of {commit[:12]}: {counts['failures'] + counts['errors']} of {counts['tests']} failed",
            remedy=f"read {done.log}",
        )
        error.result = replace(result, verdict="red")
        raise error
    return result
