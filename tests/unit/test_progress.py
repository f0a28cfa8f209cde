"""What is told of a long effect while it goes on, and what is left of it."""

from __future__ import annotations

import base64
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest

from runbook_lib import cli, live_chart, progress
from runbook_lib.canonical import sha256_file
from runbook_lib.errors import StepFailedError
from runbook_lib.model import Recovery, StepResult
from runbook_lib.notebook_html import notebook_html
from runbook_lib.run import Run
from runbook_lib.step import step
from runbook_lib.watch_config import WatchConfig
from tests.ledgers import LedgerServer
from tests.project import ROOT, wait_until


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_EVERY_S", 0.02)
    monkeypatch.setattr(progress, "_PATIENCE_S", 0.0)


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """All that is shown in the cell, in order: this process has none."""
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(progress.cell.Output, "show", lambda self, bundle, **more: shown.append(dict(bundle)))
    return shown


def test_a_line_has_bytes_rate_and_what_is_left() -> None:
    assert progress.line("dump", 50_000_000, 5.0, 200_000_000) == (
        "dump: 50.0 MB of about 200.0 MB, 10.0 MB/s, about 15 s left"
    )
    assert progress.line("dump", 50_000_000, 5.0, None) == "dump: 50.0 MB, 10.0 MB/s"
    assert progress.line("dump", 0, 0.0, 10) == "dump: 0 B of about 10 B, 0 B/s"


def test_a_wait_and_counted_things_have_words_of_their_own() -> None:
    assert progress.line("watch", 180, 180.0, 900, "s") == "watch: 3 min 00 s of 15 min 00 s, about 12 min 00 s left"
    assert progress.line("compare", 3, 2.0, 40, "tables") == "compare: 3 tables of 40 tables"
    assert progress.line("hash", 300, 10.0, 600, "files") == (
        "hash: 300 files of about 600 files, 30 files/s, about 10 s left"
    )


def test_it_is_told_while_it_goes_on_and_not_afterwards(tmp_path: Path, at_once: None) -> None:
    assert progress.now(tmp_path) == []

    with progress.told(tmp_path, "archive of app/01", lambda: 7_000_000, total=70_000_000):
        wait_until(lambda: progress.now(tmp_path), "telling")
        (line,), (seen,) = progress.now(tmp_path), progress.seen(tmp_path)

    assert line.startswith("archive of app/01: 7.0 MB of about 70.0 MB, ")
    assert (seen.what, seen.done, seen.total, seen.unit) == ("archive of app/01", 7_000_000, 70_000_000, "bytes")
    assert seen.rate > 0
    assert progress.now(tmp_path) == []


def test_a_cell_has_a_bar_with_its_figures_and_is_left_with_one_plain_line(
    tmp_path: Path, at_once: None, outputs: list[dict[str, Any]]
) -> None:
    with progress.told(tmp_path, "dump", lambda: 30, total=60):
        wait_until(lambda: outputs, "a bar")

    assert '<progress max="60" value="30" aria-label="dump"></progress>' in outputs[0]["text/html"]
    assert "30 B of about 60 B" in outputs[0]["text/html"]
    assert "30 B of about 60 B" in outputs[0]["text/plain"]
    assert re.fullmatch(r"dump: done, 30 B in \d+\.\d s, \d+ .?B/s", outputs[-1]["text/plain"])
    assert "<progress" not in outputs[-1]["text/html"]


def test_of_what_fails_is_left_how_far_it_came(tmp_path: Path, at_once: None, outputs: list[dict[str, Any]]) -> None:
    with pytest.raises(StepFailedError), progress.told(tmp_path, "dump", lambda: 30):
        wait_until(lambda: outputs, "a bar")
        raise StepFailedError("the disk is full", remedy="make room")

    assert re.fullmatch(r"dump: stopped after \d+\.\d s at 30 B", outputs[-1]["text/plain"])


