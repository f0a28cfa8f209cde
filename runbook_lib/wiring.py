"""The only place where params become adapters, and where a run is opened or attached to."""

from __future__ import annotations

import json
import os
import re
import secrets as random
import sys
import tempfile
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runbook_lib import decisions, gate, lease, mirror, preflight, seen, signatures
from runbook_lib import params as params_module
from runbook_lib.adapters import http
from runbook_lib.adapters.balancer import HttpBalancer
from runbook_lib.adapters.database import Database
from runbook_lib.adapters.git import GitRepository
from runbook_lib.adapters.hosts import host_from
from runbook_lib.adapters.messages import CsvTracker, FolderCalendar, FolderPages, FolderTickets, OutboxChat
from runbook_lib.adapters.objects import S3Store
from runbook_lib.adapters.secrets import Secrets
from runbook_lib.adapters.shell import LocalShell
from runbook_lib.canonical import canonical_json, digest, sha256_file, write_atomically
from runbook_lib.errors import FolderLostError, LedgerUnavailableError, RunbookError, UsageError
from runbook_lib.ledger import Ledger
from runbook_lib.model import Release
from runbook_lib.params import Params
from runbook_lib.params_file import read_facts
from runbook_lib.run import Run, Services, session_name
from runbook_lib.seen import Seen
from runbook_lib.state import RunState
from runbook_lib.step import current_attempt

_RUN_ID = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9A-Za-z.-]{1,64}-[0-9a-f]{6}")
ALIASES = ("next", "running", "bad")


def root() -> Path:
    """The project folder: the nearest one upwards with params/ and runbooks/, or `RUNBOOK_HOME`.

    Raises:
        UsageError: there is none.
    """
    given = os.environ.get("RUNBOOK_HOME")
    starts = [Path(given)] if given else [Path.cwd(), *Path.cwd().parents, Path(__file__).parent.parent]
    for folder in starts:
        if (folder / "params").is_dir() and (folder / "runbooks").is_dir():
            return folder.resolve()
    raise UsageError("no project here: no folder with params/ and runbooks/", remedy="cd into it, or set RUNBOOK_HOME")


def ledger_of(params: Params | None = None) -> Ledger:
    """The ledger that the params name, by default outputs/ledger.sqlite."""
    if params is not None and params.ledger:
        return Ledger(params.ledger)
    return Ledger(f"sqlite:///{root() / 'outputs' / 'ledger.sqlite'}")


def load_params(environment: str, settings: Mapping[str, str] | None = None) -> Params:
    """Load params/<environment>.yml.

    Raises:
        UsageError: the name or the file is wrong.
    """
    if not params_module.NAME.fullmatch(environment):
        raise UsageError(f"environment {environment[:60]!r} is no name", remedy="use a name such as rehearsal")
    return params_module.load(root() / "params" / f"{environment}.yml", settings=settings)


def stack_facts(params: Params) -> dict[str, Any]:
    """What the rehearsal stack says of itself; empty for a real environment."""
    if params.rehearsal is None:
        return {}
    file = Path(params.rehearsal.stack) / "stack.json"
    return read_facts(file, "rehearsal.stack: stack.json") if os.path.exists(file) else {}  # noqa: PTH110  # never raises


def named_version(params: Params, version: str) -> str:
    """A release tag; the twin's names for its releases (`next`, …) become theirs."""
    versions = stack_facts(params).get("versions") if version in ALIASES else None
    return params_module.version_text(str(versions.get(version, version) if isinstance(versions, dict) else version))


def preview(
    environment: str, version: str = "", *, settings: Mapping[str, str] | None = None, opened_by: str | None = None
) -> Run:
    """A handle for planning: everything is checked, nothing is written; its run id is the word RUN.

    Args:
        environment: the params file's name.
        version: the release tag.
        settings: `--set` overrides.
        opened_by: who is about to open a run, empty for the params' own; None when nobody is.

    Raises:
        UsageError: the params, the version, a tool, a host or a database is not what it must be.
    """
    try:
        params = load_params(environment, settings)
        if opened_by is not None:
            preflight.opener(params, opened_by)
        return _preview(params, version)
    except UsageError:
        raise
    except RunbookError as error:  # whatever does not answer here, nothing was started
        raise UsageError(error.message, remedy=error.remedy) from error


