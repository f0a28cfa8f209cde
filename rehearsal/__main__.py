"""`python -m rehearsal`: the local production twin's own command.

up | down | status     the twin as a whole; --json prints its facts as one line
sign RUN GATE          a person with the needed role looks at a gate's evidence and decides
spot-check RUN         quinn uses the shop and records what was seen
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rehearsal.errors import StackError


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; 2 with one line on stderr when the twin cannot do it."""
    parser = argparse.ArgumentParser(
        prog="python -m rehearsal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("up", "down", "status", "sign", "spot-check"))
    parser.add_argument("words", nargs="*", metavar="RUN [GATE]")
    parser.add_argument("--dir", type=Path, help="the twin's folder (default: .rehearsal in the project)")
    parser.add_argument("--json", action="store_true", help="print facts as one line of JSON")
    given = parser.parse_args(arguments)
    wanted = {"sign": 2, "spot-check": 1}.get(given.verb, 0)
    if len(given.words) != wanted:
        parser.error(f"{given.verb} takes {wanted} names, not {len(given.words)}")
    try:
        return _do(given.verb, given.words, given.dir, as_json=given.json)
    except (StackError, OSError, subprocess.SubprocessError) as error:
        print(f"rehearsal: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"rehearsal: the package {error.name} is missing; install the group: rehearsal", file=sys.stderr)
        return 2


def _do(verb: str, words: list[str], folder: Path | None, *, as_json: bool) -> int:
    # Imported late: `status` and `--help` need no database driver.
    from rehearsal import people, stack
    from rehearsal.repository import RepositoryError

    folder = (folder or stack.PROJECT / ".rehearsal").resolve()
    if verb == "up":
        try:
            facts = stack.up(folder)
        except RepositoryError as error:
            raise StackError(str(error)) from error
    elif verb == "down":
        stack.down(folder)
        facts = {"up": False}
    else:
        facts = stack.status(folder)
    if verb in ("sign", "spot-check"):
        if not facts["up"]:
            raise StackError(f"no twin is up in {folder}; next: python -m rehearsal up --dir {folder}")
        return (
            people.sign(words[0], words[1], facts["people"]) if verb == "sign" else people.spot_check(words[0], facts)
        )
    print(json.dumps(facts, sort_keys=True) if as_json else _text(facts, folder))
    return 0


def _text(facts: dict[str, Any], folder: Path) -> str:
    if not facts["up"]:
        return f"down: {folder}"
    running, front = facts["versions"]["running"], facts["endpoints"]["front"]
    return f"up: {folder}\nthe shop, {running}: {front}\nfacts: {folder}/stack.json, logs: {folder}/log"


if __name__ == "__main__":
    raise SystemExit(main())
