"""Phase 4, deploy: one host after the other, each drained, deployed, healthy and read back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runbook_lib import fence, maintenance
from runbook_lib.adapters import http
from runbook_lib.commands import ansible
from runbook_lib.errors import StepFailedError, UnavailableError
from runbook_lib.model import Command, Recovery, StepResult
from runbook_lib.run import Run
from runbook_lib.step import step


def deploy_command(run: Run, host: str, commit: str) -> Command:
    """deploy_release.yml for one host and one commit."""
    deploy = run.params.deploy
    return ansible.playbook(
        "deploy_release.yml",
        folder=Path(deploy.playbooks),
        inventory=Path(deploy.inventory),
        limit=(host,),
        extra={"git_ref": commit, "run_id": run.run_id},
        vault_password_file=run.secrets.path(deploy.vault_password) if deploy.vault_password else None,
        timeout_s=deploy.timeout_s,
    )


def serving(run: Run, host: str) -> str | None:
    """The commit that a web host's running process serves; None when it does not answer."""
    url = run.params.all_hosts[host].url
    if url is None:
        return None
    try:
        return str(http.get_json(url + run.params.application.version_path)["commit"])
    except (UnavailableError, KeyError):
        return None


def deploy_to(run: Run, host: str, commit: str, *, name: str) -> StepResult:
    """Drain, deploy, wait for health, read the commit back, take traffic again.

    Raises:
        StepFailedError: the host does not serve the commit; it stays drained, so that no user meets it.
    """
    params, balancer = run.params.all_hosts[host], run.services.balancer
    balanced = balancer is not None and params.balanced and params.url is not None
    before = serving(run, host)
    if balanced and balancer is not None:
        fence.raise_on(run, host)  # the balancer knows no epochs: who is stale is refused before it asks
        balancer.drain(host, timeout_s=run.params.deploy.drain_timeout_s)
    done = run.services.shell.run(fence.through(run, deploy_command(run, host, commit), (host,)), name=f"{name}-{host}")
    if params.url is not None:
        health = http.request("GET", params.url + run.params.application.health_path)
        after = serving(run, host)
        if health.status != 200 or after != commit:
            raise StepFailedError(
                f"{host} answers {health.status} and serves {after}, not {commit}", remedy=f"read {done.log}"
            )
    if balanced and balancer is not None:
        fence.raise_on(run, host)
        balancer.ready(host)
    facts = {"commit": commit, "before": before, "seconds": round(done.duration_s, 1)}
    return StepResult(facts=facts if params.url is not None else {**facts, "before": "a worker does not say"})


def _found_on(run: Run, host: str, intent: Mapping[str, Any]) -> StepResult | None:
    """Whether a host has the release and takes traffic; None means deploy again: the playbook is safe to repeat.

    A process that serves the commit shows neither what the host starts next nor what the playbook does behind the
    restart. So its playbook must have ended well too, as the attempt's folder has it: of one that failed, was killed or
    left no trace here nothing is taken for done. A worker says nothing, and is deployed again.
    """
    params, balancer, commit = run.params.all_hosts[host], run.services.balancer, run.release.commit
    fence.raise_on(run, host)  # what an earlier executor started there has ended, and nothing of it starts any more
    ended = run.folder / intent["children"] / f"deploy-{host}.exit"
    if not ended.is_file() or ended.read_text().strip() != "0":
        return None
    if params.url is None or serving(run, host) != commit:
        return None
    if http.request("GET", params.url + run.params.application.health_path).status != 200:
        return None  # no user is sent to it before it is healthy
    if (
        balancer is not None
        and params.balanced
        and not any(b.name == host and b.state == "ready" for b in balancer.backends())
    ):
        fence.refuse_stale(run)
        balancer.ready(host)
    return StepResult(facts={"commit": commit, "found": "after an interruption"})


@step(
    "End the database's write fence",
    recovery=Recovery.REPEAT,
    owner="DBA",
    expected_s=0.3,
    way_back="fence again",
)
def lift_write_fence(run: Run) -> StepResult:
    """The migration is signed off, so the new code may write; the front door goes on refusing users.

    It worked when the role's setting is gone and users are still refused. It sets a state: a second run changes
    nothing.
    """
    ended = maintenance.lift_fence(run)
    if maintenance.is_fenced(run):
        raise StepFailedError("the fence is still there", remedy="look at ALTER ROLE … RESET")
    return StepResult(facts={"sessions ended": ended, "users still refused": maintenance.is_on(run)})


@lift_write_fence.plan
def _plan_lift(run: Run) -> list[tuple[str, ...]]:
    d = run.params.database
    return [
        (
            "sql",
            d.maintenance,
            f"ALTER ROLE {d.app_role} IN DATABASE {d.production} RESET default_transaction_read_only",
        )
    ]


@step(
    "Deploy the release, one host at a time",
    recovery=Recovery.PROBE,
    owner="DevOps",
    expected_s=6.0,
    way_back="deploy the previous commit the same way",
    each=lambda run: tuple(run.params.all_hosts),
)
def deploy_release(run: Run, host: str) -> StepResult:
    """Drain the host, run deploy_release.yml on it, wait for health, read back the commit, take traffic again.

    It worked when the host itself says that it serves the commit. Undone by deploying the previous commit.
    """
    return deploy_to(run, host, run.release.commit, name="deploy")


@deploy_release.pre_state
def _serves_before(run: Run, host: str) -> dict[str, Any]:
    return {"commit": serving(run, host)}


@deploy_release.probe
def _already_there(run: Run, host: str, intent: Mapping[str, Any]) -> StepResult | None:
    return _found_on(run, host, intent)


@deploy_release.plan
def _plan_deploy(run: Run) -> list[tuple[str, ...]]:
    return [deploy_command(run, host, run.release.commit).argv for host in run.params.all_hosts]


@step("Read the running commit back from every host", recovery=Recovery.REPEAT, owner="DevOps", expected_s=0.3)
def verify_commits(run: Run) -> StepResult:
    """Ask every web host, and the front door several times, which commit it serves.

    It worked when all say the release's commit. Looking changes nothing.
    """
    said = {host: serving(run, host) for host, params in run.params.all_hosts.items() if params.url is not None}
    application = run.params.application
    for number in range(2 * max(1, len(said))):
        said[f"front door {number + 1}"] = str(http.get_json(application.url + application.version_path)["commit"])
    wrong = {where: commit for where, commit in said.items() if commit != run.release.commit}
    if wrong:
        raise StepFailedError(
            f"not everything serves {run.release.commit[:12]}: {wrong}", remedy="deploy those hosts again"
        )
    return StepResult(facts={"commit": run.release.commit, "asked": list(said)})


STEPS = (lift_write_fence, deploy_release, verify_commits)
