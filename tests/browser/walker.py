"""JupyterLab as a person has it before them: a lab of a project, and a notebook in a browser."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, Page, Request, expect

from runbook_lib.adapters import jupyter
from runbook_lib.lab import known
from tests.project import Project

# Pressed so often, each time waited for so long, in seconds.
_PRESSES, _BEGUN_S = 5, 10.0
_RAN = re.compile(r"\[(\*|\d+)\]:")  # the prompt of a cell that runs or ran
SLOW_MS = 90_000  # a bound is a failure, not a measurement: the machine may be at other work


@dataclass(frozen=True)
class Lab:
    """A `runbook lab` that runs: what it printed, and its process."""

    process: subprocess.Popen[str]
    run_id: str
    url: str
    folder: Path
    log: Path

    @property
    def server(self) -> jupyter.Server:
        server, _ = known(self.folder.parent / "lab-state")
        assert server is not None
        return server

    def url_of(self, notebook: str) -> str:
        return self.server.url_of(notebook)

    def stop(self) -> tuple[int, str]:
        """Ctrl-C; its exit status and what it said."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=120), self.said

    @property
    def said(self) -> str:
        """What it said on stderr so far."""
        return self.log.read_text()


def _as_at_a_terminal() -> None:
    # A shell that runs the tests in its background has Ctrl-C ignored, nohup has SIGHUP so; children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@contextmanager
def lab_of(project: Project, *words: str, env: Mapping[str, str] | None = None) -> Iterator[Lab]:
    """`runbook lab` on the project's run, ended with the body."""
    descriptor, log = tempfile.mkstemp(prefix="lab-", suffix=".err", dir=project.root)
    process = subprocess.Popen(
        (sys.executable, "-m", "runbook_lib", "lab", "--no-browser", "--json", *words),
        env={**project.env, **(env or {})},
        cwd=project.root,
        stdout=subprocess.PIPE,
        stderr=descriptor,
        text=True,
        start_new_session=True,
        preexec_fn=_as_at_a_terminal,
    )
    os.close(descriptor)
    try:
        line = process.stdout.readline()
        assert line, Path(log).read_text()
        facts = json.loads(line)
        lab = Lab(process, facts["run_id"], facts["url"], Path(facts["folder"]), Path(log))
        assert "failed" not in lab.said, lab.said
        yield lab
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(timeout=120)
        process.stdout.close()


@dataclass
class Outside:
    """Every request of a page that would leave this machine."""

    urls: list[str] = field(default_factory=list)

    def look(self, request: Request) -> None:
        if not re.match(r"file:///|(https?|wss?)://127\.0\.0\.1:\d+/|data:|blob:", request.url):
            self.urls.append(request.url)


def barriers(page: Page, selector: str) -> list[str]:
    """What in a part of the page keeps people out, by axe-core's rules for WCAG 2.2 A and AA."""
    rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"], "resultTypes": ["violations"]}
    found = Axe().run(page, context=selector, options=rules).response["violations"]
    return [f"{rule['id']}: {node['html'][:200]}" for rule in found for node in rule["nodes"]]


