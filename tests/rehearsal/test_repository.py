"""The sample application's repository: same commits everywhere, and a freeze that refuses pushes."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from rehearsal import repository
from rehearsal.repository import RepositoryError, build

RELEASES = ("v1.4.0", "v1.5.0", "v1.6.0")
CANDIDATE = "v1.7.0-rc.1"


def git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = ("git", "-c", "user.name=Robin", "-c", "user.email=robin@shop.example", *arguments)
    environment = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    return subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("built")
    return folder / "shop.git", build(folder)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    build(tmp_path)
    assert git(tmp_path, "clone", "--quiet", "shop.git", "work").returncode == 0
    work = tmp_path / "work"
    (work / "CHANGELOG.md").write_text("# Changelog\n", encoding="utf-8")
    assert git(work, "commit", "--quiet", "-am", "Write the changelog").returncode == 0
    return work


def freeze(shop: Path) -> Path:
    path = shop / repository.FREEZE_FILE
    facts = {
        "run_id": "20260316T090000Z-v1.5.0-abc123",
        "by": "ada",
        "since": "09:00",
        "why": "release of v1.5.0",
    }
    path.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return path


def test_commits_are_the_same_on_every_machine(
    built: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".gitconfig").write_text(
        "[user]\nname = Else\n[core]\nautocrlf = true\n[commit]\ngpgSign = true\n[tag]\ngpgSign = true\n"
        "[init]\ndefaultObjectFormat = sha256\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Else")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    before = os.umask(0o077)

    try:
        again = build(tmp_path / "again")
    finally:
        os.umask(before)

    assert again == built[1]


def test_every_tag_is_annotated_and_holds_its_own_version(built: tuple[Path, dict[str, str]]) -> None:
    shop, commits = built

    assert tuple(commits) == (*RELEASES, CANDIDATE)
    for tag, commit in commits.items():
        assert re.fullmatch("[0-9a-f]{40}", commit)
        assert git(shop, "cat-file", "-t", tag).stdout.strip() == "tag"
        assert git(shop, "show", f"{tag}:VERSION").stdout.strip() == tag


def test_releases_are_merged_and_their_pipelines_green_the_candidate_neither(
    built: tuple[Path, dict[str, str]],
) -> None:
    shop, commits = built

    merged = git(shop, "tag", "--merged", "release").stdout.split()
    reports = {
        tag: json.loads(git(shop, "notes", f"--ref={repository.NOTES_REF}", "show", commit).stdout)["status"]
        for tag, commit in commits.items()
    }

    assert merged == list(RELEASES)
    assert reports == dict.fromkeys(RELEASES, "success") | {CANDIDATE: "failed"}


def test_each_next_release_keeps_the_earlier_migrations(built: tuple[Path, dict[str, str]]) -> None:
    shop, _ = built

    pending = [set(git(shop, "ls-tree", "--name-only", f"{tag}:db/migrations").stdout.split()) for tag in RELEASES]

    assert pending[0] < pending[1] < pending[2]
    assert [len(later - earlier) for earlier, later in pairwise(pending)] == [2, 1]


def test_an_existing_repository_keeps_what_was_pushed(clone: Path) -> None:
    pushed = git(clone, "push", "origin", "main")

    build(clone.parent)

    assert pushed.returncode == 0, pushed.stderr
    assert "Write the changelog" in git(clone.parent / "shop.git", "log", "-1", "main").stdout


def test_a_repository_of_another_version_is_named(tmp_path: Path) -> None:
    subprocess.run(("git", "init", "--quiet", "--bare", tmp_path / "shop.git"), check=True)

    with pytest.raises(RepositoryError, match=r"lacks the tag v1\.4\.0; remove that folder"):
        build(tmp_path)


@pytest.mark.parametrize("branch", ["main", "release"])
def test_a_freeze_refuses_pushes_and_says_who_and_why(clone: Path, branch: str) -> None:
    frozen = freeze(clone.parent / "shop.git")

    refused = git(clone, "push", "origin", f"HEAD:{branch}")
    frozen.unlink()
    accepted = git(clone, "push", "origin", f"HEAD:{branch}", "--force")

    assert refused.returncode != 0
    assert "frozen by ada since 09:00, run 20260316T090000Z-v1.5.0-abc123" in refused.stderr
    assert "why: release of v1.5.0" in refused.stderr
    assert accepted.returncode == 0, accepted.stderr


def test_a_freeze_lets_other_branches_through(clone: Path) -> None:
    freeze(clone.parent / "shop.git")

    assert git(clone, "push", "origin", "HEAD:refs/heads/topic").returncode == 0


def test_the_hook_is_executable(built: tuple[Path, dict[str, str]]) -> None:
    assert (built[0] / "hooks" / "update").stat().st_mode & stat.S_IXUSR
