"""A run's folder comes back from a real S3 server as the ledger names it, or not at all."""

from __future__ import annotations

import errno
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import TYPE_CHECKING, Any

import pytest

from runbook_lib import archive, executor, lease, mirror
from runbook_lib.adapters import processes
from runbook_lib.adapters.objects import S3Store
from runbook_lib.canonical import canonical_json, sha256
from runbook_lib.errors import PausedError, StepFailedError, VerificationError
from runbook_lib.ledger import Ledger
from runbook_lib.model import Artifact, Event, StepResult
from runbook_lib.phases import prepare
from runbook_lib.ports import Stored
from runbook_lib.run import Run
from runbook_lib.step import current_attempt
from tests.unit.conftest import OpenRun, open_run, people  # noqa: F401  # fixtures
from tests.unit.test_gate import asked_in
from tests.unit.test_step import Acts

if TYPE_CHECKING:
    from tests.contracts.conftest import Bucket
    from tests.ledgers import LedgerServer

RUN = "20260102T030405Z-v1.5.0-a1b2c3"


@pytest.fixture
def store(bucket: Bucket, request: pytest.FixtureRequest) -> S3Store:
    prefix = request.node.name
    return S3Store(bucket.name, prefix, endpoint=bucket.endpoint, credentials_file=str(bucket.credentials))


def mirrored(store: S3Store, files: dict[str, bytes], run_id: str = RUN) -> list[Event]:
    """Put a folder into the store as another machine would have; the ledger's events that name it."""

    def put(content: bytes) -> str:
        digest = sha256(content)
        key = f"{store.prefix.strip('/')}/runs/{run_id}/{digest}"
        store._client.put_object(Bucket=store.bucket, Key=key, Body=content, Metadata={"sha256": digest})
        return digest

    listing = canonical_json({"run": run_id, "files": {name: put(content) for name, content in files.items()}})
    return [event(mirror.EVENT, {"sha256": put(listing), "files": len(files), "epoch": 1})]


def event(kind: str, data: dict[str, Any], seq: int = 1) -> Event:
    return Event(RUN, seq, "2026-01-02T03:04:05.000000Z", kind, data, "0" * 64, "")


def outcome(path: str, content: bytes, seq: int = 2) -> Event:
    """A step's green end that names one file."""
    named = {"path": path, "sha256": sha256(content), "size_bytes": len(content)}
    result = {"facts": {}, "artifacts": [named], "verdict": "green", "title": "", "status": "green"}
    return event("step_outcome", {"step": "a.b", "attempt": 1, "status": "green", "result": result}, seq)


def test_a_folder_comes_back_byte_for_byte(store: S3Store, tmp_path: Path) -> None:
    files = {"params.json": b"{}", "artifacts/plan.json": b'{"a":1}'}
    events = mirrored(store, files)

    mirror.fetch(store, events, tmp_path / "run", tmp_path / "scratch")

    assert {name: (tmp_path / "run" / name).read_bytes() for name in files} == files


def test_a_file_that_comes_back_as_something_else_is_not_taken(store: S3Store, tmp_path: Path) -> None:
    events = mirrored(store, {"params.json": b"{}"})
    key = f"{store.prefix}/runs/{RUN}/{sha256(b'{}')}"
    store._client.put_object(Bucket=store.bucket, Key=key, Body=b"[]")

    with pytest.raises(VerificationError, match="came back as something else"):
        mirror.fetch(store, events, tmp_path / "run", tmp_path / "scratch")

    assert not (tmp_path / "run" / "params.json").exists()


def test_no_file_lands_outside_of_the_runs_folder(store: S3Store, tmp_path: Path) -> None:
    events = mirrored(store, {"../outside": b"x"})

    with pytest.raises(VerificationError, match="outside of the run's folder"):
        mirror.fetch(store, events, tmp_path / "run", tmp_path / "scratch")

    assert not (tmp_path / "outside").exists()


