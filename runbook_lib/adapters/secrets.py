"""Secrets: resolved where they are used, and kept out of everything that is written."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from runbook_lib.errors import UsageError

_SHORTEST = 6  # a shorter value would redact ordinary words


@dataclass(slots=True)
class Secrets:
    """Resolves references and remembers the values only to redact them."""

    _known: set[str] = field(default_factory=set, repr=False)

    def resolve(self, reference: str) -> str:
        """The value behind `env:NAME` or `file:PATH`.

        Raises:
            UsageError: nothing is there; the reference is named, never a value.
        """
        kind, _, where = reference.partition(":")
        if kind == "env":
            value = os.environ.get(where, "")
        elif kind == "file":
            try:
                value = Path(where).read_text().strip()
            except OSError as error:
                raise UsageError(
                    f"secret {reference} cannot be read: {error.strerror}", remedy="mend the reference"
                ) from error
        else:
            raise UsageError(f"secret reference {kind}: is not known", remedy="use env:NAME or file:PATH")
        if not value:
            raise UsageError(f"secret {reference} is empty", remedy="mend the reference")
        self.remember(value)
        return value

    def path(self, reference: str) -> Path:
        """The file behind a `file:` reference, for tools that read it themselves."""
        kind, _, where = reference.partition(":")
        if kind != "file":
            raise UsageError(f"{reference} must be a file: reference here", remedy="use file:PATH")
        return Path(where)

    def remember(self, value: str) -> None:
        """Redact this value from now on."""
        if len(value) >= _SHORTEST:
            self._known.add(value)

    def redacted(self, text: str) -> str:
        """The text with every known secret value replaced."""
        for value in sorted(self._known, key=len, reverse=True):
            text = text.replace(value, "[redacted]")
        return text

    def redact_file(self, path: Path) -> None:
        """Replace known secret values in a log, line by line; untouched when there are none."""
        values = [value.encode() for value in sorted(self._known, key=len, reverse=True)]
        if not values or not path.exists():
            return
        content = path.read_bytes()
        clean = content
        for value in values:
            clean = clean.replace(value, b"[redacted]")
        if clean != content:
            path.write_bytes(clean)