def _preview(params: Params, version: str) -> Run:
    environment = params.environment
    version = version or ("next" if params.rehearsal is not None else "")
    if not version:
        raise UsageError("which version?", remedy=f"runbook run {environment} --version V")
    version = named_version(params, version)
    secrets = Secrets()
    # What the params say by themselves, before anybody is asked.
    preflight.check_window(params)
    preflight.check_watch(params)
    preflight.check_files(params)
    scratch = _scratch(environment, "RUN")
    services = _services(params, secrets, scratch, Path())
    preflight.check_tools(params)
    release = _release(params, services, version)
    run = _run(params, ledger_of(params), "RUN", release)
    preflight.check_database(run)
    return run


def draft_of(params: Params) -> Run:
    """A handle with services and without a release, for looking around; nothing is written."""
    nothing = Release(params.environment, "", "", "", "", "")
    return _run(params, ledger_of(params), "RUN", nothing)


@contextmanager
def looking_around(params: Params) -> Iterator[Run]:
    """Like `draft_of`, for work outside of any run: what it writes goes to a folder that is removed afterwards."""
    draft = draft_of(params)
    with tempfile.TemporaryDirectory(prefix="runbook-") as scratch:
        folder = Path(scratch)
        # A command that went on would do so for nobody, and without the folder.
        services = _services(params, Secrets(), folder, folder, left_on_interrupt=False)
        yield replace(draft, folder=folder, scratch=folder, services=services)


@contextmanager
def without_folder(run_id: str) -> Iterator[Run]:
    """A run whose folder is lost, with its environment's params as they are now: to shut its executor out, no more.

    Raises:
        UsageError: there is no such run, or no params of its environment that name its ledger.
    """
    ledger, _ = ledger_with(run_id)
    release = release_of(ledger.state(run_id))
    params = load_params(release.environment)
    if not ledger_of(params).seq(run_id):
        raise UsageError(
            f"params/{release.environment}.yml names another ledger than that of run {run_id}",
            remedy="name that one there, then the same again",
        )
    with looking_around(params) as draft:
        yield replace(draft, run_id=run_id, release=release, ledger=ledger)


def create(draft: Run, *, plan: Mapping[str, Any], opened_by: str = "", people_sign: bool = False) -> Run:
    """Open the run that was previewed: write its folder, its trust file and its first events.

    Args:
        draft: from `preview`.
        plan: from `plan.plan_of`; its digest is pinned in the run.
        opened_by: who answers for opening it: this person cannot approve its gates.
        people_sign: the rehearsal's people sign at the gates.
    """
    params, release = draft.params, draft.release
    opener = preflight.opener(params, opened_by)
    run_id = f"{datetime.now(UTC).strftime('%Y%m%dT%H%M%SZ')}-{release.version}-{random.token_hex(3)}"
    run = _run(params, draft.ledger, run_id, release)
    run.ledger.seen = Seen(run_id, run.scratch / seen.NAME)
    _write_trust(params, run.secrets)  # first: a key that cannot be used leaves no folder behind
    run.folder.mkdir(parents=True, exist_ok=False)
    run.scratch.mkdir(parents=True, exist_ok=True)
    frozen = params.frozen()
    write_atomically(run.folder / "params.json", canonical_json(frozen))
    opened = {
        "version": release.version,
        "ref": release.ref,
        "commit": release.commit,
        "environment": release.environment,
        "previous_version": release.previous_version,
        "previous_commit": release.previous_commit,
        "params_sha256": digest(frozen),
        "opened_by": opener,
        "people_sign": people_sign,
        "notebooks": {p.name: sha256_file(p) for p in sorted((root() / "runbooks").glob("*.ipynb"))},
    }
    run.ledger.append(run_id, "run_opened", opened, environment=release.environment)
    artifact = run.keep("plan.json", canonical_json(dict(plan)))
    run.ledger.append(run_id, "plan_pinned", {"digest": plan["digest"], "artifact": artifact.as_json()})
    return run


