"""What a verb says: words on stderr, facts as the last line of stdout, progress beside its work."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print facts as JSON, the last line of stdout.")]

PROGRESS_EVERY_S = 5.0


def say(text: str) -> None:
    """Say one line on stderr."""
    # What somebody typed may be in it, and it is one line on a terminal all the same. That may be gone by now.
    with contextlib.suppress(OSError):
        print("".join(c if c.isprintable() else "?" for c in text), file=sys.stderr, flush=True)


def ended_by_signals() -> Callable[[], int]:
    """From now on Ctrl-C, SIGTERM and a terminal that goes away raise KeyboardInterrupt; returns how many came so far."""
    came = 0

    def asked_to_end(_number: int, _frame: object) -> None:
        # The second one must not tear what the first one is just tidying up; who wants may ask for it. A third one ends
        # this process whatever it is at.
        nonlocal came
        came += 1
        if came != 2:
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup: it goes on without one
            signal.signal(number, asked_to_end)
    return lambda: came


def print_json(value: Any) -> None:
    """Print facts on one line of stdout."""
    print(json.dumps(value, ensure_ascii=False, sort_keys=True), flush=True)


@contextmanager
def beside(work: Callable[[], None], stop: threading.Event) -> Iterator[None]:
    """Let `work`, which ends when it is told to stop, run in a thread while the body does."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
