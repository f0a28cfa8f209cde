"""Read-only mode: the front door's refusal, the workers' rest, the database's write fence, and their proofs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from runbook_lib import fence as fence_at
from runbook_lib.adapters import http
from runbook_lib.commands import ansible
from runbook_lib.errors import StepFailedError
from runbook_lib.model import Command
from runbook_lib.run import Run


def playbook(run: Run, name: str) -> Command:
    """`enable_maintenance.yml` or `disable_maintenance.yml` on every host of the application, and no other."""
    deploy = run.params.deploy
    return ansible.playbook(
        name,
        folder=Path(deploy.playbooks),
        inventory=Path(deploy.inventory),
        limit=tuple(run.params.all_hosts),
        timeout_s=deploy.timeout_s,
    )


def turn_on(run: Run) -> None:
    """Refuse users' writes at every host and rest the workers. Running it again changes nothing."""
    _play(run, "enable_maintenance")


def turn_off(run: Run) -> None:
    """Take writes again and wake the workers. Running it again changes nothing."""
    _play(run, "disable_maintenance")


def _play(run: Run, name: str) -> None:
    command = fence_at.through(run, playbook(run, f"{name}.yml"), tuple(run.params.all_hosts))
    run.services.shell.run(command, name=name)


def probe_write(run: Run, url: str | None = None) -> http.Answer:
    """Try to write as a user would, from outside, without the bypass."""
    application = run.params.application
    base = url or application.url
    headers = {"User-Agent": "runbook-probe/1.0"}
    return http.request("POST", base + application.probe_write_path, form=application.probe_write_form, headers=headers)


def refuses(run: Run, answer: http.Answer) -> bool:
    """True when the answer is the maintenance mode's own refusal."""
    return answer.status == 503 and run.params.application.refusal_header.lower() in answer.headers


def is_on(run: Run) -> bool:
    """True when every web host, and so the front door, refuses a user's write."""
    urls = [host.url for host in run.params.hosts.web.values() if host.url] or [run.params.application.url]
    return all(refuses(run, probe_write(run, url)) for url in urls)


def prove_read_only(run: Run) -> dict[str, Any]:
    """Show from outside that writes are refused and reads are served.

    Raises:
        StepFailedError: a write got through, or a read did not.
    """
    answer = probe_write(run)
    if not refuses(run, answer) or not is_on(run):
        raise StepFailedError(
            f"a probe write through the front door was not refused (status {answer.status})",
            remedy="look at enable_maintenance.yml and the hosts that it named",
        )
    reads = {path: http.request("GET", run.params.application.url + path).status for path in _reads(run)}
    bad = {path: status for path, status in reads.items() if status != 200}
    if bad:
        raise StepFailedError(f"reads are not served in read-only mode: {bad}", remedy="look at the application")
    return {"write refused with": answer.status, "reads served": reads}


def prove_open(run: Run) -> dict[str, Any]:
    """Show from outside that users are no longer refused.

    The probe carries no login: any answer but the maintenance mode's refusal or a server error proves it.

    Raises:
        StepFailedError: still refused somewhere, or broken.
    """
    urls = [host.url for host in run.params.hosts.web.values() if host.url]
    statuses = {}
    for url in [run.params.application.url, *urls]:
        answer = probe_write(run, url)
        statuses[url] = answer.status
        if refuses(run, answer) or answer.status >= 500:
            raise StepFailedError(
                f"{url} still refuses writes (status {answer.status})", remedy="run disable_maintenance.yml"
            )
    return {"probe write": next(iter(statuses.values())), "doors tried": len(statuses)}


def _reads(run: Run) -> list[str]:
    return [run.params.application.health_path, *run.params.application.critical_paths]


# --- the database's fence ------------------------------------------------------------------------------------------


def fence(run: Run) -> int:
    """Make every new transaction of the application's role read-only and end its sessions; returns how many."""
    database = run.params.database
    with fence_at.database(run, database.production) as session:
        session.execute(
            sql.SQL("ALTER ROLE {} IN DATABASE {} SET default_transaction_read_only = on").format(
                sql.Identifier(database.app_role), sql.Identifier(database.production)
            )
        )
        return _end_sessions(run, session)


def lift_fence(run: Run) -> int:
    """Let the application's role write again; its sessions are ended so that they learn of it."""
    database = run.params.database
    with fence_at.database(run, database.production) as session:
        session.execute(
            sql.SQL("ALTER ROLE {} IN DATABASE {} RESET default_transaction_read_only").format(
                sql.Identifier(database.app_role), sql.Identifier(database.production)
            )
        )
        return _end_sessions(run, session)


def is_fenced(run: Run) -> bool:
    """True when the role's setting in this database is read-only."""
    database = run.params.database
    with _admin(run) as session:
        rows = session.execute(
            "SELECT unnest(setconfig) FROM pg_db_role_setting s JOIN pg_roles r ON r.oid = s.setrole "
            "JOIN pg_database d ON d.oid = s.setdatabase WHERE r.rolname = %s AND d.datname = %s",
            (database.app_role, database.production),
        ).fetchall()
    return ("default_transaction_read_only=on",) in rows


def prove_fenced(run: Run) -> str:
    """Try to write as the application's role; the write must fail and is never committed. Returns the SQLSTATE.

    Raises:
        StepFailedError: it could have written.
    """
    database = run.params.database
    with run.services.database.connect(
        database.app_role, database.production, application=f"{run.session_name}: fence probe", autocommit=False
    ) as session:
        try:
            session.execute("UPDATE schema_migrations SET version = version WHERE false")
        except psycopg.errors.ReadOnlySqlTransaction as error:
            session.rollback()
            return str(error.sqlstate)
        except psycopg.errors.InsufficientPrivilege:
            session.rollback()
            shown = session.execute("SHOW transaction_read_only").fetchone()
            session.rollback()
            if shown == ("on",):
                return "25006"
        session.rollback()
    raise StepFailedError(f"{database.app_role} could still write to {database.production}", remedy="look at the fence")


def _admin(run: Run) -> psycopg.Connection[Any]:
    database = run.params.database
    return run.services.database.connect(database.admin_role, database.maintenance, application=run.session_name)


def _end_sessions(run: Run, session: psycopg.Connection[Any]) -> int:
    database = run.params.database
    rows = session.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s AND datname = %s AND pid <> pg_backend_pid()",
        (database.app_role, database.production),
    ).fetchall()
    return len(rows)
