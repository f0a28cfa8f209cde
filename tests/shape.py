"""What every record of a completed rehearsal holds, whichever door it was walked through."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import nbformat

from runbook_lib.card import MIME

GOLDEN = Path(__file__).parent / "golden" / "completed-rehearsal.json"
# What differs between one release and the next, or between a door and the other; everything else is equal.
DIFFERS = {
    "verify.spot_checks": "people tick them in the lab; a headless rehearsal may leave them unrecorded",
    "verify.watch_telemetry": "what was measured: a busy machine may leave the verdict open",
    "verify.scan_logs": "what the logs say",
}


def same_shape(record: Path) -> None:
    """See that a record has the shape that all have; RUNBOOK_GOLDEN=1 writes it down anew."""
    found = json.loads(json.dumps(shape(record)))
    if os.environ.get("RUNBOOK_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    assert found == json.loads(GOLDEN.read_text())


def shape(record: Path) -> dict[str, Any]:
    """A record without its names, times, sizes and digests: what a reader finds in which place."""
    events = [json.loads(line) for line in (record / "ledger.jsonl").read_text().splitlines()]
    outcomes = [e["data"] for e in events if e["kind"] == "step_outcome"]
    statement = json.loads((record / "statement.json").read_bytes())
    files = {p.relative_to(record).as_posix() for p in record.rglob("*") if p.is_file() and "review" not in p.parts}
    return {
        "steps": sorted(  # hosts are archived beside one another
            [
                o["step"],
                o["status"],
                o["result"]["title"],
                o["result"]["verdict"],
                [_name(f) for f in o["result"]["facts"]],
            ]
            for o in outcomes
            if o["step"] not in DIFFERS
        ),
        "gates": [[e["data"]["gate"], e["data"]["decision"]] for e in events if e["kind"] == "gate_decision"],
        "checklist": [
            [row["phase"], row["action"], row["owner"], row["done"] or row["phase"].startswith("Metrics")]
            for row in json.loads((record / "checklist.json").read_bytes())["rows"]
        ],
        "statement": sorted(statement["predicate"]),
        "release": {k: v for k, v in statement["predicate"]["release"].items() if not k.endswith("commit")},
        "state": statement["predicate"]["state"],
        "notebooks": {p.name: _cells(p) for p in sorted((record / "notebooks").glob("*.ipynb"))},
        "files": sorted(f for f in files if not f.startswith(("logs/", "decisions/"))),
    }


def _name(fact: str) -> str:
    return re.sub(r":[0-9]+$", ":PORT", re.sub(r"^/.*/", "FOLDER/", fact))


def _cells(notebook: Path) -> list[Any]:
    """Each code cell's source, with the steps whose card it shows."""
    cells = [c for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "code" and c.source.strip()]
    found = []
    for cell in cells:
        shown = [o.data[MIME] for o in cell.outputs if MIME in o.get("data", {})]
        source = "parameters" if "injected-parameters" in cell.metadata.get("tags", []) else cell.source
        found.append([source, [[part["step"], part["status"]] for card in shown for part in card["parts"]]])
    return found
