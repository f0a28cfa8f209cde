"""What `runbook doctor` looks at: tools, hosts, credentials, services; it changes nothing."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from typing import Any

from runbook_lib import preflight, restore, room, wiring
from runbook_lib.adapters import http
from runbook_lib.errors import RunbookError, UsageError
from runbook_lib.model import Command
from runbook_lib.params import Database, Params
from runbook_lib.run import Run


def examine(params: Params) -> list[dict[str, Any]]:
    """Every check with its name, whether it is fine, and why (not)."""
    run = wiring.draft_of(params)
    services, found = run.services, []

    def check(name: str, look: Callable[[], str]) -> None:
        try:
            found.append({"name": name, "ok": True, "why": look()})
        except (RunbookError, OSError, KeyError, ValueError, subprocess.SubprocessError) as error:
            found.append({"name": name, "ok": False, "why": str(error)})

    for tool in preflight.tools_of(params):
        check(f"tool {os.path.basename(tool)}", lambda tool=tool: preflight.find_tool(tool))  # type: ignore[misc]  # noqa: PTH119
    for name, host in params.all_hosts.items():
        command = services.hosts[name].command(Command(("true",), timeout_s=20.0))
        check(f"host {name}", lambda c=command: _answers(c))  # type: ignore[misc]
        if host.url is not None:
            url = host.url + params.application.version_path
            check(f"service {name}", lambda u=url: f"serves {http.get_json(u)['version']}")  # type: ignore[misc]
    for role, database in (
        (params.database.backup_role, params.database.production),
        (params.database.migrate_role, params.database.production),
        (params.database.app_role, params.database.production),
        (params.database.admin_role, params.database.maintenance),
        (params.database.migrate_role, params.database.staging),
    ):
        check(f"database {database} as {role}", lambda r=role, d=database: _connects(services.database, r, d))  # type: ignore[misc]
    check("fence for the migration tool", lambda: _may_fence(services.database, params.database))
    check("scratch volume", lambda: _knows_its_room(run))
    check("scratch databases", lambda: _none_is_left(run))
    check("object store", lambda: f"{services.store.used_bytes():,} bytes stored")
    check("repository", lambda: f"frozen by {services.repository.frozen_by() or 'nobody'}")
    if services.balancer is not None:
        balancer = services.balancer
        check("load balancer", lambda: ", ".join(f"{b.name} {b.state}" for b in balancer.backends()))
    check("recorder key", lambda: f"readable: {run.secrets.path(params.record.key).stat().st_size} bytes")
    check("bypass token", lambda: "resolved" if run.secrets.resolve(params.application.bypass_token) else "")
    return found


def _answers(command: Command) -> str:
    done = subprocess.run(  # noqa: S603
        command.argv,
        cwd=command.cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=command.timeout_s,
        check=False,
    )
    if done.returncode:
        raise OSError(f"exit {done.returncode}: {done.stderr.decode(errors='replace').strip()[:200]}")
    return "answers"


def _connects(database: Any, role: str, name: str) -> str:
    with database.connect(role, name, application="runbook: doctor") as connection:
        return f"server {connection.info.server_version}"


def _knows_its_room(run: Run) -> str:
    volume = room.of_scratch(run, 0)
    if not volume.total_bytes:
        raise UsageError(str(volume.lack(0.0)), remedy=volume.remedy)
    return f"{volume.free_bytes:,} of {volume.total_bytes:,} bytes free"


def _none_is_left(run: Run) -> str:
    """What a proof restored is production's data, on production's server."""
    params = run.params.database
    found = restore.of_proofs(run.services.database, params)
    left = [one for one in found if not one.at_work]
    if left:
        sizes = ", ".join(f"{one.name}" + (f" ({one.size_bytes:,} bytes)" if one.size_bytes else "") for one in left)
        drops = "; ".join(f'DROP DATABASE "{one.name}"' for one in left)
        raise UsageError(
            f"killed proofs left {sizes}",
            remedy=f"when no proof is at work: as {params.admin_role} in {params.maintenance}: {drops}",
        )
    return f"a proof is at work in {', '.join(one.name for one in found)}" if found else "none is left over"


def _may_fence(database: Any, named: Database) -> str:
    with database.connect(named.admin_role, named.maintenance, application="runbook: doctor") as connection:
        row = connection.execute(
            "SELECT rolsuper OR rolcreaterole FROM pg_roles WHERE rolname = current_user"
        ).fetchone()
    if row is None or not row[0]:
        raise UsageError(
            f"{named.admin_role} may not make roles: no migration could be let in",
            remedy=f"ALTER ROLE {named.admin_role} CREATEROLE",
        )
    return f"{named.admin_role} may make roles"
