"""Records: what is sealed verifies anywhere, and any change to it is seen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runbook_lib import archive, signatures
from runbook_lib.canonical import canonical_json, digest, sha256
from runbook_lib.errors import UsageError, VerificationError
from runbook_lib.ledger import Ledger
from runbook_lib.model import Event
from runbook_lib.state import fold

RUN = "20260102T030405Z-v1.5.0-a1b2c3"
COMMIT, BEFORE = "1" * 40, "2" * 40
PARAMS = {
    "environment": "rehearsal",
    "people": {
        "ada": {"name": "Ada", "roles": ["lead", "dba"], "keys": []},
        "bob": {"name": "Bob", "roles": ["qa"], "keys": []},
        "eve": {"name": "Eve", "roles": [], "keys": []},
    },
    "gates": {
        "backup": {"roles": ["lead"], "quorum": 1},
        "migration": {"roles": ["dba"], "quorum": 1},
        "release": {"roles": ["qa", "on_call"], "quorum": 1},
    },
}
SIGN_OFF = {"backup": "backup", "migration": "migrate", "release": "verify"}


@dataclass
class Story:
    """Writes a run's ledger and files as the engine does, small."""

    folder: Path
    ledger: Ledger
    keys: Mapping[str, Path]
    trust: Path

    def append(self, kind: str, data: Mapping[str, Any]) -> Event:
        return self.ledger.append(RUN, kind, data, environment="rehearsal")

    def write(self, path: str, content: bytes) -> dict[str, Any]:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return {"path": path, "sha256": sha256(content), "size_bytes": len(content)}

    def open(self) -> None:
        self.write("params.json", canonical_json(PARAMS))
        self.append(
            "run_opened",
            {
                "version": "v1.5.0",
                "ref": "v1.5.0",
                "commit": COMMIT,
                "environment": "rehearsal",
                "previous_version": "v1.4.0",
                "previous_commit": BEFORE,
                "params_sha256": digest(PARAMS),
                "opened_by": "eve",
            },
        )

    def step(
        self, key: str, *artifacts: dict[str, Any], status: str = "green", verdict: str = "green", **facts: Any
    ) -> None:
        known = self.ledger.state(RUN).step(key).attempt
        gates = {}
        for event in self.ledger.events(RUN):
            if event.kind == "gate_decision" and event.data["decision"] == "approve":
                gates[event.data["gate"]] = [event.data["sha256"]]
        self.append(
            "step_intent",
            {"step": key, "title": key.partition(".")[2].replace("_", " "), "attempt": known + 1, "gates": gates},
        )
        result = {"facts": facts, "artifacts": list(artifacts), "verdict": verdict, "title": key, "status": status}
        error = "" if status == "green" else "it broke: disk full"
        self.append(
            "step_outcome",
            {"step": key, "attempt": known + 1, "status": status, "result": result, "duration_s": 1.25, "error": error},
        )

    def ask(self, gate: str, *files: dict[str, Any]) -> Event:
        number = self.ledger.state(RUN).gate(gate).round + 1
        cards = [{"name": f["path"], "files": [{"path": f["path"], "sha256": f["sha256"]}]} for f in files]
        evidence = self.write(f"artifacts/gates/{gate}-{number}.json", canonical_json({"gate": gate, "cards": cards}))
        rule = PARAMS["gates"][gate]  # type: ignore[index]
        opened_s = 1_700_000_000.5
        return self.append(
            "gate_opened",
            {
                "gate": gate,
                "round": number,
                "nonce": "ab" * 16,
                "opened_epoch_s": opened_s,
                "expires_epoch_s": opened_s + 4e9,
                "evidence": {"path": evidence["path"], "sha256": evidence["sha256"], "cards": len(cards)},
                **rule,
            },
        )

    def decide(
        self,
        opened: Event,
        person: str,
        *files: dict[str, Any],
        decision: str = "approve",
        signer: str = "",
        **changed: Any,
    ) -> None:
        data, gate = opened.data, opened.data["gate"]
        role = next((r for r in data["roles"] if r in PARAMS["people"][person]["roles"]), "lead")  # type: ignore[index]
        subject = {f["path"]: f["sha256"] for f in files} | {data["evidence"]["path"]: data["evidence"]["sha256"]}
        predicate = {
            "run": RUN,
            "release": {"version": "v1.5.0", "commit": COMMIT, "environment": "rehearsal"},
            "gate": gate,
            "round": data["round"],
            "nonce": data["nonce"],
            "decision": decision,
            "person": person,
            "role": role,
            "comment": f"seen <b>by</b> {person}",
            "ledger_head": opened.hash,
            "expires_epoch_s": data["expires_epoch_s"],
            **changed,
        }
        statement = self.sign(
            "https://runbook.dev/gate-decision/v1",
            subject,
            predicate,
            f"{gate}-{data['round']}-{person}-{decision}",
            signer or person,
        )
        self.append(
            "gate_decision",
            {
                "gate": gate,
                "round": data["round"],
                "person": person,
                "roles": [role],
                "decision": decision,
                "comment": predicate["comment"],
                **statement,
            },
        )

    def check(self, name: str, *, passed: bool) -> None:
        said = {
            "run": RUN,
            "check": name,
            "passed": passed,
            "note": "",
            "person": "bob",
            "ledger_head": self.ledger.state(RUN).head,
        }
        statement = self.sign("https://runbook.dev/spot-check/v1", {"v1.5.0": "0" * 64}, said, f"check-{name}-1", "bob")
        self.append("check_recorded", {"check": name, "passed": passed, "note": "", "person": "bob", **statement})

    def sign(
        self, kind: str, subject: Mapping[str, str], predicate: Mapping[str, Any], name: str, signer: str
    ) -> dict[str, Any]:
        data = canonical_json(
            {
                "_type": "https://in-toto.io/Statement/v1",
                "predicateType": kind,
                "subject": [{"name": n, "digest": {"sha256": d}} for n, d in sorted(subject.items())],
                "predicate": dict(predicate),
            }
        )
        signature = signatures.sign(data, key=self.keys[signer], namespace="runbook-gate")
        self.write(f"decisions/{name}.json", data)
        self.write(f"decisions/{name}.json.sig", signature)
        return {
            "statement": f"decisions/{name}.json",
            "sha256": sha256(data),
            "signature_sha256": sha256(signature),
            "statement_json": data.decode(),
            "signature": signature.decode(),
        }

    def gate(self, gate: str, person: str, *files: dict[str, Any]) -> None:
        opened = self.ask(gate, *files)
        self.decide(opened, person, *files)
        self.step(f"{SIGN_OFF[gate]}.sign_off")

    def notebook(self, path: str, text: str) -> None:
        output = {
            "output_type": "display_data",
            "metadata": {},
            "data": {"text/html": f"<p onclick='x()'>{text}</p><script>1</script>"},
        }
        cells = [
            {"cell_type": "markdown", "id": "a", "metadata": {}, "source": f"# {text}"},
            {
                "cell_type": "code",
                "id": "b",
                "metadata": {},
                "source": "backup.dump(run)",
                "execution_count": 1,
                "outputs": [output],
            },
        ]
        self.write(path, json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells}).encode())

    def until_gate_1(self) -> dict[str, Any]:
        self.open()
        self.append("phase_started", {"phase": "backup"})
        manifest = self.write("artifacts/backup/manifest.json", b'{"dump":"good"}')
        self.step("backup.dump_database", status="failed")
        self.step("backup.dump_database", manifest, bytes=123456)
        return manifest

    def release(self) -> None:
        """A whole release."""
        manifest = self.until_gate_1()
        self.notebook("notebooks/01_backup.ipynb", "Backup")
        self.gate("backup", "ada", manifest)
        self.append("phase_started", {"phase": "begin"})
        self.step("begin.prove_read_only")
        self.append("phase_started", {"phase": "migrate"})
        self.step("migrate.verify_schema")
        self.gate("migration", "ada")
        self.append("phase_started", {"phase": "deploy"})
        for host in ("web1", "web2"):
            self.step(f"deploy.verify_commits@{host}")
        self.append("phase_started", {"phase": "verify"})
        self.step("verify.smoke_tests")
        chart = self.write("artifacts/watch/p95_latency_s.png", png())
        self.step("verify.watch_telemetry", chart, points=60)
        self.check("log_in", passed=True)
        self.gate("release", "bob", chart)
        self.append("phase_started", {"phase": "complete"})
        for name in ("lift_maintenance", "notify_team", "publish_pages", "update_changelog"):
            self.step(f"complete.{name}")
        self.append("run_ended", {"state": "completed"})

    def seal(self) -> Path:
        return archive.seal(
            self.folder,
            events=self.ledger.events(RUN),
            state=self.ledger.state(RUN),
            recorder_key=self.keys["recorder"],
            trust=self.trust,
        )

    def review(self) -> Path:
        self.notebook("review/08_review.ipynb", "Retrospective")
        self.step("review.retrospective", self.write("review/artifacts/retro.md", b"went well\n"))
        return self.seal_review()

    def seal_review(self) -> Path:
        return archive.seal_review(
            self.folder, events=self.ledger.events(RUN), recorder_key=self.keys["recorder"], trust=self.trust
        )

    def wrong(self) -> list[archive.Check]:
        return [check for check in archive.verify(self.folder, self.trust) if not check.ok]


