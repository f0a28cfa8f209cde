"""A whole release, walked in JupyterLab: every cell run there, three people's own signatures, the sealed record."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import requests

pytest.importorskip("playwright", reason="no playwright: pip install playwright")

from playwright.sync_api import Locator, Page, expect  # noqa: E402

from runbook_lib.phases import FORWARD, name_of, notebook_of  # noqa: E402
from tests.browser.walker import SLOW_MS, Lab, Notebook, barriers  # noqa: E402
from tests.project import Project, wait_until  # noqa: E402
from tests.shape import same_shape  # noqa: E402

ROLES = {"backup": "deploy_lead", "migrate": "dba", "verify": "qa"}
Shoot = Callable[[Page, str], None]


@pytest.fixture
def shoot(tmp_path: Path) -> Shoot:
    """Takes the pictures of the documents; RUNBOOK_PICTURES=docs/pictures renews those."""
    folder = Path(os.environ.get("RUNBOOK_PICTURES", tmp_path))

    def taken(page: Page, name: str) -> None:
        page.screenshot(path=folder / f"{name}.png")

    return taken


def dark(lab: Lab) -> None:
    """Choose JupyterLab's dark theme, as its Settings menu does."""
    address = f"{lab.server.url}lab/api/settings/@jupyterlab/apputils-extension:themes"
    body = {"raw": json.dumps({"theme": "JupyterLab Dark"})}
    answer = requests.put(address, json=body, headers={"Authorization": f"token {lab.server.token}"}, timeout=60)
    assert answer.ok, answer.text


def signs(panel: Locator, person: str, key: str) -> None:
    """Choose who signs, and with which key file."""
    for label, value in (("Who signs", person), ("Key", key)):
        panel.get_by_label(label, exact=True).fill(value)
        panel.get_by_label(label, exact=True).press("Tab")


def approve(notebook: Notebook, number: int, person: str, key: str) -> None:
    """Sign in the gate's panel, and wait for the card that takes its place."""
    panel = notebook.cell(number).locator(".rb-panel")
    signs(panel, person, key)
    panel.get_by_role("button", name="Approve").click()
    notebook.wait_output(number, re.compile("approved by"))
    expect(panel).to_have_count(0, timeout=SLOW_MS)


def tick(notebook: Notebook, number: int, person: str, key: str, recorded: Callable[[], int]) -> None:
    """Sign every spot check as passed, and wait for the step's card."""
    panel = notebook.cell(number).locator(".rb-panel")
    signs(panel, person, key)
    checks = panel.get_by_role("button", name="Pass").count()
    for check in range(checks):
        panel.get_by_role("button", name="Pass").nth(check).click()
        wait_until(lambda: recorded() == check + 1, f"the record of spot check {check + 1}")  # noqa: B023
    expect(panel).to_have_count(0, timeout=SLOW_MS)
    notebook.wait_output(number, re.compile("passed, "))


def test_a_whole_release_is_walked_cell_by_cell_to_the_sealed_record(
    lab: Lab, project: Project, page: Page, shoot: Shoot
) -> None:
    people = project.facts["people"]
    signer = {
        phase: next(name for name, who in people.items() if role in who["roles"]) for phase, role in ROLES.items()
    }
    assert len(set(signer.values())) == 3
    desk = Notebook.opened(page, lab.url)
    for phase in map(name_of, FORWARD):
        name = notebook_of(phase)
        notebook = Notebook.opened_beside(page, name)
        cells = [c for c in nbformat.read(lab.folder / name, as_version=4).cells if c.cell_type == "code"]
        for number, source in enumerate(cell.source for cell in cells):
            if source == "verify.watch_telemetry(run)":
                notebook.press(number)
                expect(notebook.output(number).locator("img")).to_be_visible(timeout=SLOW_MS)
                notebook.output(number).first.scroll_into_view_if_needed()
                shoot(page, "watch")
                notebook.wait_idle()
            else:
                notebook.run(number)
            expect(notebook.cell(number).locator("[data-mime-type='application/vnd.jupyter.error']")).to_have_count(0)
            if source == "verify.spot_checks(run)":
                person = signer["verify"]
                tick(notebook, number, person, people[person]["key"], lambda: len(project.state(lab.run_id).checks))
            if source.endswith(".sign_off(run)"):
                if phase == "backup":
                    notebook.cell(number).scroll_into_view_if_needed()
                    shoot(page, "gate")
                    assert barriers(page, ".jp-NotebookPanel:not(.lm-mod-hidden) .rb-panel") == []
                    desk.show()
                    expect(desk.panel.get_by_text("waits for").first).to_be_visible(timeout=SLOW_MS)
                    shoot(page, "desk")
                    assert barriers(page, ".rb-desk") == []
                    notebook.show()
                approve(notebook, number, signer[phase], people[signer[phase]]["key"])
        notebook.save()

    desk.show()
    desk.panel.get_by_role("button", name="End and seal").click()
    record = project.root / "outputs" / "rehearsal" / lab.run_id
    wait_until(lambda: (record / "statement.json.sig").exists(), "the seal")
    expect(desk.panel.get_by_text("completed").first).to_be_visible(timeout=SLOW_MS)
    dark(lab)
    desk = Notebook.opened(page, lab.url)
    expect(page.locator("body[data-jp-theme-light=false]")).to_be_attached(timeout=SLOW_MS)
    desk.show()
    assert barriers(page, ".rb-desk") == []
    shoot(page, "desk-dark")
    page.goto((record / "index.html").as_uri())
    shoot(page, "record")
    verified = project.runbook("verify", str(record), "--trust", str(record.parent / "allowed_signers"))
    assert verified.returncode == 0, verified.stdout
    assert not (record / "attempts").exists()  # nothing was taken headless
    same_shape(record)  # as the record of a headless release has, see tests/runbooks/test_notebooks.py
