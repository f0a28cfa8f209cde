"""The playbook in order: which step stands before which, and which gates each needs."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

from runbook_lib.gate import check_needs
from runbook_lib.phases import backup, begin, complete, deploy, migrate, prepare, review, rollback, verify
from runbook_lib.run import Run
from runbook_lib.step import Step, Waiting

FORWARD: tuple[ModuleType, ...] = (prepare, backup, begin, migrate, deploy, verify, complete)
ALL: tuple[ModuleType, ...] = (*FORWARD[:-1], rollback, complete, review)


def name_of(phase: ModuleType) -> str:
    """`runbook_lib.phases.backup` → `backup`."""
    return phase.__name__.rpartition(".")[2]


def steps_of(phase: str) -> tuple[Step, ...]:
    """A phase's steps in order."""
    return next(module.STEPS for module in ALL if name_of(module) == phase)


def notebook_of(phase: str) -> str:
    """`backup` → `01_backup.ipynb`."""
    return f"{[name_of(module) for module in ALL].index(phase):02d}_{phase}.ipynb"


def _panel_of(step: Step) -> Waiting | None:
    """What a step that waits for people shows them in JupyterLab; None for a step that waits for nobody."""
    if not step.gate and step is not verify.spot_checks:
        return None

    def shown(run: Run) -> Any:
        from runbook_lib import panel  # the widgets take their time, and headless needs none

        settle = partial(step.settled, run)
        return panel.gate_panel(run, step.gate, settle) if step.gate else panel.checks_panel(run, settle)

    return shown


def _put_in_order() -> None:
    before: list[Step] = []
    gates: list[str] = []
    for module in FORWARD:
        for step in module.STEPS:
            step.phase, step.before, step.needs, step.guard = name_of(module), tuple(before), tuple(gates), check_needs
            step.waiting = _panel_of(step)
            before.append(step)
            if step.gate:
                gates.append(step.gate)
    # The way back and the review stand beside the line: each in its own order, behind no gate.
    for module in (rollback, review):
        for index, step in enumerate(module.STEPS):
            step.phase, step.before = name_of(module), tuple(module.STEPS[:index])


_put_in_order()