def test_what_takes_no_time_shows_nothing(tmp_path: Path, outputs: list[dict[str, Any]]) -> None:
    with progress.told(tmp_path, "dump", lambda: 30):
        pass

    assert outputs == []


def test_a_look_that_comes_late_is_not_shown_over_the_last_word(
    tmp_path: Path, at_once: None, outputs: list[dict[str, Any]]
) -> None:
    go_on, looking, looks = threading.Event(), threading.Event(), []

    def slow() -> int:
        looks.append(1)
        if len(looks) == 2:
            looking.set()
            go_on.wait(20)
        return 1

    with progress.told(tmp_path, "dump", slow):
        assert looking.wait(20)
    (follower,) = [thread for thread in threading.enumerate() if thread.name == "progress of dump"]
    go_on.set()
    follower.join(20)

    assert "done" in outputs[-1]["text/plain"]
    assert progress.now(tmp_path) == []


def test_nothing_fails_because_it_is_watched(tmp_path: Path, at_once: None) -> None:
    looks = []

    def gone() -> int:
        looks.append(1)
        return (tmp_path / "gone").stat().st_size

    with progress.told(tmp_path, "gone", gone):
        wait_until(lambda: len(looks) > 2, "looking")

    assert progress.now(tmp_path) == []


def test_files_are_hashed_beside_other_work(tmp_path: Path) -> None:
    file, gone = tmp_path / "a", tmp_path / "b"
    file.write_bytes(b"a" * 100_000)

    with progress.hashing([file, gone], progress.untold) as digests:
        found = {path: digest.result() for path, digest in digests.items()}

    assert found == {file: sha256_file(file), gone: "missing"}


def test_who_fails_beside_the_hashing_waits_for_no_file(tmp_path: Path) -> None:
    file = tmp_path / "a"
    with file.open("wb") as big:
        big.truncate(1 << 40)  # an hour's reading

    with pytest.raises(KeyError), progress.hashing([file], progress.untold):
        raise KeyError

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hashing")]


def test_a_file_is_hashed_and_how_far_it_is_read_is_told(tmp_path: Path) -> None:
    file, told = tmp_path / "one.dump", []
    file.write_bytes(bytes(range(256)) * 4000)

    @contextmanager
    def tell(what: str, done: Callable[[], int], *, total: int | None = None, unit: str = "bytes") -> Iterator[None]:
        told.append(done())
        yield
        told.extend((what, done(), total, unit))

    assert progress.sha256(file, tell) == sha256_file(file)
    assert told == [0, "one.dump, hashed", 1_024_000, 1_024_000, "bytes"]


def test_the_last_word_of_a_killed_process_is_not_told(tmp_path: Path) -> None:
    left = tmp_path / "progress" / "dump.json"
    left.parent.mkdir()
    left.write_text('{"what": "dump", "line": "dump: 1 B", "done": 1, "total": null, "rate": 1.0, "unit": "bytes"}')
    assert progress.now(tmp_path) == ["dump: 1 B"]

    os.utime(left, (time.time() - 60, time.time() - 60))

    assert progress.now(tmp_path) == []


def hosts_step(act: Callable[[Run, str], None], *, at_once: bool) -> Any:
    def over_hosts(run: Run, host: str) -> StepResult:
        act(run, host)
        return StepResult()

    limit = (lambda run: 3) if at_once else None
    made = step("Switch over", recovery=Recovery.REPEAT, each=lambda run: ("app-01", "app-02", "db-01"), limit=limit)(
        over_hosts
    )
    made.phase = "prepare"
    return made


@pytest.mark.parametrize("together", [False, True], ids=["in turn", "at once"])
def test_a_step_over_hosts_says_which_are_done(
    run: Run, at_once: None, outputs: list[dict[str, Any]], together: bool
) -> None:
    def act(run: Run, host: str) -> None:
        if host == "app-02":
            wait_until(
                lambda: any("app-01 ✔" in line and "app-02 ●" in line for line in progress.now(run.scratch)), host
            )

    hosts_step(act, at_once=together)(run)

    assert any("1 of 3 hosts" in shown["text/plain"] or "2 of 3 hosts" in shown["text/plain"] for shown in outputs)
    assert outputs[-1]["text/plain"].startswith("Switch over: 3 of 3 hosts: app-01 ✔, app-02 ✔, db-01 ✔, in ")


