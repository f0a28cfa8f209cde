"""The watch as it goes on: a chart that is drawn again and again, and gives way to the charts of the record."""

from __future__ import annotations

import base64
import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field

from runbook_lib import cell, charts, telemetry, watch
from runbook_lib.pages import seconds
from runbook_lib.run import Run
from runbook_lib.watch import Sample
from runbook_lib.watch_config import WatchConfig

_EVERY_S = 5.0
_MOST_DRAWINGS = 30
_NICE = 19


@dataclass(slots=True)
class LiveChart:
    """One output of the cell.

    Args:
        baseline: samples of the time before, drawn beside what is measured.
    """

    run: Run
    config: WatchConfig
    baseline: Sequence[Sample]
    _output: cell.Output = field(default_factory=cell.Output, init=False)
    _turn: threading.Lock = field(default_factory=threading.Lock, init=False)
    _shown: bool = field(default=False, init=False)

    @contextmanager
    def window(self, start_s: float, duration_s: float) -> Iterator[None]:
        """Draw what was measured so far, now and then, while the body waits for the window to pass.

        Args:
            start_s: in epoch seconds.
            duration_s: the window's length.
        """
        if not cell.is_watched():
            yield
            return
        stop = threading.Event()
        work = copy_context().run
        thread = threading.Thread(
            target=work, args=(self._follow, start_s, duration_s, stop), daemon=True, name="live chart"
        )
        thread.start()
        try:
            yield
        finally:
            stop.set()
            with self._turn:  # a drawing that is not shown by now never is
                pass

    def end(self, pictures: Sequence[tuple[bytes, str]]) -> None:
        """Show these in its place.

        Args:
            pictures: PNG and alternative text of each.
        """
        outputs = [self._output, *(cell.Output() for _ in pictures[1:])]
        for output, (png, alt) in zip(outputs, pictures, strict=False):
            bundle, metadata = _image(png, alt)
            output.show(bundle, metadata=metadata)
        self._shown = False

    def drop(self) -> None:
        """Leave a word in its place: there will be no chart."""
        if self._shown:
            self._output.show({"text/plain": "The watch was stopped before its end: there is no chart."})

    def _follow(self, start_s: float, duration_s: float, stop: threading.Event) -> None:
        # Whatever is measured on this machine comes first. On Linux a thread has a priority of its own.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        current: list[Sample] = []
        until_s, took_s = start_s, 0.0
        pause_s = max(_EVERY_S, duration_s / _MOST_DRAWINGS)
        while not stop.wait(max(pause_s, 2 * took_s)):
            began = time.monotonic()
            with contextlib.suppress(Exception):  # the watch does not fail because nobody can draw it
                interval_s = self.run.params.watch.interval_s
                now_s = start_s + interval_s * math.floor(
                    (min(time.time(), start_s + duration_s) - start_s) / interval_s
                )
                if now_s > until_s:
                    # Only what is new: the database is asked once for each value.
                    current += telemetry.collect(self.run, until_s, now_s, "current")
                    until_s = now_s
                self._draw(current, until_s - start_s, duration_s, stop)
            took_s = time.monotonic() - began

    def _draw(self, current: Sequence[Sample], passed_s: float, duration_s: float, stop: threading.Event) -> None:
        samples = [s for s in (*self.baseline, *current) if s.metric in self.config.metrics]
        so_far = f"{seconds(passed_s)} of {seconds(duration_s)}, not judged yet"
        png = charts.overview(samples, watch.judge(samples, self.config), so_far=so_far)
        bundle, metadata = _image(png, f"Chart of the telemetry watch: {so_far}")
        with self._turn:
            if not stop.is_set():
                self._output.show(bundle, metadata=metadata)
                self._shown = True


@contextmanager
def live(run: Run, config: WatchConfig, baseline: Sequence[Sample]) -> Iterator[LiveChart]:
    """A chart for the body's windows; without `end` it gives way to a word that there is none."""
    chart = LiveChart(run, config, baseline)
    try:
        yield chart
    finally:
        chart.drop()


def _image(png: bytes, alt: str) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    # A picture of its own and no HTML with one inside: viewers that clean HTML show it, and nbconvert reads `alt`.
    return {"image/png": base64.b64encode(png).decode(), "text/plain": alt}, {"image/png": {"alt": alt}}
