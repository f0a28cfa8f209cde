"""All classes of the soak, one after the other; it can be stopped, and goes on where it was.

python -m tests.soak --state FOLDER            some hours; FOLDER/soak.md has the tables
python -m tests.soak --state FOLDER --sample   two minutes: a few cases of each class, in one world
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.project import ROOT
from tests.soak import crowds, faults, killpoints, kills
from tests.soak.killpoints import Walk

CLASSES: tuple[tuple[str, ...], ...] = (
    ("killpoints", "--ledger", "sqlite"),
    ("killpoints", "--ledger", "postgresql"),
    ("kills", "--ledger", "sqlite"),
    ("kills", "--ledger", "postgresql"),
    ("faults", "--ledger", "sqlite"),
    ("faults", "--ledger", "postgresql"),
    ("crowds",),
    ("parameters",),
    ("guards",),
)
# One of each recovery policy, and of each kind of target: messages and git, files, the database, the store, the schema.
SAMPLED = (
    "prepare.freeze_merges",
    "backup.archive_files@app-01",
    "backup.dump_database",
    "backup.replicate_off_site",
    "migrate.migrate_production",
)
_FAULTS = (
    "disk of outputs/ full",
    "disk of outputs/ read-only",
    "descriptors used up",
    "clock set by + 1 h meanwhile",
    "database cut later",
    "database restarted",
    "store answers 503",
    "store cuts answers",
)


def sample(walk: Walk) -> Iterator[tuple[str, Any]]:
    """A few cases of each class, the last step first."""
    known = {fault.name: fault for fault in faults.FAULTS}
    chosen = {(key, fault.name) for key, fault in faults.plan(walk, len(faults.FAULTS)) if fault.name in _FAULTS}
    for number, key in enumerate(reversed(walk.steps)):
        draw = random.Random(number)
        points = killpoints.points_of(walk, key)
        for point in draw.sample(points, 4):
            result = killpoints.try_case(walk, key, point)
            if result is not None:
                yield "kill points", result
        yield "kills", kills.try_kill(walk, number, key)
        for name in sorted(name for step, name in chosen if step == key)[number % 2 :: 2]:
            yield "faults", faults.try_fault(walk, key, known[name])
        yield "crowds", crowds.try_schedule(walk, number, key, crowds.KINDS[number % 2], 3)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--sample", action="store_true")
    given = parser.parse_args()
    given.state.mkdir(parents=True, exist_ok=True)
    if given.sample:
        os.environ["PYTHONPATH"] = str(ROOT)
        wanted = SAMPLED.__contains__
        with faults.disturbed(given.state / "world", wanted=wanted, back=False) as walk:
            with (given.state / "sample.jsonl").open("w") as file:
                for name, result in sample(walk):
                    line = {"class": name, "good": result.good, **asdict(result)}
                    print(json.dumps(line), file=file, flush=True)
        return
    tables = []
    for name, *words in CLASSES:
        argv = (sys.executable, "-m", f"tests.soak.{name}", "--state", str(given.state), *words)
        done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        tables.append(f"## {name} {' '.join(words[1:])}\n\n{done.stdout.partition(chr(10) + '|')[1:][1]}")
        (given.state / "soak.md").write_text("\n\n".join(tables) + "\n")
        if done.returncode:
            sys.exit(f"{name} {' '.join(words)}: not everything held; {given.state}/soak.md and its .jsonl say what")


if __name__ == "__main__":
    main()