def png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (8).to_bytes(4, "big") * 2 + b"\x08\x00\x00\x00\x00"
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 72)) + chunk(b"IEND", b"")
    )


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("archive-keys")
    found = {}
    for name in ("ada", "bob", "eve", "recorder", "stranger"):
        found[name] = folder / name
        subprocess.run(("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(found[name])), check=True)
    return found


def new_story(folder: Path, keys: Mapping[str, Path]) -> Story:
    folder.mkdir(parents=True, exist_ok=True)
    trust = folder / "allowed_signers"
    people = {name: [signatures.public_key_of(keys[name])] for name in ("ada", "bob", "eve")}
    trust.write_text(signatures.allowed_signers(people, recorder_key=signatures.public_key_of(keys["recorder"])))
    record = folder / RUN
    record.mkdir()
    return Story(record, Ledger(f"sqlite:///{folder / 'ledger.sqlite'}"), keys, trust)


@pytest.fixture
def story(tmp_path: Path, keys: dict[str, Path]) -> Story:
    return new_story(tmp_path / "run", keys)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory, keys: dict[str, Path]) -> Story:
    story = new_story(tmp_path_factory.mktemp("original") / "run", keys)
    story.release()
    story.seal()
    story.review()
    return story


@pytest.fixture
def sealed(original: Story, tmp_path: Path) -> Story:
    """A record with its review, to be changed."""
    folder = tmp_path / RUN
    shutil.copytree(original.folder, folder)
    return Story(folder, original.ledger, original.keys, original.trust)


def test_a_sealed_record_verifies_and_so_does_its_review(sealed: Story) -> None:
    assert sealed.wrong() == []

    names = {check.name for check in archive.verify(sealed.folder, sealed.trust)}
    assert {
        "statement",
        "files",
        "SHA256SUMS",
        "ledger",
        "gates",
        "artifacts",
        "signature",
        "review signature",
        "review ledger",
        "review statement",
        "review files",
    } <= names


def test_a_record_without_review_verifies(story: Story) -> None:
    story.release()

    assert story.seal() == story.folder / "statement.json"

    assert story.wrong() == []
    assert not (story.folder / "review").exists()


def test_sealing_again_changes_nothing(story: Story) -> None:
    story.release()
    story.seal()
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in story.folder.rglob("*") if p.is_file()}

    story.seal()

    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in story.folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("survivors", [0, 1, 3, 6])