def refuse_second(draft: Run) -> None:
    """Refuse to open a run while another one holds the environment.

    Raises:
        UsageError: naming the holder, since when and its last step.
    """
    holder = draft.ledger.live_run(draft.release.environment)
    if holder is not None:
        last = max(holder.steps.items(), key=lambda item: item[1].time, default=("its opening", None))[0]
        raise UsageError(
            f"{draft.release.environment} is held by run {holder.run_id}, opened by {holder.opened['opened_by']} at "
            f"{holder.opened_time}, last on {last}",
            remedy=f"runbook resume {holder.run_id}, or runbook abort {holder.run_id} --reason TEXT",
        )


def attach(run_id: str) -> Run:
    """The handle of a run that was opened before, with its frozen params.

    Raises:
        UsageError: there is no such run, or its params were changed since.
        FolderLostError: its folder is neither here nor in a store.
    """
    if not _RUN_ID.fullmatch(run_id):
        raise UsageError(f"{run_id[:80]!r} is no run id", remedy="runbook list")
    found = next((root() / "outputs").glob(f"*/{run_id}/params.json"), None) or _fetched(run_id)
    try:
        data = json.loads(found.read_bytes())
    except ValueError as error:
        raise UsageError(f"{found} cannot be read: {error}", remedy="restore the file") from error
    params = params_module.check(data, where=f"{run_id}/params.json")
    ledger = ledger_of(params)
    ledger.seen = Seen(run_id, _scratch(params.environment, run_id) / seen.NAME)
    state = ledger.state(run_id)
    if digest(data) != state.opened["params_sha256"]:
        raise UsageError(f"params.json of {run_id} is not what the run was opened with", remedy="restore the file")
    ledger.epoch = lease.inherited(run_id)
    run = _run(params, ledger, run_id, release_of(state))
    if not state.ended or not run.trust.exists():  # to read what has ended nobody needs the recorder's key
        _write_trust(params, Secrets())
    if mirror.is_shared(params) and ledger.epoch is None and mirror.newest(events := ledger.events(run_id)):
        mirror.fetch(run.services.store, events, run.folder, run.scratch)  # another machine may have been at it
    events = ledger.events(run_id)
    ledger.seen.keep(events[-1])
    for event in events:
        decisions.bring(run, event.data)
    return run


def seen_of(run_id: str) -> Seen | None:
    """What this machine remembers of a run; None when it has seen nothing of it."""
    found = next((root() / "outputs").glob(f"*/.scratch/{run_id}/{seen.NAME}"), None)
    return Seen(run_id, found) if found is not None else None


def known_ledgers(silent: list[str]) -> Iterator[tuple[Ledger, Params | None]]:
    """Every ledger that this installation knows: its own, and those that the params files name; none is made here.

    Args:
        silent: gets what those say that do not answer.
    """
    seen = {f"sqlite:///{root() / 'outputs' / 'ledger.sqlite'}"}
    yield ledger_of(), None
    for file in sorted((root() / "params").glob("*.yml")):
        try:
            params = load_params(file.stem)
        except UsageError:
            continue  # another environment's, which this machine is not set up for
        url = params.ledger or ""
        if not url or url in seen:
            continue
        seen.add(url)
        try:
            yield Ledger(url), params
        except LedgerUnavailableError as error:
            silent.append(f"{params.environment}: {error.message}")


def folders_of_no_run(known: Container[str]) -> list[Path]:
    """Runs' folders in which something was done though no ledger has an event of the run.

    Args:
        known: the runs that the ledgers know; the one that a run's own params name is asked as well.
    """
    found = []
    for file in sorted((root() / "outputs").glob("*/*/params.json")):
        run_id = file.parent.name
        # Who was killed while opening a run leaves its params alone.
        if run_id in known or not _RUN_ID.fullmatch(run_id) or not (file.parent / "artifacts").is_dir():
            continue
        try:
            if not any(ledger.seq(run_id) for ledger, _ in _own_ledger(run_id)):
                found.append(file.parent)
        except LedgerUnavailableError:  # it may know the run
            continue
    return found


