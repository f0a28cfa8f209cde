"""Phase 7: open to all users, tell everybody, and leave nothing frozen.

Users have the release from the first step on: of the words that follow none can fail the run, let alone roll it
back. What could not be delivered is shown and tried again by the review.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from runbook_lib import fence, maintenance, outward
from runbook_lib.adapters.git import FREEZE_FILE
from runbook_lib.clock import utc_now
from runbook_lib.errors import StepFailedError
from runbook_lib.model import Recovery, StepResult
from runbook_lib.run import Run
from runbook_lib.smoke import run_smoke
from runbook_lib.step import step

_MOST_CHANGES = 30


@step(
    "Lift maintenance: open to all users",
    recovery=Recovery.PROBE,
    owner="Ops",
    timeout_s=600.0,
    expected_s=4.0,
    way_back="maintenance on again",
)
def lift_maintenance(run: Run) -> StepResult:
    """The front door takes writes again, proved from outside.

    That shows nothing of the workers: only the playbook that ended well wakes them, here or before the watch.
    """
    lifted = run.params.maintenance.lift == "before_watch" and run.state.green("verify.open_for_users")
    known = _open(run) if lifted else None
    if known is not None:
        return StepResult(facts={"maintenance": "was off already: lifted before the watch", **known})
    maintenance.turn_off(run)
    return StepResult(facts={"maintenance": "off", **maintenance.prove_open(run)})


@lift_maintenance.probe
def _(run: Run, intent: Mapping[str, Any]) -> StepResult | None:
    return None  # the playbook sets a state, and open doors say nothing of the workers behind them


def _open(run: Run) -> dict[str, Any] | None:
    """The proof that every door is open; None when one is not, also when it is only half lifted."""
    try:
        return maintenance.prove_open(run)
    except StepFailedError:
        return None


@lift_maintenance.plan
def _(run: Run) -> list[tuple[str, ...]]:
    return [
        maintenance.playbook(run, "disable_maintenance.yml").argv,
        ("call", "a write through the front door is taken"),
    ]


@step(
    "Smoke tests again, as any user",
    recovery=Recovery.PROBE,
    owner="QA",
    timeout_s=600.0,
    expected_s=5.0,
    way_back="red: maintenance on again",
)
def smoke_after_lifting(run: Run) -> StepResult:
    """Without the bypass: what a user meets. Red closes the door again and fails the run."""
    again = run.state.step("complete.smoke_after_lifting").attempt > 1
    if again or _open(run) is None:
        maintenance.turn_off(run)  # an attempt before this one closed the door, or a part of it
    try:
        result = run_smoke(run, run.release.commit, bypass=False, name="after-lifting")
    except StepFailedError as error:
        maintenance.turn_on(run)
        error.message += "; maintenance is on again"
        raise
    if result.verdict != "green":
        maintenance.turn_on(run)
        failed = StepFailedError(
            "smoke tests are red for users; maintenance is on again",
            remedy=f"runbook resume {run.run_id} opens and tests again, runbook rollback {run.run_id} goes back",
        )
        failed.result = result
        raise failed
    return result


@smoke_after_lifting.probe
def _(run: Run, intent: Mapping[str, Any]) -> StepResult | None:
    return None  # tests prove only what they saw to the end; one test order more does no harm


@smoke_after_lifting.plan
def _(run: Run) -> list[tuple[str, ...]]:
    return [("call", f"pytest tests/smoke --base-url {run.params.application.url}, without the bypass")]


@step("Notify the team", recovery=Recovery.PROBE, owner="Lead", way_back="said again when it changes")
def notify_team(run: Run) -> StepResult:
    """In the deployments channel, with the changes."""
    return StepResult(facts=outward.post(run, run.params.messages.deployments, _success(run), what="success"))


@notify_team.probe
def _(run: Run, intent: Mapping[str, Any]) -> StepResult | None:
    found = outward.found_post(run, run.params.messages.deployments, _success(run), what="success")
    return None if found is None else StepResult(facts=found)


@notify_team.plan
def _(run: Run) -> list[tuple[str, ...]]:
    return [("call", f"post in {run.params.messages.deployments}: {run.release.version} is deployed")]


def changes(run: Run) -> list[str]:
    """Subjects of the commits that this release brings, as phase 0 recorded them."""
    return [str(subject) for subject in run.state.fact("prepare.confirm_candidate", "changes") or []]


def _listed(run: Run) -> str:
    return "\n".join(f"- {subject}" for subject in changes(run)[:_MOST_CHANGES]) or "- no changes"


def _success(run: Run) -> str:
    return (
        f"✅ {run.release.version} successfully deployed to {run.release.environment}; all checks green. "
        f"See changelog below.\n{_listed(run)}"
    )


@step("Lift the merge freeze", recovery=Recovery.PROBE, owner="Lead", way_back="freeze again")
def lift_freeze(run: Run) -> StepResult:
    """Before the changelog: that one is merged too."""
    return StepResult(facts=outward.deliver(run, lambda: lift(run)))


@lift_freeze.probe
def _(run: Run, intent: Mapping[str, Any]) -> StepResult | None:
    return StepResult(facts={"merges": "open"}) if run.services.repository.frozen_by() is None else None


@lift_freeze.plan
def _(run: Run) -> list[tuple[str, ...]]:
    return [("call", f"lift the freeze of {run.params.repository.url}")]


def lift(run: Run) -> dict[str, Any]:
    """Lift this run's freeze, and say whether merges are open; another run's is left alone.

    Raises:
        StepFailedError: it still stands, or nobody can tell whose it is.
    """
    run.services.repository.lift_freeze(run.run_id)
    holder = run.services.repository.frozen_by()
    if holder == run.run_id:
        raise StepFailedError("the freeze still stands although it was lifted", remedy="lift it by hand")
    if holder is not None and holder.startswith("unknown"):
        raise StepFailedError(
            "merges are frozen by a file that cannot be read: nobody can tell whose it is",
            remedy=f"look at {FREEZE_FILE} in the repository, remove it when it is this run's",
        )
    return {"merges": "open" if holder is None else f"still frozen by run {holder}"}


@step("Update the changelog", recovery=Recovery.PROBE, owner="Dev", expected_s=1.0, way_back="revert the commit")
def update_changelog(run: Run) -> StepResult:
    """One entry on top, pushed to the release branch."""
    return StepResult(facts=outward.deliver(run, lambda: _changelog(run)))


@update_changelog.probe
def _(run: Run, intent: Mapping[str, Any]) -> StepResult | None:
    branch, key = run.params.repository.branch, run.key("changelog")
    commit = outward.found(lambda: run.services.repository.find_changelog(branch=branch, key=key))
    return None if commit is None else StepResult(facts=_changelog_facts(run, commit))


@update_changelog.plan
def _(run: Run) -> list[tuple[str, ...]]:
    return [("call", f"commit to {run.params.repository.changelog} on {run.params.repository.branch}, push")]


def _changelog(run: Run) -> dict[str, Any]:
    repository = run.params.repository
    # The day of the window, not of this call: a repeated call must say the same.
    day = run.state.opened_time[:10]
    entry = f"## {run.release.version} - released to {run.release.environment} {day}\n{_listed(run)}"
    commit = run.services.repository.add_changelog(
        entry,
        path=repository.changelog,
        branch=repository.branch,
        key=run.key("changelog"),
        sure=partial(fence.refuse_stale, run),
    )
    return _changelog_facts(run, commit)


def _changelog_facts(run: Run, commit: str) -> dict[str, Any]:
    return {"file": run.params.repository.changelog, "branch": run.params.repository.branch, "commit": commit}


@step("Publish the run-book and the API docs", recovery=Recovery.PROBE, owner="Dev", way_back="publish the former text")
def publish_pages(run: Run) -> StepResult:
    """Two pages: how this release was done, and what the application offers now."""
    return StepResult(facts=outward.deliver(run, lambda: _publish(run)))


@publish_pages.probe
def _(run: Run, intent: Mapping[str, Any]) -> StepResult | None:
    found = outward.found(
        lambda: {title: run.services.pages.find(run.key(what)) for what, (title, _) in _pages(run).items()}
    )
    return StepResult(facts=found) if found is not None and all(found.values()) else None


@publish_pages.plan
def _(run: Run) -> list[tuple[str, ...]]:
    return [("call", f"publish {what} of {run.release.version}") for what in ("page-runbook", "page-api")]


def _publish(run: Run) -> dict[str, Any]:
    return {
        title: run.services.pages.publish(title, body, key=run.key(what)) for what, (title, body) in _pages(run).items()
    }


def _pages(run: Run) -> dict[str, tuple[str, str]]:
    name, release = run.params.application.name, run.release
    listed = "".join(f"<li>{html.escape(subject)}</li>" for subject in changes(run))
    steps = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(state.result.title)}</td><td>{state.duration_s:.1f} s</td></tr>"
        for key, state in run.state.steps.items()
        if state.result is not None and not key.startswith("complete.")
    )
    book = (
        f"<p>{html.escape(name)} {html.escape(release.version)} (<code>{release.commit}</code>) was released to "
        f"{html.escape(release.environment)} by run <code>{html.escape(run.run_id)}</code>; before it ran "
        f"{html.escape(release.previous_version)}.</p><h2>Changes</h2><ul>{listed}</ul>"
        f"<h2>Steps</h2><table>{steps}</table>"
    )
    api = (
        f"<p>Production Release {html.escape(release.version)}, <code>{release.commit}</code>.</p>"
        f"<pre>{html.escape(_readme(run))}</pre>"
    )
    return {
        "page-runbook": (f"Run-book: {name} {release.version}", book),
        "page-api": (f"Production Release {release.version}: API", api),
    }


def _readme(run: Run) -> str:
    for name in ("docs/API.md", "API.md", "README.md"):
        path = Path(run.tree(run.release.commit)) / name
        if path.is_file():
            return path.read_text(errors="replace")
    return "This release carries no API text."


@step("Close the release ticket", recovery=Recovery.PROBE, owner="Lead", way_back="reopen it")
def close_ticket(run: Run) -> StepResult:
    """Release notes, moved to Done."""
    return StepResult(facts=outward.deliver(run, lambda: _ticket(run)))


@close_ticket.probe
def _(run: Run, intent: Mapping[str, Any]) -> StepResult | None:
    address = outward.found(lambda: run.services.tickets.find(run.key("ticket")))
    return None if address is None else StepResult(facts=_ticket_facts(run, address))


@close_ticket.plan
def _(run: Run) -> list[tuple[str, ...]]:
    return [("call", f"ticket Release notes {run.release.version} to Done")]


def _ticket(run: Run) -> dict[str, Any]:
    body = f"{run.release.version} ({run.release.commit}), run {run.run_id}, {utc_now()[:10]}\n\n{_listed(run)}"
    address = run.services.tickets.close_new(f"Release notes {run.release.version}", body, key=run.key("ticket"))
    return _ticket_facts(run, address)


def _ticket_facts(run: Run, address: str) -> dict[str, Any]:
    return {"ticket": f"Release notes {run.release.version}", "status": "Done", "address": address}


# What the review tries again when it could not be delivered.
AGAIN: Mapping[str, Callable[[Run], dict[str, Any]]] = {
    "complete.lift_freeze": lift,
    "rollback.lift_freeze": lift,
    "complete.update_changelog": _changelog,
    "complete.publish_pages": _publish,
    "complete.close_ticket": _ticket,
}

STEPS = (
    lift_maintenance,
    smoke_after_lifting,
    notify_team,
    lift_freeze,
    update_changelog,
    publish_pages,
    close_ticket,
)