def test_a_step_over_hosts_that_fails_leaves_which_one(run: Run, at_once: None, outputs: list[dict[str, Any]]) -> None:
    def act(run: Run, host: str) -> None:
        wait_until(lambda: outputs, "telling")
        if host == "app-02":
            raise StepFailedError("no", remedy="look")

    with pytest.raises(StepFailedError):
        hosts_step(act, at_once=False)(run)

    assert outputs[-2]["text/plain"].startswith("Switch over: 1 of 3 hosts: app-01 ✔, app-02 ✖, stopped after ")
    assert outputs[-1]["text/plain"] == "failed: Switch over"


def test_of_many_hosts_those_are_named_that_are_not_done() -> None:
    doing = progress.Items([f"app-{n:02}" for n in range(40)])
    for n in range(20):
        doing(f"app-{n:02}", lambda: None)

    assert str(doing) == "20 of 40 hosts"
    assert doing("app-20", lambda: str(doing)) == "20 of 40 hosts: app-20 ●"


def executed(tmp_path: Path, *sources: str) -> Any:
    """A notebook, run headless in a kernel of its own."""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in sources],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}},
    )
    nbformat.write(notebook, tmp_path / "in.ipynb")
    papermill.execute_notebook(
        str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), progress_bar=False, log_output=False, cwd=str(ROOT)
    )
    return nbformat.read(tmp_path / "out.ipynb", as_version=4)


@pytest.fixture
def in_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels find the code that is tested."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_a_notebook_that_was_run_headless_has_the_last_line_alone(
    tmp_path: Path, in_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNBOOK_HEADLESS", "1")
    book = executed(
        tmp_path,
        f"""
import pathlib, time
from runbook_lib import progress
progress._EVERY_S, progress._PATIENCE_S = 0.01, 0.0
folder, looks = pathlib.Path({str(tmp_path)!r}), []
with progress.told(folder, "dump", lambda: looks.append(1) or len(looks), total=1000):
    while len(looks) < 20:
        time.sleep(0.01)
""",
        "from runbook_lib import cell; cell.is_watched()",
    )

    assert book.cells[1].outputs[0].data["text/plain"] == "False"

    (output,) = book.cells[0].outputs
    assert output.data["text/plain"].startswith("dump: done, ")
    assert "<progress" not in output.data["text/html"]
    page = notebook_html(tmp_path / "out.ipynb", title="headless")
    assert "dump: done, " in page
    assert "of about" not in page


# Draws until a chart is shown: END is what becomes of it.
_LIVE = """
import time
from runbook_lib import cell, live_chart, telemetry, wiring
live_chart._EVERY_S, live_chart._MOST_DRAWINGS, shown = 0.1, 6000, []
if "show" not in globals():
    show = cell.Output.show
cell.Output.show = lambda self, bundle, **more: (shown.append(bundle["text/plain"]), show(self, bundle, **more))
run, start_s = wiring.attach(RUN), time.time() - 10
with live_chart.live(run, telemetry.watch_config(run.params), telemetry.collect(run, start_s - 20, start_s, "baseline")) as chart:
    with chart.window(start_s, 600.0):
        while not shown:
            time.sleep(0.05)
    END
assert "of 10 min 00 s, not judged yet" in shown[0], shown
"""


def measured(open_run: Callable[..., Run], tmp_path: Path) -> Run:
    """A run with an access log that goes on for some minutes from now."""
    now_s, log = time.time(), tmp_path / "access.jsonl"
    lines = [f'{{"time": {now_s - 90 + n / 20:.3f}, "status": 200, "duration_s": 0.05}}\n' for n in range(9000)]
    log.write_text("".join(lines))
    return open_run(
        watch__duration_s="6",
        watch__interval_s="0.25",
        watch__baseline_s="20",
        watch__extensions="0",
        watch__access_log=str(log),
    )


