"""Each guard is taken out of a copy of the project, and the tests that are named for it must fail there.

    python -m tests.soak.guards --state FOLDER [--only NAME]

The same tests must pass before that in a copy that nothing was taken out of. A run of tests that ends in a time-out, or
before a test was called, says nothing: only a test that was called and failed counts. Results are kept a line each, so
that it can be stopped and continued; what was seen is seen again when guard, source or tests have changed since.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

from runbook_lib.canonical import digest, sha256_file
from tests.project import ROOT
from tests.soak.guarded import GUARDS, Guard

FAILED = "failed as it must"
# A guard that was torn out instead of taken out: the test would fail whatever it promises.
_TORN = re.compile(r"(NameError|ImportError|ModuleNotFoundError|SyntaxError|IndentationError|UnboundLocalError)\b")
_TEST_TIMEOUT_S = 180
_TIMEOUT_S = 2400.0


@dataclass(frozen=True, slots=True)
class Case:
    """One test's end: `passed`, `failed` (in its call), or `other` (in its set-up, skipped, timed out)."""

    name: str
    end: str
    said: str = ""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the tests said without a guard; `of` is the digest of guard, source and tests, see `depends_on`."""

    guard: str
    of: str
    verdict: str
    failed: list[str]
    said: str

    @property
    def good(self) -> bool:
        return self.verdict == FAILED


def without(guard: Guard, text: str) -> str:
    """The source without the guard.

    Raises:
        ValueError: the guard's text is not there exactly once, or what is left is no Python.
    """
    found = text.count(guard.there)
    if found != 1:
        raise ValueError(f"{guard.name}: its text stands {found} times in {guard.file}: {guard.there.strip()[:80]!r}")
    changed = text.replace(guard.there, guard.instead)
    compile(changed, guard.file, "exec")
    return changed


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of what is or may be committed; removed at the end."""
    argv = ("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    listed = subprocess.run(argv, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    with tempfile.TemporaryDirectory(prefix="guards-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder) / "copy"
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
        yield copy


def run_tests(copy: Path, tests: Sequence[str]) -> list[Case]:
    """Run tests in a copy, and read how each ended from pytest's own report; empty when there is none."""
    report = copy.parent / "report.xml"
    report.unlink(missing_ok=True)
    options = (f"--junitxml={report}", "-o", "junit_family=xunit1", f"--timeout={_TEST_TIMEOUT_S}")
    argv = (sys.executable, "-m", "pytest", *options, f"--basetemp={copy.parent / 'tmp'}", *tests)
    env = {**os.environ, "PYTHONPATH": str(copy)}
    with (copy.parent / "pytest.log").open("wb") as log:
        process = subprocess.Popen(argv, cwd=copy, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(_TIMEOUT_S)
        except BaseException as error:
            process.send_signal(signal.SIGINT)  # fixtures stop what they started
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return []
    return [_case(element) for element in ET.parse(report).iter("testcase")] if report.exists() else []


def _case(element: ET.Element) -> Case:
    name = f"{element.get('file')}::{element.get('name')}"
    failure = element.find("failure")
    if failure is not None:
        said = failure.get("message", "")
        timed_out = said.startswith("Failed: Timeout")
        return Case(name, "other" if timed_out or _TORN.match(said) else "failed", said)
    ended = next((kind for kind in ("error", "skipped") if element.find(kind) is not None), None)
    return Case(name, "passed") if ended is None else Case(name, "other", str(element.find(ended).get("message")))


def of(test: str, cases: Sequence[Case]) -> list[Case]:
    """The cases of a named test: itself, or all that its parameters make of it."""
    return [case for case in cases if case.name == test or case.name.startswith(f"{test}[")]


def take_out(guard: Guard, here: Sequence[Case], key: str) -> Seen:
    """Take one guard out of a copy, and see what its tests say."""

    def seen(verdict: str, failed: Sequence[Case] = (), said: str = "") -> Seen:
        return Seen(guard.name, key, verdict, [case.name for case in failed], said[:2000])

    for test in guard.tests:
        known = of(test, here)
        wrong = [case for case in known if case.end != "passed"]
        if wrong or not known:
            return seen(f"does not pass with the guard: {test}", wrong, wrong[0].said if wrong else "no such test")
    with copied() as copy:
        try:
            changed = without(guard, (copy / guard.file).read_text())
        except (ValueError, SyntaxError) as error:
            return seen("the list has rotted", said=str(error))
        (copy / guard.file).write_text(changed)
        cases = run_tests(copy, guard.tests)
        log = (copy.parent / "pytest.log").read_text(errors="replace")
    failed = [case for case in cases if case.end == "failed"]
    said = failed[0].said if failed else log[-1500:]
    if all(any(case in failed for case in of(test, cases)) for test in guard.tests):
        return seen(FAILED, failed, said)
    silent = not cases or any(case.end == "other" for case in cases)
    return seen("the tests gave no answer" if silent else "SURVIVED", failed, said)


def depends_on(guard: Guard) -> str:
    """The digest of the guard, its source file and its tests' files."""
    files = sorted({guard.file, *(test.partition("::")[0] for test in guard.tests)})
    return digest(
        {"guard": {**asdict(guard), "tests": list(guard.tests)}, "files": {f: sha256_file(ROOT / f) for f in files}}
    )


def table(guards: Sequence[Guard]) -> str:
    """The guards as a Markdown table."""
    rows = ["| guard | taken out of | the test that fails |", "|---|---|---|"]
    for guard in guards:
        tests = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in guard.tests)
        rows.append(f"| {guard.name} | `{guard.file}` | {tests} |")
    return "\n".join(rows)


def _kept(path: Path) -> Mapping[str, Seen]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {seen.guard: seen for seen in (Seen(**json.loads(line)) for line in lines)}


def main() -> None:
    """Take out the guards that were not seen yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--only", metavar="NAME", help="guards whose name has this text")
    given = parser.parse_args()
    given.state.mkdir(parents=True, exist_ok=True)
    kept = given.state / "guards.jsonl"
    chosen = [guard for guard in GUARDS if given.only is None or given.only in guard.name]
    keys = {guard.name: depends_on(guard) for guard in chosen}
    known = {name: seen for name, seen in _kept(kept).items() if seen.good and seen.of == keys.get(name)}
    left = [guard for guard in chosen if guard.name not in known]
    here: list[Case] = []
    if left:
        with copied() as copy:
            here = run_tests(copy, sorted({test for guard in left for test in guard.tests}))
        print(f"with all guards: {sum(case.end == 'passed' for case in here)} of {len(here)} tests pass", flush=True)
        for case in here:
            if case.end != "passed":
                print(f"  {case.name}: {case.said[:300]}", flush=True)
    with kept.open("a") as file:
        for number, guard in enumerate(left, 1):
            seen = known[guard.name] = take_out(guard, here, keys[guard.name])
            file.write(json.dumps(asdict(seen)) + "\n")
            file.flush()
            said = "" if seen.good else f"\n{seen.said}"
            print(f"{number}/{len(left)} {guard.name}: {seen.verdict}{said}", flush=True)
    print(table([guard for guard in chosen if known[guard.name].good]))
    missing = [guard.name for guard in chosen if not known[guard.name].good]
    print(
        f"\n{len(chosen) - len(missing)} of {len(chosen)} guards were seen to be tested{': not ' if missing else ''}{', '.join(missing)}"
    )
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
