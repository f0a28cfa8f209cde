"""Wrong params as hypothesis draws them: the example with mistakes put in, pieces cut out, or anything at all."""

from __future__ import annotations

import copy
import re
from typing import Any

import yaml
from hypothesis import strategies as st

from tests.project import ROOT
from tests.soak import mistakes
from tests.soak.mistakes import FIELDS, FREE, GONE, Field, put

TEXT = (ROOT / "params" / "example.yml").read_text()
EXAMPLE: dict[str, Any] = yaml.safe_load(TEXT)
ANY_TEXT = st.text(max_size=40)
_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT
VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)
_BY_TYPE: dict[str, st.SearchStrategy[Any]] = {
    "bool": st.booleans(),
    "int": st.integers(),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "str": ANY_TEXT,
    "list": st.lists(_SCALARS, max_size=3),
    "map": st.dictionaries(ANY_TEXT, _SCALARS, max_size=3),
}


def _with(characters: str) -> st.SearchStrategy[str]:
    return st.builds("{}{}{}".format, ANY_TEXT, st.sampled_from(characters), ANY_TEXT)


def _behind(start: str) -> st.SearchStrategy[str]:
    return ANY_TEXT.map(lambda text: start + text)


def _not(pattern: str) -> st.SearchStrategy[str]:
    return ANY_TEXT.filter(lambda text: not re.match(pattern, text))


# Texts that no field of the kind takes. They say less than the grammars do, and never more.
_CONTROLLED = _with("\x00\x01\n\r\t\x1b\x7f\x85\x9b\u2028\u202e")
_NO_ADDRESS = _not(r"[^:]*:|/") | _with(" \t\n\u00a0")
OUTSIDE: dict[str, st.SearchStrategy[str]] = {
    **dict.fromkeys(("url", "front", "secret", "address", "outbox", "folder", "csv", "ledger"), _NO_ADDRESS),
    "name": _not(r"[a-z][a-z0-9_-]*\Z") | st.from_regex(r"[a-z]{32,60}", fullmatch=True),
    "word": _not(r"[A-Za-z_][A-Za-z0-9_.-]*\Z"),
    "line": _CONTROLLED,
    "facts": _CONTROLLED,
    "text": _with("\x00"),
    "choice": _not(r"[a-z0-9_-]+\Z"),
    "urlpath": _not("/") | _with(" \t\n\u00a0"),
    "below": _behind("/") | _behind("../") | _behind("-") | _CONTROLLED,
    "absolute": _not("/") | _CONTROLLED,
    "fileref": _NO_ADDRESS | _behind("env:"),
    "remote": _NO_ADDRESS | _behind("-"),
    "server": _with(" \t\n/?@,;$#'"),
    "bucket": _not(r"[a-z0-9.-]+\Z"),
    "key": _not("ssh-|sk-|ecdsa-"),
    "moment": _not(r".*\d{4}"),
}


def _wrong_type(one: Field) -> st.SearchStrategy[Any]:
    own = mistakes.type_of(one.kind)
    # A whole number is a good floating-point number.
    others = [strategy for name, strategy in _BY_TYPE.items() if name != own and (own, name) != ("float", "int")]
    return st.one_of(*others) if one.null else st.one_of(st.none(), *others)


def _wrong_number(one: Field) -> st.SearchStrategy[Any]:
    never: st.SearchStrategy[Any] = st.sampled_from(mistakes.WRONG_NUMBERS)
    if one.least is None or one.most is None:
        return never
    if one.kind == "int":
        return never | st.integers(max_value=int(one.least) - 1) | st.integers(min_value=int(one.most) + 1)
    low = st.floats(max_value=one.least, exclude_max=not one.above, allow_nan=False)
    return never | low | st.floats(min_value=one.most, exclude_min=True, allow_nan=False)


def _wrong_text(one: Field) -> st.SearchStrategy[Any]:
    return st.sampled_from(mistakes.WRONG_TEXTS[one.kind]) | OUTSIDE[one.kind]


_KNOWN = {one.path.rpartition(".")[2] for one in FIELDS}
_OPEN = (*FREE, "watch.rules", "watch.hard_limits", "application.probe_write_form")
# The kinds of mistake: where each can be made, and what is put there.
_KINDS: dict[str, tuple[Field, ...]] = {
    "unknown key": tuple(one for one in FIELDS if one.kind == "map" and not one.null and one.path not in _OPEN),
    "wrong name": tuple(one for one in FIELDS if one.path in FREE),
    "wrong type": FIELDS,
    "missing key": tuple(one for one in FIELDS if one.needed and not one.path.endswith("*")),
    "wrong text": tuple(one for one in FIELDS if one.kind in mistakes.WRONG_TEXTS),
    "out of range": tuple(one for one in FIELDS if one.kind in mistakes.NUMBERS),
}


