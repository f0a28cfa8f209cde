"""`runbook lab` in a browser: opened at the desk, alive at once, alone with this machine."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Callable
from statistics import median

import nbformat
import pytest

pytest.importorskip("playwright", reason="no playwright: pip install playwright")

from playwright.sync_api import Page, expect  # noqa: E402

from tests.browser.walker import SLOW_MS, Lab, Notebook  # noqa: E402
from tests.project import Project  # noqa: E402

# The prompt's text is of no use here: this is drawn by a widget's view, and by nothing else.
LIVE = ".jp-OutputArea-output .jupyter-widgets"


def test_it_opens_at_the_release_desk_with_live_widgets_and_no_click(lab: Lab, page: Page) -> None:
    page.goto(lab.url)

    expect(page.locator(LIVE).first).to_be_visible(timeout=SLOW_MS)
    expect(page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")).to_contain_text(lab.run_id.split("-")[1])
    assert "release_desk.ipynb" in page.locator(".lm-TabBar-tab.lm-mod-current").all_inner_texts()
    expect(page.get_by_text("model not found")).to_have_count(0)


def test_a_reload_and_a_second_browser_find_the_same_living_desk(lab: Lab, new_page: Callable[[], Page]) -> None:
    first, second = new_page(), new_page()
    for page in (first, second):
        page.goto(lab.url)
        expect(page.locator(LIVE).first).to_be_visible(timeout=SLOW_MS)

    first.reload()

    expect(first.locator(LIVE).first).to_be_visible(timeout=SLOW_MS)
    assert len(lab.server.kernels) == 1


def test_a_second_lab_finds_the_first(lab: Lab, project: Project) -> None:
    done = project.runbook("lab", lab.run_id, "--no-browser", "--json")

    assert done.returncode == 0, done.stderr
    assert project.last_json(done) == {"run_id": lab.run_id, "url": lab.url, "folder": str(lab.folder)}
    assert "goes on" in done.stderr
    assert lab.server.alive


def test_without_a_run_it_takes_the_one_in_progress_and_refuses_another_version(lab: Lab, project: Project) -> None:
    done = project.runbook("lab", "--no-browser", "--json")
    refused = project.runbook("lab", "--no-browser", "--version", "v9.9.9")

    assert project.last_json(done)["run_id"] == lab.run_id
    assert refused.returncode == 2
    assert f"version is 'v9.9.9', run {lab.run_id} has" in refused.stderr


def test_three_people_sign_in_a_lab_run(lab: Lab, project: Project) -> None:
    assert project.state(lab.run_id).opened["people_sign"] is False


def test_a_notebook_is_walked_by_its_helpers(lab: Lab, page: Page) -> None:
    """What the other tests here stand on: run one, run all, restart, and the kernel knows where it is."""
    (lab.folder / "plain.ipynb").write_text(
        nbformat.writes(
            nbformat.v4.new_notebook(
                cells=[
                    nbformat.v4.new_code_cell(source)
                    for source in ("import os\nos.environ['RUNBOOK_LAB']", "count = 40", "count + 2")
                ],
                metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
            )
        )
    )
    notebook = Notebook.opened(page, lab.url_of("plain.ipynb"))

    notebook.run("RUNBOOK_LAB")
    notebook.wait_output("RUNBOOK_LAB", lab.run_id)
    notebook.run_all()
    notebook.wait_output("count + 2", "42")
    notebook.restart_kernel()
    notebook.run("count + 2")
    notebook.wait_output("count + 2", "NameError")
    notebook.save()

    assert "NameError" in (lab.folder / "plain.ipynb").read_text()


def test_nobody_else_on_this_machine_reads_along(lab: Lab) -> None:
    server = lab.server
    assert lab.folder.is_relative_to(server.state.parent)
    for folder in (lab.folder, server.state, server.runtime):
        assert stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0, folder
    # A kernel on TCP would show its outputs to every user; and a process list must not show the token.
    connections = [json.loads(p.read_text()) for p in server.runtime.glob("kernel-*.json")]
    assert connections
    assert {c["transport"] for c in connections} == {"ipc"}
    for pid in (server.process["pid"], *server.kernels):
        with open(f"/proc/{pid}/cmdline") as argv, open(f"/proc/{pid}/environ") as environment:
            assert server.token not in argv.read() + environment.read()


def test_the_desk_opens_as_quickly_as_an_empty_notebook(lab: Lab, new_page: Callable[[], Page]) -> None:
    """Both are open when they are drawn and their kernel is at hand: a live widget, an idle kernel."""
    empty = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("")],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    (lab.folder / "empty.ipynb").write_text(nbformat.writes(empty))
    kinds = {
        "empty": (lab.url_of("empty.ipynb"), ".jp-Notebook-ExecutionIndicator[data-status=idle]"),
        "desk": (lab.url, LIVE),
    }

    def seconds_to_open(url: str, ready: str) -> float:
        # JupyterLab comes back with what was open last: each opening is one of a fresh workspace.
        for workspace in (lab.server.state / "workspaces").glob("*"):
            workspace.unlink()
        page = new_page()
        begun = time.monotonic()
        page.goto(url)
        panel = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
        panel.locator(".jp-Cell").first.wait_for(timeout=SLOW_MS)
        panel.locator(ready).first.wait_for(state="attached", timeout=SLOW_MS)
        took = time.monotonic() - begun
        page.context.close()
        return took

    ratios: list[float] = []
    # What else the machine does can make either of them slow, not the desk quick: one quiet round is enough.
    while len(ratios) < 3 and not (ratios and ratios[-1] <= 1.5):
        took = {name: [] for name in kinds}
        for _ in range(2):
            for name, kind in kinds.items():
                took[name].append(seconds_to_open(*kind))
        ratios.append(median(took["desk"]) / median(took["empty"]))
        print(f"{took} ratio {ratios[-1]:.2f}")

    assert ratios[-1] <= 1.5, ratios
