"""The fence at the targets: an executor that was stopped, overtaken and woken up again can do nothing there.

Every lease has an epoch, and every target keeps the highest that it has met. On a host that is a file, and all of
Ansible's modules run through an interpreter that looks at it first, both under one lock: a newer executor waits until
a module of the older one has ended, and none starts after that. In a database it is a setting, looked at under an
advisory lock that is held while its schema or its roles are changed; a newer executor ends the session that holds it.
A program with sessions of its own there names a role that only its executor's epoch has: the server refuses it when a
newer executor has dropped that.
In the object store nothing is written over: keys carry the run's id, and a put only makes what is not there.
The git host, the chat and the like keep no epoch: there the ledger is asked right before the deed.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psycopg
from psycopg import sql

from runbook_lib.canonical import sha256
from runbook_lib.errors import (
    DeniedError,
    FencedError,
    PausedError,
    StepFailedError,
    UnavailableError,
)
from runbook_lib.model import Command
from runbook_lib.run import Run

# $1 the epoch, $2 who comes, $3 the interpreter behind the fence, $4 how long to wait for the lock in seconds. The
# lock's file is never removed: a second file of that name would be a second lock.
_RAISE = """
set -eu
umask 022
command -v flock > /dev/null || { echo 'flock (util-linux) is not installed here' >&2; exit 69; }
mkdir -p .runbook && cd .runbook
exec 9>> lock
flock -w "$4" 9 || { echo "still at work here: $(cat job 2> /dev/null)" >&2; exit 75; }
known=$(cat epoch 2> /dev/null || echo 0)
case $known in
*[!0-9]* | '') echo "what is in $(pwd)/epoch is no number: look whether anything runs here, then remove it" >&2; exit 69;;
esac
[ "$known" -le "$1" ] || { echo "a later executor was here (epoch $known, this one has $1)" >&2; exit 97; }
cat > "python-$1.new" << EOF
#!/bin/sh
cd "$(pwd)" && exec 9>> lock && flock -w 300 9 || exit 75
[ "\\$(cat epoch)" = "$1" ] || { echo 'a later executor was here: this one is stale' >&2; exit 97; }
echo "$2, pid \\$\\$" > job
cd "\\$OLDPWD" && exec $3 "\\$@"
EOF
chmod 755 "python-$1.new"
mv "python-$1.new" "python-$1"
for old in python-*; do [ "$old" = "python-$1" ] || rm -f "$old"; done
# On disk before anything rests on it, also over a loss of power; an old `sync` knows no files.
printf '%s\\n' "$1" > epoch.new
sync epoch.new 2> /dev/null || sync
mv epoch.new epoch
sync . 2> /dev/null || sync
"""
_STALE, _AT_WORK = 97, 75
_NO_SSH = 255
_WAIT_S = 30.0
_GRACE_S = 10.0
# One lock in each database; the number is of no meaning, only hardly used by anybody else.
_LOCK = int(sha256(b"runbook fence")[:15], 16)
_SETTING = "runbook.epoch"


def epoch(run: Run) -> int:
    """The epoch that this process works under.

    Raises:
        FencedError: it is nobody's executor.
    """
    if run.ledger.epoch is None:
        raise FencedError(
            f"this process is not the executor of run {run.run_id}", remedy=f"runbook resume {run.run_id}"
        )
    return run.ledger.epoch


def refuse_stale(run: Run) -> None:
    """Compare this executor's epoch with the ledger's, right before a deed at a target that keeps no epoch.

    Raises:
        FencedError: another executor has the run.
    """
    mine, newest = epoch(run), run.state.epoch
    if mine != newest:
        raise FencedError(
            f"run {run.run_id} was taken over: its lease has epoch {newest}, this process had {mine}",
            remedy=f"runbook status {run.run_id}",
        )


# --- hosts -------------------------------------------------------------------------------------------------------


def raise_on(run: Run, host: str) -> None:
    """Make this executor's epoch the host's, and wait until a module that still runs there has ended.

    Raises:
        FencedError: a later executor was there.
        PausedError: something of an earlier one still runs there.
        UnavailableError: it does not answer.
    """
    python = run.params.all_hosts[host].python
    words = ("sh", "-c", _RAISE, "sh", str(epoch(run)), run.run_id, python, f"{_WAIT_S:g}")
    there = run.services.hosts[host].command(
        Command(words, timeout_s=_WAIT_S + 30, ok_exits=(0, _STALE, _AT_WORK, _NO_SSH))
    )
    done = run.services.shell.run(there, name=f"fence-{host}")
    if done.exit_code == _STALE:
        raise FencedError(f"{host}: {done.tail(1)}", remedy=f"runbook status {run.run_id}")
    if done.exit_code == _NO_SSH:
        raise UnavailableError(f"{host} does not answer: {done.tail(1)}", remedy="mend that, then resume")
    if done.exit_code == _AT_WORK:
        raise PausedError(f"{host}: {done.tail(1)}", remedy="wait for it, or end it there; then resume")


def through(run: Run, command: Command, hosts: Sequence[str]) -> Command:
    """The playbook with every module on these hosts behind the fence, which is raised first."""
    for host in hosts:
        raise_on(run, host)
    pythons = {host: f"{run.services.hosts[host].home}/.runbook/python-{epoch(run)}" for host in hosts}
    words = {"runbook_python": pythons, "ansible_python_interpreter": "{{ runbook_python[inventory_hostname] }}"}
    *first, playbook = command.argv
    return replace(command, argv=(*first, "--extra-vars", json.dumps(words), playbook))


# --- databases ---------------------------------------------------------------------------------------------------


@contextmanager
def database(run: Run, name: str) -> Iterator[psycopg.Connection[Any]]:
    """An administrator's session in a database, alone there among all executors while the body runs.

    Raises:
        FencedError: a later executor was there.
        PausedError: another session has the lock.
    """
    d, mine = run.params.database, epoch(run)
    with run.services.database.connect(d.admin_role, name, application=f"{run.session_name}: fence") as session:
        session.execute("SELECT set_config('lock_timeout', '5s', false)")
        try:
            session.execute("SELECT pg_advisory_lock(%s)", (_LOCK,))
        except psycopg.errors.LockNotAvailable as error:
            raise PausedError(
                f"another executor is at work in {name}: {_lock_holder(session)}", remedy="wait for it, then resume"
            ) from error
        known = _known_epoch(session, name)
        if known > mine:
            raise FencedError(
                f"{name}: a later executor was here (epoch {known}, this one has {mine})",
                remedy=f"runbook status {run.run_id}",
            )
        if known < mine:
            setting = sql.SQL("ALTER DATABASE {} SET {} = {}")
            session.execute(setting.format(sql.Identifier(name), sql.SQL(_SETTING), sql.Literal(str(mine))))
            _admit_nobody(session, name)
        yield session


@contextmanager
def admitting(run: Run, name: str, role: str) -> Iterator[str]:
    """Like `database`, for a program that opens its own sessions as `role`: yields the options that let them in.

    A session that asks for a role which is not there is refused before its first statement. So the program asks for
    one that has this epoch's name and no rights, and then at once for the one that it would have had without.

    Raises:
        DeniedError: the administrator may not make roles, or `role` cannot log in.
        FencedError, PausedError: as `database` does.
    """
    with run.services.database.connect(role, name, application=f"{run.session_name}: fence") as session:
        usual = session.execute("SELECT current_setting('role')").fetchone()
    with database(run, name) as session:
        _admit_nobody(session, name)
        admission = f"{_admissions(name)}{epoch(run)}"
        try:
            session.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(admission)))
            session.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(admission), sql.Identifier(role)))
        except psycopg.errors.InsufficientPrivilege as error:
            raise DeniedError(
                f"{run.params.database.admin_role} may not make the role {admission} that lets {role} in: "
                f"{error.diag.message_primary}",
                remedy=f"ALTER ROLE {run.params.database.admin_role} CREATEROLE",
            ) from error
        try:
            yield " ".join(f"-c role={_as_option(asked)}" for asked in (admission, usual[0] if usual else "none"))
        finally:
            with contextlib.suppress(psycopg.OperationalError):  # who ended this session has dropped it
                _admit_nobody(session, name)


def _admissions(name: str) -> str:
    """How the roles begin that let programs into a database; the server has them for all of its databases."""
    return f"runbook_{sha256(name.encode())[:12]}_"


def _admit_nobody(session: psycopg.Connection[Any], name: str) -> None:
    """Let no further program in; under the lock."""
    rows = session.execute("SELECT rolname FROM pg_roles WHERE starts_with(rolname, %s)", (_admissions(name),))
    for (admission,) in rows.fetchall():
        session.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(admission)))


def _as_option(word: str) -> str:
    return word.replace("\\", "\\\\").replace(" ", "\\ ")


def end_left_over(run: Run) -> int:
    """End what this run's earlier executors left running in the server, after a grace; returns how many it were.

    Their processes are gone: whatever goes on for them is rolled back in the end, or stands between two states, which
    is for the step's probe to see. Sessions are told by the name that the run gives them.

    Raises:
        PausedError: one does not end; it is named.
    """
    d = run.params.database
    with run.services.database.connect(
        d.admin_role, d.maintenance, application=f"{run.session_name}: probe"
    ) as session:
        deadline = time.monotonic() + _GRACE_S
        while (found := _at_work(run, session)) and time.monotonic() < deadline:
            time.sleep(0.2)
        for pid, application, query in found:
            ended = session.execute("SELECT pg_terminate_backend(%s, 10000)", (pid,)).fetchone()
            if ended != (True,):
                raise PausedError(
                    f"a session of this run is still at work in the database (pid {pid}, {application}: {query})",
                    remedy="wait for it, or let a DBA end it; then resume",
                )
    return len(found)


def _at_work(run: Run, session: psycopg.Connection[Any]) -> list[Any]:
    return session.execute(
        "SELECT pid, application_name, left(query, 80) FROM pg_stat_activity "
        "WHERE starts_with(application_name, %s) AND state <> 'idle' AND pid <> pg_backend_pid()",
        (run.session_name,),
    ).fetchall()


def _end_sessions(run: Run) -> None:
    """End all of the run's sessions, at work or not."""
    d = run.params.database
    with run.services.database.connect(
        d.admin_role, d.maintenance, application=f"{run.session_name}: takeover"
    ) as session:
        rows = session.execute(
            "SELECT pid, pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
            "WHERE starts_with(application_name, %s) AND pid <> pg_backend_pid()",
            (run.session_name,),
        ).fetchall()
    left = [str(pid) for pid, ended in rows if not ended]
    if left:
        raise PausedError(f"sessions {', '.join(left)} do not end", remedy="let a DBA look")


