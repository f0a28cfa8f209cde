"""What a verb says: words on stderr, facts as the last line of stdout, progress beside its work."""

from __future__ import annotations

import contextlib
import json
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
