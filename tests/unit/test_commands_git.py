"""git's argv word for word, and what is read from its output."""

from __future__ import annotations

from pathlib import Path

import pytest

from runbook_lib.commands import git

BASE = ("git", "-c", "safe.directory=/srv/shop.git", "--git-dir=/srv/shop.git")
REPOSITORY = Path("/srv/shop.git")
A, B = "a" * 40, "b" * 40


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            git.commit_of_tag(REPOSITORY, "v1.5.0"),
            ("rev-parse", "--verify", "--quiet", "--end-of-options", "refs/tags/v1.5.0^{commit}"),
        ),
        (
            git.commit_of_branch(REPOSITORY, "main"),
            ("rev-parse", "--verify", "--quiet", "--end-of-options", "refs/heads/main^{commit}"),
        ),
        (git.is_ancestor(REPOSITORY, A, "release"), ("merge-base", "--is-ancestor", A, "refs/heads/release")),
        (git.note(REPOSITORY, A, "ci"), ("notes", "--ref=refs/notes/ci", "show", A)),
        (
            git.subjects(REPOSITORY, A, B),
            ("log", "--no-show-signature", "--format=%s", "--end-of-options", f"{A}..{B}", "--"),
        ),
        (git.archive(REPOSITORY, A, into=Path("/tmp/t.tar")), ("archive", "--format=tar", "--output=/tmp/t.tar", A)),
        (
            git.push(REPOSITORY, "ssh://git.example/shop.git", A, "main"),
            ("push", "--quiet", "--end-of-options", "ssh://git.example/shop.git", f"{A}:refs/heads/main"),
        ),
        (
            git.fetch(REPOSITORY, "https://git.example/shop.git"),
            (
                "fetch",
                "--quiet",
                "--prune",
                "--no-tags",
                "--no-write-fetch-head",
                "--end-of-options",
                "https://git.example/shop.git",
                "+refs/heads/*:refs/heads/*",
                "+refs/tags/*:refs/tags/*",
                "+refs/notes/*:refs/notes/*",
            ),
        ),
    ],
)
def test_argv(argv: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert argv == (*BASE, *expected)


def test_a_push_is_never_forced() -> None:
    argv = git.push(REPOSITORY, "u", A, "main")

    assert not any(word.startswith(("+", "-f", "--force")) for word in argv)


def test_a_search_by_key_takes_only_that_key() -> None:
    output = f"{A} run-1/changelog-2\n{B} other run-1/changelog\n"

    assert git.found_key(output, "run-1/changelog") == B
    assert git.found_key(output, "run-1") is None
    assert git.found_key("", "run-1") is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("# Changelog\n\n## v1\n- a\n", "# Changelog\n\n## v2\n- b\n\n## v1\n- a\n"),
        ("# Changelog\nNotes.\n", "# Changelog\nNotes.\n\n## v2\n- b\n\n"),
        ("", "# Changelog\n\n## v2\n- b\n\n"),
        ("## v1\n### Fixed\n", "## v2\n- b\n\n## v1\n### Fixed\n"),
    ],
)
def test_an_entry_goes_on_top_of_the_sections(before: str, after: str) -> None:
    assert git.with_entry(before, "## v2\n- b\n") == after
