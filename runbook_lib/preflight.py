"""What must be true before a run may be opened: tools, files, rules, and the right database. Only looks."""

from __future__ import annotations

import getpass
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from runbook_lib import telemetry
from runbook_lib.commands.migrations import versions_in
from runbook_lib.errors import RunbookError, UsageError
from runbook_lib.params import Params
from runbook_lib.params_file import one_line
from runbook_lib.run import Run

# A run that is late opens all the same; a window of another day is a slip of the date.
_LATE = timedelta(days=1)


def opener(params: Params, person: str) -> str:
    """Who answers for opening a run: the person named, or the params' own, or the login name.

    Raises:
        UsageError: it is none of the people, or a gate could not be passed without them.
    """
    if person and person not in params.people:
        raise UsageError(f"--as {person}: nobody of that name", remedy=f"use one of {', '.join(sorted(params.people))}")
    name = person or params.opened_by or getpass.getuser()
    if name not in params.people and params.rehearsal is None:
        # Somebody under another name than the params know could approve what they opened themselves.
        raise UsageError(
            f"{name} opens the run and is none of the people in the params file", remedy="say who you are: --as PERSON"
        )
    for gate in ("backup", "migration", "release"):
        # Found out at the gate, it would leave production closed.
        needed, able = getattr(params.gates, gate).quorum, params.able(gate, opener=name)
        if len(able) < needed:
            raise UsageError(
                f"gates.{gate} needs {needed} beside {name}, who opens the run and cannot approve it",
                remedy="let somebody else open it: --as PERSON",
            )
    return name


def tools_of(params: Params) -> list[str]:
    """The programs that a release calls on this machine."""
    tools = [
        "git",
        "ssh-keygen",
        "tar",
        "ansible-playbook",
        "pg_dump",
        "pg_dumpall",
        "pg_restore",
        params.migrations.executable,
    ]
    return [*tools, "ssh"] if any(host.address.startswith("ssh:") for host in params.all_hosts.values()) else tools


def find_tool(name: str) -> str:
    """The program's path; relative ones are the release's own (`bin/rails`) and are found in its tree.

    Raises:
        UsageError: it is not installed.
    """
    path = name if "/" in name and not name.startswith("/") else shutil.which(name)
    if path is None:
        raise UsageError(f"{name} is not installed on this machine", remedy="install it, or put its folder on PATH")
    return path


def check_tools(params: Params) -> None:
    """See that every program is there.

    Raises:
        UsageError: naming the first that is not.
    """
    # Found missing in the middle, it would leave production closed.
    for tool in tools_of(params):
        find_tool(tool)


def check_files(params: Params) -> None:
    """See that the files and folders are there that the params name on this machine.

    Raises:
        UsageError: naming the key and the path.
    """
    store, vault = params.backup.store.credentials_file, params.deploy.vault_password
    wanted = {
        "deploy.playbooks": (f"{params.deploy.playbooks}/deploy_release.yml", Path.is_file),
        "deploy.inventory": (params.deploy.inventory, Path.exists),
        "deploy.vault_password": (vault and vault.removeprefix("file:"), Path.is_file),
        "database.passfile": (params.database.passfile, Path.is_file),
        "database.bin": (params.database.bin, Path.is_dir),
        "backup.store.credentials_file": (store, Path.is_file),
        "watch.access_log": (params.watch.access_log, Path.is_file),
        "record.key": (params.record.key.removeprefix("file:"), Path.is_file),
    }
    for key, (path, look) in wanted.items():
        if path is not None and not _sees(look, Path(path)):
            raise UsageError(
                f"{key}: {path} is not there",
                remedy="runbook stack up" if params.rehearsal else f"mend {key} in the params file",
            )
    backups = Path(params.backup.directory)
    if not _sees(Path.is_dir, backups if _sees(Path.exists, backups) else backups.parent):
        raise UsageError(f"backup.directory: {backups.parent} is no folder", remedy="mend backup.directory")


def _sees(look: Callable[[Path], bool], path: Path) -> bool:
    try:
        return look(path)
    except OSError:  # a name that no file can have, or a folder that may not be looked into
        return False


def check_window(params: Params) -> None:
    """See that the window is not one of the past.

    Raises:
        UsageError: it began over a day ago.
    """
    start = params.window.start
    if start is not None and datetime.fromisoformat(start) < datetime.now(UTC) - _LATE:
        raise UsageError(f"window.start: {start} is over a day ago", remedy="mend window.start, or leave it out")


def check_watch(params: Params) -> None:
    """See that the watch's rules can be read, before a release depends on them.

    Raises:
        UsageError: naming the key.
    """
    try:
        telemetry.watch_config(params)
    except ValueError as error:
        raise UsageError(f"watch.rules: {one_line(error)}", remedy="see watch in params/example.yml") from error


def check_database(run: Run) -> None:
    """Reachable is not enough: it must be the application's database, at the running release's schema.

    Raises:
        UsageError: naming the database and what is wrong with it.
    """
    d, tree = run.params.database, run.params.migrations.directory
    previous = set(versions_in(run.tree(run.release.previous_commit), tree))
    known = previous | set(versions_in(run.tree(run.release.commit), tree))
    for name in (d.production, d.staging):
        try:
            with run.services.database.connect(d.migrate_role, name, application="runbook: opening") as connection:
                row = connection.execute("SELECT to_regclass('schema_migrations') IS NOT NULL").fetchone()
                there = row is not None and bool(row[0])
                rows = connection.execute("SELECT version FROM schema_migrations").fetchall() if there else []
        except RunbookError as error:
            raise UsageError(f"database {name}: {error.message}", remedy=error.remedy) from error
        if not there:
            raise UsageError(
                f"database {name} at {d.host}:{d.port} has no schema_migrations: it is not the application's",
                remedy="mend database.* in the params file",
            )
        applied = {version for (version,) in rows}
        missing = previous - applied
        # Staging may be ahead, with candidates that never were released.
        foreign = applied - known if name == d.production else set()
        if (missing and name == d.production) or foreign:
            raise UsageError(
                f"database {name} at {d.host}:{d.port} is not at the schema of {run.release.previous_version}, which runs "
                f"now: it lacks {sorted(missing)[:5]}, and {sorted(foreign)[:5]} are known to neither release",
                remedy="mend database.* in the params file, or let a DBA look",
            )