def test_a_file_that_is_gone_or_was_changed_here_comes_back(store: S3Store, tmp_path: Path) -> None:
    events = [
        *mirrored(store, {"params.json": b"{}", "a.json": b"a", "b": b"b", "notebooks/n": b"n"}),
        outcome("a.json", b"a"),
    ]
    folder = tmp_path / "run"
    mirror.fetch(store, events, folder, tmp_path / "scratch")
    (folder / "a.json").write_bytes(b"other")
    (folder / "notebooks" / "n").write_bytes(b"nobody names it")
    (folder / "b").unlink()

    mirror.fetch(store, events, folder, tmp_path / "scratch")

    found = [(folder / name).read_bytes() for name in ("a.json", "b", "notebooks/n")]
    assert found == [b"a", b"b", b"nobody names it"]


def test_what_a_step_is_writing_here_is_left_alone(store: S3Store, tmp_path: Path) -> None:
    events = [*mirrored(store, {"params.json": b"{}", "a.json": b"a"}), outcome("a.json", b"a")]
    mirror.fetch(store, events, tmp_path / "run", tmp_path / "scratch")
    (tmp_path / "run" / "a.json").write_bytes(b"a newer one")

    again = event("step_intent", {"step": "a.b", "attempt": 2, "executor": processes.me()}, 3)
    mirror.fetch(store, [*events, again], tmp_path / "run", tmp_path / "scratch")

    assert (tmp_path / "run" / "a.json").read_bytes() == b"a newer one"


class Meeting(S3Store):
    """A store whose every answer waits until two have asked, each for a file of its own."""

    def __init__(self, store: S3Store, both: Barrier) -> None:
        super().__init__(
            store.bucket, store.prefix, endpoint=store.endpoint, credentials_file=str(store.credentials_file)
        )
        self.both = both

    def fetch(self, stored: Stored, into: Path) -> None:
        super().fetch(stored, into)
        # The other one may be through with its files already.
        with suppress(BrokenBarrierError):
            self.both.wait(2)


def test_two_that_attach_at_once_both_have_the_folder(store: S3Store, tmp_path: Path) -> None:
    """`runbook status` beside `runbook resume` on a machine that has nothing of the run yet."""
    names = ("logs/a", "logs/b", "logs/c", "logs/d", "params.json")
    events, both = mirrored(store, {name: name.encode() for name in names}), Barrier(2)
    # One of them has the list and the first file already: what they bring at the same moment differs.
    later = tmp_path / "scratch"
    mirror.fetch(store, mirrored(store, {"logs/a": b"logs/a"}), tmp_path / "run", later)

    def attach(turn: int) -> None:
        folder = tmp_path / ("run" if turn else "other")
        mirror.fetch(Meeting(store, both), events, folder, later)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(attach, range(2)))

    for folder in ("run", "other"):
        assert {name: (tmp_path / folder / name).read_text() for name in names} == {name: name for name in names}


def test_what_an_executor_here_may_be_writing_is_left_alone(store: S3Store, tmp_path: Path) -> None:
    """Between two steps it writes too: what its kernel leaves, and the record."""
    events = [*mirrored(store, {"params.json": b"{}", "a.json": b"a"}), outcome("a.json", b"a")]
    mirror.fetch(store, events, tmp_path / "run", tmp_path / "scratch")
    (tmp_path / "run" / "a.json").write_bytes(b"a newer one")

    living = event("lease_taken", {"epoch": 1, "executor": processes.me()}, 3)
    mirror.fetch(store, [*events, living], tmp_path / "run", tmp_path / "scratch")

    assert (tmp_path / "run" / "a.json").read_bytes() == b"a newer one"


def test_a_sealed_record_is_not_written_to(store: S3Store, tmp_path: Path) -> None:
    events = [*mirrored(store, {"params.json": b"{}", "a.json": b"a"}), outcome("a.json", b"a")]
    mirror.fetch(store, events, tmp_path / "run", tmp_path / "scratch")
    statement = {"subject": [{"name": "a.json", "digest": {"sha256": sha256(b"a")}}]}
    (tmp_path / "run" / "statement.json").write_bytes(canonical_json(statement))
    (tmp_path / "run" / "statement.json.sig").write_bytes(b"sealed")
    (tmp_path / "run" / "a.json").write_bytes(b"changed")  # it must not verify, and not be mended unseen

    mirror.fetch(store, events, tmp_path / "run", tmp_path / "scratch")

    assert (tmp_path / "run" / "a.json").read_bytes() == b"changed"


