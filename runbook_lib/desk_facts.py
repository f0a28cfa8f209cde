"""What the desk shows beside the ledger's state: plan, rules, clocks, who is at work, and what was edited."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from runbook_lib import gate, progress, walked, work
from runbook_lib.canonical import sha256_file
from runbook_lib.clock import Moment
from runbook_lib.desk_page import Facts, PhaseFact, StepFact, read_only
from runbook_lib.errors import RunbookError
from runbook_lib.follow import Follower
from runbook_lib.phases import FORWARD, name_of, notebook_of, prepare, review, rollback
from runbook_lib.plan import expected_s
from runbook_lib.render import in_doubt
from runbook_lib.run import Run


@dataclass(slots=True)
class Sources:
    """Where the facts of one run come from; what cannot change is read once."""

    run: Run
    phases: tuple[PhaseFact, ...] = ()
    _read: dict[Path, tuple[tuple[int, int], str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.phases = tuple(
            PhaseFact(
                name_of(module),
                notebook_of(name_of(module)),
                tuple(
                    StepFact(s.title, s.owner, expected_s(self.run, s), tuple(s.keys(self.run))) for s in module.STEPS
                ),
                next((s.gate for s in module.STEPS if s.gate), ""),
            )
            for module in (*FORWARD, rollback, review)
        )

    def facts(self, seen: Follower, started: work.Command | None = None, *, trouble: tuple[str, ...] = ()) -> Facts:
        """The facts of this moment.

        Args:
            seen: the ledger as of the last look.
            started: the last command that a desk started: it is at work before it holds the run's lease.
            trouble: what else must be shown.
        """
        run, state, params = self.run, seen.state, self.run.params
        worker = work.worker(state)
        at_work = worker.said if worker is not None and worker.alive else ""
        if not at_work and started is not None and started.alive:
            at_work = f"runbook {started.words[0]} (just started)"
        sealed = (run.folder / "statement.json.sig").exists()
        return Facts(
            now=Moment.now(),
            phases=self.phases,
            gates={
                name: (gate.rule(run, name), tuple(params.able(name, opener=str(state.opened.get("opened_by")))))
                for name in gate.NAMES
            },
            window=self._window(seen),
            window_fixed=params.window.start is not None,
            budget_s=params.window.budget_s,
            way_back_s=sum(step.expected_s for p in self.phases if p.name == "rollback" for step in p.steps),
            read_only=read_only(seen.events, before_watch=params.maintenance.lift == "before_watch"),
            at_work=at_work,
            lost="" if at_work else _lost(worker, run.run_id),
            progress=tuple(progress.now(run.scratch)),
            checks=tuple(check.name for check in params.spot_checks.checks),
            edited=tuple(self._edited(state.opened.get("notebooks", {}))),
            may_settle={key: params.may_settle(key, opener=str(state.opened["opened_by"])) for key in in_doubt(state)},
            record=str(run.folder),
            sealed=sealed,
            review_signed=(run.folder / "review" / "statement.json.sig").exists(),
            trouble=trouble,
        )

    def _window(self, seen: Follower) -> tuple[float, float] | None:
        state = seen.state
        told = [state.fact("prepare.schedule_window", name) for name in ("start", "end")]
        if all(told):
            start, end = (datetime.fromisoformat(str(at)) for at in told)
        else:
            try:
                start, end = prepare.window(self.run)
            except (RunbookError, OSError, ValueError, KeyError):
                return None  # no plan is here: the window is not known yet
        return start.timestamp(), end.timestamp()

    def _edited(self, pinned: Mapping[str, str]) -> Iterator[str]:
        """Notebooks that are not as the run was opened with; a laid out one by its code cells."""
        for name, digest in sorted(pinned.items()):
            origin, laid_out = self.run.root / "runbooks" / name, walked.folder_of(self.run) / name
            if self._known(origin, sha256_file) != digest:
                yield f"runbooks/{name} is not what the run was opened with: put it back"
            elif why := self._known(laid_out, self._edited_cell):
                yield f"{name}: {why}"

    def _edited_cell(self, path: Path) -> str:
        try:
            return walked.edited(self.run, path)
        except (ValueError, KeyError, TypeError):
            return "it cannot be read as a notebook"

    def _known(self, path: Path, read: Callable[[Path], str]) -> str:
        """What was read of a file, and read again when the file changed."""
        try:
            stat = path.stat()
        except OSError:
            return ""
        stamp = (stat.st_mtime_ns, stat.st_size)
        if path not in self._read or self._read[path][0] != stamp:
            self._read[path] = (stamp, read(path))
        return self._read[path][1]


def _lost(worker: work.Worker | None, run_id: str) -> str:
    if worker is None or worker.alive:
        return ""
    if worker.alive is None:
        lost = f"if that machine is lost: runbook takeover {run_id} --reason TEXT"
        return f"{worker.name} holds the run and cannot be looked at from here: look there; {lost}"
    return f"{worker.name} worked on the run and is gone: runbook resume {run_id} goes on"
