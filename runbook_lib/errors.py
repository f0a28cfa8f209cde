"""Every error that a person can meet, grouped by what the person does next.

RunbookError                 exit code
├── UsageError                2   mend the parameters or the command; nothing was started
│   └── FolderLostError       2   put the run's folder back, or abort the run
├── StepFailedError           1   look at the evidence; resume tries again, rollback goes back
│   ├── UnavailableError      1   nobody answered; trying again is safe
│   └── DeniedError           1   credentials or rights are wrong; trying again cannot help
├── GateClosedError           3   rejected or timed out; rollback, or ask again
├── VerificationError         4   the record is not what was sealed
└── PausedError              75   waiting for people; resume goes on (EX_TEMPFAIL of sysexits.h)
    ├── StepInDoubtError     75   settle the step: runbook resolve
    ├── FencedError          75   another executor has the run: look who, runbook status
    └── LedgerUnavailableError 75 mend its disk or its server; what happened is asked of the targets then
"""

from __future__ import annotations

from typing import Any, ClassVar


class RunbookError(Exception):
    """What is wrong, with its values, and the next move."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}. Next: {self.remedy}" if self.remedy else self.message

    def _render_traceback_(self) -> list[str]:
        # IPython asks for this: a cell that stops at a gate shows one sentence, not a stack.
        return [f"{type(self).__name__}: {self}"]


class UsageError(RunbookError):
    """Parameters or usage are wrong; nothing was started."""

    exit_code = 2


class FolderLostError(UsageError):
    """The ledger knows a run whose folder is not here, and no store has it."""


class StepFailedError(RunbookError):
    """A step ran and did not reach what it is for; `result` may hold the StepResult that shows the evidence."""

    result: Any = None


class UnavailableError(StepFailedError):
    """Nobody answered; safe to try again."""


class DeniedError(StepFailedError):
    """Credentials or rights are wrong; trying again cannot help."""


class GateClosedError(RunbookError):
    """A gate was rejected, or nobody decided in time."""

    exit_code = 3


class VerificationError(RunbookError):
    """A record differs from what was sealed or signed."""

    exit_code = 4


class PausedError(RunbookError):
    """The run waits for people; `runbook resume` goes on."""

    exit_code = 75


class StepInDoubtError(PausedError):
    """The intent is recorded, the outcome is not: the effect may or may not have happened."""


class FencedError(PausedError):
    """Another executor has the run: this one may not write, and its commands are refused at the targets."""


class LedgerUnavailableError(PausedError):
    """The ledger cannot be read or written: nothing is decided without it."""
