"""What must be true before a run may be opened: tools, files, rules, and the right database. Only looks."""

from __future__ import annotations

import shutil
from pathlib import Path

from runbook_lib import telemetry
from runbook_lib.commands.migrations import versions_in
from runbook_lib.errors import RunbookError, UsageError
from runbook_lib.params import Params
from runbook_lib.run import Run


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
    wanted = {
        "deploy.playbooks": (Path(params.deploy.playbooks) / "deploy_release.yml", Path.is_file),
        "deploy.inventory": (Path(params.deploy.inventory), Path.exists),
        "database.passfile": (Path(params.database.passfile), Path.is_file),
        "watch.access_log": (Path(params.watch.access_log), Path.is_file),
    }
    for key, (path, look) in wanted.items():
        if not look(path):
            raise UsageError(
                f"{key}: {path} is not there",
                remedy="runbook stack up" if params.rehearsal else f"mend {key} in the params file",
            )
    backups = Path(params.backup.directory)
    if not (backups if backups.exists() else backups.parent).is_dir():
        raise UsageError(f"backup.directory: {backups.parent} is no folder", remedy="mend backup.directory")


def check_watch(run: Run) -> None:
    """See that the watch's rules can be read, before a release depends on them.

    Raises:
        UsageError: naming the key.
    """
    try:
        telemetry.watch_config(run)
    except ValueError as error:
        raise UsageError(f"watch.rules: {error}", remedy="see watch in params/example.yml") from error


def check_database(run: Run) -> None:
    """Reachable is not enough: it must be the application's database, at the running release's schema.

    Raises:
        UsageError: naming the database and what is wrong with it.
    """
    d, tree = run.params.database, run.params.migrations.directory
    if d.production == d.staging:
        raise UsageError(
            f"database.production and database.staging are both {d.production}: a release is rehearsed on staging first",
            remedy="mend database.* in the params file",
        )
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
