"""Writing files so that nobody reads half of one, and secrets so that nobody else reads them at all."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, content: str) -> None:
    """Replace `path` in one move."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(content, encoding="utf-8")
    part.replace(path)


def write_secret(path: Path, content: str) -> None:
    """Create `path` readable by its owner only, from its first byte on.

    Raises:
        FileExistsError: it is there already.
    """
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(content)
