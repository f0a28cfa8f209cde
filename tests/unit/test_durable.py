"""What is said to be written is on disk: the order in which the operating system is asked, seen from outside."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from runbook_lib import backup_files
from runbook_lib.canonical import canonical_json, write_atomically
from runbook_lib.errors import StepInDoubtError
from runbook_lib.model import StepResult
from runbook_lib.run import Run


@dataclass
class Disk:
    """What was synced, renamed and linked, in order; of a synced file its size at that moment."""

    calls: list[tuple[object, ...]] = field(default_factory=list)

    def watch(self, patch: pytest.MonkeyPatch) -> Disk:
        """Look over the shoulder of the calls that matter; each is passed on as it is."""
        fsync, replace, link = os.fsync, os.replace, os.link

        def seen_fsync(handle: int) -> None:
            fsync(handle)
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            self.calls.append(("sync", path) if path.is_dir() else ("sync", path, path.stat().st_size))

        def seen_replace(source: str | Path, target: str | Path) -> None:
            replace(source, target)
            self.calls.append(("rename", Path(source), Path(target)))

        def seen_link(source: str | Path, target: str | Path, **more: bool) -> None:
            link(source, target, **more)
            self.calls.append(("link", Path(source), Path(target)))

        patch.setattr(os, "fsync", seen_fsync)
        patch.setattr(os, "replace", seen_replace)
        patch.setattr(os, "link", seen_link)
        return self


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk().watch(monkeypatch)


def test_a_file_is_on_disk_before_it_gets_its_name_and_its_folder_after(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "params.json"
    path.write_bytes(b"old")

    write_atomically(path, b"new content")

    scratch = next(call[1] for call in disk.calls if call[0] == "rename")
    assert disk.calls == [
        ("sync", scratch, len(b"new content")),
        ("rename", scratch, path),
        ("sync", tmp_path),
    ]


def test_who_reads_meanwhile_sees_the_old_content_or_the_new(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "params.json"
    path.write_bytes(b"old")
    before = path.stat().st_ino

    with path.open("rb") as reader:
        write_atomically(path, b"new content")
        assert reader.read() == b"old"

    assert path.stat().st_ino != before
    assert list(tmp_path.iterdir()) == [path]


def backup_of(run: Run) -> tuple[Path, Path, StepResult]:
    """A part that was proved, the name that it is to get, and its proof."""
    final = backup_files.dump_path(run)
    part = backup_files.fresh_part(final)
    part.write_bytes(b"dump")
    return part, final, StepResult(facts={"sha256": backup_files.sha256_file(part)})


def test_a_backup_gets_its_name_when_its_proof_is_on_disk_and_its_folder_follows(run: Run, disk: Disk) -> None:
    part, final, proof = backup_of(run)
    disk.calls.clear()

    backup_files.finish(run, part, final, proof)

    names = [call[0] for call in disk.calls]
    assert names == ["sync", "rename", "sync", "link", "sync"]
    assert disk.calls[3:] == [("link", part, final), ("sync", final.parent)]
    assert not part.exists()


def test_a_backup_never_takes_the_place_of_another_file(run: Run) -> None:
    part, final, proof = backup_of(run)
    final.write_text("precious")

    with pytest.raises(FileExistsError):
        backup_files.finish(run, part, final, proof)

    assert final.read_text() == "precious"


def test_a_backup_that_is_not_what_was_proved_is_not_taken_for_it(run: Run) -> None:
    part, final, proof = backup_of(run)
    backup_files.finish(run, part, final, proof)
    known = backup_files.finished(run, final)
    assert known is not None
    assert known.facts == proof.facts
    final.write_bytes(b"dumb")

    with pytest.raises(StepInDoubtError, match="is not what this run verified"):
        backup_files.finished(run, final)


@pytest.mark.parametrize("as_before", [False, True])
def test_another_machine_finds_a_backups_artifacts_beside_it(run: Run, tmp_path: Path, as_before: bool) -> None:
    part, final, _ = backup_of(run)
    kept = run.keep("backup/inventory.json", '{"tables": {}}')
    proof = StepResult(facts={"sha256": backup_files.sha256_file(part)}, artifacts=(kept,))
    backup_files.finish(run, part, final, proof)
    if as_before:  # an earlier version kept them inside of its JSON
        (note,) = final.parent.glob(f"{final.name}.*.json")
        note.write_bytes(canonical_json({"result": proof.as_json(), "artifacts": {kept.path: '{"tables": {}}'}}))
    elsewhere = replace(run, folder=tmp_path / "elsewhere", scratch=tmp_path / "scratch-elsewhere")

    found = backup_files.finished(elsewhere, final)

    assert found is not None
    assert [elsewhere.describe(elsewhere.folder / a.path) for a in found.artifacts] == [kept]