def test_a_folder_that_came_only_half_is_no_run_yet(store: S3Store, tmp_path: Path) -> None:
    events = mirrored(store, {"params.json": b"{}", "walked.ipynb": b"cells"})
    key = f"{store.prefix}/runs/{RUN}/{sha256(b'cells')}"
    store._client.put_object(Bucket=store.bucket, Key=key, Body=b"other")

    with pytest.raises(VerificationError, match="came back as something else"):
        mirror.fetch(store, events, tmp_path / "run", tmp_path / "scratch")

    assert not (tmp_path / "run" / "params.json").exists()


def test_the_newest_list_is_what_counts_also_where_an_older_one_was_read(store: S3Store, tmp_path: Path) -> None:
    first = mirrored(store, {"params.json": b"{}", "a": b"a"})
    mirror.fetch(store, first, tmp_path / "run", tmp_path / "scratch")
    second = mirrored(store, {"params.json": b"{}", "a": b"a newer one"})

    mirror.fetch(store, [*first, *second], tmp_path / "run", tmp_path / "scratch")

    assert (tmp_path / "run" / "a").read_bytes() == b"a newer one"


def test_what_later_events_name_comes_along(store: S3Store, tmp_path: Path) -> None:
    """One that holds no lease puts its file by itself: no list names it yet."""
    events = mirrored(store, {"params.json": b"{}"})
    mirrored(store, {"gates/backup-2.json": b"evidence"})

    mirror.fetch(store, [*events, outcome("gates/backup-2.json", b"evidence")], tmp_path / "run", tmp_path / "scratch")

    assert (tmp_path / "run" / "gates" / "backup-2.json").read_bytes() == b"evidence"


@pytest.fixture
def shared(open_run: OpenRun, ledger_server: LedgerServer, bucket: Bucket, request: pytest.FixtureRequest) -> OpenRun:  # noqa: F811
    """Opens a run whose ledger is shared and whose store answers."""
    where = {
        "ledger": ledger_server.new_ledger(),
        "backup__store__endpoint": bucket.endpoint,
        "backup__store__bucket": bucket.name,
        "backup__store__prefix": request.node.name,
        "backup__store__credentials_file": str(bucket.credentials),
    }
    return lambda **more: open_run(**{**where, **more})


def test_a_store_that_lets_nobody_in_stops_no_release(shared: OpenRun, tmp_path: Path) -> None:
    wrong = tmp_path / "credentials"
    wrong.write_text("[default]\naws_access_key_id = AKNOBODY\naws_secret_access_key = wrong\n")
    run = shared(backup__store__credentials_file=str(wrong))

    mirror.push(run)
    mirror.put(run, "params.json", b"{}")

    said = [e.data["text"] for e in run.ledger.events(run.run_id) if e.kind == "note"]
    assert ["the folder was not mirrored" in said[0], "params.json was not mirrored" in said[1]] == [True, True]


