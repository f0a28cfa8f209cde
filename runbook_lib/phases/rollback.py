"""Phase 6, rollback: what was changed is undone in reverse order, as the ledger has it, and proved.

Without a request (`runbook rollback RUN`, or a failed gate where the params say so) only the way back is shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import psycopg

from runbook_lib import fence, lease, maintenance, migration, outward
from runbook_lib.adapters import catalogue, http, processes
from runbook_lib.canonical import sha256_file
from runbook_lib.commands import migrations
from runbook_lib.errors import DeniedError, PausedError, StepFailedError, StepInDoubtError, UnavailableError
from runbook_lib.model import Recovery, Status, StepResult
from runbook_lib.phases import complete, deploy, migrate
from runbook_lib.run import Run
from runbook_lib.smoke import run_smoke
from runbook_lib.step import step

_MOST_SHOWN = 10  # objects of a schema
_LEFT_OVER_S = 1800.0  # the longest that a command of a killed executor is waited for


def _not_asked(run: Run) -> StepResult | None:
    if run.state.rollback is not None:
        return None
    said = "no rollback is requested: runbook rollback RUN asks for it"
    return StepResult(facts={"nothing was done": said}, status="not requested")


_undo = partial(step, instead=_not_asked)


def touched(run: Run, key: str) -> bool:
    """True when a step was ever started: its effect may be there, all of it or a part.

    Also when it was put back to be done again, since that says nothing of what the first attempt left.
    """
    return run.state.step(key).attempt > 0


def touched_hosts(run: Run) -> list[str]:
    """Hosts whose deployment was started, last one first."""
    return [host for host in reversed(tuple(run.params.all_hosts)) if touched(run, f"deploy.deploy_release@{host}")]


def let_in(run: Run) -> bool:
    """True when users may have been let in with this release."""
    early = run.params.maintenance.lift == "before_watch" and touched(run, "verify.open_for_users")
    return early or touched(run, "complete.lift_maintenance")


def let_interrupted_end(run: Run) -> None:
    """Wait for what a killed executor left running: what it still changes must be there to be seen and undone.

    Raises:
        PausedError: the executor itself is alive, or ran where it cannot be looked at; a command or a migration goes on.
    """
    for key, now in run.state.steps.items():
        # Blocked: an older version did that over what was still at work.
        if now.status not in (Status.RUNNING, Status.BLOCKED) or now.intent["phase"] == "rollback":
            continue
        lease.refuse_at_work(run, key, now.intent, now.intent_time)
        processes.wait_for_children(run.folder / now.intent["children"], timeout_s=_LEFT_OVER_S)
    if touched(run, "migrate.migrate_production"):
        migration.refuse_while_migrating(run, run.params.database.production)


def refuse_at_work(run: Run) -> None:
    """See that nothing of the run goes on, before its environment is free for another one.

    Its sessions in the database that are still at work are ended: their processes are gone.

    Raises:
        PausedError: a command of it goes on and is named, a session in the database does not end, or nobody can tell.
    """
    for key, now in run.state.steps.items():
        if now.status not in (Status.RUNNING, Status.BLOCKED):
            continue
        lease.refuse_at_work(run, key, now.intent, now.intent_time)
        for name, group in processes.children(run.folder / now.intent["children"]):
            raise PausedError(
                f"{key}: {name} is still at work here (process group {group})",
                remedy=f"wait for it, or end it with kill -- -{group}; then the same again",
            )
    if run.state.locked:  # before that nothing of a run is in the database
        try:
            fence.end_left_over(run)
        except (UnavailableError, DeniedError, psycopg.OperationalError) as error:
            raise PausedError(
                f"whether anything of run {run.run_id} is at work in the database cannot be seen: {error}"[:800],
                remedy="mend that, then the same again",
            ) from error


def in_doubt(run: Run) -> list[str]:
    """Steps that were begun and are not known to have ended well: what they left was not looked at."""
    unsettled = (Status.RUNNING, Status.BLOCKED, Status.FAILED)
    return [
        f"in doubt: {key} is {now.status.value}: what it left was not looked at"
        for key, now in run.state.steps.items()
        if now.status in unsettled
    ]


def schema_difference(run: Run) -> list[str]:
    """Versions that production has and had not before this release, newest first; never the previous release's."""
    before = run.state.fact("migrate.record_schema", "versions")
    if before is None or not touched(run, "migrate.migrate_production"):
        return []
    return [v for v in reversed(migration.applied_versions(run, run.params.database.production)) if v not in before]


