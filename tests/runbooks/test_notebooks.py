"""The notebooks stay thin, clean and safe; and they walk a release untouched."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from runbook_lib.phases import ALL, name_of, notebook_of
from tests.project import ROOT, Project
from tests.shape import same_shape

PHASES = sorted((ROOT / "runbooks").glob("[0-9]*.ipynb"))
DESK = ROOT / "runbooks" / "release_desk.ipynb"
NOTEBOOKS = [*PHASES, DESK]


def code_cells(path: Path) -> list:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def test_there_is_one_notebook_a_phase() -> None:
    assert [p.name for p in PHASES] == [notebook_of(name_of(module)) for module in ALL]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_without_outputs_and_with_text_before_each_cell(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells

    for before, cell in zip(cells, cells[1:], strict=False):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown"
            assert not cell.outputs
            assert cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_cell_holds_calls_and_nothing_clever(path: Path) -> None:
    forbidden = (ast.FunctionDef, ast.If, ast.For, ast.While, ast.JoinedStr, ast.Lambda, ast.ClassDef, ast.Try)
    for cell in code_cells(path):
        assert not [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, forbidden)], cell.source


@pytest.mark.parametrize("module", ALL, ids=name_of)
def test_a_notebook_calls_every_step_of_its_phase_once_in_order(module: object) -> None:
    phase = name_of(module)  # type: ignore[arg-type]
    cells = [c.source for c in code_cells(ROOT / "runbooks" / notebook_of(phase))]

    assert cells[0] == 'environment = "rehearsal"\nversion = ""\nrun_id = ""'
    assert cells[2:] == [f"{phase}.{step.name}(run)" for step in module.STEPS]  # type: ignore[attr-defined]


def test_the_desk_opens_the_run_as_the_others_do_and_shows_it() -> None:
    parameters, handle, shown = (c.source for c in code_cells(DESK))

    assert parameters == 'environment = "rehearsal"\nversion = ""\nrun_id = ""'
    assert handle.endswith("run = open_run(environment, version, run_id)\nrun")
    assert shown == "desk.show(run)"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_parameters_cell_is_tagged(path: Path) -> None:
    assert code_cells(path)[0].metadata.tags == ["parameters"]


def test_untouched_notebooks_are_walked_to_the_first_gate_and_through_it(project: Project) -> None:
    _nbval(project, *(f"runbooks/{path.name}" for path in PHASES[:2]))

    (run,) = project.runs()
    state = project.state(run.name)
    assert all(
        state.green(f"{name_of(module)}.{step.name}") for module in ALL[:2] for step in module.STEPS if not step.each
    )
    assert project.runbook("abort", run.name, "--reason", "walked so far on purpose").returncode == 0


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_untouched_notebooks_walk_a_rehearsal_release_that_the_twins_people_sign(project: Project) -> None:
    _nbval(project, "runbooks")

    run = project.runs()[-1]
    steps = project.runbook("status", run.name)
    assert "complete" in steps.stdout
    facts = project.facts
    for host in facts["hosts"].values():
        if "url" in host:
            assert (
                facts["commits"][facts["versions"]["next"]] in (Path(host["home"]) / "current" / "REVISION").read_text()
            )
    # Walked by hand it is not ended yet: the review showed that and wrote nothing, and resume ends and seals it.
    for words in (("resume", run.name), ("review", run.name)):
        ended = project.runbook(*words)
        assert ended.returncode == 0, ended.stderr
    verified = project.runbook("verify", str(run), "--trust", str(run.parent / "allowed_signers"))
    assert verified.returncode == 0, verified.stdout
    same_shape(run)  # as that of a release that was walked in JupyterLab, see tests/browser/test_release.py


def _nbval(project: Project, *paths: str) -> None:
    done = subprocess.run(
        (
            sys.executable,
            "-m",
            "pytest",
            "--nbval-lax",
            "-q",
            "-p",
            "no:cacheprovider",
            "-c",
            "/dev/null",
            "--rootdir",
            str(project.root),
            *paths,
        ),
        env=project.env,
        cwd=project.root,
        capture_output=True,
        text=True,
        timeout=500,
    )

    assert done.returncode == 0, done.stdout[-6000:]
