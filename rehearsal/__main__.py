"""`python -m rehearsal up|down|status|sign|spot-check`: the local production twin's own command."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rehearsal import people, stack


def main() -> int:
    """Run one verb; 2 with one line on stderr when the twin cannot do it."""
    parser = argparse.ArgumentParser(prog="python -m rehearsal", description=__doc__)
    parser.add_argument("verb", choices=("up", "down", "status", "sign", "spot-check"))
    parser.add_argument("words", nargs="*", help="sign RUN GATE, spot-check RUN")
    parser.add_argument("--dir", type=Path, default=stack.PROJECT / ".rehearsal")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    folder = given.dir.resolve()
    try:
        match given.verb, given.words:
            case "sign", [run_id, gate]:
                return people.sign(run_id, gate, people.facts_of(folder)["people"])
            case "spot-check", [run_id]:
                return people.spot_check(run_id, people.facts_of(folder))
            case "up", []:
                facts = stack.up(folder)
            case "down", []:
                stack.down(folder)
                facts = {"up": False}
            case "status", []:
                facts = stack.status(folder)
            case _:
                parser.error(f"{given.verb}: wrong words {given.words}")
    except (stack.StackError, OSError) as error:
        print(f"rehearsal: {error}", file=sys.stderr)
        return 2
    print(json.dumps(facts, sort_keys=True) if given.json else f"up: {facts['up']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
