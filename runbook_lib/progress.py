"""How far a long effect has come: bytes, rate and the time that is left, for the notebook and for the terminal.

A view and nothing more: it is written over all the time, lies outside of the record, and no step reads it.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any

from runbook_lib import cell
from runbook_lib.canonical import canonical_json
from runbook_lib.pages import seconds, size

_EVERY_S = 1.0
_STALE_S = 10.0
# Short of this nobody waits, and nothing is shown.
_PATIENCE_S = 2.0


@contextmanager
def told(folder: Path, what: str, done: Callable[[], int], *, total: int | None = None) -> Iterator[None]:
    """Tell the progress of what the body does.

    Args:
        folder: the run's scratch folder.
        what: in a few words.
        done: how many bytes are done; called about once a second, from another thread.
        total: how many it will be, as far as anybody knows.
    """
    stop, began = threading.Event(), time.monotonic()
    file = folder / "progress" / f"{_name(what)}.json"
    output = cell.Output()

    def follow() -> None:
        while not stop.wait(_EVERY_S):
            elapsed_s = time.monotonic() - began
            if elapsed_s < _PATIENCE_S:
                continue
            with contextlib.suppress(Exception):  # nothing may fail because it is watched
                said = line(what, done(), elapsed_s, total)
                _write(file, {"what": what, "line": said})
                output.show({"text/plain": said})

    thread = threading.Thread(target=copy_context().run, args=(follow,), daemon=True, name=f"progress of {what}")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=_EVERY_S)
        file.unlink(missing_ok=True)


def now(folder: Path) -> list[str]:
    """What is told at this moment, a line each."""
    lines = []
    for file in sorted((folder / "progress").glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):  # it has just ended
            if time.time() - file.stat().st_mtime < _STALE_S:  # a killed process leaves its last word
                lines.append(str(json.loads(file.read_bytes())["line"]))
    return lines


def line(what: str, done: int, elapsed_s: float, total: int | None) -> str:
    """One line for people: bytes, rate, and the time that is left when the end is known."""
    rate = done / elapsed_s if elapsed_s else 0.0
    words = [f"{what}: {size(done)}", f"{size(round(rate))}/s"]
    if total:
        words[0] += f" of about {size(total)}"
        if rate and done < total:
            words.append(f"about {seconds((total - done) / rate)} left")
    return ", ".join(words)


def _name(what: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "-" for c in what)


def _write(file: Path, data: dict[str, Any]) -> None:
    # Without waiting for the disk: after a crash nobody wants it.
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_bytes(canonical_json(data))
    os.replace(part, file)  # noqa: PTH105
