"""The application's git host: release candidates, the CI's word on them, the merge freeze, the changelog."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runbook_lib.canonical import sync_folder
from runbook_lib.clock import utc_now
from runbook_lib.commands import git
from runbook_lib.errors import DeniedError, StepFailedError, UnavailableError, UsageError

FREEZE_FILE = "runbook-freeze.json"
_PUSH_TRIES = 5
_NO_NAME = re.compile(r"[\x00-\x20^~:?*\[\\]|\.\.|@\{")
_DENIED = (
    "permission denied",
    "authentication failed",
    "could not read username",
    "not authorized",
    "dubious ownership",
)


@dataclass(frozen=True, slots=True)
class GitRepository:
    """A repository by URL or folder, through the git program.

    A folder of this machine is read where it lies; of anything else a bare mirror is kept in `scratch`.

    Args:
        url: a folder, or what git takes as URL.
        scratch: for mirrors and half-made files.
        ci_notes_ref: the CI writes a JSON note on each commit that it judged, under refs/notes/THIS.
        author: name and address of the changelog's commits.
        timeout_s: for each git command, in seconds.
    """

    url: str
    scratch: Path
    ci_notes_ref: str = "ci"
    author: tuple[str, str] = ("runbook", "runbook@localhost")
    timeout_s: float = 120.0

    def commit_of(self, ref: str) -> str:
        """See `ports.Repository`."""
        repository = self._current()
        # A revision such as `v1^` is no tag's name, and git would follow it.
        found = None if _NO_NAME.search(ref) else self._try(git.commit_of_tag(repository, ref))
        if found is None:
            known = ", ".join(self._git(git.tags(repository)).split()) or "none"
            raise UsageError(
                f"there is no tag {ref} in {self.url} (newest: {known})", remedy="push the tag, or name another version"
            )
        return found.strip()

    def merged(self, commit: str, branch: str) -> bool:
        """See `ports.Repository`.

        Raises:
            UsageError: there is no such branch.
        """
        repository = self._current()
        if self._try(git.commit_of_branch(repository, branch)) is None:
            raise UsageError(f"there is no branch {branch} in {self.url}", remedy="mend repository.branch")
        return self._try(git.is_ancestor(repository, commit, branch)) is not None

    def ci_status(self, commit: str) -> Mapping[str, Any]:
        """See `ports.Repository`; a note that is no JSON object has the status `unreadable`."""
        said = self._try(git.note(self._current(), commit, self.ci_notes_ref))
        if said is None:
            return {"status": "missing"}
        try:
            report = json.loads(said)
        except ValueError:
            report = None
        return report if isinstance(report, dict) and "status" in report else {"status": "unreadable"}

    def freeze(self, run_id: str, why: str, *, sure: Callable[[], None] = lambda: None) -> None:
        """See `ports.Repository`: writes the file that the repository's update hook looks for.

        The file appears whole or not at all, and only when there is none: of two runs at once one wins.
        """
        path = self._freeze_file()
        content = {"run_id": run_id, "by": getpass.getuser(), "since": utc_now(), "why": why}
        draft = path.with_name(f".{FREEZE_FILE}.{os.getpid()}")
        try:
            with draft.open("w") as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
            draft.chmod(0o644)
            sure()
            path.hardlink_to(draft)
            sync_folder(path.parent)
        except FileExistsError:
            holder = self.frozen_by()
            if holder != run_id:
                raise UsageError(
                    f"merges are frozen already, by run {holder}", remedy=f"finish or abort run {holder} first"
                ) from None
        except OSError as error:
            raise DeniedError(
                f"the freeze cannot be written to {path}: {error.strerror}", remedy="check its rights"
            ) from error
        finally:
            draft.unlink(missing_ok=True)

    def frozen_by(self) -> str | None:
        """See `ports.Repository`; a freeze file that cannot be read counts as somebody else's."""
        try:
            data = json.loads(self._freeze_file().read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return "unknown (unreadable freeze file)"
        return str(data.get("run_id") or "unknown") if isinstance(data, dict) else "unknown"

    def lift_freeze(self, run_id: str) -> None:
        """See `ports.Repository`."""
        if self.frozen_by() != run_id:
            return
        path = self._freeze_file()
        try:
            path.unlink(missing_ok=True)
            sync_folder(path.parent)
        except OSError as error:
            raise DeniedError(
                f"the freeze {path} cannot be lifted: {error.strerror}", remedy=f"remove {path}"
            ) from error

    def export(self, commit: str, into: Path) -> None:
        """See `ports.Repository`."""
        repository = self._current()
        into.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=into.parent, prefix=f".{into.name[:12]}."))
        try:
            self._git(git.archive(repository, commit, into=work / "tree.tar"))
            tree = work / "tree"
            tree.mkdir()
            with tarfile.open(work / "tree.tar") as tar:
                tar.extractall(tree, filter="data")
            try:
                tree.rename(into)
            except OSError:
                # Another process was first: the same commit, hence the same files.
                if not into.is_dir():
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def add_changelog(
        self, entry: str, *, path: str, branch: str, key: str, sure: Callable[[], None] = lambda: None
    ) -> str:
        """See `ports.Repository`.

        Raises:
            StepFailedError: the git host refused the push; its own words are in the message.
        """
        said = ""
        for _ in range(_PUSH_TRIES):
            mirror = self._mirrored()
            known = git.found_key(self._git(git.find_key(mirror, branch, key)), key)
            if known is not None:
                return known
            head = self._git(git.commit_of_branch(mirror, branch)).strip()
            commit = self._commit(mirror, head, entry, path, key)
            sure()
            done = self._run(git.push(mirror, self.url, commit, branch))
            if done.returncode == 0:
                return commit
            said = _one_line(done.stderr)
            if not any(
                word in said for word in ("fetch first", "non-fast-forward", "failed to update ref", "cannot lock ref")
            ):
                break
            # Somebody else pushed in between: on top of theirs then.
        raise StepFailedError(
            f"{self.url} refused the changelog on {branch}: {said}", remedy="lift what refuses it, then resume"
        )

    def find_changelog(self, *, branch: str, key: str) -> str | None:
        """See `ports.Repository`."""
        return git.found_key(self._git(git.find_key(self._current(), branch, key)), key)

    def log(self, since: str, until: str) -> list[str]:
        """See `ports.Repository`."""
        return self._git(git.subjects(self._current(), since, until)).splitlines()

    def _commit(self, mirror: Path, head: str, entry: str, path: str, key: str) -> str:
        """Make the commit in the mirror: an index of its own, no working tree."""
        old = self._try(git.git(mirror, "show", f"{head}:{path}")) or ""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
            content = Path(folder) / "changelog"
            content.write_text(git.with_entry(old, entry))
            blob = self._git(git.git(mirror, "hash-object", "-w", "--no-filters", str(content))).strip()
            self._git(git.git(mirror, "read-tree", head), env=index)
            self._git(git.git(mirror, "update-index", "--add", "--cacheinfo", f"100644,{blob},{path}"), env=index)
            tree = self._git(git.git(mirror, "write-tree"), env=index).strip()
        title = entry.strip().splitlines()[0].lstrip("# ").strip()
        message = f"Changelog: {title}\n\n{git.KEY_TRAILER}: {key}\n"
        name, address = self.author
        who = {
            f"GIT_{role}_{part}": value
            for role in ("AUTHOR", "COMMITTER")
            for part, value in (("NAME", name), ("EMAIL", address))
        }
        return self._git(git.git(mirror, "commit-tree", tree, "-p", head, "-m", message), env=who).strip()

    @property
    def _folder(self) -> Path | None:
        path = Path(self.url.removeprefix("file://"))
        if path.is_absolute():
            return path / ".git" if (path / ".git").is_dir() else path
        return None

    def _freeze_file(self) -> Path:
        if self._folder is None:
            raise UsageError(
                f"repository.freeze hook-file needs the repository's folder on this machine, not {self.url}",
                remedy="run where the repository lies, or protect the branch by hand",
            )
        if not self._folder.is_dir():
            raise UnavailableError(f"the repository {self.url} is not there", remedy="check repository.url")
        return self._folder / FREEZE_FILE

    def _current(self) -> Path:
        """A repository that holds what the git host holds now."""
        if self._folder is None:
            return self._mirrored()
        if not self._folder.is_dir():
            raise UnavailableError(f"the repository {self.url} is not there", remedy="check repository.url")
        return self._folder

    def _mirrored(self) -> Path:
        mirror = self.scratch / "mirror.git"
        if not (mirror / "HEAD").exists():
            mirror.parent.mkdir(parents=True, exist_ok=True)
            self._git(("git", "init", "--quiet", "--bare", "--template=", str(mirror)))
        self._git(git.fetch(mirror, self.url))
        return mirror

    def _git(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> str:
        done = self._run(argv, env=env)
        if done.returncode != 0:
            said = _one_line(done.stderr) or f"exit {done.returncode}"
            kind = DeniedError if any(word in said.lower() for word in _DENIED) else UnavailableError
            raise kind(f"git on {self.url}: {said}", remedy="check repository.url and the keys of this user")
        return done.stdout

    def _try(self, argv: Sequence[str]) -> str | None:
        """The output, or None when git says no (exit 1, or 128 with the repository readable)."""
        done = self._run(argv)
        if done.returncode == 0:
            return done.stdout
        if any(word in done.stderr.lower() for word in (*_DENIED, "not a git repository")):
            raise DeniedError(
                f"git on {self.url}: {_one_line(done.stderr)}", remedy="check repository.url and its rights"
            )
        return None

    def _run(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        # Of the caller's own git settings nothing counts but its keys: a remote needs them, a folder does not.
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        clean |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
        if self._folder is not None:
            clean["GIT_CONFIG_GLOBAL"] = os.devnull
        try:
            return subprocess.run(  # noqa: S603  # argv built in commands.git
                argv,
                env={**clean, **(env or {})},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=self.timeout_s,
            )
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(
                f"git on {self.url} did not answer in {self.timeout_s:g} s", remedy="try again"
            ) from error
        except FileNotFoundError as error:
            raise UsageError("git is not installed on this machine", remedy="install git") from error


def _one_line(said: str) -> str:
    return " | ".join(line.strip() for line in said.splitlines() if line.strip())[:500]
