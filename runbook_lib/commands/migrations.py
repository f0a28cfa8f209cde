"""Migration tools' command lines: dbmate, whose schema_migrations is Rails' table, and rails itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from runbook_lib.errors import UsageError
from runbook_lib.model import Command


@dataclass(frozen=True, slots=True)
class Target:
    """One database as one role sees it; the password is in `passfile`, `options` are the server's for each session."""

    host: str
    port: int
    role: str
    database: str
    passfile: str
    lock_timeout_s: float
    options: str = ""

    @property
    def url(self) -> str:
        """Without a password: the client takes it from the password file."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        # Only this machine is spoken to in the clear; elsewhere PGSSLMODE or the client's own default decides.
        clear = "?sslmode=disable" if self.host in ("127.0.0.1", "::1", "localhost") else ""
        return f"postgresql://{self.role}@{host}:{self.port}/{self.database}{clear}"

    @property
    def lock_timeout_ms(self) -> int:
        """How long a statement may wait for a lock, in milliseconds; never 0, which would mean for ever."""
        return max(1, round(self.lock_timeout_s * 1000))

    @property
    def env(self) -> dict[str, str]:
        """What the client needs beside its argv."""
        return {"PGPASSFILE": self.passfile}


def up(tool: str, executable: str, target: Target, *, tree: Path, directory: str, timeout_s: float) -> Command:
    """Apply what is pending."""
    if tool == "rails":
        return _rails(executable, target, tree, timeout_s, "db:migrate")
    return _dbmate(executable, target, tree / directory, timeout_s, "up")


def down(
    tool: str, executable: str, target: Target, *, tree: Path, directory: str, timeout_s: float, version: str
) -> Command:
    """Undo one version; dbmate undoes the newest only, so its caller checks first which that is."""
    if tool == "rails":
        command = _rails(executable, target, tree, timeout_s, "db:migrate:down")
        return Command(command.argv, timeout_s, {**command.env, "VERSION": version}, command.cwd)
    return _dbmate(executable, target, tree / directory, timeout_s, "rollback")


def status(tool: str, executable: str, target: Target, *, tree: Path, directory: str) -> Command:
    """List what is applied and pending; rails exits 1 on an empty database."""
    if tool == "rails":
        return _rails(executable, target, tree, 120.0, "db:migrate:status")
    return _dbmate(executable, target, tree / directory, 120.0, "status")


def versions_in(tree: Path, directory: str) -> dict[str, Path]:
    """The release's migrations: version to file, oldest first.

    Raises:
        UsageError: a file's name has no version, or two have the same.
    """
    found: dict[str, Path] = {}
    for path in sorted((tree / directory).glob("*")):
        if path.suffix not in (".sql", ".rb"):
            continue
        match = re.match(r"(\d{8,20})_", path.name)
        if match is None or match[1] in found:
            raise UsageError(f"migration {path.name} has no version of its own", remedy="rename it in the release")
        found[match[1]] = path
    return found


def reversible(path: Path) -> bool:
    """True when a migration says how it is undone."""
    text = path.read_text()
    if path.suffix == ".rb":
        return "IrreversibleMigration" not in text and re.search(r"def (change|down)\b", text) is not None
    return any(
        line.strip() and not line.strip().startswith("--")
        for down in _sections(text, "down")
        for line in down.splitlines()[1:]
    )


def transactional(path: Path, direction: str = "up") -> bool:
    """True when a migration, or its undo, and its row in schema_migrations are one transaction: both change or neither.

    What is not understood is not called one.

    Args:
        direction: `up` or `down`.
    """
    text = path.read_text()
    if path.suffix == ".rb":
        return "disable_ddl_transaction!" not in text
    found = _sections(text, direction)
    return len(found) == 1 and re.search(r"\btransaction:\s*false\b", found[0].partition("\n")[0]) is None


def _sections(text: str, direction: str) -> list[str]:
    """What stands behind each directive of a direction, from the rest of its line on, as dbmate spells them."""
    parts = re.split(r"^--\s*migrate:(up|down)\b", text, flags=re.MULTILINE)
    return [body for said, body in zip(parts[1::2], parts[2::2], strict=True) if said == direction]


def _dbmate(executable: str, target: Target, folder: Path, timeout_s: float, verb: str) -> Command:
    url = f"{target.url}{'&' if '?' in target.url else '?'}lock_timeout={target.lock_timeout_ms}"
    if target.options:
        url += f"&options={quote(target.options, safe='')}"
    argv = (executable, "--no-dump-schema", "--migrations-dir", str(folder), "--url", url, verb)
    return Command(argv, timeout_s=timeout_s, env=target.env)


def _rails(executable: str, target: Target, tree: Path, timeout_s: float, task: str) -> Command:
    env = {
        **target.env,
        "DATABASE_URL": target.url,
        "RAILS_ENV": "production",
        # In the URL Rails would drop it without a word: it knows only libpq's own names there.
        "PGOPTIONS": f"-c lock_timeout={target.lock_timeout_ms} {target.options}".rstrip(),
    }
    return Command((executable, task), timeout_s=timeout_s, env=env, cwd=tree)
