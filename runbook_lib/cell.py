"""The notebook cell that is running: what it shows while it works, and its source. Outside of a notebook nothing happens."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Set for the kernels of `runbook lab`: the run that is walked there.
LAB_VARIABLE = "RUNBOOK_LAB"
# Set for the kernels of `runbook run`: nobody looks at their notebooks before the end.
HEADLESS_VARIABLE = "RUNBOOK_HEADLESS"


def is_watched() -> bool:
    """True where somebody may look at the cell while it runs."""
    return _shell() is not None and HEADLESS_VARIABLE not in os.environ


def in_lab(run_id: str) -> bool:
    """True in a kernel that `runbook lab` started for this run: people sit before it."""
    return os.environ.get(LAB_VARIABLE) == run_id and _shell() is not None


def source() -> str | None:
    """The text of the cell that is running, None outside of a notebook."""
    shell = _shell()
    ran = shell.user_ns.get("In") if shell is not None else None
    return str(ran[-1]) if ran else None


@dataclass
class Output:
    """One output of the running cell that can be written over, from any thread, also after the cell has returned."""

    _handle: list[Any] = field(default_factory=list)

    def show(self, bundle: Mapping[str, Any], *, metadata: Mapping[str, Any] | None = None) -> None:
        """Show this, or show it in place of what was shown before.

        Args:
            bundle: MIME type -> data; give `text/plain` beside `text/html`.
            metadata: MIME type -> what a viewer wants to know besides, such as an image's `alt`.
        """
        if _shell() is None:
            return
        from IPython.display import display

        if self._handle:
            self._handle[0].update(dict(bundle), metadata=dict(metadata or {}), raw=True)
        else:
            handle = display(dict(bundle), metadata=dict(metadata or {}), raw=True, display_id=True)  # type: ignore[no-untyped-call]
            self._handle.append(handle)


def _shell() -> Any:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell if getattr(shell, "kernel", None) is not None else None