def test_a_live_chart_gives_way(open_run: Callable[..., Run], tmp_path: Path, in_kernels: None) -> None:
    live = _LIVE.replace("RUN", repr(measured(open_run, tmp_path).run_id))

    book = executed(
        tmp_path,
        live.replace("END", "chart.end([(b'one', 'first'), (b'two', 'second')])"),
        live.replace("END", "pass"),
    )

    left = [[output.data["text/plain"] for output in cell.outputs] for cell in book.cells]
    assert left == [["first", "second"], ["The watch was stopped before its end: there is no chart."]]


def test_nothing_is_drawn_where_nobody_looks(open_run: Callable[..., Run], tmp_path: Path) -> None:
    with live_chart.LiveChart(measured(open_run, tmp_path), WatchConfig(), ()).window(time.time(), 600.0):
        assert not [thread for thread in threading.enumerate() if thread.name == "live chart"]


def test_the_watch_ends_with_the_charts_of_the_record(
    open_run: Callable[..., Run], tmp_path: Path, in_kernels: None
) -> None:
    run = measured(open_run, tmp_path)
    begun = {"step": "begin.enable_maintenance", "phase": "begin", "attempt": 1, "children": "logs/x", "pre_state": {}}
    run.ledger.append(run.run_id, "step_intent", begun)

    book = executed(
        tmp_path,
        f"""
from runbook_lib import progress, wiring
from runbook_lib.phases import verify
progress._EVERY_S = 0.1
_ = verify.watch_telemetry.action(wiring.attach({run.run_id!r}))
""",
    )

    outputs = book.cells[0].outputs
    texts = [output.data["text/plain"] for output in outputs]
    (told,) = [text for text in texts if text.startswith("watch")]
    assert re.fullmatch(r"watch: done in \d+(\.\d)? s", told)
    pictures = [output for output in outputs if "image/png" in output.data]
    kept = {path.read_bytes() for path in (run.folder / "artifacts" / "watch").glob("*.png")}
    assert {base64.b64decode(picture.data["image/png"]) for picture in pictures} == kept
    assert len(outputs) == 1 + len(kept) == 4
    page = notebook_html(tmp_path / "out.ipynb", title="watch")
    alts = re.findall(r'<img[^>]*alt="([^"]*)"', page)
    assert len(alts) == 3
    assert all(re.search(r": (green|red|inconclusive)\.", alt) for alt in alts), alts
    assert "not judged yet" not in page


@pytest.fixture
def server(ledger_server: LedgerServer) -> Iterator[LedgerServer]:
    """A ledger's server that a test may stop."""
    yield ledger_server
    if ledger_server.process.poll() is not None:
        ledger_server.restart()


def test_a_ledger_that_is_away_for_a_while_does_not_end_what_the_terminal_shows(
    open_run: Callable[..., Run], server: LedgerServer, capfd: pytest.CaptureFixture[str]
) -> None:
    run, shown = open_run(ledger=server.new_ledger()), ""

    def seen(words: str) -> bool:
        nonlocal shown
        shown += capfd.readouterr().err
        return words in shown

    with cli._progress(run):
        server.stop()
        wait_until(lambda: seen("cannot be used"), "the outage on the terminal", 20)
        server.restart()
        run.ledger.append(run.run_id, "note", {"text": "it is back"})

        wait_until(lambda: seen("it is back"), "the note on the terminal", 20)

    assert "Traceback" not in shown
    assert shown.count("cannot be used") == 1


def test_an_interrupt_is_not_replaced_by_what_a_ledger_says_at_the_end(
    open_run: Callable[..., Run], server: LedgerServer
) -> None:
    run = open_run(ledger=server.new_ledger())

    with pytest.raises(KeyboardInterrupt), cli._progress(run):
        server.stop()
        raise KeyboardInterrupt
