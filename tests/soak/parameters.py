"""Wrong parameters, thousands of them: each is refused in one line, with exit code 2, before anything was done.

    python -m tests.soak.parameters --state FOLDER [--curated N] [--drawn N]

The curated mistakes are those of `tests.soak.mistakes`, each given to the command itself, in this process, in a project
folder without a twin. The drawn ones are those of `tests.soak.mutants`: most go to the schema, a share as files and as
words to the command. What a call does is seen from outside: Python's audit events while it runs, and the project folder
before and after. Results are kept a line each; what has one is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import typer.main
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from runbook_lib import cli
from runbook_lib.canonical import digest
from runbook_lib.errors import UsageError
from runbook_lib.params import Params, check, load
from tests.soak import mistakes, mutants
from tests.soak.mistakes import RUN_ID, Mistake, put

_TOOLS = ("pg_dump", "pg_restore", "ansible-playbook", "dbmate")
_BATCH = 500
_CALL_S = 20


# --- the observer ------------------------------------------------------------------------------------------------

# What changes something outside this process, or begins to. Looking is none of them, except where it starts a program.
_DEEDS = frozenset(
    """os.mkdir os.rename os.remove os.rmdir os.link os.symlink os.truncate os.chmod os.chown os.utime os.setxattr
    os.removexattr os.mkfifo os.system os.exec os.fork os.forkpty os.posix_spawn os.spawn os.kill os.killpg
    subprocess.Popen socket.connect socket.bind socket.sendto socket.getaddrinfo sqlite3.connect tempfile.mkstemp
    tempfile.mkdtemp shutil.move shutil.copyfile shutil.rmtree urllib.Request webbrowser.open""".split()
)


class Observer:
    """Counts deeds by Python's audit events. A hook cannot be taken out again: there is one, and it mostly sleeps."""

    def __init__(self) -> None:
        self._seen: list[str] | None = None
        self._looks: Callable[[str, tuple[Any, ...]], bool] = lambda *_: False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, words: tuple[Any, ...]) -> None:
        if self._seen is None or (event not in _DEEDS and event != "open"):
            return
        if event == "open" and not _writes(words):
            return
        if not self._looks(event, words):
            self._seen.append(f"{event} {words!r}"[:200])

    @contextmanager
    def watching(self, looks: Callable[[str, tuple[Any, ...]], bool] | None = None) -> Iterator[list[str]]:
        """The deeds of the body; `looks` says which of them only look."""
        seen: list[str] = []
        self._seen, self._looks = seen, looks or (lambda *_: False)
        try:
            yield seen
        finally:
            self._seen = None


def _writes(words: tuple[Any, ...]) -> bool:
    path, mode, flags = words
    if path == os.devnull or isinstance(path, int):  # a pipe's end
        return False
    return (isinstance(mode, str) and any(c in mode for c in "wax+")) or bool(
        isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )


OBSERVER = Observer()


class TooLongError(BaseException):
    """A call that does not come back; no OSError, which the command would explain away."""


@contextmanager
def _in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TooLongError(f"no answer in {_CALL_S} s")

    known = signal.signal(signal.SIGALRM, late)
    others = signal.setitimer(signal.ITIMER_REAL, _CALL_S)  # pytest has one running too
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *others)
        signal.signal(signal.SIGALRM, known)


# --- a project without a twin ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What one call did."""

    code: object
    said: str
    deeds: list[str]
    changed: list[str]
    traceback: str = ""

    def wrong(self, says: str = "") -> list[str]:
        """Why this is no refusal as it must be; empty when it is one."""
        lines = self.said.splitlines()
        return [
            why
            for why, is_so in (
                (f"traceback: {self.traceback[-300:]}", bool(self.traceback)),
                (f"exit {self.code}", self.code != 2),
                (f"{len(lines)} lines", len(lines) != 1),
                ("does not begin with its name", not self.said.startswith("runbook: ")),
                ("not printable", not self.said.removesuffix("\n").isprintable()),
                (f"does not name {says!r}", says not in self.said),
                ("says nothing", len(self.said.split()) < 3),
                (f"deeds: {self.deeds[:3]}", bool(self.deeds)),
                (f"changed: {self.changed[:3]}", bool(self.changed)),
            )
            if is_so
        ]


