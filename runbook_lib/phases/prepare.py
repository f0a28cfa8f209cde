"""Phase 0: the candidate, the freeze, the window, the room for its backups. Days before; blocks nobody but merges."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from runbook_lib import fence, outward, room
from runbook_lib.adapters import http
from runbook_lib.commands import archive_files, git
from runbook_lib.errors import StepFailedError
from runbook_lib.model import Artifact, Recovery, StepResult
from runbook_lib.run import Run
from runbook_lib.step import step

_MOST_SUBJECTS = 50


@step(
    "Confirm the release candidate: tag, commit, branch, CI",
    recovery=Recovery.REPEAT,  # only reads
    owner="Dev",
    expected_s=1.0,
)
def confirm_candidate(run: Run) -> StepResult:
    """The tag still stands on the commit that the run was opened for, the branch holds it, CI passed it."""
    facts = candidate(run)
    release = run.release
    changes = run.services.repository.log(release.previous_commit, release.commit)
    listed = "".join(f"- {subject}\n" for subject in changes)
    kept = run.keep("prepare/changes.md", f"# {release.previous_version} → {release.version}\n\n{listed or '- none'}\n")
    return StepResult(facts={**facts, "changes": changes[:_MOST_SUBJECTS]}, artifacts=(kept,))


@confirm_candidate.plan
def _(run: Run) -> list[tuple[str, ...]]:
    url, commit = run.params.repository.url, run.release.commit
    return [
        git.commit_of_tag(url, run.release.ref),
        git.is_ancestor(url, commit, run.params.repository.branch),
        git.note(url, commit, run.params.repository.ci_notes_ref),
        git.subjects(url, run.release.previous_commit, commit),
    ]


def candidate(run: Run) -> dict[str, Any]:
    """Check the candidate as it is now.

    Raises:
        StepFailedError: the tag moved, the branch lacks the commit, or CI did not pass that very commit.
    """
    release, repository = run.release, run.services.repository
    branch = run.params.repository.branch
    commit = repository.commit_of(release.ref)
    if commit != release.commit:
        raise StepFailedError(
            f"tag {release.ref} stands on {commit}, the run was opened for {release.commit}",
            remedy="find out who moved the tag; abort this run and open a new one",
        )
    if not repository.merged(commit, branch):
        raise StepFailedError(
            f"{release.ref} ({commit[:12]}) is not merged into {branch}",
            remedy=f"merge it into {branch}, then open a new run",
        )
    ci = repository.ci_status(commit)
    if ci.get("status") != "success":
        raise StepFailedError(
            f"CI says {ci.get('status')!r} of {release.ref} ({commit[:12]})",
            remedy="release a commit that CI has passed",
        )
    shown = {name: str(ci[name]) for name in ("status", "pipeline", "finished") if name in ci}
    return {"version": release.version, "commit": commit, "branch": branch, "CI": shown}


@step(
    "Check which release runs: it is what a rollback goes back to",
    recovery=Recovery.REPEAT,  # only reads
    owner="Ops",
    expected_s=1.0,
)
def check_running_version(run: Run) -> StepResult:
    """Every web host says that it serves the previous release."""
    serving = {}
    for name, host in run.params.hosts.web.items():
        if host.url is not None:
            said = http.get_json(host.url + run.params.application.version_path)
            serving[name] = str(said.get("commit"))
    other = {name: commit for name, commit in serving.items() if commit != run.release.previous_commit}
    if other:
        raise StepFailedError(
            f"{', '.join(f'{name} serves {commit[:12]}' for name, commit in other.items())}, not "
            f"{run.release.previous_version} ({run.release.previous_commit[:12]})",
            remedy="settle what runs, abort this run and open a new one",
        )
    return StepResult(
        facts={
            "running": run.release.previous_version,
            "commit": run.release.previous_commit,
            "asked": list(serving),
            "way back": f"{run.release.version} → {run.release.previous_version}",
        }
    )


@check_running_version.plan
def _(run: Run) -> list[tuple[str, ...]]:
    path = run.params.application.version_path
    return [("call", f"GET {host.url}{path}") for host in run.params.hosts.web.values() if host.url]


@step(
    "Freeze merges",
    recovery=Recovery.PROBE,
    owner="Lead",
    way_back="lift_freeze, on every way out",
)
def freeze_merges(run: Run) -> StepResult:
    """The git host refuses merges until the run ends.

    The freeze of a run that has ended, aborted for instance, is taken over: nobody else would lift it any more.
    """
    holder = run.services.repository.frozen_by()
    left = next((s for s in run.ledger.runs() if s.run_id == holder and s.ended), None)
    if left is not None:
        fence.refuse_stale(run)
        run.services.repository.lift_freeze(left.run_id)
    run.services.repository.freeze(run.run_id, _why(run), sure=partial(fence.refuse_stale, run))
    if run.services.repository.frozen_by() != run.run_id:
        raise StepFailedError("the freeze does not stand although it was set", remedy="look at the git host")
    taken_over = {} if left is None else {"taken over from": f"{left.run_id}, {left.ended}"}
    return StepResult(facts={"frozen by": run.run_id, "why": _why(run), **taken_over})


@freeze_merges.probe
def _(run: Run, intent: Mapping[str, Any]) -> StepResult | None:
    if run.services.repository.frozen_by() != run.run_id:
        return None
    return StepResult(facts={"frozen by": run.run_id, "why": _why(run)})


@freeze_merges.plan
def _(run: Run) -> list[tuple[str, ...]]:
    return [("call", f"freeze {run.params.repository.url}: {_why(run)}")]


def _why(run: Run) -> str:
    return f"release {run.release.version} to {run.release.environment}"


def window(run: Run) -> tuple[datetime, datetime]:
    """The release window: from `window.start` (or when the run was opened) for as long as the plan expects."""
    # The opening, not now: a step that is repeated after a crash must name the same hour.
    start = datetime.fromisoformat(run.params.window.start or run.state.opened_time)
    aside = ("prepare", "rollback", "review")
    length_s = sum(step["expected_s"] for step in run.plan["steps"] if step["phase"] not in aside)
    start = start.astimezone(UTC).replace(microsecond=0)
    return start, start + timedelta(seconds=round(length_s))


def people_of_gates(run: Run) -> list[str]:
    """Who must be there: everybody who holds a gate's role, as `Name (role, role)`."""
    gates = run.params.gates
    wanted = {*gates.backup.roles, *gates.migration.roles, *gates.release.roles}
    return [
        f"{person.name} ({', '.join(role for role in person.roles if role in wanted)})"
        for person in run.params.people.values()
        if wanted & set(person.roles)
    ]


