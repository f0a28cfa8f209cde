"""A headless Chromium before a real JupyterLab on a project with a twin."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.project import Project

if TYPE_CHECKING:
    from tests.browser.walker import Lab

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, or a skip that says how to get one; ended with its file, since it keeps an event loop running here."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    if not os.access(CHROMIUM, os.X_OK):
        pytest.skip(f"no {CHROMIUM}: as root: sh rehearsal/install-debian.sh, or apt-get install chromium")
    # Chromium's own sandbox refuses root.
    flags = [*FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def new_page(browser: Any) -> Iterator[Any]:
    """Opens pages as different people have them: nothing in common; none may ask for anything outside."""
    from tests.browser.walker import Outside

    outside, contexts = Outside(), []

    def opened() -> Any:
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 800}))
        page = contexts[-1].new_page()
        page.on("request", outside.look)
        # Saved by hand in the moment in which JupyterLab saves by itself, it takes its own file for somebody else's.
        asked = page.locator(".jp-Dialog", has_text="has changed on disk since")
        page.add_locator_handler(asked, lambda dialog: dialog.get_by_role("button", name="Overwrite").click())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert outside.urls == []


@pytest.fixture
def page(new_page: Any) -> Any:
    """A page of 1280×800; none of its requests may leave this machine."""
    return new_page()


@pytest.fixture(scope="module")
def lab(browser: Any, project: Project) -> Iterator[Lab]:
    """`runbook lab` on a new run of the project; without a browser nothing is started."""
    from tests.browser.walker import lab_of

    with lab_of(project) as running:
        yield running