class World:
    """A project folder with params/ and runbooks/, whose good params file is refused only since its repository is not there."""

    def __init__(self, home: Path) -> None:
        self.home = home
        there = home / "there"
        for folder in ("params", "runbooks", "there/playbooks", "there/backups", "there/bin"):
            (home / folder).mkdir(parents=True)
        for name in (
            "playbooks/deploy_release.yml",
            "inventory.yml",
            "pgpass",
            "access.jsonl",
            "vault",
            "recorder",
            "credentials",
        ):
            (there / name).write_text("")
        (there / "series.csv").write_text("time,metric,value,window\n")
        good = {
            "environment": "shop",
            "run": RUN_ID,
            "inventory": {},
            "files": [{"kind": "dump", "source_sha256": "0" * 64}],
        }
        (there / "manifest.json").write_text(json.dumps(good))
        for tool in _TOOLS:
            (there / "bin" / tool).write_text("#!/bin/sh\nexit 1\n")
            (there / "bin" / tool).chmod(0o755)
        self.good = copy.deepcopy(mutants.EXAMPLE) | {"environment": "shop", "ledger": None}
        for key, value in {
            "database.passfile": "pgpass",
            "database.bin": "bin",
            "backup.directory": "backups",
            "deploy.playbooks": "playbooks",
            "deploy.inventory": "inventory.yml",
            "watch.access_log": "access.jsonl",
            "repository.url": "no-repository.git",
            "backup.store.credentials_file": "credentials",
        }.items():
            put(self.good, key, str(there / value))
        put(self.good, "record.key", f"file:{there / 'recorder'}")
        put(self.good, "deploy.vault_password", f"file:{there / 'vault'}")
        put(self.good, "window.start", None)
        self.file = home / "params" / "shop.yml"
        self.text = yaml.safe_dump(self.good, sort_keys=False)
        self.file.write_text(self.text)
        self.run_id = ""

    def make_the_recorders_key(self) -> None:
        """A real one, in place of the empty file."""
        key = self.home / "there" / "recorder"
        key.unlink()
        subprocess.run(("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)), check=True)

    def open_a_run(self) -> None:
        """Open one as `runbook run` would, past what only a twin has."""
        from runbook_lib import wiring
        from runbook_lib.model import Release

        with self._at_home():
            params = wiring.load_params("shop")
            release = Release("shop", "v1.5.0", "v1.5.0", "a" * 40, "v1.4.0", "b" * 40)
            draft = wiring._run(params, wiring.ledger_of(params), "RUN", release)
            run = wiring.create(draft, plan={"digest": "0" * 64})
            self.run_id = run.run_id
            run.ledger._engine.dispose()

    @contextmanager
    def _at_home(self) -> Iterator[None]:
        known, directory = dict(os.environ), Path.cwd()
        os.environ["RUNBOOK_HOME"] = str(self.home)
        os.chdir(self.home)
        try:
            yield
        finally:
            os.chdir(directory)
            os.environ.clear()
            os.environ.update(known)

    def call(self, words: tuple[str, ...]) -> Seen:
        """Run the command in this process, as the installed script does."""
        said, out = io.StringIO(), io.TextIOWrapper(io.BytesIO())
        code: object = None
        trace, argv = "", sys.argv
        sys.argv = ["runbook", *words]
        before = self._digests()
        try:
            with (
                self._at_home(),
                contextlib.redirect_stderr(said),
                contextlib.redirect_stdout(out),
                OBSERVER.watching(_only_looks if self.run_id else None) as deeds,
            ):
                try:
                    with _in_time():
                        cli.main()
                except SystemExit as end:
                    code = end.code
                except BaseException:
                    trace = traceback.format_exc()
        finally:
            sys.argv = argv
        after = self._digests()
        changed = sorted(path for path in {*before, *after} if before.get(path) != after.get(path))
        return Seen(code, said.getvalue(), list(deeds), changed, trace)

    def _digests(self) -> dict[str, object]:
        found: dict[str, object] = {}
        for path in [self.home, *self.home.rglob("*")]:
            name = path.relative_to(self.home).as_posix()
            if self.run_id and path.name.startswith("ledger.sqlite"):
                continue  # a reader of SQLite has files of its own beside it; what it says is compared below
            known = path.lstat()
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else os.path.islink(path)
            found[name] = (known.st_mode, known.st_ino, content, None if self.run_id else known.st_mtime_ns)
        if self.run_id:
            with contextlib.closing(sqlite3.connect(self.home / "outputs" / "ledger.sqlite")) as ledger:
                found["the ledger"] = ledger.execute("SELECT count(*), max(hash) FROM events").fetchall()
        return found

    def params_text(self, change: tuple[tuple[str, Any], ...]) -> str:
        """The good params file with keys changed."""
        data = copy.deepcopy(self.good)
        for key, value in change:
            put(data, key, value)
        return yaml.safe_dump(data, sort_keys=False)

    def text_of(self, mistake: Mistake) -> str | bytes:
        """The params file of a mistake."""
        if mistake.kind == "key given twice":
            return str(mistake.text).format(self.text)
        return self.params_text(mistake.change) if mistake.text is None else mistake.text

    def try_out(self, mistake: Mistake) -> Seen:
        """Make the mistake, and put all back that it needed."""
        text = self.text_of(mistake)
        self.file.write_bytes(text if isinstance(text, bytes) else text.encode())
        for name, content in mistake.files.items():
            path = self.home / name
            if content.startswith("-> "):
                path.symlink_to(content[3:])
            else:
                path.write_text(content)
        try:
            return self.call(
                tuple(
                    w.replace("{home}", str(self.home)).replace(RUN_ID, self.run_id if mistake.on_a_run else RUN_ID)
                    for w in mistake.words
                )
            )
        finally:
            for name in mistake.files:
                (self.home / name).unlink()
            self.file.write_text(self.text)


def _only_looks(event: str, words: tuple[Any, ...]) -> bool:
    """A run's handle reads its ledger and asks ssh-keygen for the recorder's public key."""
    return event == "sqlite3.connect" or (event == "subprocess.Popen" and tuple(words[1][:2]) == ("ssh-keygen", "-y"))


# --- one case, and all of them -----------------------------------------------------------------------------------


@dataclass
class Result:
    """One case. `allowed`: drawn at random, and rightly let through by the schema."""

    kind: str
    name: str
    refused: bool
    allowed: bool = False
    deeds: list[str] = field(default_factory=list)
    traceback: str = ""
    wrong: list[str] = field(default_factory=list)
    said: str = ""
    batch: str = ""

    @property
    def good(self) -> bool:
        return (self.refused or self.allowed) and not self.deeds and not self.traceback


def _of_call(kind: str, name: str, seen: Seen, says: str = "") -> Result:
    wrong, deeds = seen.wrong(says), [*seen.deeds, *seen.changed]
    return Result(kind, name, not wrong, False, deeds, seen.traceback[-800:], wrong, seen.said[:300])


def of_schema(kind: str, drawn: object, look: Callable[[], Params], *, at_random: bool = False) -> Result:
    """The result of what goes to the schema without the command around it.

    Args:
        kind: the row of the table.
        drawn: what was drawn, for the record.
        look: loads or checks it.
        at_random: it may be good by chance; then a run must be able to pin it.
    """
    result = Result(f"drawn: {kind}", hashlib.sha256(repr(drawn).encode()).hexdigest()[:16], refused=False)
    with OBSERVER.watching() as deeds:
        try:
            with _in_time():
                params = look()
            frozen = json.loads(json.dumps(params.frozen()))
            result.allowed = at_random and len(digest(frozen)) == 64 and check(frozen, where="params.json") == params
        except UsageError as error:
            said = str(error)
            result.said, result.refused = said[:300], said.isprintable() and bool(error.remedy)
        except BaseException:
            result.traceback = traceback.format_exc()[-800:]
    result.deeds = list(deeds)
    if not result.good:
        result.wrong = [repr(drawn)[:2000]]
    return result


@dataclass
class Worlds:
    """A project with nothing, and one with a run."""

    empty: World
    with_run: World

    @classmethod
    @contextmanager
    def made(cls, folder: Path) -> Iterator[Worlds]:
        """Make both in an empty folder; each is tried with good words first, so that no case pays for what is loaded once."""
        sys.dont_write_bytecode, known = True, sys.dont_write_bytecode
        # Typer builds all verbs at each call; for thousands of calls in one process once is enough.
        build, typer.main.get_command = typer.main.get_command, functools.cache(typer.main.get_command)
        worlds = cls(World(folder / "empty"), World(folder / "with-run"))
        worlds.with_run.make_the_recorders_key()
        worlds.with_run.open_a_run()
        try:
            for world in (worlds.empty, worlds.with_run):
                wrong = world.call(mistakes.RUN).wrong("no-repository.git is not there")
                assert not wrong, wrong
            yield worlds
        finally:
            sys.dont_write_bytecode = known
            typer.main.get_command = build

    def try_out(self, mistake: Mistake) -> Result:
        """One curated case."""
        world = self.with_run if mistake.on_a_run else self.empty
        return _of_call(mistake.kind, mistake.name, world.try_out(mistake), mistake.says)

    def drawn(self) -> dict[str, tuple[float, st.SearchStrategy[Any], Callable[[Any], Result]]]:
        """What is drawn: its share, how, and how one is tried."""
        file = self.empty.home / "params" / "example.yml"

        def mutant(drawn: tuple[str, dict[str, Any]]) -> Result:
            return of_schema(drawn[0], drawn[1], lambda: check(drawn[1], where="example.yml"))

        def any_value(data: dict[str, Any]) -> Result:
            return of_schema("anything at any key", data, lambda: check(data, where="example.yml"), at_random=True)

        def as_file(kind: str, text: bytes) -> Result:
            file.write_bytes(text)
            return of_schema(kind, text, lambda: load(file), at_random=True)

        def setting(drawn: tuple[str, str]) -> Result:
            put_in = dict([drawn])
            return of_schema("--set", drawn, lambda: load(self.empty.file, settings=put_in), at_random=True)

        def command(words: tuple[str, ...]) -> Result:
            return _of_call("drawn: words of the command", repr(words), self.empty.call(words))

        return {
            "mutants": (0.70, mutants.mutants(), mutant),
            "values": (0.10, mutants.any_value(), any_value),
            "bytes": (0.05, mutants.anything(), lambda text: as_file("bytes and text as a file", text)),
            "bits": (0.04, mutants.bits(), lambda text: as_file("bits of YAML as a file", text)),
            "torn": (0.03, mutants.torn(), lambda text: as_file("the example, torn", text)),
            "settings": (0.03, mutants.settings(), setting),
            "words": (0.05, mutants.words(), command),
        }


def draw(
    number: int, size: int, strategy: st.SearchStrategy[Any], one: Callable[[Any], Result], known: set[str]
) -> list[Result]:
    """So many results of inputs that are not known yet, drawn from a seed of their own."""
    results: list[Result] = []
    again = 0
    while len(results) < size:

        @seed(number * 1000 + again)
        @settings(
            max_examples=max(20, size - len(results)),
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def take(drawn: Any) -> None:
            result = one(drawn)
            if len(results) < size and (result.name not in known or not result.good):
                known.add(result.name)
                results.append(result)

        take()
        again += 1
    return results


def table(results: list[Result]) -> str:
    """The results as a Markdown table, a row for each kind of mistake."""
    rows = [
        "| kind of mistake | cases | refused | allowed by the schema | with an effect | traceback |",
        "|---|---|---|---|---|---|",
    ]
    for title, part in (
        ("**curated**", [r for r in results if not r.batch]),
        ("**drawn**", [r for r in results if r.batch]),
    ):
        for kind in [*sorted({r.kind for r in part}), title]:
            of = [r for r in part if kind in (title, r.kind)]
            rows.append(
                f"| {kind} | {len(of):,} | {sum(r.refused for r in of):,} | {sum(r.allowed for r in of):,} | "
                f"{sum(bool(r.deeds) for r in of)} | {sum(bool(r.traceback) for r in of)} |"
            )
    return "\n".join(rows)


def main() -> None:
    """Run the cases that have no result yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="where results are kept")
    parser.add_argument("--curated", type=int, default=None, help="so many of the curated ones, all by default")
    parser.add_argument("--drawn", type=int, default=20_000)
    told = parser.parse_args()
    told.state.mkdir(parents=True, exist_ok=True)
    kept = told.state / "parameters.jsonl"
    results = [Result(**json.loads(line)) for line in kept.read_text().splitlines()] if kept.exists() else []
    known, batches = {(r.kind, r.name) for r in results if not r.batch}, {r.batch for r in results}
    curated = [*mistakes.all_of_the_file(), *mistakes.all_of_the_command_line()]
    assert len({(m.kind, m.name) for m in curated}) == len(curated)
    with tempfile.TemporaryDirectory() as folder, Worlds.made(Path(folder)) as worlds, kept.open("a") as file:

        def keep(more: list[Result]) -> None:
            results.extend(more)
            file.write("".join(json.dumps(asdict(r)) + "\n" for r in more))
            file.flush()
            for r in more:
                if not r.good:
                    print(
                        f"BAD {r.kind}: {r.name}: {r.wrong} {r.said!r} {r.deeds[:3]} {r.traceback[-300:]}", flush=True
                    )

        for number, mistake in enumerate(curated[: told.curated], 1):
            if (mistake.kind, mistake.name) not in known:
                keep([worlds.try_out(mistake)])
                if number % 500 == 0:
                    print(f"{number} of {len(curated)} curated ones", flush=True)
        for name, (share, strategy, one) in worlds.drawn().items():
            left, number = round(told.drawn * share), 0
            drawn = {r.name for r in results if r.batch.startswith(f"{name} ")}
            while left > 0:
                size = min(_BATCH, left)
                batch = f"{name} {number}, {size}"
                if batch not in batches:
                    found = draw(number, size, strategy, one, drawn)
                    for result in found:
                        result.batch = batch
                    keep(found)
                    print(f"{batch}: {sum(r.good for r in found)} good", flush=True)
                left, number = left - size, number + 1
    print(table(results))
    sys.exit(0 if all(r.good for r in results) else 1)


if __name__ == "__main__":
    main()
