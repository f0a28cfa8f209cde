"""The notebooks that a run was opened with: what may run is what stands in them."""

from __future__ import annotations

import json

from runbook_lib import cell
from runbook_lib.canonical import sha256
from runbook_lib.errors import UsageError
from runbook_lib.run import Run


def sources(run: Run, notebook: str) -> list[str]:
    """The code cells of a notebook of the playbook, word for word.

    Args:
        run: whose opening pinned the notebook's digest.
        notebook: such as `01_backup.ipynb`.

    Raises:
        UsageError: the file is gone, or is another one than at the opening.
    """
    path = run.root / "runbooks" / notebook
    opened = run.state.opened
    data = path.read_bytes() if path.is_file() else b""
    # Runs of earlier versions pinned none.
    if "notebooks" in opened and sha256(data) != opened["notebooks"].get(notebook):
        raise UsageError(
            f"runbooks/{notebook} is not what run {run.run_id} was opened with",
            remedy="put it back as it was; to release by another playbook, abort this run and open the next",
        )
    return ["".join(c["source"]) for c in json.loads(data)["cells"] if c["cell_type"] == "code"]


def refuse_edited(run: Run, phase: str) -> None:
    """See that the cell that is running stands in its phase's notebook as the run was opened with.

    Raises:
        UsageError: it does not.
    """
    notebook = next((name for name in run.state.opened.get("notebooks", {}) if name[3:] == f"{phase}.ipynb"), "")
    running = (cell.source() or "").strip()
    if running not in [source.strip() for source in sources(run, notebook)]:
        first = running.partition("\n")[0][:80]
        raise UsageError(
            f"the cell {first!r} does not stand in {notebook} as run {run.run_id} was opened with",
            remedy="put its text back as it was; nothing was started",
        )