def test_a_seal_that_was_killed_never_verifies_and_its_repeat_gives_the_same_record(
    story: Story, monkeypatch: pytest.MonkeyPatch, survivors: int
) -> None:
    story.release()
    reference = story.folder.with_name("reference")
    shutil.copytree(story.folder, reference)
    Story(reference, story.ledger, story.keys, story.trust).seal()
    real, written = archive.write_atomically, 0

    def killed(path: Path, data: bytes | str) -> None:
        nonlocal written
        if written == survivors:
            path.parent.mkdir(exist_ok=True)
            (path.parent / f".{path.name}.ab12cd34").write_text("half")
            raise KeyboardInterrupt
        written += 1
        real(path, data)

    monkeypatch.setattr(archive, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        story.seal()
    assert story.wrong() != []
    monkeypatch.undo()

    story.seal()

    assert contents(story.folder) == contents(reference)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_changed_record_is_neither_overwritten_nor_accepted_by_a_second_seal(sealed: Story) -> None:
    (sealed.folder / "index.html").write_text("other")

    with pytest.raises(VerificationError, match=r"index\.html"):
        sealed.seal()

    assert (sealed.folder / "index.html").read_text() == "other"


def test_a_run_that_goes_on_is_not_sealed(story: Story) -> None:
    story.until_gate_1()

    with pytest.raises(UsageError, match="has not ended"):
        story.seal()


def test_a_recorder_that_nobody_trusts_does_not_seal(story: Story) -> None:
    story.release()
    story.keys = {**story.keys, "recorder": story.keys["stranger"]}

    with pytest.raises(VerificationError):
        story.seal()

    assert not (story.folder / "statement.json.sig").exists()


def test_one_flipped_bit_anywhere_is_seen(sealed: Story) -> None:
    unseen = []
    for path in sorted(p for p in sealed.folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        # Every file's digest is taken whole, so one spot stands for all; a signature is parsed, so many are tried.
        spots = range(0, len(content), 61) if path.suffix == ".sig" else [len(content) // 2][: len(content)]
        for spot in spots:
            path.write_bytes(content[:spot] + bytes([content[spot] ^ 1]) + content[spot + 1 :])
            if not sealed.wrong():
                unseen.append((path.name, spot))
        path.write_bytes(content)

    assert unseen == []
    assert sealed.wrong() == []


def listed_again(folder: Path) -> None:
    """What somebody would do who changes a file: mend its line in SHA256SUMS too."""
    left_out = ("review/", "statement.json", "SHA256SUMS")
    lines = [f"{sha256(c)}  {p}\n" for p, c in sorted(contents(folder).items()) if not p.startswith(left_out)]
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.mark.parametrize("change", ["changed", "added", "removed"])
def test_a_change_that_stands_in_sha256sums_too_is_seen(sealed: Story, change: str) -> None:
    path = sealed.folder / ("notebooks/02_other.ipynb" if change == "added" else "notebooks/01_backup.ipynb")
    if change == "removed":
        path.unlink()
        (path.parent / "other.txt").write_text("no empty folder")
    else:
        path.write_text("other")
    listed_again(sealed.folder)

    assert (f"notebooks/{path.name}", "files") in {(c.where, c.name) for c in sealed.wrong()}


def test_a_statement_that_a_stranger_signed_does_not_hold(sealed: Story) -> None:
    path = sealed.folder / "statement.json"
    signature = signatures.sign(path.read_bytes(), key=sealed.keys["stranger"], namespace="runbook-record")
    path.with_name("statement.json.sig").write_bytes(signature)

    assert "signature" in {c.name for c in sealed.wrong()}


def test_every_deleted_or_emptied_file_is_seen(sealed: Story) -> None:
    for path in sorted(p for p in sealed.folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        path.write_bytes(b"")
        assert sealed.wrong(), path
        path.unlink()
        assert sealed.wrong(), path
        path.write_bytes(content)
    assert sealed.wrong() == []


@pytest.mark.soak
def test_every_renamed_or_lengthened_file_is_seen(sealed: Story) -> None:
    for path in sorted(p for p in sealed.folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        assert sealed.wrong(), path
        path.write_bytes(content)
        other = path.with_name("." + path.name)
        path.rename(other)
        assert sealed.wrong(), path
        other.rename(path)
    assert sealed.wrong() == []


@pytest.mark.parametrize(
    "path",
    [
        "extra.txt",
        "artifacts/extra.bin",
        "decisions/backup-1-eve-approve.json",
        "decisions/note.txt",
        "html/.hidden",
        "review/extra",
        "review/review/extra",
        "statement.json.bak",
        "artifacts/a\nb",
        "artifacts/\x1b[2J",
        b"artifacts/\xff\xfe",
    ],
)
def test_every_added_file_is_seen(sealed: Story, path: str | bytes) -> None:
    file = os.path.join(os.fsencode(sealed.folder), os.fsencode(path))
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(file, "wb") as opened:
        opened.write(b"x")

    wrong = sealed.wrong()

    assert wrong
    json.dumps([(c.where, c.why) for c in wrong], ensure_ascii=False).encode()
    assert all((c.where + c.why).isprintable() for c in wrong)


def test_swapped_files_are_seen(sealed: Story) -> None:
    folder = sealed.folder
    pairs = [
        ("notebooks/01_backup.ipynb", "params.json"),
        ("decisions/backup-1-ada-approve.json.sig", "decisions/migration-1-ada-approve.json.sig"),
        ("statement.json.sig", "review/statement.json.sig"),
        ("statement.json", "review/statement.json"),
    ]
    for first, second in pairs:
        one, two = (folder / first).read_bytes(), (folder / second).read_bytes()
        (folder / first).write_bytes(two)
        (folder / second).write_bytes(one)
        assert sealed.wrong(), (first, second)
        (folder / first).write_bytes(one)
        (folder / second).write_bytes(two)


def test_links_empty_folders_and_pipes_are_seen(sealed: Story) -> None:
    def link() -> None:
        shutil.move(sealed.folder / "params.json", sealed.folder.parent / "params.json")
        (sealed.folder / "params.json").symlink_to(sealed.folder.parent / "params.json")

    def folder_link() -> None:
        (sealed.folder / "linked").symlink_to("artifacts")

    def pipe() -> None:
        os.mkfifo(sealed.folder / "artifacts" / "pipe")

    def empty() -> None:
        (sealed.folder / "nothing").mkdir()

    def replaced() -> None:
        (sealed.folder / "statement.json.sig").unlink()
        (sealed.folder / "statement.json.sig").mkdir()

    for change in (folder_link, pipe, empty, link, replaced):
        change()
        assert sealed.wrong(), change.__name__


def junk() -> dict[str, Callable[[Path], object]]:
    def write(content: bytes) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(content)

    def folder(path: Path) -> None:
        path.unlink()
        path.mkdir()

    deep = b"[" * 200_000
    return {
        "empty": write(b""),
        "binary": write(bytes(range(256)) * 20),
        "deep": write(deep),
        "number": write(b"9" * 5000),
        "null": write(b"null"),
        "list": write(b"[]"),
        "object": write(b"{}"),
        "wrong types": write(b'{"_type":1,"predicate":[],"predicateType":{},"subject":7}'),
        "nan": write(b"NaN"),
        "invalid utf-8": write(b'"\xff"'),
        "surrogate": write(b'"\\ud800"'),
        "folder": folder,
    }


@pytest.mark.parametrize("kind", list(junk()))
@pytest.mark.parametrize(
    "path",
    [
        "statement.json",
        "statement.json.sig",
        "SHA256SUMS",
        "ledger.jsonl",
        "params.json",
        "decisions/backup-1-ada-approve.json",
        "decisions/backup-1-ada-approve.json.sig",
        "index.html",
        "review/statement.json",
        "review/ledger.jsonl",
    ],
)
def test_junk_is_a_failed_check_and_never_a_crash(sealed: Story, path: str, kind: str) -> None:
    junk()[kind](sealed.folder / path)

    assert sealed.wrong()


def test_a_record_that_is_none_fails_without_a_crash(tmp_path: Path, sealed: Story) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for record in (tmp_path / "missing", tmp_path / "file", tmp_path / "empty"):
        assert any(not c.ok for c in archive.verify(record, sealed.trust))
    for trust in (tmp_path / "missing", tmp_path, tmp_path / "file"):
        assert any(not c.ok for c in archive.verify(sealed.folder, trust))


def reseal(story: Story) -> None:
    """What somebody with the recorder's key could do: sign the folder as it is now."""
    for name in ("statement.json.sig", "statement.json", "SHA256SUMS"):
        (story.folder / name).unlink(missing_ok=True)
    shutil.rmtree(story.folder / "review", ignore_errors=True)
    events = story.ledger.events(RUN)
    end = next(i for i, e in enumerate(events) if e.kind == "run_ended") + 1
    with suppress(VerificationError):  # sealing says at once that such a record does not verify
        archive.seal(
            story.folder,
            events=events[:end],
            state=fold(events[:end]),
            recorder_key=story.keys["recorder"],
            trust=story.trust,
        )


def test_even_the_recorder_cannot_forge_a_decision(sealed: Story) -> None:
    path = sealed.folder / "decisions/backup-1-ada-approve.json"
    said = json.loads(path.read_bytes())
    said["predicate"]["comment"] = "another word"
    path.write_bytes(canonical_json(said))
    reseal(sealed)

    assert {c.name for c in sealed.wrong()} >= {"decision", "gates"}


def test_what_the_ledger_carries_of_a_statement_is_what_it_names(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    sign = Story.sign
    monkeypatch.setattr(Story, "sign", lambda *words: {**sign(*words), "statement_json": "{}"})
    story.gate("backup", "ada", story.until_gate_1())
    story.append("run_ended", {"state": "aborted"})

    with pytest.raises(VerificationError, match="carries another statement than it names"):
        story.seal()


def test_even_the_recorder_cannot_change_the_evidence_after_the_decision(sealed: Story) -> None:
    (sealed.folder / "artifacts/backup/manifest.json").write_bytes(b'{"dump":"bad!"}')
    reseal(sealed)

    wrong = {c.where for c in sealed.wrong()}
    assert "decisions/backup-1-ada-approve.json" in wrong
    assert "artifacts/backup/manifest.json" in wrong


def test_even_the_recorder_cannot_leave_a_file_out_of_sha256sums(sealed: Story) -> None:
    listed, path = sealed.folder / "SHA256SUMS", sealed.folder / "statement.json"
    listed.write_bytes(b"".join(listed.read_bytes().splitlines(keepends=True)[1:]))
    statement = json.loads(path.read_bytes())
    for subject in statement["subject"]:
        if subject["name"] == "SHA256SUMS":
            subject["digest"]["sha256"] = sha256(listed.read_bytes())
    path.write_bytes(canonical_json(statement))
    signature = signatures.sign(path.read_bytes(), key=sealed.keys["recorder"], namespace="runbook-record")
    path.with_name("statement.json.sig").write_bytes(signature)
    shutil.rmtree(sealed.folder / "review")

    assert [c.name for c in sealed.wrong()] == ["SHA256SUMS"]


def test_even_the_recorder_cannot_bring_a_script_into_the_pages(sealed: Story) -> None:
    page = sealed.folder / "artifacts/page.html"
    for content in (
        b"<p>x</p><SCRIPT>alert(1)</SCRIPT>",
        b"<img src=x onerror=alert(1)>",
        b"<a href=' java\nscript:alert(1)'>x</a>",
        b"<iframe src=x></iframe>",
        b"<meta http-equiv=refresh content='0;url=//evil'>",
        b"<img src='https://elsewhere.example/x.png'>",
        b"\xff\xfe<\x00s\x00c\x00r\x00i\x00p\x00t\x00>\x00",
    ):
        page.write_bytes(content)
        reseal(sealed)
        assert [c.where for c in sealed.wrong()] == ["artifacts/page.html"], content


@pytest.mark.parametrize(
    ("person", "changed", "why"),
    [
        ("ada", {"nonce": "cd" * 16}, "nonce"),
        ("ada", {"run": "20260102T030405Z-v1.5.0-ffffff"}, "about run"),
        ("ada", {"ledger_head": "0" * 64}, "ledger_head"),
        ("ada", {"round": 2}, "round"),
        ("ada", {"release": {"version": "v1.5.0", "commit": BEFORE, "environment": "rehearsal"}}, "another release"),
        ("bob", {}, "does not hold"),
        ("eve", {}, "does not hold"),
    ],
)
def test_a_decision_for_something_else_or_by_somebody_else_does_not_stand(
    story: Story, person: str, changed: dict[str, Any], why: str
) -> None:
    manifest = story.until_gate_1()
    opened = story.ask("backup", manifest)
    story.decide(opened, person, manifest, **changed)
    story.step("backup.sign_off")
    story.append("run_ended", {"state": "aborted"})

    with pytest.raises(VerificationError, match="does not verify"):
        story.seal()

    wrong = {c.name: c.why for c in story.wrong()}
    assert why in wrong["decision"]
    assert "does not stand" in wrong["gates"]


def test_who_opened_the_run_cannot_approve_it_whatever_their_role(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PARAMS["people"]["eve"], "roles", ["lead"])  # type: ignore[index]
    manifest = story.until_gate_1()
    story.decide(story.ask("backup", manifest), "eve", manifest)
    story.append("run_ended", {"state": "aborted"})

    with pytest.raises(VerificationError):
        story.seal()

    assert "eve opened the run and may not approve it" in {c.name: c.why for c in story.wrong()}["decision"]


def test_one_person_cannot_sign_as_another(story: Story) -> None:
    manifest = story.until_gate_1()
    story.decide(story.ask("backup", manifest), "ada", manifest, signer="bob")
    story.append("run_ended", {"state": "aborted"})

    with pytest.raises(VerificationError):
        story.seal()

    assert "no valid signature of ada" in {c.name: c.why for c in story.wrong()}["decision"]


def test_a_step_behind_a_gate_that_nobody_approved_is_seen(story: Story) -> None:
    manifest = story.until_gate_1()
    story.ask("backup", manifest)
    story.step("begin.prove_read_only")
    story.append("run_ended", {"state": "aborted"})

    with pytest.raises(VerificationError, match="gates"):
        story.seal()

    assert "before gate backup" in {c.name: c.why for c in story.wrong()}["gates"]


def test_a_rejected_gate_rolled_back_is_a_good_record(story: Story) -> None:
    manifest = story.until_gate_1()
    story.gate("backup", "ada", manifest)
    story.step("begin.prove_read_only")
    story.step("migrate.verify_schema")
    story.decide(story.ask("migration"), "ada", decision="reject")
    story.append("rollback_requested", {"reason": "locks remain", "exit_code": 3})
    story.step("rollback.lift_fence_and_maintenance")
    story.append("run_ended", {"state": "rolled_back"})

    story.seal()

    assert story.wrong() == []
    page = (story.folder / "index.html").read_text()
    assert "locks remain" in page
    assert "rejected" in page


def test_a_gate_asked_again_over_new_evidence_keeps_its_old_decision(story: Story) -> None:
    manifest = story.until_gate_1()
    story.decide(story.ask("backup", manifest), "ada", manifest)
    newer = story.write("artifacts/backup/manifest.json", b'{"dump":"better"}')
    story.step("backup.dump_database", newer)
    story.gate("backup", "ada", newer)
    story.append("run_ended", {"state": "aborted", "reason": "enough"})

    story.seal()

    assert story.wrong() == []


def test_a_review_of_another_record_does_not_fit(sealed: Story, tmp_path: Path, keys: dict[str, Path]) -> None:
    other = new_story(tmp_path / "other", keys)
    other.release()
    other.seal()
    other.review()

    shutil.rmtree(sealed.folder / "review")
    assert sealed.wrong() == []
    shutil.copytree(other.folder / "review", sealed.folder / "review")

    assert {"review statement", "review ledger"} <= {c.name for c in sealed.wrong()}


def test_a_review_leaves_the_record_as_it_was_and_is_signed_once(story: Story) -> None:
    story.release()
    story.seal()
    before = contents(story.folder)

    story.review()
    after = contents(story.folder)
    story.seal_review()

    assert {p: c for p, c in after.items() if not p.startswith("review/")} == before
    assert contents(story.folder) == after
    assert story.wrong() == []


def test_a_review_that_is_not_signed_yet_is_said_so_and_does_not_hinder_the_seal(story: Story) -> None:
    story.release()
    story.seal()
    story.notebook("review/08_review.ipynb", "Retrospective")

    assert any("not signed" in c.why for c in story.wrong())
    story.seal()


def test_public_tools_agree(sealed: Story) -> None:
    done = subprocess.run(("sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"), cwd=sealed.folder, check=False)
    assert done.returncode == 0

    argv = (
        "ssh-keygen",
        "-Y",
        "verify",
        "-f",
        str(sealed.trust),
        "-I",
        "recorder",
        "-n",
        "runbook-record",
        "-s",
        "statement.json.sig",
    )
    with (sealed.folder / "statement.json").open("rb") as statement:
        assert (
            subprocess.run(argv, cwd=sealed.folder, stdin=statement, check=False, capture_output=True).returncode == 0
        )


def test_the_statement_names_every_file_and_the_run(sealed: Story) -> None:
    statement = json.loads((sealed.folder / "statement.json").read_bytes())
    files = {p for p in contents(sealed.folder) if not p.startswith(("review/", "statement.json"))}

    assert {s["name"] for s in statement["subject"]} == files
    assert statement["predicateType"] == "https://runbook.dev/release-record/v1"
    assert statement["predicate"]["run_id"] == RUN
    assert statement["predicate"]["state"] == "completed"
    assert statement["predicate"]["release"]["commit"] == COMMIT
