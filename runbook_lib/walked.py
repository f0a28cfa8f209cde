"""The phases' notebooks as people walk them in JupyterLab: laid out for a run, and taken into its record when it ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from runbook_lib import pinned
from runbook_lib.canonical import write_atomically
from runbook_lib.card import MIME, Part
from runbook_lib.errors import PausedError, UsageError
from runbook_lib.phases import ALL, name_of, notebook_of, steps_of
from runbook_lib.run import Run
from runbook_lib.state import RunState
from runbook_lib.step import Step

DESK = "release_desk.ipynb"
_WIDGET = "application/vnd.jupyter.widget-view+json"
_INJECTED = "injected-parameters"


def folder_of(run: Run) -> Path:
    """Where a run's notebooks are walked; not part of the record."""
    return run.scratch / "lab"


def lay_out(run: Run) -> Path:
    """Put the notebooks there, the run's parameters filled in; what is there already stays as people left it.

    Raises:
        UsageError: a notebook is not what the run was opened with.
    """
    import nbformat
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    folder = folder_of(run)
    for name in sorted((*(notebook_of(name_of(module)) for module in ALL), DESK)):
        if (folder / name).exists():
            continue
        pinned.sources(run, name)
        # papermill's own loader: its parametrizing looks for tags in every cell, which a file need not have.
        notebook = load_notebook_node(str(run.root / "runbooks" / name))
        filled = parameterize_notebook(notebook, parameters(run))
        write_atomically(folder / name, nbformat.writes(filled))  # type: ignore[no-untyped-call]
    return folder


def parameters(run: Run) -> dict[str, str]:
    """What a notebook's parameters cell is given, by headless papermill and in JupyterLab alike."""
    return {"environment": run.release.environment, "version": run.release.version, "run_id": run.run_id}


def record_of(run: Run, phase: str) -> Path:
    """Where a phase's notebook stands in the record."""
    return run.folder / ("review" if phase == "review" else "notebooks") / notebook_of(phase)


def keep(run: Run, text: str, final: Path) -> None:
    """Write an executed notebook into the record; an earlier attempt is kept beside it, not overwritten."""
    text = run.secrets.redacted(text)
    if final.exists():
        if final.read_text() == text:
            return
        _set_aside(final.read_text(), final)
    write_atomically(final, text)


def _set_aside(text: str, final: Path) -> None:
    # A review never touches the sealed record around it.
    attempts = (final.parent.parent if final.parent.name == "notebooks" else final.parent) / "attempts"
    known = sorted(attempts.glob(f"{final.stem}-*.ipynb"))
    if text not in [path.read_text() for path in known]:
        write_atomically(attempts / f"{final.stem}-{1 + len(known)}.ipynb", text)


def take(run: Run, phases: tuple[str, ...] = (), *, at_the_end: bool = True) -> None:
    """Take what was walked in JupyterLab into the record.

    A phase that was begun there and finished headless keeps its headless notebook, with the other one among the
    attempts.

    Args:
        run: whose notebooks.
        phases: which; all but the review when none is named.
        at_the_end: refuse what is not whole; before the end it is left, and may still be saved.

    Raises:
        PausedError: a notebook lacks the card of a step that the ledger has, shows another one, or has a cell that is
            not what the run was opened with; it is named.
    """
    state = run.state
    for phase in phases or tuple(name for name in map(name_of, ALL) if name != "review"):
        path = folder_of(run) / notebook_of(phase)
        notebook = _decided(run, state, phase, _read(path))
        if not list(_cards(notebook)):
            continue  # laid out, and nothing was done in it
        final = record_of(run, phase)
        wrong = edited(run, path) or missing(run, state, phase, notebook)
        passed = all(step.is_green(run, state) for step in steps_of(phase))
        shown = _drawn_again(run, phase, _without_widgets(notebook))
        text = json.dumps(shown, indent=1, ensure_ascii=False) + "\n"
        if not wrong and (passed or at_the_end):
            # What is there may be this one already, before JupyterLab saved it once more.
            if not final.exists() or missing(run, state, phase, _read(final)):
                keep(run, text, final)
        elif wrong and final.exists() and passed:
            _set_aside(run.secrets.redacted(text), final)
        elif wrong and at_the_end:
            again = "seal" if state.ended else "resume"
            raise PausedError(
                f"{path.name} as it was walked and saved is no evidence: {wrong}",
                remedy=f"runbook lab {run.run_id}, run that cell once more and save (a green step is not done again), "
                f"then: runbook {again} {run.run_id}; or move {path} away: the phase is then shown without it",
            )


