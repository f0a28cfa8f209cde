"""Notebooks walked in the kernels of the lab: gates return at once, the next call looks, and what was walked is archived."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from runbook_lib import walked, wiring
from runbook_lib.card import MIME
from runbook_lib.run import Run
from tests.project import Project


@pytest.fixture(scope="module")
def run(project: Project) -> Run:
    """A run whose phase 0 was taken headless, laid out for the lab."""
    done = project.runbook("run", "rehearsal", "--until", "prepare", "--json")
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        for name, value in project.env.items():
            patch.setenv(name, value)
        made = wiring.attach(project.last_json(done)["run_id"])
        walked.lay_out(made)
        yield made


def walk(project: Project, run: Run, name: str) -> str:
    """Run All, and save as JupyterLab would; what stopped it, as people read it."""
    path = walked.folder_of(run) / name
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    try:
        client.execute(env={**project.env, "RUNBOOK_LAB": run.run_id})
    except CellExecutionError:
        return next("\n".join(o["traceback"]) for c in notebook.cells for o in c.get("outputs", []) if "traceback" in o)
    finally:
        nbformat.write(notebook, path)
    return ""


def outputs(path: Path) -> list[dict]:
    cells = json.loads(path.read_text())["cells"]
    return [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]


def cards(path: Path) -> list[str]:
    return [part["step"] for o in outputs(path) for part in o.get("data", {}).get(MIME, {}).get("parts", [])]


def test_a_gates_cell_returns_at_once_and_the_next_call_stops_in_one_sentence(project: Project, run: Run) -> None:
    assert walk(project, run, "01_backup.ipynb") == ""
    stopped = walk(project, run, "02_begin.ipynb")

    assert len(stopped.splitlines()) == 1, stopped
    assert "backup.sign_off (Gate 1: backup) is not green" in stopped
    assert not [key for key in run.state.steps if key.startswith("begin.")]


def test_once_it_is_signed_the_next_call_goes_on(project: Project, run: Run) -> None:
    signed = project.approve(run.run_id, "1", "ada")
    assert signed.returncode == 0, signed.stderr

    assert walk(project, run, "02_begin.ipynb") == ""

    assert run.state.green("backup.sign_off")
    assert run.state.green("begin.prove_read_only")


def test_an_edited_cell_is_not_run_and_its_notebook_is_refused(project: Project, run: Run) -> None:
    path = walked.folder_of(run) / "03_migrate.ipynb"
    original = path.read_text()
    notebook = nbformat.reads(original, as_version=4)
    cell = next(c for c in notebook.cells if c.cell_type == "code" and c.source.startswith("migrate."))
    cell.source += "  # once more"
    nbformat.write(notebook, path)
    before = run.state.seq

    stopped = walk(project, run, "03_migrate.ipynb")

    assert "does not stand in 03_migrate.ipynb" in stopped
    assert run.state.seq == before
    assert "was edited" in walked.edited(run, path)
    path.write_text(original)
    assert walked.edited(run, path) == ""


def test_a_missing_card_holds_up_no_release(project: Project, run: Run) -> None:
    path = walked.folder_of(run) / "01_backup.ipynb"
    notebook = nbformat.read(path, as_version=4)
    unsaved = next(c for c in notebook.cells if c.source == "backup.compare_hashes(run)")
    unsaved.outputs = []
    nbformat.write(notebook, path)

    done = project.runbook("resume", run.run_id, "--json")

    assert (done.returncode, project.last_json(done)["gate"]) == (75, "migration"), done.stderr
    assert (run.folder / "notebooks" / "02_begin.ipynb").exists()
    assert not (run.folder / "notebooks" / "01_backup.ipynb").exists()


def test_a_gate_that_was_decided_elsewhere_has_its_card_in_what_is_archived(project: Project, run: Run) -> None:
    path = walked.folder_of(run) / "01_backup.ipynb"
    assert "backup.sign_off" not in cards(path)  # the page was closed while its panel stood there

    notebook = walked._decided(run, run.state, "backup", json.loads(path.read_text()))

    assert [part["step"] for part in walked._cards(notebook)][-1] == "backup.sign_off"


def test_at_the_end_a_notebook_that_lacks_a_card_is_refused_by_name(project: Project, run: Run) -> None:
    done = project.runbook("abort", run.run_id, "--reason", "seen enough")

    assert done.returncode == 75, done.stderr
    for word in ("01_backup.ipynb", "backup.compare_hashes is missing", f"runbook lab {run.run_id}", "runbook seal"):
        assert word in done.stderr
    assert not (run.folder / "statement.json.sig").exists()


def test_a_notebook_whose_card_differs_from_the_ledger_is_refused_by_name(project: Project, run: Run) -> None:
    assert walk(project, run, "01_backup.ipynb") == ""  # once more: every step answers from the ledger, ended or not
    path = walked.folder_of(run) / "01_backup.ipynb"
    good = path.read_text()
    path.write_text(good.replace('"status": "green"', '"status": "failed"'))
    assert path.read_text() != good

    done = project.runbook("seal", run.run_id, "--json")

    path.write_text(good.replace("Dump the database</strong>", "Never dumped</strong>"))
    assert "Never dumped" in path.read_text()
    assert done.returncode == 75, done.stderr
    assert "01_backup.ipynb" in done.stderr
    assert "is not what the ledger says" in done.stderr


def test_what_was_walked_is_what_is_archived_without_its_widgets(project: Project, run: Run) -> None:
    done = project.runbook("seal", run.run_id)

    assert done.returncode == 0, done.stderr
    for name in ("01_backup.ipynb", "02_begin.ipynb"):
        kept, lab = run.folder / "notebooks" / name, walked.folder_of(run) / name
        assert cards(kept) == cards(lab)
        assert "Never dumped" not in kept.read_text()  # what people read is drawn from the ledger
        assert "widget-view" not in kept.read_text()
        assert [c.source for c in nbformat.read(kept, 4).cells] == [c.source for c in nbformat.read(lab, 4).cells]
    headless = run.folder / "notebooks" / "03_migrate.ipynb"
    assert json.loads(headless.read_text())["metadata"]["papermill"]["exception"] is True  # it waited at its gate
    verified = project.runbook("verify", str(run.folder), "--trust", str(run.trust))
    assert verified.returncode == 0, verified.stdout
