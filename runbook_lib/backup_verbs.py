"""`runbook backup`: what is kept of an environment's backups, and the proof of one of them again.

Heavy parts are imported inside the verbs, as in `cli`, which mounts them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from runbook_lib import terminal
from runbook_lib.errors import DeniedError, PausedError, RunbookError, StepFailedError, UnavailableError, UsageError
from runbook_lib.terminal import Json, beside, print_json, say

app = typer.Typer(no_args_is_help=True, help="Backups that are kept: list them, prove one again.")

_ERRORS = 5


@app.command("list")
def backup_list(environment: str, json: Json = False) -> None:
    """What is kept of an environment's backups: where, how old, how big, proved or not; the store is asked what it has."""
    from runbook_lib import kept, wiring

    params = wiring.load_params(environment)
    ledger, store = wiring.ledger_of(params), params.backup.store
    try:
        there = wiring.draft_of(params).services.store.listed("")
    except (RunbookError, OSError, ValueError) as error:
        there = None
        say(f"the store was not asked: {error.message if isinstance(error, RunbookError) else error}")
    found = kept.kept(
        ledger.runs(environment),
        Path(params.backup.directory),
        there,
        address=f"s3://{store.bucket}/{store.prefix.strip('/')}/",
        known=frozenset(ledger.every_run_id()),
    )
    if json:
        print_json(kept.as_json(found))
    else:
        print(kept.as_text(found))


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Tell on stderr how far the body's work has come."""
    from runbook_lib import progress

    stop = threading.Event()

    def tell() -> None:
        while not stop.wait(terminal.PROGRESS_EVERY_S):
            for line in progress.now(folder):
                say(line)

    with beside(tell, stop):
        yield


@contextmanager
def _not_tried(*, json: bool) -> Iterator[None]:
    """Tell whoever reads JSON too that nothing is known of the dump: what ended the proof lies elsewhere."""
    try:
        yield
    except (RunbookError, OSError) as error:
        if json:
            why, then = (error.message, error.remedy) if isinstance(error, RunbookError) else (str(error), "")
            print_json({"ok": False, "outcome": "not tried", "why": [why], "next": then})
        raise


@app.command("prove")
def backup_prove(
    dump: Path,
    manifest: Annotated[Path, typer.Option(help="artifacts/backup/manifest.json of the run that made it.")],
    environment: Annotated[str, typer.Option(help="Whose server restores it; by default the manifest's.")] = "",
    json: Json = False,
) -> None:
    """Restore a dump into a scratch database and compare it with its manifest.

    Exits 1 when it is not its source or cannot be restored; 2 or 75 when it could not be tried.
    """
    with _not_tried(json=json):
        report = _proved(dump, manifest, environment)
    if json:
        print_json(report)
    else:
        for table in report.get("tables", []):
            mark = "✔" if table["same"] else "✖"
            print(f"{mark} {table['table']}: {table['rows']:,} rows, restored {table['restored_rows'] or 0:,}")
        for what in report.get("not_provable", []):
            print(f"? not covered: {what}")
        for why in report["why"]:
            print(f"✖ {why}")
        print(f"{dump} is {report['outcome']}")
        if "next" in report:
            print(f"next   {report['next']}")
    raise typer.Exit(0 if report["ok"] else 1)


def _proved(dump: Path, manifest: Path, environment: str) -> dict[str, Any]:
    """The report of a proof that came to its end, whichever that is.

    Raises:
        UsageError: something must be mended before the dump can be tried.
        PausedError: nobody answered, or somebody ended it: the same again is safe.
    """
    from functools import partial

    from runbook_lib import progress, restore, room, wiring
    from runbook_lib.adapters.database import in_words

    known = restore.read_manifest(manifest)
    where = environment or str(known.get("environment", ""))
    if not where:
        raise UsageError(f"{manifest} names no environment", remedy="say whose server restores it: --environment ENV")
    params = wiring.load_params(where)
    restore.asked_of(dump, known)
    left = f"runbook doctor {where} names a scratch database that could not be dropped"
    # What is restored is production's data: it must not stay when somebody hangs up.
    terminal.ended_by_signals()
    try:
        with wiring.looking_around(params) as run, _told(run.scratch), in_words("the proof"):
            room.refuse_without(
                run,
                dump,
                unpacked_bytes=restore.unpacked_bytes(dump, known),
                database_bytes=restore.database_bytes(known),
            )
            try:
                return restore.prove_against_manifest(
                    dump,
                    known,
                    database=run.services.database,
                    params=run.params.database,
                    shell=run.services.shell,
                    timeout_s=run.params.backup.timeout_s,
                    jobs=run.params.backup.jobs,
                    told=partial(progress.told, run.scratch),
                    free_ratio=run.params.backup.free_ratio,
                )
            except (UnavailableError, DeniedError):
                raise
            except StepFailedError as error:
                return _not_restored(error, run.scratch)
    except KeyboardInterrupt:
        raise PausedError(
            "the proof was interrupted, and of the dump nothing is known", remedy=f"the same again; {left}"
        ) from None
    except UnavailableError as error:
        raise PausedError(
            f"the dump could not be tried: {error.message}", remedy=f"{error.remedy}, then the same again; {left}"
        ) from error
    except StepFailedError as error:
        raise UsageError(f"the dump could not be tried: {error.message}", remedy=error.remedy) from error


def _not_restored(error: StepFailedError, logs: Path) -> dict[str, Any]:
    """A command on the dump failed: for the dump's sake or the machine's, which only its words tell."""
    said = [
        line.strip()
        for log in sorted(logs.rglob("*.log"))
        for line in log.read_text(errors="replace").splitlines()
        if "error" in line.lower() and line.strip() not in error.message
    ]
    return {
        "ok": False,
        "outcome": "not restored",
        "why": [error.message, *said[:_ERRORS]],
        "next": "keep the dump; mend what is said, or let another server try: --environment ENV",
    }