def was_begun(run: Run, phase: str) -> bool:
    """True when steps of a phase were taken in JupyterLab, as far as its notebook was saved."""
    return bool(list(_cards(_read(folder_of(run) / notebook_of(phase)))))


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes())) if path.exists() else {"cells": []}


def edited(run: Run, path: Path) -> str:
    """Say which code cell of a walked notebook is not what the run was opened with; empty when all are."""
    if not path.exists():
        return ""
    cells = [c for c in json.loads(path.read_bytes())["cells"] if c["cell_type"] == "code"]
    # Shift+Enter in the last cell leaves an empty one behind it.
    own = [t for c in cells if _INJECTED not in c["metadata"].get("tags", []) and (t := "".join(c["source"])).strip()]
    try:
        known = pinned.sources(run, path.name)
    except UsageError as error:
        return error.message
    for number, (here, there) in enumerate(zip(own, known, strict=False), start=1):
        if here.strip() != there.strip():
            return f"its code cell {number} was edited: {here.partition(chr(10))[0][:80]!r}"
    return "" if len(own) == len(known) else f"it has {len(own)} code cells, not {len(known)}"


def missing(run: Run, state: RunState, phase: str, notebook: dict[str, Any]) -> str:
    """Say which step's card is missing in a phase's notebook or differs from the ledger; empty when all are right."""
    shown = {part["step"]: part for part in _cards(notebook)}
    outcomes = [e.data for e in run.ledger.events(run.run_id) if e.kind == "step_outcome"]
    proved = {(data["step"], data["attempt"]) for data in outcomes if data["status"] == "green"}
    for key, part in shown.items():
        if part["status"] == "green" and (key, part["attempt"]) not in proved:
            return f"the card of {key} is green, and the ledger does not say so"
    for step in steps_of(phase):
        for key in step.keys(run):
            known = state.step(key)
            if not state.green(key):
                continue
            if key not in shown:
                return f"the card of {key} is missing"
            if shown[key] != json.loads(json.dumps(Part(key, known).as_json())):
                return f"the card of {key} is not what the ledger says"
    return ""


def _decided(run: Run, state: RunState, phase: str, notebook: dict[str, Any]) -> dict[str, Any]:
    """Put the step's card in the place of a panel whose page was closed, or loaded later, when people decided."""
    return _with_outputs(
        run,
        phase,
        notebook,
        lambda step, outputs: (
            [_card_of(step, run)]
            if step.waiting is not None
            and step.is_green(run, state)
            and any(_WIDGET in output.get("data", {}) for output in outputs)
            else outputs
        ),
    )


def _drawn_again(run: Run, phase: str, notebook: dict[str, Any]) -> dict[str, Any]:
    """Draw each card anew from the ledger: what people read there is what its JSON says, whatever was in the file."""
    return _with_outputs(
        run,
        phase,
        notebook,
        lambda step, outputs: [
            _card_of(step, run) if output.get("data", {}).get(MIME, {}).get("parts") else output for output in outputs
        ],
    )


def _with_outputs(
    run: Run, phase: str, notebook: dict[str, Any], change: Callable[[Step, list[Any]], list[Any]]
) -> dict[str, Any]:
    calls = {f"{phase}.{step.name}(run)": step for step in steps_of(phase)}
    cells = []
    for cell in notebook["cells"]:
        step = calls.get("".join(cell["source"]).strip()) if cell["cell_type"] == "code" else None
        cells.append({**cell, "outputs": change(step, cell["outputs"])} if step is not None else cell)
    return {**notebook, "cells": cells}


def _card_of(step: Step, run: Run) -> dict[str, Any]:
    return {"output_type": "display_data", "metadata": {}, "data": step.card(run).bundle()}


def _cards(notebook: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            yield from output.get("data", {}).get(MIME, {}).get("parts", [])


def _without_widgets(notebook: dict[str, Any]) -> dict[str, Any]:
    """A widget shows nothing without its kernel: its twin, the output behind it, stays."""
    cells = []
    for cell in notebook["cells"]:
        outputs = [o for o in cell.get("outputs", []) if _WIDGET not in o.get("data", {})]
        cells.append({**cell, "outputs": outputs} if cell["cell_type"] == "code" else cell)
    metadata = {name: value for name, value in notebook["metadata"].items() if name != "widgets"}
    return {**notebook, "cells": cells, "metadata": metadata}