@st.composite
def _mistake(draw: st.DrawFn, data: dict[str, Any]) -> str:
    """Make one in place and tell its kind; empty when its place is not there any more."""
    kind = draw(st.sampled_from(sorted(_KINDS)))
    one = draw(st.sampled_from(_KINDS[kind]))
    names: list[str] = []
    node: Any = data
    try:
        for part in one.path.split("."):
            names.append(draw(st.sampled_from(sorted(node))) if part == "*" and node else part)
            node = node[int(names[-1]) if isinstance(node, list) else names[-1]]
        if kind == "unknown key":
            node[draw(ANY_TEXT.filter(lambda text: text not in _KNOWN))] = draw(VALUES)
        elif kind == "wrong name":
            node[draw(OUTSIDE["name"])] = copy.deepcopy(next(iter(node.values())))
        elif kind == "missing key":
            put(data, ".".join(names), GONE)
        else:
            wrong = {"wrong type": _wrong_type, "wrong text": _wrong_text, "out of range": _wrong_number}[kind]
            put(data, ".".join(names), draw(wrong(one)))
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration):
        return ""  # an earlier mistake is in its place
    return kind


@st.composite
def mutants(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """The example with one to three mistakes, and the kind of the last: no later one undoes it."""
    data = copy.deepcopy(EXAMPLE)
    kinds = [draw(_mistake(data)) for _ in range(draw(st.sampled_from((1, 1, 2, 3))))]
    kind = next((kind for kind in reversed(kinds) if kind), "")
    if not kind:
        data.pop("database")
    return kind or "missing key", data


@st.composite
def any_value(draw: st.DrawFn) -> dict[str, Any]:
    """The example with anything at one place."""
    data = copy.deepcopy(EXAMPLE)
    node, name = data, draw(st.sampled_from(sorted(data)))
    while isinstance(node[name], dict) and node[name] and draw(st.integers(0, 3)):
        node, name = node[name], draw(st.sampled_from(sorted(node[name])))
    node[name] = draw(VALUES)
    return data


_MARKS = r"""{ } [ ] : - ? ! & * # % @ ` | > ' " ~ \ , &a *a <<: ${ ${a} --- ... 0x 1e9 !!bool !!int !!timestamp !!set !!map"""
_BITS = st.sampled_from([*_MARKS.split(), " ", ": ", "- ", "\n", "\n  ", "\t", "\x00", "\x85", "\ufeff", "é"])


@st.composite
def torn(draw: st.DrawFn) -> bytes:
    """The example's text with pieces cut out and bits of YAML put in."""
    text = TEXT
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        text = text[:start] + draw(_BITS) + text[start + draw(st.integers(0, 40)) :]
    return text.encode()


def bits() -> st.SearchStrategy[bytes]:
    """Bits of YAML in any order."""
    return st.lists(_BITS | ANY_TEXT, max_size=30).map(lambda found: "".join(found).encode(errors="replace"))


def anything() -> st.SearchStrategy[bytes]:
    """Bytes, and text."""
    return st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode(errors="replace"))


def settings() -> st.SearchStrategy[tuple[str, str]]:
    """A key and a text for `--set`."""
    keys = st.sampled_from([mistakes.at(one.path) for one in FIELDS])
    return st.tuples(keys | ANY_TEXT, ANY_TEXT | _BITS)


# No shell can give NUL or half a character as an argument.
_WORD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=60)
_FORMS: tuple[tuple[str, ...], ...] = (
    ("run", "{}", "--version", "v1.5.0"),
    ("run", "shop", "--version={}"),
    (*mistakes.RUN, "--set={}"),
    (*mistakes.RUN, "--set=watch.duration_s={}"),
    (*mistakes.RUN, "--set={}=1"),
    (*mistakes.RUN, "--until={}"),
    (*mistakes.RUN, "--as={}"),
    (*mistakes.RUN, "--plan={}"),
    ("run", "{}", "{}"),
    ("doctor", "{}"),
    ("plan", "{}"),
    ("status", "{}"),
    ("resume", "{}"),
    ("gate", "show", "{}", "1"),
    ("gate", "show", mistakes.RUN_ID, "{}"),
    ("gate", "{}"),
    ("check", mistakes.RUN_ID, "{}", "--pass"),
    ("resolve", mistakes.RUN_ID, "{}", "--done"),
    # A good one of these would bring the twin up.
    ("rehearse", "--fault=x{}"),
    ("rehearse", "--watch=x{}"),
    ("rehearse", "--version=../{}"),
    ("verify", "{}", "--trust", "/nowhere/at/all"),
    ("judge", "/nowhere/{}"),
    ("x{}",),
)


@st.composite
def words(draw: st.DrawFn) -> tuple[str, ...]:
    """A command with any text where a word belongs; never a call for help."""
    form = draw(st.sampled_from(_FORMS))
    return tuple(part.replace("{}", draw(_WORD.filter(lambda text: not text.startswith("--h")))) for part in form)
