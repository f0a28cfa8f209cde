"""How a lab ends: nothing stays behind, a step is waited for, and what a closed terminal left is found again."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="no playwright: pip install playwright")

from playwright.sync_api import Page, expect  # noqa: E402

from runbook_lib import lab as lab_module  # noqa: E402
from runbook_lib.adapters import http  # noqa: E402
from runbook_lib.model import Status  # noqa: E402
from tests.browser.walker import SLOW_MS, Lab, lab_of  # noqa: E402
from tests.project import Project, alive, wait_until  # noqa: E402


def left_of(lab: Lab, runtime: Path) -> list[int]:
    """Processes that still know the lab's folder or its kernels'."""
    return [*alive(str(lab.folder)), *alive(str(runtime))]


def test_closing_the_browser_stops_nothing_and_ctrl_c_leaves_no_process(
    project: Project, new_page: Callable[[], Page]
) -> None:
    with lab_of(project) as lab:
        page = new_page()
        page.goto(lab.url)
        expect(page.locator(".jupyter-widgets").first).to_be_visible(timeout=SLOW_MS)
        runtime, kernels = lab.server.runtime, lab.server.kernels

        page.context.close()
        assert lab.server.kernels == kernels != []
        status, said = lab.stop()

    assert status == 0, said
    assert f"runbook status {lab.run_id}" in said
    assert left_of(lab, runtime) == []
    assert not runtime.exists()
    assert not (lab.folder.parent / "lab-state" / "token").exists()


def test_a_step_that_is_being_run_is_waited_for(project: Project, tmp_path: Path) -> None:
    hold, reached = tmp_path / "hold", tmp_path / "reached"
    held = tmp_path / "du"
    held.write_text(
        f'#!/bin/sh\necho >> {reached}\nwhile [ -e {hold} ]; do sleep 0.05; done\nexec {shutil.which("du")} "$@"\n'
    )
    held.chmod(held.stat().st_mode | stat.S_IXUSR)
    hold.touch()

    with lab_of(project, env={"PATH": f"{tmp_path}:{project.env['PATH']}"}) as lab:
        walking = threading.Thread(target=lab.server.run_notebook, args=(lab.folder / "00_prepare.ipynb",))
        walking.start()
        wait_until(reached.exists, "the look at what is free")
        lab.process.send_signal(signal.SIGINT)
        wait_until(lambda: "check_capacity is being run here and is waited for" in lab.said, "the word that it waits")
        assert lab.server.alive
        hold.unlink()
        assert lab.process.wait(timeout=120) == 0
        walking.join()

    step = project.state(lab.run_id).step("prepare.check_capacity")
    assert step.status is Status.GREEN


def test_what_a_closed_terminal_left_is_found_and_ended(project: Project) -> None:
    with lab_of(project) as first:
        os.kill(first.process.pid, signal.SIGHUP)
        first.process.wait(timeout=60)
        assert first.server.alive
        runtime = first.server.runtime

        with lab_of(project) as second:
            assert second.url == first.url
            status, said = second.stop()

    assert status == 0, said
    assert left_of(first, runtime) == []


def test_in_production_the_browser_opens_no_shell(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNBOOK_HOME", str(project.root))
    run = lab_module.run_to_walk("", environment="", version="", person="")

    answers = {}
    for production in (False, True):
        params = run.params.model_copy(update={"production": production})
        lab = lab_module.open_lab(replace(run, params=params), port=0, say=pytest.fail)
        headers = {"Authorization": f"token {lab.server.token}"}
        answers[production] = http.request("GET", f"{lab.server.url}api/terminals", headers=headers).status
        lab.end()

    assert answers == {False: 200, True: 404}
