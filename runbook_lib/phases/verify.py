"""Phase 5, verify: smoke tests, people's spot checks, the watch, the logs; green only on proof."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from typing import Any

from runbook_lib import charts, live_chart, log_scan, maintenance, progress, telemetry, watch
from runbook_lib.clock import epoch_s
from runbook_lib.errors import PausedError, StepFailedError
from runbook_lib.gate import gate_step
from runbook_lib.model import Command, Recovery, StepResult
from runbook_lib.run import Run
from runbook_lib.smoke import run_smoke
from runbook_lib.step import step

_LOG_BYTES = 5_000_000


@step("Run the smoke tests", recovery=Recovery.REPEAT, owner="QA", expected_s=3.0)
def smoke_tests(run: Run) -> StepResult:
    """Run the release's own smoke tests through the front door, past the read-only mode.

    It worked when every test passed. They place test orders of their own, so a second run is harmless.
    """
    return run_smoke(run, run.release.commit, bypass=True, name="smoke")


@smoke_tests.plan
def _plan_smoke(run: Run) -> list[tuple[str, ...]]:
    return [("pytest", "tests/smoke", "--base-url", run.params.application.url)]


@step(
    "Open to users before the watch, where the params say so",
    recovery=Recovery.REPEAT,
    owner="Ops",
    expected_s=1.0,
    way_back="enable_maintenance.yml",
)
def open_for_users(run: Run) -> StepResult:
    """With `maintenance.lift: before_watch` users come in now and the watch sees them, the way back armed.

    It worked when a probe write is no longer refused. It sets a state: a second run changes nothing.
    """
    if run.params.maintenance.lift != "before_watch":
        return StepResult(facts={"maintenance": "stays on until gate 3 (maintenance.lift: after_gate_3)"})
    maintenance.turn_off(run)
    return StepResult(facts=maintenance.prove_open(run))


@step("Collect the manual spot checks", recovery=Recovery.REPEAT, owner="QA", expected_s=8.0)
def spot_checks(run: Run) -> StepResult:
    """People log in, place a test order, view the dashboard, see background jobs; each signs what they saw.

    It worked when every required check is recorded as passed. Record one with `runbook check RUN NAME --pass`.
    """
    rehearsal = run.params.rehearsal
    wanted = [check.name for check in run.params.spot_checks.checks]
    people = rehearsal is not None and rehearsal.people_sign and run.state.opened.get("people_sign")
    if rehearsal is not None and people and not set(wanted) <= set(run.state.checks):
        subprocess.run(
            (sys.executable, "-m", "rehearsal", "spot-check", run.run_id, "--dir", rehearsal.stack),
            cwd=run.root,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            timeout=120,
        )
    known = run.state.checks
    failed = {name: known[name]["note"] for name in wanted if name in known and not known[name]["passed"]}
    if failed:
        raise StepFailedError(
            f"spot checks failed: {failed}", remedy="mend it, record it again, then runbook resume; or roll back"
        )
    missing = [name for name in wanted if name not in known]
    if missing and run.params.spot_checks.required:
        raise PausedError(
            f"spot checks are not recorded: {', '.join(missing)}",
            remedy=f"runbook check {run.run_id} {missing[0]} --pass --note TEXT --as PERSON --key FILE",
        )
    said = {name: f"passed, {known[name]['person']}: {known[name]['note']}" for name in wanted if name in known}
    return StepResult(facts={**said, **dict.fromkeys(missing, "not recorded")})


@spot_checks.plan
def _plan_checks(run: Run) -> list[tuple[str, ...]]:
    return [("people", check.name, check.asks) for check in run.params.spot_checks.checks]


@step("Watch the telemetry", recovery=Recovery.REPEAT, owner="On-call", timeout_s=30.0, expected_s=900.0)
def watch_telemetry(run: Run) -> StepResult:
    """Measure p95 latency, 5xx rate, request rate and queue depth, and judge them against the time before maintenance.

    It worked when the verdict is green: every metric is there, fresh and within its band. An interrupted watch starts
    again in full. Red closes gate 3; inconclusive extends the watch and then asks a person.
    """
    settings = run.params.watch
    began = epoch_s(_first_started(run, "begin.enable_maintenance"))
    baseline = telemetry.collect(run, began - settings.baseline_s, began, "baseline")
    names, config = telemetry.metrics(run.params), telemetry.watch_config(run.params)
    extended = 0
    with live_chart.live(run, config, baseline) as live:
        while True:
            start_s = time.time()
            with live.window(start_s, settings.duration_s):
                _sit_through(run, extended)
            current = telemetry.collect(run, start_s, start_s + settings.duration_s, "current")
            samples = [s for s in (*baseline, *current) if s.metric in names]
            judgement = watch.judge(samples, config)
            if judgement.verdict != "inconclusive" or extended >= settings.extensions:
                break
            extended += 1
        artifacts = [
            run.keep("watch/series.csv", telemetry.as_csv([*baseline, *current])),
            run.keep("watch/judgement.json", json.dumps(judgement.as_json(), indent=1, sort_keys=True)),
        ]
        pictures = []
        for name in names:
            png = charts.chart(name, samples, judgement, title=_TITLES[name], unit=telemetry.UNITS[name])
            artifacts.append(run.keep(f"watch/{name}.png", png))
            pictures.append((png, charts.describe(name, judgement)))
        live.end(pictures)
    judged: dict[str, Any] = json.loads(json.dumps(judgement.as_json()))
    reasons = {name: "; ".join(one["reasons"]) or one["verdict"] for name, one in judged["metrics"].items()}
    return StepResult(
        facts={
            "verdict": judgement.verdict,
            "seconds watched": settings.duration_s * (1 + extended),
            "extended": extended,
            **reasons,
        },
        artifacts=tuple(artifacts),
        verdict=judgement.verdict,
    )


_TITLES = {
    "p95_latency_s": "p95 latency",
    "requests_per_s": "Requests",
    "errors_5xx_per_s": "5xx errors",
    "queue_depth_jobs": "Queue depth",
}


def _sit_through(run: Run, extended: int) -> None:
    """Wait for the window to pass, saying how far it is."""
    start, duration_s = time.monotonic(), run.params.watch.duration_s
    what = f"watch, extended {extended} times" if extended > 1 else "watch, extended once" if extended else "watch"
    with progress.told(run.scratch, what, lambda: round(time.monotonic() - start), total=round(duration_s), unit="s"):
        while (passed := time.monotonic() - start) < duration_s:
            time.sleep(min(1.0, duration_s - passed))


def _first_started(run: Run, key: str) -> str:
    """When a step was first begun: a later attempt's time would count what the first one did as before it."""
    return next(e.time for e in run.ledger.events(run.run_id) if e.kind == "step_intent" and e.data["step"] == key)


