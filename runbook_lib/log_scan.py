"""New error signatures in an application's log: what is said after the deployment and was not said before."""

from __future__ import annotations

import re
from collections import Counter

_TROUBLE = re.compile(
    r"\b(ERROR|CRITICAL|FATAL|Exception|Traceback|[A-Z]\w+(?:Error|Exception))\b|migration.*warn|DEPRECATION WARNING",
    re.IGNORECASE,
)
_TIME = re.compile(r"^\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?")
_CHANGING = (
    (re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"), "<id>"),
    (re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{7,64}\b"), "<hex>"),
    (re.compile(r"\"[^\"]*\"|'[^']*'"), "<text>"),
    (re.compile(r"\b[a-z]+-\d+\b"), "<host>"),
    (re.compile(r"\d+(?:\.\d+)?"), "<n>"),
)


def signature(line: str) -> str:
    """A line with everything that changes from case to case taken out."""
    line = _TIME.sub("", line).strip()
    for pattern, mark in _CHANGING:
        line = pattern.sub(mark, line)
    return line[:300]


def signatures(text: str, *, from_time: str = "", until_time: str = "9999") -> Counter[str]:
    """Count the signatures of troubled lines between two ISO 8601 UTC moments; a line without time has its forerunner's."""
    found: Counter[str] = Counter()
    now = ""
    for line in text.splitlines():
        stamp = _TIME.match(line)
        if stamp:
            now = stamp[0].replace(" ", "T")[:19]
        if from_time[:19] <= now < until_time[:19] and _TROUBLE.search(line):
            found[signature(line)] += 1
    return found


def new_signatures(before: Counter[str], after: Counter[str]) -> dict[str, int]:
    """What only the later window says, most frequent first."""
    return {text: count for text, count in after.most_common() if text not in before}