def _known_epoch(session: psycopg.Connection[Any], name: str) -> int:
    row = session.execute(
        "SELECT split_part(word, '=', 2) FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase, "
        "unnest(s.setconfig) AS word WHERE d.datname = %s AND s.setrole = 0 AND split_part(word, '=', 1) = %s",
        (name, _SETTING),
    ).fetchone()
    return int(row[0]) if row is not None else 0


def _lock_holder(session: psycopg.Connection[Any]) -> str:
    row = session.execute(
        "SELECT a.pid, a.application_name FROM pg_locks l JOIN pg_stat_activity a USING (pid) "
        "WHERE l.locktype = 'advisory' AND l.granted AND (l.classid::bigint << 32) | l.objid::bigint = %s",
        (_LOCK,),
    ).fetchone()
    return "unknown" if row is None else f"{row[1]} (pid {row[0]})"


# --- all of it ---------------------------------------------------------------------------------------------------


def raise_everywhere(run: Run) -> list[str]:
    """Shut an earlier executor out of every target of the environment; returns where it was.

    Raises:
        PausedError: a target could not be fenced; it is named, and those before it are fenced.
    """
    fenced: list[str] = []
    d = run.params.database
    targets: list[tuple[str, Any]] = [(f"sessions in {d.production} and {d.staging}", lambda: _end_sessions(run))]
    targets += [(f"database {name}", lambda name=name: _raise_in(run, name)) for name in (d.production, d.staging)]
    targets += [(f"host {host}", lambda host=host: raise_on(run, host)) for host in run.params.all_hosts]
    for target, shut in targets:
        try:
            shut()
        except (StepFailedError, PausedError) as error:
            raise PausedError(
                f"{target} could not be fenced: {error.message}; fenced so far: {', '.join(fenced) or 'nothing'}",
                remedy="mend that, then the same command again",
            ) from error
        fenced.append(target)
    return fenced


def _raise_in(run: Run, name: str) -> None:
    with database(run, name):
        pass
    _end_sessions(run)  # of a program that was let in just before