def ledger_with(run_id: str) -> tuple[Ledger, Params | None]:
    """The ledger that knows a run, and params that name that ledger; the run itself is not looked at.

    Raises:
        UsageError: there is no such run.
        LedgerUnavailableError: a ledger that may know it does not answer.
    """
    if not _RUN_ID.fullmatch(run_id):
        raise UsageError(f"{run_id[:80]!r} is no run id", remedy="runbook list")
    silent: list[str] = []
    for ledger, params in (*_own_ledger(run_id), *known_ledgers(silent)):
        if ledger.seq(run_id):
            return ledger, params
    if silent:
        raise LedgerUnavailableError(
            f"run {run_id} is not here, and a ledger that may know it does not answer: {'; '.join(silent)}",
            remedy="mend that, then the same again",
        )
    raise UsageError(f"there is no run {run_id}", remedy="runbook list")


def _own_ledger(run_id: str) -> list[tuple[Ledger, Params | None]]:
    """The ledger that the run's own params name: the params files may name another one by now."""
    found = next((root() / "outputs").glob(f"*/{run_id}/params.json"), None)
    if found is None:
        return []
    try:
        params = params_module.check(json.loads(found.read_bytes()), where=f"{run_id}/params.json")
    except (UsageError, ValueError):  # whoever needs them says what is wrong with them
        return []
    return [(ledger_of(params), params)]


def _fetched(run_id: str) -> Path:
    """The params.json of a run that another machine began, its folder brought here first.

    Raises:
        UsageError: no ledger that is known here knows the run.
        FolderLostError: one does, and no store has the folder.
    """
    ledger, params = ledger_with(run_id)
    shared = params is not None and mirror.is_shared(params)
    if params is None or not shared or mirror.newest(ledger.events(run_id)) is None:
        raise FolderLostError(
            f"the folder of run {run_id} is not in outputs/, though the ledger knows the run",
            remedy=f"put it back, or go on where it is; if it is lost: runbook abort {run_id} --reason TEXT",
        )
    folder = root() / "outputs" / params.environment / run_id
    scratch = _scratch(params.environment, run_id)
    store = _services(params, Secrets(), scratch, folder).store
    mirror.fetch(store, ledger.events(run_id), folder, scratch)
    return folder / "params.json"


def open_run(environment: str = "rehearsal", version: str = "", run_id: str = "") -> Run:
    """What a notebook calls: attach to `run_id`, or to the environment's run in progress, or open a new one.

    Opening without a run id is for the rehearsal only: nothing runs against a real environment by accident.

    Raises:
        UsageError: naming what is wrong; nothing was started.
    """
    if run_id:
        run = attach(run_id)
        for name, given, known in (
            ("environment", environment, run.release.environment),
            ("version", version, run.release.version),
        ):
            if given and given != known:
                raise UsageError(f"{name} is {given!r}, run {run_id} has {known!r}", remedy=f"leave {name} empty")
        return run
    params = load_params(environment)
    if params.rehearsal is None:
        raise UsageError(
            f"{environment} is no rehearsal: a run id is needed", remedy=f"runbook run {environment} --version V"
        )
    open_runs = [s for s in ledger_of(params).runs(environment) if s.opened.get("people_sign")]
    newest = next((s for s in open_runs if not version or s.opened["version"] == version), None)
    if newest is not None and not newest.ended:
        return attach(newest.run_id)
    from runbook_lib.plan import plan_of  # the plan knows all phases; a notebook that attaches needs none of it

    draft = preview(environment, version)
    refuse_second(draft)
    return create(draft, plan=plan_of(draft), people_sign=True)


def last_run(environment: str = "rehearsal", version: str = "", run_id: str = "") -> Run:
    """What the review calls: attach to `run_id`, or to the environment's newest run, ended or not.

    Raises:
        UsageError: there is none yet.
    """
    if run_id:
        return open_run(environment, version, run_id)
    params = load_params(environment)
    newest = next(
        (s for s in ledger_of(params).runs(environment) if not version or s.opened["version"] == version), None
    )
    if newest is None:
        raise UsageError(f"{environment} has no run to look back at", remedy=f"runbook run {environment}")
    return attach(newest.run_id)