def what_changed(run: Run) -> list[str]:
    """Everything that the ledger says this run changed outside its own folder, newest first, with what undoes it."""
    found = []
    if let_in(run):
        found.append("users were let in → read-only mode on again while going back")
    hosts = touched_hosts(run)
    if hosts:
        found.append(f"code on {', '.join(hosts)} → deploy {run.release.previous_version} there")
    schema = schema_difference(run)
    if schema:
        found.append(f"schema of {run.params.database.production}: {', '.join(schema)} → undo each, newest first")
    if touched(run, "begin.fence_writes") and not run.state.green("deploy.lift_write_fence"):
        found.append("write fence in the database → lifted")
    if touched(run, "begin.enable_maintenance"):
        found.append("read-only mode → off")
    if touched(run, "prepare.freeze_merges"):
        found.append("merge freeze → lifted")
    return found


def _only_shown(run: Run) -> StepResult | None:
    return None if run.state.rollback is not None else _way_back(run)


@step("Show the way back", recovery=Recovery.REPEAT, owner="Lead", expected_s=0.2, instead=_only_shown)
def show_way_back(run: Run) -> StepResult:
    """List what this run changed and what undoes it, read from the ledger and from the targets; changes nothing.

    What a killed executor left running is waited for first.
    """
    let_interrupted_end(run)
    return _way_back(run)


def _way_back(run: Run) -> StepResult:
    changed = what_changed(run)
    facts = {str(number): line for number, line in enumerate(changed, 1)} or {
        "to undo": "nothing outside the run's folder"
    }
    if run.state.rollback is None:
        return StepResult(facts=facts, title="The way back, if it were asked for now", status="shown only")
    return StepResult(facts=facts, artifacts=(run.keep("rollback/way_back.json", json.dumps(changed, indent=1)),))


@_undo("Announce the rollback", recovery=Recovery.PROBE, owner="Lead", expected_s=0.2)
def announce_rollback(run: Run) -> StepResult:
    """Tell the deployments channel that the release goes back, and why.

    It worked when the message's address is shown. A second run posts nothing.
    """
    release, reason = run.release, (run.state.rollback or {}).get("reason", "")
    text = f"Rolling {release.environment} back from {release.version} to {release.previous_version}: {reason}"
    return StepResult(facts=outward.post(run, run.params.messages.deployments, text[:3000], what="announce_rollback"))


@announce_rollback.probe
def _rollback_announced(run: Run, intent: object) -> StepResult | None:
    address = outward.found(lambda: run.services.chat.find(run.key("announce_rollback")))
    return None if address is None else StepResult(facts={"address": address})


@_undo("Refuse writes while going back", recovery=Recovery.REPEAT, owner="Ops", expected_s=4.0)
def close_for_users(run: Run) -> StepResult:
    """Where users were let in already, read-only mode goes on again before code and schema change under them.

    It sets a state: a second run changes nothing.
    """
    if not let_in(run) or not (touched_hosts(run) or schema_difference(run)):
        return StepResult(facts={"read-only mode": "as it is"})
    maintenance.turn_on(run)
    return StepResult(facts=maintenance.prove_read_only(run))


@_undo("Put the previous code back", recovery=Recovery.REPEAT, owner="DevOps", timeout_s=1800.0, expected_s=24.0)
def restore_code(run: Run) -> StepResult:
    """Deploy the previous commit to every host that was touched, last one first, drained like on the way here.

    It worked when the playbook has ended well for each host, and each serves the previous commit. A host that serves it
    already is no exception: killed between the switch and the restart, its next start would take the new release, and
    only the playbook knows what that start takes. It looks before it acts: a second run changes only what is missing.
    """
    done = {}
    for host in touched_hosts(run):
        done[host] = deploy.deploy_to(run, host, run.release.previous_commit, name="back").facts["commit"]
    return StepResult(facts=done or {"code": "was not touched"})


@_undo("Put the previous schema back", recovery=Recovery.PROBE, owner="DBA", timeout_s=1800.0, expected_s=2.0)
def restore_schema(run: Run) -> StepResult:
    """Undo exactly the migrations that this release applied, newest first; never one of the previous release's.

    It worked when schema_migrations is what was recorded before. Each undo looks at the newest row first, so a second
    run goes on where the first stopped. What may be half done outside a transaction, a migration or an undo, is a
    person's to settle first: no undo is written for that. A dump is never restored from here.
    """
    if touched(run, "migrate.migrate_production"):
        migrate.migrate_production.settle_left_over(run)
    before = run.state.fact("migrate.record_schema", "versions")
    if before is None and touched(run, "migrate.migrate_production"):
        raise StepFailedError(
            "the ledger does not say which migrations production had before this release",
            remedy="a DBA compares schema_migrations with the previous release and undoes what is too much",
        )
    undone = []
    for version in schema_difference(run):
        migration.undo(run, version)
        undone.append(version)
    if before is not None:
        now = migration.applied_versions(run, run.params.database.production)
        if now != before:
            raise StepFailedError(
                f"the schema is {now}, it was {before}", remedy="let a DBA look; nothing else was touched"
            )
    return (
        _compared(run, {"undone now, newest first": undone})
        if before is not None
        else StepResult(facts={"undone now, newest first": undone, "schema": "was not touched"})
    )


