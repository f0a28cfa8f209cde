"""Builds the sample application's repository: the same commits, tags and notes each time.

The sources lie in `shop/`: `base/` is the first release, each later release a folder with only the files
that it adds or changes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "shop"
FREEZE_FILE = "runbook-freeze.json"
NOTES_REF = "refs/notes/ci"
AUTHOR = ("Sam Porter", "sam@shop.example")

FREEZE_HOOK = f"""#!/bin/sh
# Refuses pushes to the protected branches while a release holds the merge freeze.
case "$1" in
    refs/heads/main | refs/heads/release) ;;
    *) exit 0 ;;
esac
freeze="${{GIT_DIR:-.}}/{FREEZE_FILE}"
[ -e "$freeze" ] || exit 0
field() {{
    tr '\\n' ' ' < "$freeze" | sed -n 's/.*"'"$1"'" *: *"\\([^"]*\\)".*/\\1/p'
}}
echo "merge freeze: $1 is frozen by $(field by) since $(field since), run $(field run_id)" >&2
echo "why: $(field why)" >&2
echo "next: wait until the release ends, or ask $(field by)" >&2
exit 1
"""


class RepositoryError(Exception):
    """git could not build the repository; the message carries git's own words."""


@dataclass(frozen=True, slots=True)
class Revision:
    """One commit and the tag on it."""

    tag: str
    folder: str
    subject: str
    date: str
    ci: str
    released: bool = True


HISTORY = (
    Revision("v1.4.0", "base", "Process orders in a queue", "2026-03-02T09:00:00+00:00", "success"),
    Revision("v1.5.0", "v1.5.0", "Add coupons", "2026-03-16T09:00:00+00:00", "success"),
    Revision("v1.6.0", "v1.6.0", "Pace clients by fair use", "2026-03-30T09:00:00+00:00", "success"),
    # A candidate that must be refused: not merged into `release`, and its pipeline failed.
    Revision(
        "v1.7.0-rc.1",
        "v1.7.0-rc.1",
        "Start on gift cards",
        "2026-04-07T09:00:00+00:00",
        "failed",
        released=False,
    ),
)


def build(folder: Path) -> dict[str, str]:
    """Create the bare repository `folder/shop.git` and return each tag's commit (40 hex digits).

    A repository that is already there is left as it is, with whatever was pushed to it, and only read.

    Raises:
        RepositoryError: git is missing or refused.
    """
    repository = folder / "shop.git"
    if not repository.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".shop.git-") as scratch:
            half_built = Path(scratch) / "shop.git"
            _create(half_built, Path(scratch) / "tree")
            # Renamed when complete: a killed build leaves no half repository under the name.
            half_built.rename(repository)
    return {revision.tag: _commit_of(repository, revision.tag) for revision in _present()}


def _present() -> tuple[Revision, ...]:
    return tuple(revision for revision in HISTORY if (SOURCES / revision.folder).is_dir())


def _create(repository: Path, tree: Path) -> None:
    # No template: the user's own hooks and excludes have no place here.
    _git(
        None,
        "init",
        "--quiet",
        "--bare",
        "--template=",
        "--object-format=sha1",
        "--initial-branch=main",
        str(repository),
    )
    tree.mkdir()
    parent: str | None = None
    for revision in _present():
        _lay_over(SOURCES / revision.folder, tree)
        parent = _commit(repository, tree, revision, parent)
        _git(repository, "update-ref", "refs/heads/main", parent)
        if revision.released:
            _git(repository, "update-ref", "refs/heads/release", parent)
        message = f"{revision.tag}: {revision.subject}"
        _git(repository, "tag", "--annotate", "--message", message, revision.tag, parent, date=revision.date)
        report = {"status": revision.ci, "pipeline": f"shop/{revision.tag}", "finished": revision.date}
        note = json.dumps(report, sort_keys=True)
        _git(repository, "notes", f"--ref={NOTES_REF}", "add", "--message", note, parent, date=revision.date)
    (repository / "index").unlink()
    hook = repository / "hooks" / "update"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(FREEZE_HOOK, encoding="utf-8")
    hook.chmod(0o755)


def _lay_over(source: Path, tree: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".pytest_cache", ".ruff_cache", ".mypy_cache")
    shutil.copytree(source, tree, dirs_exist_ok=True, ignore=ignore)


def _commit(repository: Path, tree: Path, revision: Revision, parent: str | None) -> str:
    # Modes and line ends depend on how the sources were unpacked: commit plain files, byte for byte.
    plain = (
        "-c",
        "core.fileMode=false",
        "-c",
        "core.autocrlf=false",
        "-c",
        "core.bare=false",
        f"--work-tree={tree}",
    )
    # A fresh index each time: by size and time alone, git takes a file replaced within a second for unchanged.
    (repository / "index").unlink(missing_ok=True)
    _git(repository, *plain, "add", "--all", "--force", ".", cwd=tree)
    written = _git(repository, "write-tree")
    parents = () if parent is None else ("-p", parent)
    return _git(repository, "commit-tree", written, *parents, "-m", revision.subject, date=revision.date)


def _commit_of(repository: Path, tag: str) -> str:
    try:
        return _git(repository, "rev-parse", "--verify", f"refs/tags/{tag}^{{commit}}")
    except RepositoryError as error:
        raise RepositoryError(f"{repository} lacks the tag {tag}; remove that folder, it is built again") from error


def _git(repository: Path | None, *arguments: str, date: str | None = None, cwd: Path | None = None) -> str:
    where = () if repository is None else (f"--git-dir={repository}",)
    argv = ("git", *where, *arguments)
    try:
        done = subprocess.run(argv, env=_environment(date), cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RepositoryError("git is not installed; the rehearsal needs it to hold the sample application") from error
    if done.returncode != 0:
        raise RepositoryError(f"git {' '.join(arguments[:2])} failed: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip()


def _environment(date: str | None) -> Mapping[str, str]:
    """Nothing of the user's git reaches the commits: they must be the same on every machine."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    name, address = AUTHOR
    kept |= {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_NAME": name,
        "GIT_AUTHOR_EMAIL": address,
        "GIT_COMMITTER_NAME": name,
        "GIT_COMMITTER_EMAIL": address,
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
    }
    if date is not None:
        kept |= {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
    return kept
