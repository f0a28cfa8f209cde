"""A gate's panel in JupyterLab: it waits, signs with a key and with nothing less, and every page sees what was decided."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("playwright", reason="no playwright: pip install playwright")

from playwright.sync_api import Locator, Page, expect  # noqa: E402

from tests.browser.walker import SLOW_MS, Lab, Notebook, lab_of  # noqa: E402
from tests.project import Project  # noqa: E402

NAME = "01_backup.ipynb"
GATE = "backup.sign_off(run)"
# From the click to the first change of what the panel says, in milliseconds, as the page itself sees it.
REACTION = """panel => new Promise(done => {
    const began = performance.now();
    new MutationObserver((_, seen) => {
        if (panel.querySelector('[role=status], [role=alert]')) { seen.disconnect(); done(performance.now() - began); }
    }).observe(panel, {subtree: true, childList: true});
    [...panel.querySelectorAll('button')].find(button => button.textContent === 'Approve').click();
})"""


@pytest.fixture(scope="module")
def at_gate(browser: object, project: Project) -> Iterator[Lab]:
    """A lab on a run whose first gate is asked; nobody has signed."""
    done = project.runbook("run", "rehearsal", "--json")
    assert done.returncode == 75, done.stderr
    facts = project.last_json(done)
    assert facts["gate"] == "backup"
    with lab_of(project, facts["run_id"]) as lab:
        yield lab


def panel_of(notebook: Notebook) -> Locator:
    return notebook.panel.locator(".rb-panel")


def test_run_all_stops_at_the_gate_and_only_the_right_key_opens_it_for_every_page(
    at_gate: Lab, project: Project, new_page: Callable[[], Page]
) -> None:
    people = project.facts["people"]
    first = Notebook.opened(new_page(), at_gate.url_of(NAME))
    first.run_all()
    panel = panel_of(first)
    expect(panel.get_by_role("button", name="Approve")).to_be_visible(timeout=SLOW_MS)
    first.wait_idle()
    assert project.state(at_gate.run_id).gate("backup").decisions == ()
    expect(first.panel.get_by_text("Traceback")).to_have_count(0)
    expect(first.panel.locator("[data-mime-type='application/vnd.jupyter.error']")).to_have_count(0)

    # a click alone, and how soon it is answered
    reaction_ms = panel.evaluate(REACTION)
    expect(panel.get_by_role("alert")).to_contain_text("nothing was signed: nobody is chosen", timeout=SLOW_MS)
    panel.get_by_label("Who signs").fill("ada")
    panel.get_by_role("button", name="Approve").click()
    expect(panel.get_by_role("alert")).to_contain_text("a click alone is no signature", timeout=SLOW_MS)

    # another person's key
    panel.get_by_label("Key", exact=True).fill(people["dan"]["key"])
    panel.get_by_role("button", name="Approve").click()
    expect(panel.get_by_role("alert")).to_contain_text("the signature is not ada's", timeout=SLOW_MS)
    panel.get_by_label("Who signs").fill("dan")
    panel.get_by_role("button", name="Approve").click()
    expect(panel.get_by_role("alert")).to_contain_text("dan holds dba; gate backup needs deploy_lead", timeout=SLOW_MS)
    assert project.state(at_gate.run_id).gate("backup").decisions == ()

    # a second browser on the same notebook
    first.save()
    second = Notebook.opened(new_page(), at_gate.url_of(NAME))
    expect(panel_of(second).get_by_role("button", name="Approve")).to_be_visible(timeout=SLOW_MS)
    other = panel_of(second)
    other.get_by_label("Who signs").fill("ada")
    other.get_by_label("Key", exact=True).fill(people["ada"]["key"])
    other.get_by_role("button", name="Approve").click()
    expect(second.panel.get_by_text("approved by").first).to_be_visible(timeout=SLOW_MS)
    began = time.monotonic()
    expect(first.panel.get_by_text("approved by").first).to_be_visible(timeout=SLOW_MS)
    assert time.monotonic() - began < 2
    assert [d["person"] for d in project.state(at_gate.run_id).gate("backup").decisions] == ["ada"]
    assert reaction_ms < 300
