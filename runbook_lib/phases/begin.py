"""Phase 2, begin: say so, refuse users' writes, and prove from outside that they are refused."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from runbook_lib import maintenance, outward, telemetry
from runbook_lib.errors import StepFailedError
from runbook_lib.model import Recovery, StepResult
from runbook_lib.run import Run
from runbook_lib.step import step

# The judge's own data contract: fewer points, or larger holes, make its verdict inconclusive.
_FEWEST_POINTS, _COMPLETE = 20, 0.95


def window_minutes(run: Run) -> int:
    """The read-only window that is announced, in minutes, as the pinned plan computed it."""
    return max(1, math.ceil(float(run.plan["read_only_s"]) / 60))


@step("Check that the watch has its baseline", recovery=Recovery.REPEAT, owner="On-call", expected_s=5.0)
def check_baseline(run: Run) -> StepResult:
    """Without measurements from before, gate 3 could never be green: look for them while nothing is changed yet.

    It worked when every metric has enough recent points. A young environment is waited for, at most
    `watch.baseline_s`. Looking changes nothing.
    """
    settings = run.params.watch
    deadline = time.monotonic() + settings.baseline_s
    while True:
        now = time.time()
        samples = telemetry.collect(run, now - settings.baseline_s, now, "baseline")
        wanted = max(_FEWEST_POINTS, _COMPLETE * settings.baseline_s / settings.interval_s)
        points = {
            name: sum(s.metric == name and math.isfinite(s.value) for s in samples)
            for name in telemetry.metrics(run.params)
        }
        if min(points.values()) >= wanted:
            return StepResult(facts={"points": points, "needed": math.ceil(wanted), "seconds": settings.baseline_s})
        if time.monotonic() > deadline:
            raise StepFailedError(
                f"the baseline of the last {settings.baseline_s:g} s has {points} points, {math.ceil(wanted)} are needed",
                remedy="mend the telemetry (watch.* in the params file), then runbook resume: nothing was changed yet",
            )
        time.sleep(1.0)


@step(
    "Announce the start with the computed window",
    recovery=Recovery.PROBE,
    owner="Lead",
    expected_s=0.2,
    way_back="the incident note tells the same people",
)
def announce_start(run: Run) -> StepResult:
    """Post to the deployments channel that the release starts now and how long writes are refused.

    It worked when the message's address is shown. A second run posts nothing.
    """
    channel = run.params.messages.deployments
    minutes = window_minutes(run)
    text = (
        f"Deploying {run.release.version} to {run.release.environment} — starting now. "
        f"Expect about {minutes} min read-only period."
    )
    return StepResult(facts=outward.post(run, channel, text, what="announce_start"))


@announce_start.probe
def _announced(run: Run, intent: Mapping[str, Any]) -> StepResult | None:
    address = outward.found(lambda: run.services.chat.find(run.key("announce_start")))
    return None if address is None else StepResult(facts={"address": address, "found": "after an interruption"})


@announce_start.plan
def _plan_announce(run: Run) -> list[tuple[str, ...]]:
    return [("chat", run.params.messages.deployments, "starting now, with the read-only window of this plan")]


@step(
    "Enable maintenance (read-only) mode",
    recovery=Recovery.REPEAT,
    owner="Ops",
    expected_s=4.0,
    way_back="disable_maintenance.yml",
)
def enable_maintenance(run: Run) -> StepResult:
    """Run enable_maintenance.yml on every host: web hosts refuse writes, workers rest.

    It worked when the playbook ended well; the proof from outside is a step of its own. The playbook sets a state, so
    a second run changes nothing.
    """
    maintenance.turn_on(run)
    return StepResult(facts={"hosts": list(run.params.all_hosts), "playbook": "enable_maintenance.yml"})


@enable_maintenance.plan
def _plan_enable(run: Run) -> list[tuple[str, ...]]:
    return [maintenance.playbook(run, "enable_maintenance.yml").argv]


@step(
    "Fence writes in the database",
    recovery=Recovery.REPEAT,
    owner="DBA",
    expected_s=0.3,
    way_back="reset the role's setting; its sessions reconnect",
)
def fence_writes(run: Run) -> StepResult:
    """Make the application's role read-only in this database and end its sessions: workers, cron and consoles too.

    It worked when the role's setting is there and a probe write fails with SQLSTATE 25006. It sets a state, so a
    second run changes nothing.
    """
    ended = maintenance.fence(run)
    return StepResult(
        facts={"role": run.params.database.app_role, "sessions ended": ended, "SQLSTATE": maintenance.prove_fenced(run)}
    )


@fence_writes.plan
def _plan_fence(run: Run) -> list[tuple[str, ...]]:
    d = run.params.database
    return [
        (
            "sql",
            d.maintenance,
            f"ALTER ROLE {d.app_role} IN DATABASE {d.production} SET default_transaction_read_only = on",
        )
    ]


@step(
    "Prove from outside that writes are refused and reads are served",
    recovery=Recovery.REPEAT,
    owner="Ops",
    expected_s=0.3,
)
def prove_read_only(run: Run) -> StepResult:
    """Try a write as a user would, through the front door and at each host; then read.

    It worked when each write answers 503 with the maintenance header and each read answers 200. Looking changes
    nothing.
    """
    shown = maintenance.prove_read_only(run)
    return StepResult(facts={**shown, "database refuses with SQLSTATE": maintenance.prove_fenced(run)})


@prove_read_only.plan
def _plan_prove(run: Run) -> list[tuple[str, ...]]:
    application = run.params.application
    return [
        ("http", "POST", application.url + application.probe_write_path),
        ("http", "GET", application.url + application.health_path),
    ]


STEPS = (check_baseline, announce_start, enable_maintenance, fence_writes, prove_read_only)