@restore_schema.probe
def _undone(run: Run, intent: Mapping[str, Any]) -> StepResult | None:
    """Nothing is taken for done: an undo and its row are one transaction, and the rows tell where to go on.

    Where they are not, the section may be done and its row still there: once more would undo it twice.
    """
    production = run.params.database.production
    migration.refuse_while_migrating(run, production)
    left = schema_difference(run)
    if left and migrate.begun(run, intent, f"undo-{left[0]}"):
        files = migrations.versions_in(run.tree(run.release.commit), run.params.migrations.directory)
        if left[0] in files and not migrations.transactional(files[left[0]], "down"):
            raise StepInDoubtError(
                f"the undo of {files[left[0]].name} runs outside a transaction and may be done, or half done, in "
                f"{production}, while its row is still in schema_migrations",
                remedy="let a DBA look, and remove the row where it is done",
            )
    return None


def _compared(run: Run, facts: dict[str, object]) -> StepResult:
    """The facts with whether the schema is as before; what no migration's undo puts back is named, and is not green.

    It is no failure: a partition that came by itself is such a difference, and users wait to be let in. Nor is a
    recorded schema that is lost or another one: nobody can compare with it.
    """
    result = run.state.step("migrate.record_schema").result
    kept = next((a for a in result.artifacts if a.path.endswith(migrate.SCHEMA_BEFORE)), None) if result else None
    if kept is None:  # recorded by an older version
        return StepResult(facts={**facts, "schema": "its migrations are as before; its objects were not recorded"})
    recorded = run.folder / kept.path
    if not recorded.is_file() or sha256_file(recorded) != kept.sha256:
        said = f"its migrations are as before; its objects cannot be compared: {kept.path} is not what was recorded"
        return StepResult(facts={**facts, "schema": said}, verdict="inconclusive")
    now = migration.schema_objects(run, run.params.database.production)
    found = catalogue.differences(json.loads(recorded.read_text()), now)
    if not found:
        return StepResult(facts={**facts, "schema": "as before"})
    more = f" and {len(found) - _MOST_SHOWN} more" if len(found) > _MOST_SHOWN else ""
    said = f"its migrations are as before; it is not: {', '.join(found[:_MOST_SHOWN])}{more}"
    return StepResult(facts={**facts, "schema": said}, verdict="inconclusive")


@_undo("Lift the write fence and the read-only mode", recovery=Recovery.REPEAT, owner="Ops", expected_s=5.0)
def lift_fence_and_maintenance(run: Run) -> StepResult:
    """Let the application write and users in again. It sets a state: a second run changes nothing."""
    facts: dict[str, object] = {}
    if touched(run, "begin.fence_writes"):
        facts["sessions ended"] = maintenance.lift_fence(run)
    if touched(run, "begin.enable_maintenance"):
        maintenance.turn_off(run)
        facts.update(maintenance.prove_open(run))
    return StepResult(facts=facts or {"maintenance": "was never on"})


@_undo("Prove that everything is as before", recovery=Recovery.REPEAT, owner="On-call", expected_s=1.0)
def prove_previous(run: Run) -> StepResult:
    """Ask every host for its commit, the database for its schema and fence, the front door for a write.

    It worked when all answer as before the release. Looking changes nothing. What a host starts next nobody can ask it:
    that the playbook has ended well there, when the code was put back, is the proof.
    """
    commit = run.release.previous_commit
    said = {host: deploy.serving(run, host) for host, params in run.params.all_hosts.items() if params.url is not None}
    said["front door"] = str(http.get_json(run.params.application.url + run.params.application.version_path)["commit"])
    wrong = {where: found for where, found in said.items() if found != commit}
    if wrong:
        raise StepFailedError(
            f"not everything serves {commit[:12]} again: {wrong}", remedy="deploy those hosts by hand"
        )
    before = run.state.fact("migrate.record_schema", "versions")
    now = migration.applied_versions(run, run.params.database.production)
    if before is not None and now != before:
        raise StepFailedError(f"the schema is {now}, it was {before}", remedy="let a DBA look at who migrated since")
    if maintenance.is_fenced(run):
        raise StepFailedError(
            "the write fence is still in the database", remedy="ALTER ROLE … RESET default_transaction_read_only"
        )
    facts = {
        "commit": commit,
        "served by": list(said),
        "newest migration": now[-1] if now else "none",
        **maintenance.prove_open(run),
    }
    return StepResult(facts=facts) if before is None else _compared(run, facts)


