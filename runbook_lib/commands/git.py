"""git as argv: read a release candidate, commit a changelog entry without a working tree."""

from __future__ import annotations

import re
from pathlib import Path

KEY_TRAILER = "Runbook-Key"
_SECTION = re.compile(r"^## ", re.MULTILINE)


def git(repository: Path | str, *arguments: str) -> tuple[str, ...]:
    """Any git command on a bare repository.

    `safe.directory` is given for that one folder: a release user reads a repository that the git user owns.
    """
    return ("git", "-c", f"safe.directory={repository}", f"--git-dir={repository}", *arguments)


def commit_of_tag(repository: Path | str, tag: str) -> tuple[str, ...]:
    """Print the commit that a tag, annotated or not, stands on."""
    return git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"refs/tags/{tag}^{{commit}}")


def tags(repository: Path | str) -> tuple[str, ...]:
    """Print the newest tags, newest first."""
    return git(repository, "for-each-ref", "--sort=-creatordate", "--count=5", "--format=%(refname:short)", "refs/tags")


def commit_of_branch(repository: Path | str, branch: str) -> tuple[str, ...]:
    """Print the commit at the head of a branch."""
    return git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"refs/heads/{branch}^{{commit}}")


def is_ancestor(repository: Path | str, commit: str, branch: str) -> tuple[str, ...]:
    """Exit 0 when the branch holds the commit, 1 when it does not."""
    return git(repository, "merge-base", "--is-ancestor", commit, f"refs/heads/{branch}")


def note(repository: Path | str, commit: str, notes_ref: str) -> tuple[str, ...]:
    """Print the note on a commit."""
    return git(repository, "notes", f"--ref=refs/notes/{notes_ref}", "show", commit)


def subjects(repository: Path | str, since: str, until: str) -> tuple[str, ...]:
    """Print the subjects of the commits after `since` up to `until`, newest first."""
    return git(repository, "log", "--no-show-signature", "--format=%s", "--end-of-options", f"{since}..{until}", "--")


def archive(repository: Path | str, commit: str, *, into: Path) -> tuple[str, ...]:
    """Write a commit's tree as a tar file."""
    return git(repository, "archive", "--format=tar", f"--output={into}", commit)


def fetch(repository: Path | str, url: str) -> tuple[str, ...]:
    """Make a bare mirror hold what the git host holds now: branches, tags and notes, gone ones removed."""
    refs = ("+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*", "+refs/notes/*:refs/notes/*")
    return git(
        repository, "fetch", "--quiet", "--prune", "--no-tags", "--no-write-fetch-head", "--end-of-options", url, *refs
    )


def find_key(repository: Path | str, branch: str, key: str) -> tuple[str, ...]:
    """Print the newest commit of a branch whose message has this key's line, and the keys in that message."""
    return git(
        repository,
        "log",
        "--max-count=20",
        "--fixed-strings",
        f"--grep={KEY_TRAILER}: {key}",
        f"--format=%H %(trailers:key={KEY_TRAILER},valueonly,separator=%x20)",
        f"refs/heads/{branch}",
    )


def found_key(output: str, key: str) -> str | None:
    """The commit in `find_key`'s output that carries exactly this key: a search also finds longer ones."""
    for line in output.splitlines():
        commit, *keys = line.split()
        if key in keys:
            return commit
    return None


def push(repository: Path | str, url: str, commit: str, branch: str) -> tuple[str, ...]:
    """Move a branch of the git host forward to a commit; never by force."""
    return git(repository, "push", "--quiet", "--end-of-options", url, f"{commit}:refs/heads/{branch}")


def with_entry(changelog: str, entry: str) -> str:
    """The changelog with an entry on top: before the first section, after the heading."""
    entry = entry.strip() + "\n\n"
    section = _SECTION.search(changelog)
    if section:
        return changelog[: section.start()] + entry + changelog[section.start() :]
    return f"{changelog.rstrip()}\n\n{entry}".lstrip() if changelog.strip() else f"# Changelog\n\n{entry}"