class Notebook:
    """One notebook, opened in JupyterLab; cells are named by a part of their source."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.name = ""
        self.panel = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")

    @classmethod
    def opened(cls, page: Page, url: str) -> Notebook:
        """Open it and wait until its kernel is ready."""
        page.goto(url)
        # JupyterLab first brings back what another page had open: only then comes what was asked for.
        cls._in_front(page, urlsplit(url).path.rpartition("/")[2])
        notebook = cls(page)
        notebook._ready()
        return notebook

    @classmethod
    def opened_beside(cls, page: Page, name: str) -> Notebook:
        """Open one more in a JupyterLab that is open, by the file browser as people do."""
        item = page.locator(f".jp-DirListing-item[data-file-type=notebook]:has-text('{name}')")
        item.dblclick()
        cls._in_front(page, name)
        notebook = cls(page)
        notebook._ready()
        return notebook

    @staticmethod
    def _in_front(page: Page, name: str) -> None:
        current = page.locator("#jp-main-dock-panel .lm-TabBar-tab.lm-mod-current", has_text=name)
        current.first.wait_for(timeout=SLOW_MS)

    def _ready(self) -> None:
        self.panel.locator(".jp-Cell").first.wait_for(timeout=SLOW_MS)
        self.wait_idle()
        self.name = self._tabs.and_(self.page.locator(".lm-mod-current")).inner_text().strip()

    @property
    def _tabs(self) -> Locator:
        return self.page.locator("#jp-main-dock-panel .lm-TabBar-tab")

    def show(self) -> None:
        """Bring it to the front."""
        self._tabs.filter(has_text=self.name).click()

    def wait_idle(self) -> None:
        """Until the kernel is there, nothing runs and nothing waits to run."""
        # The indicator alone is idle also while the page is still connecting: what is pressed then is lost.
        expect(self.page.locator("#jp-bottom-panel")).to_contain_text("| Idle", timeout=SLOW_MS)
        indicator = self.panel.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")
        indicator.wait_for(state="attached", timeout=SLOW_MS)

    def cell(self, source: str | int) -> Locator:
        """The code cell whose source holds this text, or the one of this number, from 0."""
        if isinstance(source, int):
            return self.panel.locator(".jp-CodeCell").nth(source)
        return self.panel.locator(".jp-CodeCell").filter(has=self.page.locator(".cm-content", has_text=source))

    def output(self, source: str | int) -> Locator:
        """What a cell shows."""
        return self.cell(source).locator(".jp-OutputArea-output")

    def press(self, source: str | int) -> None:
        """Begin to run one cell, by keyboard."""
        before = self._count(source)
        self._until_begun(lambda: self._press(source), lambda: self._count(source) != before)

    def _press(self, source: str | int) -> None:
        self.cell(source).locator(".cm-content").click()
        self.page.keyboard.press("Shift+Enter")

    def _until_begun(self, act: Callable[[], None], begun: Callable[[], bool]) -> None:
        # A page that is still busy with its first drawing loses what is pressed; people press again, and so do we.
        for _ in range(_PRESSES):
            act()
            deadline = time.monotonic() + _BEGUN_S
            while time.monotonic() < deadline:
                if begun():
                    return
                self.page.wait_for_timeout(50)
        raise AssertionError(f"{self.name}: nothing began to run")

    def run(self, source: str | int) -> None:
        """Run one cell and wait until it has ended."""
        self.press(source)
        expect(self.cell(source).locator(".jp-InputPrompt")).to_have_text(re.compile(r"\[\d+\]:"), timeout=SLOW_MS)

    def _count(self, source: str | int) -> str:
        return self.cell(source).locator(".jp-InputPrompt").inner_text()

    def run_all(self) -> None:
        """Run → Run All Cells; waits until it has begun."""
        # Cells are drawn one after another: one that comes into view has no number, and nothing began by that.
        prompts = self.panel.locator(".jp-CodeCell .jp-InputPrompt")
        before = set(filter(_RAN.fullmatch, prompts.all_inner_texts()))

        def act() -> None:
            self.panel.locator(".jp-CodeCell .cm-content").first.click()
            self.page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
            self.page.locator("li[data-command='runmenu:run-all']").click()

        self._until_begun(act, lambda: not before.issuperset(filter(_RAN.fullmatch, prompts.all_inner_texts())))

    def wait_output(self, source: str | int, text: str | re.Pattern[str]) -> None:
        """Wait until a cell shows a text."""
        expect(self.output(source).filter(has_text=text).first).to_be_visible(timeout=SLOW_MS)

    def restart_kernel(self) -> None:
        """Kernel → Restart, confirmed."""
        self.panel.locator(".jp-CodeCell .cm-content").first.click()
        self.page.keyboard.press("Escape")
        self.page.keyboard.press("0")
        self.page.keyboard.press("0")
        self.page.locator(".jp-Dialog button.jp-mod-accept").click()
        self.page.locator(".jp-Dialog").wait_for(state="detached", timeout=SLOW_MS)
        self.wait_idle()

    def save(self) -> None:
        """Save, and wait until it is saved."""
        self.page.keyboard.press("Control+s")
        self.page.locator(".lm-TabBar-tab.jp-mod-dirty").first.wait_for(state="detached", timeout=SLOW_MS)
