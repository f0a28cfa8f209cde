"""The release desk in a browser: right when the work is done elsewhere, pressed once, and by keyboard alone."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

pytest.importorskip("playwright", reason="no playwright: pip install playwright")

from playwright.sync_api import Locator, Page, expect  # noqa: E402

from tests.browser.walker import SLOW_MS, Lab  # noqa: E402
from tests.project import Project, wait_until  # noqa: E402

SEEN_WITHIN_MS = 2_000
DESK = ".jp-NotebookPanel:not(.lm-mod-hidden) .rb-desk"
TWIN = ".jp-NotebookPanel:not(.lm-mod-hidden) [class^=rb-twin-]"


@pytest.fixture
def desk(lab: Lab, page: Page) -> Locator:
    return opened(lab, page)


def opened(lab: Lab, page: Page) -> Locator:
    page.goto(lab.url)
    desk = page.locator(DESK)
    expect(desk.get_by_role("button", name="Abort")).to_be_visible(timeout=SLOW_MS)
    return desk


def kinds(project: Project, lab: Lab) -> list[str]:
    return [event.kind for event in project.ledger.events(lab.run_id)]


def test_a_living_desk_hides_its_twin(desk: Locator, page: Page) -> None:
    twin = page.locator(TWIN)

    assert twin.count() == 1
    expect(twin).to_be_hidden()
    assert "prepare" in twin.evaluate("twin => twin.textContent")


def test_everything_of_the_desk_is_seen_on_one_screen(desk: Locator, page: Page) -> None:
    for part in (desk.locator("[aria-live]"), desk.locator("ol.rail"), desk.get_by_text("Maintenance clock")):
        expect(part.first).to_be_in_viewport()
    expect(desk.get_by_role("row", name=re.compile("Docs updated"))).to_be_in_viewport()


def test_it_is_used_by_keyboard_alone_and_the_focus_is_seen(desk: Locator, page: Page, lab: Lab) -> None:
    abort = desk.get_by_role("button", name="Abort …")
    for _ in range(80):
        page.keyboard.press("Tab")
        if abort.evaluate("button => button === document.activeElement"):
            break
    expect(abort).to_be_focused()
    assert abort.evaluate("button => getComputedStyle(button).outlineStyle") == "solid"

    page.keyboard.press("Enter")
    reason = desk.get_by_role("textbox")
    expect(reason).to_be_visible(timeout=SLOW_MS)
    page.keyboard.press("Tab")
    expect(reason).to_be_focused()
    page.keyboard.type("dd the wrong day")  # two d would delete a cell, if the notebook heard them
    page.keyboard.press("Tab")
    expect(desk.get_by_role("button", name="Yes, abort")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")

    expect(reason).to_have_count(0, timeout=SLOW_MS)
    expect(abort).to_be_visible()


def test_the_next_phase_runs_once_on_a_double_click_and_goes_on_without_the_browser(
    lab: Lab, project: Project, new_page: Callable[[], Page]
) -> None:
    page = new_page()
    desk = opened(lab, page)

    desk.get_by_role("button", name="Run next phase: prepare").dblclick()
    expect(desk.locator("[aria-live]")).to_contain_text("running", timeout=SLOW_MS)
    page.close()

    wait_until(lambda: "lease_released" in kinds(project, lab), "the phase's end")
    told = kinds(project, lab)
    assert told.count("lease_taken") == told.count("phase_started") == 1
    other = opened(lab, new_page())
    expect(other.get_by_role("button", name="Run next phase: backup")).to_be_enabled(timeout=SLOW_MS)
    expect(other.locator("li[aria-current=step]")).to_contain_text("backup")


def test_it_shows_within_two_seconds_what_was_done_elsewhere(desk: Locator, lab: Lab, project: Project) -> None:
    done = project.runbook("resume", lab.run_id, "--until", "backup")

    assert done.returncode == 75, done.stderr
    expect(desk.locator("[aria-live]")).to_contain_text("waits for people", timeout=SEEN_WITHIN_MS)
    expect(desk.locator("li[aria-current=step]")).to_contain_text("gate open", timeout=SEEN_WITHIN_MS)

    project.approve(lab.run_id, "backup", "ada")
    expect(desk.get_by_role("button", name="Pass gate backup")).to_be_enabled(timeout=SEEN_WITHIN_MS)


def test_a_run_that_was_aborted_elsewhere_leads_to_its_record(desk: Locator, lab: Lab, project: Project) -> None:
    assert project.runbook("abort", lab.run_id, "--reason", "wrong day").returncode == 0

    expect(desk.locator("[aria-live]")).to_contain_text("aborted", timeout=SEEN_WITHIN_MS)
    expect(desk.get_by_role("button", name="Review")).to_be_enabled()
    expect(desk).to_contain_text("index.html")
