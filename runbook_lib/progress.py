"""How far a long effect has come: done, rate and the time that is left, for the notebook, the terminal and the desk.

A view and nothing more: it is written over all the time, lies outside of the record, and no step reads it. What stays in
the notebook is one plain line that says what it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from runbook_lib import cell, pages
from runbook_lib.canonical import canonical_json
from runbook_lib.pages import seconds, size, text

_EVERY_S = 1.0
_BLOCK_BYTES = 256 << 10
_STALE_S = 10.0
# Short of this nobody waits, and nothing is shown.
_PATIENCE_S = 2.0
# Of more items than this only those are named that are at work or have failed.
_MOST_NAMED = 12
# What goes on evenly: there a rate says something. Tables and hosts are counted, and are of any size.
_EVEN = ("bytes", "files")
# Totals that are known and not foretold.
_EXACT = ("s", "tables", "hosts")
_STYLE = (
    ".rb progress{-webkit-appearance:none;appearance:none;width:260px;max-width:100%;height:12px;margin:0 10px;border:1px solid var(--soft);"
    "border-radius:6px;overflow:hidden;background:var(--code);vertical-align:middle}"
    ".rb progress::-webkit-progress-bar{background:var(--code)}.rb progress::-webkit-progress-value{background:var(--bar)}"
    ".rb progress::-moz-progress-bar{background:var(--bar)}"
)
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Seen:
    """How far something was when it was last looked at.

    Attributes:
        what: in a few words.
        line: the whole as one line for people.
        done: in `unit`.
        total: in `unit`; None when nobody knows.
        rate: `unit` a second.
        unit: bytes, files, tables, hosts, or s for a wait.
    """

    what: str
    line: str
    done: int
    total: int | None
    rate: float
    unit: str


class Told(Protocol):
    """`told` with its folder filled in, for code that knows of no run."""

    def __call__(
        self, what: str, done: Callable[[], int], *, total: int | None = None, unit: str = "bytes"
    ) -> contextlib.AbstractContextManager[None]:
        """Tell the progress of what the body does."""


@contextmanager
def untold(what: str, done: Callable[[], int], *, total: int | None = None, unit: str = "bytes") -> Iterator[None]:
    """A `Told` that says nothing."""
    yield


@contextmanager
def told(
    folder: Path, what: str, done: Callable[[], int], *, total: int | None = None, unit: str = "bytes"
) -> Iterator[None]:
    """Tell the progress of what the body does.

    Args:
        folder: the run's scratch folder.
        what: in a few words.
        done: how much is done, in `unit`; called about once a second, from another thread.
        total: how much it will be, as far as anybody knows.
        unit: bytes, files, tables, hosts, or s for a wait.
    """
    last = 0

    def look(elapsed_s: float) -> tuple[Seen, str]:
        nonlocal last
        last = done()
        rate = last / elapsed_s if elapsed_s else 0.0
        seen = Seen(what, line(what, last, elapsed_s, total, unit), last, total, round(rate, 3), unit)
        return seen, _bar(seen)

    def end(elapsed_s: float, *, whole: bool) -> str:
        with contextlib.suppress(Exception):  # what it was counted by may be gone: then the last look counts
            look(elapsed_s)
        if unit == "s":
            return f"{what}: done in {seconds(elapsed_s)}" if whole else f"{what}: stopped after {seconds(elapsed_s)}"
        if not whole:
            return f"{what}: stopped after {seconds(elapsed_s)} at {_amount(last, unit)}"
        rate = f", {_amount(round(last / elapsed_s), unit)}/s" if unit in _EVEN and elapsed_s else ""
        return f"{what}: done, {_amount(last, unit)} in {seconds(elapsed_s)}{rate}"

    with _followed(folder, what, look, end):
        yield


def sha256(path: Path, tell: Told) -> str:
    """SHA-256 of a file's content as 64 hex digits; how far it is read is told."""
    return _hashed(path, tell, threading.Event())


def _hashed(path: Path, tell: Told, stop: threading.Event) -> str:
    """SHA-256 of a file; of a part of it when it is told to stop."""
    digest, block = hashlib.sha256(), bytearray(_BLOCK_BYTES)
    with path.open("rb", buffering=0) as file, tell(f"{path.name}, hashed", file.tell, total=path.stat().st_size):
        while not stop.is_set() and (size_bytes := file.readinto(block)):
            digest.update(memoryview(block)[:size_bytes])
    return digest.hexdigest()


@contextmanager
def hashing(paths: Iterable[Path], tell: Told) -> Iterator[dict[Path, Future[str]]]:
    """Hash files beside the body, two at a time; gives for each the SHA-256 to come, `missing` when it is not there.

    What nobody has asked for when the body ends is not hashed to its end.
    """
    stop = threading.Event()

    def digest(path: Path) -> str:
        return _hashed(path, tell, stop) if path.is_file() else "missing"

    with ThreadPoolExecutor(2, thread_name_prefix="hashing") as pool:
        try:
            yield {path: pool.submit(copy_context().run, digest, path) for path in paths}
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


