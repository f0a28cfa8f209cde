"""What goes away while a release is walked: the browser, the network, the kernel. The ledger knows, and nothing is done twice."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="no playwright: pip install playwright")

from playwright.sync_api import Page, expect  # noqa: E402

from tests.browser.walker import SLOW_MS, Lab, Notebook  # noqa: E402
from tests.project import Project, wait_until  # noqa: E402


def dumps(project: Project, run_id: str) -> list[Path]:
    return [p for p in Path(project.facts["backups"]).glob(f"{run_id}.dump*") if p.suffix != ".json"]


def test_a_kernel_restarted_in_the_middle_of_the_dump_loses_nothing(lab: Lab, project: Project, page: Page) -> None:
    assert project.runbook("resume", lab.run_id, "--until", "prepare").returncode == 0
    notebook = Notebook.opened(page, lab.url_of("01_backup.ipynb"))
    notebook.run_all()
    wait_until(lambda: project.state(lab.run_id).step("backup.dump_database").attempt, "the dump's beginning")

    notebook.restart_kernel()
    notebook.run_all()

    panel = notebook.cell("backup.sign_off(run)").locator(".rb-panel")
    expect(panel).to_be_visible(timeout=SLOW_MS)
    state = project.state(lab.run_id)
    assert state.green("backup.compare_hashes")
    assert len(dumps(project, lab.run_id)) == 1


def test_a_browser_closed_in_phase_3_and_another_one_opened_shows_the_truth(
    lab: Lab, project: Project, new_page: Callable[[], Page]
) -> None:
    assert project.approve(lab.run_id, "1", "ada").returncode == 0
    assert project.runbook("resume", lab.run_id, "--until", "begin").returncode == 0
    first = new_page()
    notebook = Notebook.opened(first, lab.url_of("03_migrate.ipynb"))
    notebook.run_all()
    wait_until(lambda: "migrate.staging_status" in project.state(lab.run_id).steps, "phase 3")
    first.context.close()

    wait_until(lambda: project.state(lab.run_id).gate("migration").round, "gate 2, with no browser there")
    second = new_page()
    desk = Notebook.opened(second, lab.url)
    expect(desk.panel.get_by_text(re.compile("gate open")).first).to_be_visible(timeout=SLOW_MS)
    expect(desk.panel.get_by_text("Gate 2: migration").first).to_be_visible(timeout=SLOW_MS)

    again = Notebook.opened_beside(second, "03_migrate.ipynb")
    again.run("migrate.migrate_production(run)")
    again.wait_output("migrate.migrate_production(run)", "green")
    attempts = {key: step.attempt for key, step in project.state(lab.run_id).steps.items() if "migrate." in key}
    assert attempts["migrate.migrate_production"] == 1