@step(
    "Schedule the deployment window with those who decide",
    recovery=Recovery.PROBE,
    owner="Lead",
    way_back="the event stays; an incident note tells its people",
)
def schedule_window(run: Run) -> StepResult:
    """One calendar event for the deploy lead, the DBA, QA and on-call."""

    def invite() -> dict[str, Any]:
        start, end = window(run)
        people = people_of_gates(run)
        title = f"Deploy {run.params.application.name} {run.release.version} to {run.release.environment}"
        address = run.services.calendar.invite(title, start, end, people, key=run.key("window"))
        return _window_facts(run, address)

    return StepResult(facts=outward.deliver(run, invite))


@schedule_window.probe
def _(run: Run, intent: Mapping[str, Any]) -> StepResult | None:
    address = outward.found(lambda: run.services.calendar.find(run.key("window")))
    return None if address is None else StepResult(facts=_window_facts(run, address))


@schedule_window.plan
def _(run: Run) -> list[tuple[str, ...]]:
    return [("call", f"invite {', '.join(people_of_gates(run))}")]


def _window_facts(run: Run, address: str) -> dict[str, Any]:
    start, end = window(run)
    return {
        "start": _clock(start),
        "end": _clock(end),
        "invited": people_of_gates(run),
        "event": address,
    }


def _clock(time: datetime) -> str:
    return time.isoformat().replace("+00:00", "Z")


@step("Announce the window", recovery=Recovery.PROBE, owner="Lead", way_back="announced again when it changes")
def announce_window(run: Run) -> StepResult:
    """In the deployments channel."""
    return StepResult(
        facts=outward.post(run, run.params.messages.deployments, _announcement(run), what="announce-window")
    )


@announce_window.probe
def _(run: Run, intent: Mapping[str, Any]) -> StepResult | None:
    found = outward.found_post(run, run.params.messages.deployments, _announcement(run), what="announce-window")
    return None if found is None else StepResult(facts=found)


@announce_window.plan
def _(run: Run) -> list[tuple[str, ...]]:
    return [("call", f"post in {run.params.messages.deployments}: {run.release.version}, the window")]


def _announcement(run: Run) -> str:
    start, end = window(run)
    return (
        f"{run.params.application.name} {run.release.version} goes to {run.release.environment} "
        f"between {start:%Y-%m-%d %H:%M} and {end:%H:%M} UTC. Merges are frozen until then. Run {run.run_id}."
    )


@step(
    "Check that every backup target keeps room",
    recovery=Recovery.REPEAT,  # only reads
    owner="Ops",
    expected_s=1.0,
)
def check_capacity(run: Run) -> StepResult:
    """After the backup each target must still have its share free."""
    facts, artifact = capacity(run, "prepare/capacity.json")
    return StepResult(facts=facts, artifacts=(artifact,))


@check_capacity.plan
def _(run: Run) -> list[tuple[str, ...]]:
    sizes = [
        run.services.hosts[name].command(archive_files.size(host.files)).argv
        for name, host in run.params.all_hosts.items()
    ]
    looks = (f"statvfs {run.params.backup.directory}", "pg_database_size, data_directory", "bytes in the store")
    return [*(("call", look) for look in looks), *sizes]


def capacity(run: Run, artifact_name: str) -> tuple[dict[str, Any], Artifact]:
    """Measure the room in each backup target against a forecast from above: nothing is assumed to shrink.

    Raises:
        StepFailedError: a target would keep less than `backup.free_ratio` free; the table is attached.
    """
    known = room.forecast(run)
    targets = room.of_targets(run, known)
    ratio = run.params.backup.free_ratio
    facts: dict[str, Any] = {
        "database bytes": known.database_bytes,
        "files bytes": known.files_bytes,
        "forecast": f"dump {known.dump_bytes:,} bytes, archives {known.archives_bytes:,}, unpacked {known.unpacked_bytes:,}: {known.why}",
        **{
            one.target: {
                "now": f"{one.now:.1%} free",
                "after": f"{one.after:.1%}",
                "limit": f"{ratio:.0%}",
                **({} if one.free_inodes is None else {"inodes": f"{one.free_inodes:,} free"}),
            }
            if one.total_bytes
            else {"now": "its size is not known", "limit": f"{ratio:.0%}"}
            for one in targets
        },
    }
    table = {"forecast": asdict(known), "free_ratio": ratio, "targets": [one.as_json() for one in targets]}
    kept = run.keep(artifact_name, json.dumps(table, indent=1) + "\n")
    for one in targets:
        lack = one.lack(ratio)
        if lack is not None:
            error = StepFailedError(lack, remedy=one.remedy)
            error.result = StepResult(facts=facts, artifacts=(kept,), verdict="red")
            raise error
    return facts, kept


STEPS = (
    confirm_candidate,
    check_running_version,
    freeze_merges,
    schedule_window,
    announce_window,
    check_capacity,
)
