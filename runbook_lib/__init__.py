"""Production releases as Jupyter notebooks that execute, gate, survive and prove themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runbook_lib.run import Run
    from runbook_lib.wiring import last_run, open_run

__all__ = ["Run", "last_run", "open_run"]


def __getattr__(name: str) -> Any:
    # Importing lazily keeps `runbook --help` and gate doors quick: the adapters cost most of a second.
    if name == "Run":
        from runbook_lib.run import Run

        return Run
    if name in ("open_run", "last_run"):
        from runbook_lib import wiring

        return getattr(wiring, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
