"""The git host: candidates are read, merges frozen and the changelog pushed once."""

from __future__ import annotations

import json
import os
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from runbook_lib.adapters.git import GitRepository
from runbook_lib.errors import StepFailedError, UnavailableError, UsageError
from runbook_lib.ports import Repository

Shop = tuple[Path, dict[str, str]]
KEY = "20260301T200000Z-v1.5.0-abcdef/changelog"
ENTRY = "## v1.5.0 - released to rehearsal 2026-03-01\n- Add coupons"


def _git(*words: str, cwd: Path | None = None) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    who = ("-c", "user.name=Sam", "-c", "user.email=sam@example.org")
    done = subprocess.run(("git", *who, *words), cwd=cwd, env=env, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture(params=["folder", "mirror"])
def repository(
    request: pytest.FixtureRequest, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Repository:
    """By its folder, and through a mirror as for a remote URL."""
    (tmp_path / "scratch").mkdir()
    if request.param == "mirror":
        monkeypatch.setattr(GitRepository, "_current", GitRepository._mirrored)
    return GitRepository(str(shop[0]), scratch=tmp_path / "scratch", ci_notes_ref="ci")


def test_a_tag_gives_its_commit(repository: Repository, shop: Shop) -> None:
    assert {tag: repository.commit_of(tag) for tag in shop[1]} == shop[1]


@pytest.mark.parametrize("ref", ["v9.9.9", "main", "HEAD", "--help", "v1.5.0^"])
def test_what_is_no_tag_is_refused_with_the_known_ones(repository: Repository, ref: str) -> None:
    with pytest.raises(UsageError, match=r"there is no tag .*v1\.5\.0"):
        repository.commit_of(ref)


def test_merged_means_held_by_that_branch(repository: Repository, shop: Shop) -> None:
    assert repository.merged(shop[1]["v1.5.0"], "release")
    assert not repository.merged(shop[1]["v1.7.0-rc.1"], "release")
    with pytest.raises(UsageError, match="no branch gone"):
        repository.merged(shop[1]["v1.5.0"], "gone")


def test_ci_speaks_of_that_very_commit(repository: Repository, shop: Shop) -> None:
    path, commits = shop
    assert repository.ci_status(commits["v1.5.0"])["status"] == "success"
    assert repository.ci_status(commits["v1.7.0-rc.1"])["status"] == "failed"

    _git("--git-dir", str(path), "notes", "--ref=refs/notes/ci", "add", "-f", "-m", "green, honest", commits["v1.5.0"])
    assert repository.ci_status(commits["v1.5.0"]) == {"status": "unreadable"}
    _git("--git-dir", str(path), "notes", "--ref=refs/notes/ci", "remove", commits["v1.5.0"])
    assert repository.ci_status(commits["v1.5.0"]) == {"status": "missing"}


def test_a_moved_tag_is_seen(repository: Repository, shop: Shop) -> None:
    path, commits = shop
    repository.commit_of("v1.5.0")

    _git("--git-dir", str(path), "tag", "-f", "v1.5.0", commits["v1.4.0"])

    assert repository.commit_of("v1.5.0") == commits["v1.4.0"]


def test_log_lists_subjects_newest_first(repository: Repository, shop: Shop) -> None:
    assert repository.log(shop[1]["v1.4.0"], shop[1]["v1.6.0"]) == ["Pace clients by fair use", "Add coupons"]


def test_export_is_the_commits_tree(repository: Repository, shop: Shop, tmp_path: Path) -> None:
    target = tmp_path / "trees" / shop[1]["v1.5.0"]

    repository.export(shop[1]["v1.5.0"], target)
    repository.export(shop[1]["v1.5.0"], target)  # a second one finds it there

    assert (target / "VERSION").read_text().strip() == "v1.5.0"
    assert not (target / ".git").exists()
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def _push_to(path: Path, branch: str, work: Path) -> subprocess.CompletedProcess[str]:
    if not work.exists():
        _git("clone", "--quiet", str(path), str(work))
    _git("commit", "--quiet", "--allow-empty", "-m", "Hotfix", cwd=work)
    return subprocess.run(
        ("git", "push", "origin", f"HEAD:refs/heads/{branch}"), cwd=work, check=False, capture_output=True, text=True
    )


def test_freeze_refuses_merges_until_it_is_lifted(repository: Repository, shop: Shop, tmp_path: Path) -> None:
    repository.freeze("run-1", 'release "v1.5.0" to production')

    assert repository.frozen_by() == "run-1"
    refused = _push_to(shop[0], "main", tmp_path / "work")
    assert refused.returncode != 0
    assert "run-1" in refused.stderr
    assert _push_to(shop[0], "topic", tmp_path / "work").returncode == 0

    repository.lift_freeze("run-1")
    repository.lift_freeze("run-1")

    assert repository.frozen_by() is None
    assert _push_to(shop[0], "main", tmp_path / "work").returncode == 0


def test_freeze_belongs_to_one_run(repository: Repository, shop: Shop) -> None:
    repository.freeze("run-1", "why")
    since = json.loads((shop[0] / "runbook-freeze.json").read_text())["since"]
    repository.freeze("run-1", "why")

    assert json.loads((shop[0] / "runbook-freeze.json").read_text())["since"] == since
    with pytest.raises(UsageError, match="run-1"):
        repository.freeze("run-2", "why")
    repository.lift_freeze("run-2")
    assert repository.frozen_by() == "run-1"
    assert [path.name for path in shop[0].glob(".runbook*")] == []


def test_a_damaged_freeze_still_freezes(repository: Repository, shop: Shop) -> None:
    (shop[0] / "runbook-freeze.json").write_text("{")

    assert "unknown" in str(repository.frozen_by())
    with pytest.raises(UsageError):
        repository.freeze("run-1", "why")


def test_changelog_is_pushed_once(repository: Repository, shop: Shop) -> None:
    path = shop[0]
    assert repository.find_changelog(branch="main", key=KEY) is None

    commit = repository.add_changelog(ENTRY, path="CHANGELOG.md", branch="main", key=KEY)
    again = repository.add_changelog(ENTRY, path="CHANGELOG.md", branch="main", key=KEY)

    assert commit == again == repository.find_changelog(branch="main", key=KEY)
    assert repository.find_changelog(branch="main", key=KEY[:-1]) is None
    assert repository.find_changelog(branch="release", key=KEY) is None
    text = _git("--git-dir", str(path), "show", "main:CHANGELOG.md")
    assert text.count("released to rehearsal") == 1
    assert text.index("released to rehearsal") < text.index("## Unreleased")
    assert _git("--git-dir", str(path), "diff", "--name-only", f"{commit}^", commit) == "CHANGELOG.md"


def test_changelog_goes_on_top_of_what_others_pushed(repository: Repository, shop: Shop, tmp_path: Path) -> None:
    repository.find_changelog(branch="main", key=KEY)
    assert _push_to(shop[0], "main", tmp_path / "work").returncode == 0

    commit = repository.add_changelog(ENTRY, path="CHANGELOG.md", branch="main", key=KEY)

    assert _git("--git-dir", str(shop[0]), "log", "-1", "--format=%s", f"{commit}^") == "Hotfix"


def test_changelog_refused_by_a_freeze_says_why(repository: Repository, shop: Shop) -> None:
    repository.freeze("run-2", "their release")

    with pytest.raises(StepFailedError, match="run-2"):
        repository.add_changelog(ENTRY, path="CHANGELOG.md", branch="main", key=KEY)


def test_a_repository_that_is_gone_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="not there"):
        GitRepository(str(tmp_path / "gone.git"), scratch=tmp_path).commit_of("v1")


def test_a_remote_cannot_be_frozen_by_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="folder on this machine"):
        GitRepository("https://git.example/shop.git", scratch=tmp_path).freeze("run-1", "why")


def _race(url: str, scratch: Path, number: int, moment: float) -> str:
    time.sleep(max(0.0, moment - time.time()))
    one = GitRepository(url, scratch=scratch / str(number))
    try:
        one.freeze(f"run-{number}", "why")
        frozen = "yes"
    except UsageError:
        frozen = "no"
    one.add_changelog(f"## entry {number}\n- x", path="CHANGELOG.md", branch="release", key=f"key-{number}")
    return frozen


def test_processes_at_once_one_freezes_and_no_entry_is_lost(shop: Shop, tmp_path: Path) -> None:
    (shop[0] / "hooks" / "update").unlink()
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        for each in [pool.submit(time.sleep, 0.2) for _ in range(3)]:
            each.result()
        moment = time.time() + 0.2
        racing = [pool.submit(_race, str(shop[0]), tmp_path / "race", n, moment) for n in range(3)]
        assert sorted(each.result() for each in racing) == ["no", "no", "yes"]

    text = _git("--git-dir", str(shop[0]), "show", "release:CHANGELOG.md")
    assert [text.count(f"## entry {n}\n") for n in range(3)] == [1, 1, 1]