class Items:
    """Which of a step's items are done, at work, or have failed."""

    def __init__(self, items: Sequence[str]) -> None:
        self._marks = dict.fromkeys(items, "")

    def __call__(self, item: str, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """Do the work of one item."""
        self._marks[item] = "●"
        try:
            result = work(*arguments)
        except BaseException:
            self._marks[item] = "✖"
            raise
        self._marks[item] = "✔"
        return result

    @property
    def done(self) -> int:
        """How many are."""
        return sum(mark == "✔" for mark in self._marks.values())

    def named(self) -> list[tuple[str, str]]:
        """Those that were begun, with their marks; of many only those that are not done."""
        many = len(self._marks) > _MOST_NAMED
        return [(item, mark) for item, mark in self._marks.items() if mark and not (many and mark == "✔")]

    def __str__(self) -> str:
        named = ", ".join(f"{item} {mark}" for item, mark in self.named())
        return f"{self.done} of {len(self._marks)} hosts" + (f": {named}" if named else "")


@contextmanager
def over(folder: Path, what: str, items: Sequence[str]) -> Iterator[Items]:
    """Tell which items are done while the body works on them.

    Args:
        folder: the run's scratch folder.
        what: in a few words.
        items: all of them.
    """
    doing, total = Items(items), len(items)
    words = {"✔": ("good", "done"), "●": ("warn", "at work"), "✖": ("bad", "not done")}

    def look(elapsed_s: float) -> tuple[Seen, str]:
        done = doing.done
        left = f", about {seconds(elapsed_s / done * (total - done))} left" if 0 < done < total else ""
        rate = done / elapsed_s if elapsed_s else 0.0
        seen = Seen(what, f"{what}: {doing}{left}", done, total, round(rate, 3), "hosts")
        pills = " ".join(
            f'<span class="pill {words[mark][0]}">{text(item)} {mark} {words[mark][1]}</span>'
            for item, mark in doing.named()
        )
        return seen, _bar(seen, said=f"{done} of {total} hosts{left}", more=pills)

    def end(elapsed_s: float, *, whole: bool) -> str:
        return f"{what}: {doing}, {'in' if whole else 'stopped after'} {seconds(elapsed_s)}"

    with _followed(folder, what, look, end):
        yield doing


@contextmanager
def _followed(
    folder: Path, what: str, look: Callable[[float], tuple[Seen, str]], end: Callable[..., str]
) -> Iterator[None]:
    """Show what `look` sees, again and again, and what `end` says in its place when the body has ended."""
    stop, began = threading.Event(), time.monotonic()
    file = folder / "progress" / f"{_name(what)}.json"
    output, shown, turn = cell.Output(), False, threading.Lock()

    def follow() -> None:
        nonlocal shown
        while not stop.wait(_EVERY_S):
            elapsed_s = time.monotonic() - began
            if elapsed_s < _PATIENCE_S:
                continue
            with contextlib.suppress(Exception):  # nothing may fail because it is watched
                seen, html = look(elapsed_s)
                with turn:
                    if stop.is_set():  # the look took longer than the rest of the work: its word is stale
                        return
                    _write(file, asdict(seen))
                    output.show({"text/html": html, "text/plain": seen.line})
                    shown = True

    def ended(*, whole: bool) -> None:
        stop.set()
        thread.join(timeout=_EVERY_S)
        with turn, contextlib.suppress(Exception):
            file.unlink(missing_ok=True)
            if shown:
                said = end(time.monotonic() - began, whole=whole)
                output.show({"text/html": pages.output(f"<p>{text(said)}</p>"), "text/plain": said})

    thread = threading.Thread(target=copy_context().run, args=(follow,), daemon=True, name=f"progress of {what}")
    thread.start()
    try:
        yield
    except BaseException:
        ended(whole=False)
        raise
    ended(whole=True)


def now(folder: Path) -> list[str]:
    """What is told at this moment, a line each."""
    return [one.line for one in seen(folder)]


def seen(folder: Path) -> list[Seen]:
    """What is told at this moment, for a machine.

    Args:
        folder: the run's scratch folder.
    """
    found = []
    for file in sorted((folder / "progress").glob("*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):  # it has just ended, or another version wrote it
            if time.time() - file.stat().st_mtime < _STALE_S:  # a killed process leaves its last word
                found.append(Seen(**json.loads(file.read_bytes())))
    return found


def line(what: str, done: int, elapsed_s: float, total: int | None, unit: str = "bytes") -> str:
    """One line for people: how much, the rate, and the time that is left when the end is known."""
    return f"{what}: {_said(done, elapsed_s, total, unit)}"


def _said(done: int, elapsed_s: float, total: int | None, unit: str) -> str:
    rate = done / elapsed_s if elapsed_s else 0.0
    words = [_amount(done, unit)]
    if total:
        words[0] += f" of {'' if unit in _EXACT else 'about '}{_amount(total, unit)}"
    if unit in _EVEN:
        words.append(f"{_amount(round(rate), unit)}/s")
    if total and rate and done < total and unit in (*_EVEN, "s"):
        words.append(f"about {seconds((total - done) / rate)} left")
    return ", ".join(words)


def _amount(value: int, unit: str) -> str:
    if unit == "bytes":
        return size(value)
    return seconds(value) if unit == "s" else f"{value:,} {unit}"


def _bar(seen: Seen, *, said: str = "", more: str = "") -> str:
    """A bar that reads without its style too, and says when it was drawn: a killed kernel leaves it standing."""
    words = said or seen.line.removeprefix(f"{seen.what}: ")
    bar = ""  # where no end is known, a bar would say nothing
    if seen.total:
        bar = f'<progress max="{seen.total}" value="{min(seen.done, seen.total)}" aria-label="{text(seen.what)}"></progress> '
    drawn = f"{datetime.now(UTC):%H:%M:%S} UTC"
    return pages.output(
        f'<div class="card"><strong>{text(seen.what)}</strong> {bar}'
        f'<span>{text(words)}</span> <span class="soft">at {drawn}</span>{f"<p>{more}</p>" if more else ""}</div>',
        more_style=_STYLE,
    )


def _name(what: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "-" for c in what)


def _write(file: Path, data: dict[str, Any]) -> None:
    # Without waiting for the disk: after a crash nobody wants it.
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_bytes(canonical_json(data))
    os.replace(part, file)  # noqa: PTH105
