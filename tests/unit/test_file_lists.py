"""What an archive holds against what its host held, whatever the number of files."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from runbook_lib.adapters import file_lists
from runbook_lib.adapters.file_lists import AFTER, ARCHIVED, BEFORE, SOURCE, Comparison
from runbook_lib.errors import StepFailedError

H1, H2, H3 = "a" * 64, "b" * 64, "c" * 64
QUIET: Mapping[str, str] = {}
# What comparing that many may add to the process, in MiB; their names and digests alone are more.
_MANY, _MOST_MIB = 100_000, 40
_COMPARED = """
import re, sys
from pathlib import Path
from runbook_lib.adapters.file_lists import ARCHIVED, AFTER, BEFORE, SOURCE, file_lists
from runbook_lib.commands import archive_files

def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

many, folder = int(sys.argv[1]), Path(sys.argv[2])
names = lambda: (f"current/packages/package-{n % 900}/modules/component-{n}.js" for n in range(many))
before = peak()
with file_lists(folder / "lists") as lists, (folder / "written").open("wb") as file:
    for of in (BEFORE, AFTER):
        lists.add(of, archive_files.parse_stamps(f"{name}\\0{'1234 1790000000.1234567890 ' * 2}\\0".encode() for name in names()))
    lists.add(SOURCE, archive_files.parse_manifest(f"{n:064x}  ./{name}\\0".encode() for n, name in enumerate(names())))
    lists.add(ARCHIVED, ((name, f"{n:064x}") for n, name in enumerate(names())))
    found = lists.compare()
    lists.write("host", file)
assert found.proved and found.files == many, found
print(peak() - before)
"""


def compared(
    folder: Path,
    source: Mapping[str, str],
    archived: Mapping[str, str],
    before: Mapping[str, str] = QUIET,
    after: Mapping[str, str] = QUIET,
) -> tuple[Comparison, dict[str, Any]]:
    written = io.BytesIO()
    with file_lists.file_lists(folder / "lists") as lists:
        for of, entries in ((BEFORE, before), (AFTER, after), (SOURCE, source), (ARCHIVED, archived)):
            assert lists.add(of, entries.items()) == len(entries)
        found = lists.compare()
        lists.write("app-01", written)
    assert list(folder.iterdir()) == []
    return found, json.loads(written.getvalue())


@pytest.mark.parametrize(
    ("archived", "missing", "differing", "named"),
    [
        ({"a": H1, "b": H2}, 0, 0, []),
        ({"a": H1}, 1, 0, ["b"]),
        ({"a": H1, "b": H3}, 0, 1, ["b"]),
        ({"a": H1, "b": H2, "c": H3}, 0, 1, ["c"]),
        ({"c": H3}, 2, 1, ["a", "b", "c"]),
    ],
)
def test_a_quiet_host_must_be_equal(
    tmp_path: Path, archived: dict[str, str], missing: int, differing: int, named: list[str]
) -> None:
    found, listing = compared(tmp_path, {"a": H1, "b": H2}, archived)

    assert (found.missing, found.differing, list(found.wrong_names)) == (missing, differing, named)
    assert found.proved == (not named)
    assert listing == {"host": "app-01", "files": archived, "changed_while_archived": []}


def test_what_moved_meanwhile_is_named_not_failed(tmp_path: Path) -> None:
    before, after = {"log": "1", "gone": "2", "a": "3"}, {"log": "4", "new": "5", "a": "3"}
    odd = 'odd\nname "x" ü'

    found, listing = compared(
        tmp_path, {"log": H1, "gone": H2, "a": H1, odd: H1}, {"log": H3, "a": H1, "new": H2, odd: H1}, before, after
    )

    assert found.proved
    assert (found.files, found.moving, list(found.moving_names)) == (4, 3, ["gone", "log", "new"])
    assert listing["changed_while_archived"] == ["gone", "log", "new"]
    assert listing["files"] == {"a": H1, "log": H3, "new": H2, odd: H1}


def test_a_file_that_is_archived_twice_is_right_twice(tmp_path: Path) -> None:
    with file_lists.file_lists(tmp_path / "lists") as lists:
        lists.add(SOURCE, [("a", H2), ("a", H2)])
        lists.add(ARCHIVED, [("a", H1), ("a", H2)])

        assert lists.compare().differing == 1


def test_which_names_are_files_themselves(tmp_path: Path) -> None:
    with file_lists.file_lists(tmp_path / "lists") as lists:
        lists.add(SOURCE, [("shared/env", H1), ("current/a", H2)])

        assert lists.known(SOURCE, ["current", "shared/env"]) == {"shared/env"}


def test_a_disk_that_is_full_is_said(tmp_path: Path) -> None:
    with file_lists.file_lists(tmp_path / "lists") as lists, pytest.raises(StepFailedError, match=r"lists .*full"):
        lists._database.execute("PRAGMA max_page_count = 3")  # as a disk without room
        lists.add(SOURCE, ((f"{n:0999}", H1) for n in range(100)))


def test_memory_does_not_grow_with_the_number_of_files(tmp_path: Path) -> None:
    argv = (sys.executable, "-c", _COMPARED, str(_MANY), str(tmp_path))

    said = subprocess.run(argv, check=True, capture_output=True, text=True).stdout

    assert int(said) < _MOST_MIB