@step("Scan the logs for new errors", recovery=Recovery.REPEAT, owner="On-call", expected_s=1.0)
def scan_logs(run: Run) -> StepResult:
    """Look for ERROR, Exception and migration warnings that were not said before the deployment.

    It worked when nothing new is said; what is new goes to gate 3 with its counts. Looking changes nothing.
    """
    since = _first_started(run, "deploy.lift_write_fence")
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    unread = []
    for name, params in run.params.all_hosts.items():
        command = run.services.hosts[name].command(
            Command(("tail", "-c", str(_LOG_BYTES), params.log), ok_exits=(0, 1))
        )
        done = run.services.shell.run(command, name=f"log-{name}")
        if done.exit_code:
            unread.append(name)
            continue
        before += log_scan.signatures(done.output, until_time=since)
        after += log_scan.signatures(done.output, from_time=since)
    new = log_scan.new_signatures(before, after)
    artifact = run.keep(
        "verify/log_signatures.json",
        json.dumps({"since": since, "new": new, "known": dict(before), "now": dict(after), "unread": unread}, indent=1),
    )
    top: dict[str, Any] = {f"new: {text[:160]}": count for text, count in list(new.items())[:5]}
    return StepResult(
        facts={"new error signatures": len(new), "lines of them": sum(new.values()), "logs not read": unread, **top},
        artifacts=(artifact,),
        verdict="inconclusive" if new or unread else "green",
    )


@scan_logs.plan
def _plan_scan(run: Run) -> list[tuple[str, ...]]:
    return [("tail", "-c", str(_LOG_BYTES), f"{name}:{host.log}") for name, host in run.params.all_hosts.items()]


sign_off = gate_step("release", evidence=(smoke_tests, spot_checks, watch_telemetry, scan_logs))

STEPS = (smoke_tests, open_for_users, spot_checks, watch_telemetry, scan_logs, sign_off)