def release_of(state: RunState) -> Release:
    """The release that a run was opened for."""
    names = ("environment", "version", "ref", "commit", "previous_version", "previous_commit")
    return Release(**{name: state.opened[name] for name in names})


def _scratch(environment: str, run_id: str) -> Path:
    return root() / "outputs" / environment / ".scratch" / run_id


def _run(params: Params, ledger: Ledger, run_id: str, release: Release) -> Run:
    folder = root() / "outputs" / release.environment / run_id
    scratch = _scratch(release.environment, run_id)
    secrets = Secrets()
    return Run(
        run_id=run_id,
        root=root(),
        folder=folder,
        scratch=scratch,
        release=release,
        params=params,
        ledger=ledger,
        services=_services(params, secrets, scratch, folder),
        secrets=secrets,
    )


def _services(
    params: Params, secrets: Secrets, scratch: Path, folder: Path, *, left_on_interrupt: bool = True
) -> Services:
    def log_folder() -> Path:
        attempt = current_attempt()
        return attempt.folder if attempt is not None else folder / "logs" / "outside-steps"

    database = params.database
    # The tools beside this interpreter, and the database client that the params name, come first.
    for programs in filter(None, (str(Path(sys.executable).parent), database.bin)):
        # In front also when they were there before: a process may have opened a run with another database.bin.
        others = [folder for folder in os.environ.get("PATH", "").split(os.pathsep) if folder != programs]
        os.environ["PATH"] = os.pathsep.join([programs, *others])
    store = params.backup.store
    messages = params.messages
    return Services(
        shell=LocalShell(log_folder, secrets, {"PGAPPNAME": session_name(folder.name)}, left_on_interrupt),
        chat=OutboxChat(_folder(messages.chat)),
        calendar=FolderCalendar(_folder(messages.calendar)),
        pages=FolderPages(_folder(messages.pages)),
        tickets=FolderTickets(_folder(messages.tickets)),
        tracker=CsvTracker(_folder(messages.tracker)),
        store=S3Store(
            bucket=store.bucket,
            prefix=store.prefix,
            endpoint=store.endpoint,
            region=store.region,
            profile=store.profile,
            credentials_file=store.credentials_file,
            encryption=store.encryption,
            kms_key=store.kms_key,
            retain_days=store.retain_days,
            retain_mode=store.retain_mode,
        ),
        repository=GitRepository(
            params.repository.url, scratch=scratch / "git", ci_notes_ref=params.repository.ci_notes_ref
        ),
        balancer=HttpBalancer(params.deploy.balancer) if params.deploy.balancer else None,
        hosts={name: host_from(name, host.address) for name, host in params.all_hosts.items()},
        database=Database(database.host, database.port, database.passfile),
    )


def _folder(url: str) -> Path:
    return Path(url.partition(":")[2])


def _release(params: Params, services: Services, version: str) -> Release:
    commit = services.repository.commit_of(version)
    serving: dict[str, tuple[str, str]] = {}
    for name, host in params.hosts.web.items():
        if host.url is None:
            continue
        try:
            said = http.get_json(host.url + params.application.version_path)
            serving[name] = (str(said["version"]), str(said["commit"]))
        except (RunbookError, KeyError) as error:
            raise UsageError(
                f"{name} does not say which release it runs ({host.url}{params.application.version_path}): {error}",
                remedy="runbook stack up" if params.rehearsal else f"runbook doctor {params.environment}",
            ) from error
    if len(set(serving.values())) != 1:
        raise UsageError(
            f"the web hosts serve different releases: {', '.join(f'{n} {c[:12]}' for n, (_, c) in serving.items())}",
            remedy="settle that first: the previous release is what a rollback goes back to",
        )
    previous_version, previous_commit = next(iter(serving.values()))
    return Release(params.environment, version, version, commit, previous_version, previous_commit)


def _write_trust(params: Params, secrets: Secrets) -> None:
    people = {name: list(person.keys) for name, person in params.people.items()}
    recorder = signatures.public_key_of(secrets.path(params.record.key))
    content = signatures.allowed_signers(people, recorder_key=recorder)
    gate.write_trust(root() / "outputs" / params.environment, content)