def test_a_full_disk_here_stops_no_release(shared: OpenRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the step did is done: its outcome is written, and the next push makes up for it."""
    run = shared()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mirror, "write_atomically", full)

    mirror.push(run)

    said = [e.data["text"] for e in run.ledger.events(run.run_id) if e.kind == "note"]
    assert said == ["the folder was not mirrored: [Errno 28] No space left on device"]


def test_what_a_step_leaves_is_in_the_store_before_the_ledger_names_it(
    shared: OpenRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that dies right after its outcome takes nothing with it: another one has the files and the logs."""
    run = shared()
    monkeypatch.setattr(prepare.confirm_candidate, "action", lambda run: StepResult(artifacts=(said(run),)))

    prepare.confirm_candidate(run)

    events = run.ledger.events(run.run_id)
    named = next(n for n, e in enumerate(events) if e.kind == "step_outcome")
    mirror.fetch(run.services.store, events[: named + 1], tmp_path / "other", tmp_path / "scratch")
    assert (tmp_path / "other" / "artifacts" / "candidate.txt").read_text() == "seen"
    assert (tmp_path / "other" / "logs" / "prepare.confirm_candidate" / "1" / "look.log").read_text() == "looked"


def said(run: Run) -> Artifact:
    """What a step leaves: an artifact, and a log."""
    attempt = current_attempt()
    assert attempt is not None
    attempt.folder.mkdir(parents=True)
    (attempt.folder / "look.log").write_text("looked")
    return run.keep("candidate.txt", "seen")


def test_a_look_from_beside_does_not_change_the_list_that_is_being_put(
    shared: OpenRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`runbook status` attaches just when the executor has written its new list and not stored it yet."""
    run = shared()
    mirror.push(run)
    put = S3Store.put

    def looked_at(store: S3Store, path: Path, key: str, *, sha256: str, retain: bool = False) -> Any:
        if path.name == "mirror-list.json":
            mirror.fetch(run.services.store, run.ledger.events(run.run_id), run.folder, run.scratch)
        return put(store, path, key, sha256=sha256)

    monkeypatch.setattr(S3Store, "put", looked_at)
    run.keep("more.txt", "more")
    mirror.push(run)

    events = run.ledger.events(run.run_id)
    mirror.fetch(run.services.store, events, run.folder, run.scratch / "another")
    assert [event.kind for event in events].count(mirror.EVENT) == 2


def test_the_machine_that_put_a_folder_needs_no_store_to_go_on(shared: OpenRun, tmp_path: Path) -> None:
    run = shared()
    mirror.push(run)
    nowhere = S3Store("bucket", "", endpoint="http://127.0.0.1:9")

    mirror.fetch(nowhere, run.ledger.events(run.run_id), run.folder, run.scratch)
    with pytest.raises(StepFailedError):
        mirror.fetch(nowhere, run.ledger.events(run.run_id), tmp_path / "other", tmp_path / "scratch")


def test_what_a_step_beside_is_still_writing_is_not_mirrored(shared: OpenRun, tmp_path: Path) -> None:
    run = shared()
    (run.folder / "logs" / "a.b" / "1").mkdir(parents=True)
    (run.folder / "logs" / "a.b" / "1" / "half.log").write_text("hal")
    intent = {"step": "a.b", "attempt": 1, "executor": processes.me(), "children": "logs/a.b/1"}
    run.ledger.append(run.run_id, "step_intent", intent)

    mirror.push(run)

    mirror.fetch(run.services.store, run.ledger.events(run.run_id), tmp_path / "other", tmp_path / "scratch")
    assert (tmp_path / "other" / "params.json").exists()
    assert not (tmp_path / "other" / "logs").exists()


def test_what_a_gate_asks_about_is_in_the_store_before_the_ledger_names_it(shared: OpenRun, tmp_path: Path) -> None:
    """Whoever opens a round may hold no lease, and push nothing: another machine has the evidence all the same."""
    run = shared()
    mirror.push(run)

    asked_in(run)

    mirror.fetch(run.services.store, run.ledger.events(run.run_id), tmp_path / "other", tmp_path / "scratch")
    evidence = "artifacts/gates/backup-1.json"
    assert (tmp_path / "other" / evidence).read_bytes() == (run.folder / evidence).read_bytes()


def name_what_is_nowhere(run: Run) -> None:
    """Let the ledger name a file of a green step that is neither here nor in the store."""
    lost = outcome("artifacts/lost.json", b"lost")
    intent = {"step": "a.b", "attempt": 1, "phase": "prepare", "executor": processes.me()}
    run.ledger.append(run.run_id, "step_intent", intent)
    run.ledger.append(run.run_id, lost.kind, lost.data)


def test_nothing_goes_forward_on_a_file_that_is_nowhere(shared: OpenRun) -> None:
    run = shared()
    name_what_is_nowhere(run)

    with pytest.raises(
        PausedError, match=r"artifacts/lost\.json, which event \d+ names, is neither here nor in the store"
    ):
        executor.go(run)


def test_a_cell_goes_forward_on_no_such_file_either_however_often_it_is_run(shared: OpenRun) -> None:
    run = shared()
    name_what_is_nowhere(run)
    acts = Acts()

    for _ in range(2):
        with pytest.raises(PausedError, match=r"artifacts/lost\.json, .* is neither here nor in the store"):
            acts.step()(run)
    with lease.held(run):  # to end it, or to go back, needs no such file
        pass

    assert acts.times == 0


def test_what_another_door_asked_about_is_fetched_by_the_cell_that_needs_it(shared: OpenRun, tmp_path: Path) -> None:
    """Whoever opens a round puts no list: who lives on does not see it as newer than his own."""
    here = shared()
    mirror.push(here)
    there = on_another_machine(here, tmp_path)
    asked_in(there)
    evidence = "artifacts/gates/backup-1.json"
    for path in ("artifacts/backup/manifest.json", evidence):
        mirror.put(there, path, (there.folder / path).read_bytes())

    assert Acts().step()(here).status == "green"

    assert (here.folder / evidence).read_bytes() == (there.folder / evidence).read_bytes()


def on_another_machine(run: Run, folder: Path) -> Run:
    """The run as another machine has it, fetched now."""
    there = replace(run, folder=folder / "run", scratch=folder / "scratch", ledger=Ledger(run.ledger.url))
    mirror.fetch(there.services.store, there.ledger.events(run.run_id), there.folder, there.scratch)
    return there


def test_a_kernel_that_stays_open_while_another_machine_goes_on_has_what_that_one_left(
    shared: OpenRun, tmp_path: Path
) -> None:
    here = shared()
    (here.folder / "notebooks").mkdir()
    (here.folder / "notebooks" / "00.ipynb").write_text("as it was here")
    mirror.push(here)
    there = on_another_machine(here, tmp_path)
    with lease.held(there):
        kept = there.keep("two.json", "{}")
        (there.folder / "notebooks" / "00.ipynb").write_text("as it went on there")
        mirror.push(there)

    with lease.held(here):
        assert (here.folder / kept.path).read_text() == "{}"
        mirror.push(here)

    third = on_another_machine(here, tmp_path / "third")
    assert (third.folder / "notebooks" / "00.ipynb").read_text() == "as it went on there"


def test_a_list_that_was_put_and_not_noted_is_not_taken_for_another_machines(shared: OpenRun) -> None:
    here = shared()
    (here.folder / "walked.ipynb").write_text("old")
    mirror.push(here)
    (here.scratch / "mirrored.json").unlink()
    (here.folder / "walked.ipynb").write_text("newer than the list")

    with lease.held(here):
        assert (here.folder / "walked.ipynb").read_text() == "newer than the list"


def test_a_record_is_sealed_once_and_reviewed_elsewhere(shared: OpenRun, tmp_path: Path) -> None:
    here = shared()
    executor.abort(here, reason="enough")
    sealed = {path: path.read_bytes() for path in here.folder.rglob("*") if path.is_file()}

    there = on_another_machine(here, tmp_path)
    executor.close(there)
    with lease.held(there):
        (there.folder / "review").mkdir(exist_ok=True)
        (there.folder / "review" / "08_review.ipynb").write_text("looked back")
        mirror.push(there)
    mirror.fetch(here.services.store, here.ledger.events(here.run_id), here.folder, here.scratch)

    assert (there.folder / mirror.SEAL).read_bytes() == (here.folder / mirror.SEAL).read_bytes()
    assert {path: path.read_bytes() for path in sealed} == sealed
    assert (here.folder / "review" / "08_review.ipynb").read_text() == "looked back"


def test_what_a_lost_machine_never_sent_gets_into_no_sealed_record(shared: OpenRun, tmp_path: Path) -> None:
    here = shared()
    mirror.push(here)
    there = on_another_machine(here, tmp_path)
    shutil.copy(here.trust, there.trust)
    never_sent = here.folder / "logs" / "x" / "1" / "migrate.log"
    never_sent.parent.mkdir(parents=True)
    never_sent.write_text("half")
    executor.abort(there, reason="the first machine was lost")

    mirror.fetch(here.services.store, here.ledger.events(here.run_id), here.folder, here.scratch)  # it comes back
    assert wrong(here) == []
    assert (here.scratch / "not-of-the-record" / "logs" / "x" / "1" / "migrate.log").read_text() == "half"
    never_sent.parent.mkdir(parents=True, exist_ok=True)
    never_sent.write_text("a child of its own wrote on")
    with lease.held(here):
        (here.folder / "review").mkdir(exist_ok=True)
        (here.folder / "review" / "08_review.ipynb").write_text("looked back")
        mirror.push(here)
    sent = json.loads((here.scratch / "mirror-list.json").read_bytes())["files"]
    mirror.fetch(there.services.store, there.ledger.events(there.run_id), there.folder, there.scratch)

    assert "review/08_review.ipynb" in sent
    assert "logs/x/1/migrate.log" not in sent
    assert [where for where in wrong(there) if not where.startswith("review/")] == []
    assert (there.folder / "review" / "08_review.ipynb").read_text() == "looked back"


def test_a_sealed_record_gets_no_file_that_it_does_not_name(shared: OpenRun, tmp_path: Path) -> None:
    """Also from an older version there, which sent all that it had."""
    here = shared()
    executor.abort(here, reason="enough")
    store, events = here.services.store, here.ledger.events(here.run_id)
    assert isinstance(store, S3Store)
    (listed,) = mirrored(store, {"logs/x/1/migrate.log": b"half"}, run_id=here.run_id)

    mirror.fetch(store, [*events, replace(listed, seq=events[-1].seq + 1)], here.folder, here.scratch)

    assert not (here.folder / "logs" / "x").exists()


def wrong(run: Run) -> list[str]:
    """Where a record does not verify."""
    return [check.where for check in archive.verify(run.folder, run.trust) if not check.ok]


def test_what_a_sealed_record_lost_comes_back_and_what_it_never_had_does_not(shared: OpenRun, tmp_path: Path) -> None:
    here = shared()
    executor.abort(here, reason="enough")
    there = on_another_machine(here, tmp_path)
    shutil.copy(here.trust, there.trust)
    for name in ("checklist.html", "params.json", "statement.json"):
        (there.folder / name).unlink()

    for _ in range(2):  # without the statement nobody knows what else is of the record
        mirror.fetch(there.services.store, there.ledger.events(here.run_id), there.folder, there.scratch)

    assert wrong(there) == []


@pytest.mark.parametrize("spoilt", ["statement.json", "checklist.html"])
def test_a_record_that_was_spoilt_here_is_spoilt_nowhere_else(shared: OpenRun, tmp_path: Path, spoilt: str) -> None:
    here = shared()
    executor.abort(here, reason="enough")
    (here.folder / spoilt).write_bytes(b"")

    with lease.held(here):
        (here.folder / "review").mkdir(exist_ok=True)
        (here.folder / "review" / "08_review.ipynb").write_text("looked back")
        mirror.push(here)
    third = on_another_machine(here, tmp_path)

    shutil.copy(here.trust, third.trust)
    assert [where for where in wrong(third) if not where.startswith("review/")] == []


def test_what_another_machine_has_sealed_otherwise_is_not_written_over_here(store: S3Store, tmp_path: Path) -> None:
    first = mirrored(store, {"params.json": b"{}", "index.html": b"page", mirror.SEAL: b"sealed here"})
    mirror.fetch(store, first, tmp_path / "run", tmp_path / "scratch")
    other = {"params.json": b"{}", "index.html": b"another", mirror.SEAL: b"sealed there", "review/a.md": b"seen"}
    (listed,) = mirrored(store, other)

    mirror.fetch(store, [*first, replace(listed, seq=2)], tmp_path / "run", tmp_path / "scratch")

    assert (tmp_path / "run" / "index.html").read_bytes() == b"page"
    assert (tmp_path / "run" / mirror.SEAL).read_bytes() == b"sealed here"
    assert (tmp_path / "run" / "review" / "a.md").read_bytes() == b"seen"


def test_a_seal_that_the_store_did_not_take_is_brought_later(shared: OpenRun) -> None:
    here = shared()
    store: Any = here.services.store
    answering, store.endpoint = store.endpoint, "http://127.0.0.1:9"
    executor.abort(here, reason="enough")
    assert (here.folder / mirror.SEAL).exists()
    store.endpoint, store._known = answering, None
    mirror.push(here)  # what was there before the end, as any step would have put it
    assert mirror.has_seal(here)