@_undo("Run the previous release's smoke tests", recovery=Recovery.REPEAT, owner="QA", expected_s=3.0)
def smoke_tests_again(run: Run) -> StepResult:
    """The new release's tests would fail on the old code: the previous one's own tests run, as any user.

    It worked when every test passed. They place test orders of their own.
    """
    return run_smoke(run, run.release.previous_commit, bypass=False, name="smoke-after-rollback")


@_undo("Lift the merge freeze", recovery=Recovery.REPEAT, owner="Dev", expected_s=0.2)
def lift_freeze(run: Run) -> StepResult:
    """The fix must be mergeable. Another run's freeze is left alone, so a second run changes nothing.

    A freeze that cannot be lifted, or read, is said and left to the review: users have the previous release back.
    """
    return StepResult(facts=outward.deliver(run, lambda: complete.lift(run)))


@_undo("Write the incident note", recovery=Recovery.PROBE, owner="On-call", expected_s=0.3)
def incident_note(run: Run) -> StepResult:
    """Post to the incidents channel what failed, when, on what evidence, with a draft of the root cause.

    It worked when the note's address is shown. A second run posts nothing.
    """
    note = _note(run)
    artifact = run.keep("rollback/incident.md", note)
    facts = outward.post(run, run.params.messages.incidents, note, what="incident")
    if outward.UNDELIVERED not in facts:
        del facts["message"]  # the artifact has it; only what is still to be said keeps its words
    return StepResult(facts=facts, artifacts=(artifact,))


@incident_note.probe
def _noted(run: Run, intent: object) -> StepResult | None:
    address = outward.found(lambda: run.services.chat.find(run.key("incident")))
    note = run.artifact_path("rollback/incident.md")
    if address is None or not note.is_file():  # another machine wrote it: here it is written again, and said once
        return None
    return StepResult(facts={"address": address}, artifacts=(run.describe(note),))


def _note(run: Run) -> str:
    state, release = run.state, run.release
    asked = state.rollback or {}
    lines = [
        f"# Incident: {release.version} rolled back on {release.environment}",
        "",
        f"Run {run.run_id}, commit {release.commit}. Back to {release.previous_version} ({release.previous_commit}).",
        f"Why: {asked.get('reason', '')}",
        "",
        "## What failed, and when",
    ]
    for key, now in state.steps.items():
        result = now.result
        if now.status is Status.FAILED or (result is not None and result.verdict != "green"):
            lines.append(f"- {now.time} {key}: {now.error or (result.verdict if result else '')}")
            for name, value in (result.facts if result else {}).items():
                lines.append(f"  - {name}: {value}")
            lines += [f"  - evidence {a.path} sha256 {a.sha256}" for a in (result.artifacts if result else ())]
    for name, gate in state.gates.items():
        lines += [f"- gate {name}: {d['decision']} by {d['person']}: {d['comment']}" for d in gate.decisions]
    subjects = run.services.repository.log(release.previous_commit, release.commit)
    lines += ["", "## Root cause (draft, to be confirmed by a person)", "", _draft(run), "", "Changes in this release:"]
    lines += [f"- {subject}" for subject in subjects]
    lines += ["", "## Timeline"]
    lines += [
        f"- {now.intent_time} → {now.time} {key}: {now.status.value}"
        for key, now in state.steps.items()
        if now.intent_time
    ]
    lines += [
        "",
        "## What stays",
        "",
        "- the backup and its off-site copies, the calendar's entry, the messages that were sent",
    ]
    return "\n".join(lines) + "\n"


def _draft(run: Run) -> str:
    logs = run.state.step("verify.scan_logs").result
    seen = run.state.step("verify.watch_telemetry").result
    said = []
    if seen is not None and seen.verdict == "red":
        said.append("The telemetry went red after the deployment and was not before it.")
    if logs is not None and logs.facts.get("new error signatures"):
        new = [
            f"{text.removeprefix('new: ')} ({count}×)" for text, count in logs.facts.items() if text.startswith("new: ")
        ]
        said.append("The logs say what they did not say before: " + "; ".join(new))
    failed = [key for key, now in run.state.steps.items() if now.status is Status.FAILED]
    if failed:
        said.append(f"The first step that failed was {failed[0]}.")
    return " ".join(said) or "Nothing measured points to a cause; a person decided."


STEPS = (
    show_way_back,
    announce_rollback,
    close_for_users,
    restore_code,
    restore_schema,
    lift_fence_and_maintenance,
    prove_previous,
    smoke_tests_again,
    lift_freeze,
    incident_note,
)
