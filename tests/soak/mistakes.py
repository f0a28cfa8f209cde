"""Mistakes in a params file and on the command line, put together from `mistakes.yml`: each of them is wrong by itself."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

GONE = object()  # the key is taken out
LIKE = object()  # the same as the first one beside it
DOT = "\0"  # a dot within a name
RUN_ID = "20260101T000000Z-v1.5.0-abcdef"
RUN = ("run", "shop", "--version", "v1.5.0")
_DATA: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yml").read_text())
_KEY = ("--key", "/nowhere/key")


@dataclass(frozen=True)
class Mistake:
    """One wrong input.

    Attributes:
        says: what the line of refusal must name.
        change: dotted keys and values, put into the good params file; or `text` is the whole file.
        files: more files of the project folder while the call runs; a link when the text begins with `-> `.
        on_a_run: the project has a run, and RUN_ID in the words stands for it.
    """

    kind: str
    name: str
    says: str
    change: tuple[tuple[str, Any], ...] = ()
    text: str | bytes | None = None
    words: tuple[str, ...] = RUN
    files: Mapping[str, str] = field(default_factory=dict)
    on_a_run: bool = False


@dataclass(frozen=True)
class Field:
    """One key: its kind, whether it must be there, whether it may be null, and the range of a number."""

    path: str
    kind: str
    needed: bool
    null: bool
    least: float | None = None
    most: float | None = None
    above: bool = False  # `least` itself is too little


_RANGE = re.compile(r"(>?)([0-9.]+)\.\.([0-9.]+)")


def _field(line: str) -> Field:
    path, kind, *flags = line.split()
    found = next((m for m in map(_RANGE.fullmatch, flags) if m), None)
    number = int if kind == "int" else float
    least, most = (number(found[2]), number(found[3])) if found else (None, None)
    return Field(path, kind, "!" in flags, "0" in flags, least, most, above=bool(found and found[1]))


FIELDS = tuple(_field(line) for line in _DATA["fields"].splitlines())
NUMBERS, TREES = ("int", "float"), ("list", "map")
# Names that people choose: what stands in them is not for the schema to know.
FREE = ("people", "hosts.web", "hosts.workers")
WRONG_TYPES: dict[str, list[Any]] = {
    "bool": ["yes", "true", 1, 0, 1.0, [True], {"a": True}],
    "int": ["5", "", 1.5, True, [5], {"a": 5}],
    "float": ["5", "", True, [5.0], {"a": 5.0}, "5 min", "1e3"],
    "list": ["a", 7, True, {"a": "b"}, ""],
    "map": ["a", 7, True, ["a"], ""],
    "str": [7, 1.5, True, ["a"], {"a": "b"}],
}
WRONG_NUMBERS = (float("nan"), float("inf"), float("-inf"))
# Put together here, so that nobody who looks for keys in files finds one.
_PRIVATE = "-----BEGIN {0}-----\nb3BlbnNzaC1rZXktdjEAAAAABG5vbmU=\n-----END {0}-----\n".format(
    "OPENSSH PRIVATE " + "KEY"
)


def _texts() -> dict[str, list[str]]:
    own: dict[str, list[str]] = _DATA["texts"]
    shared = {
        **dict.fromkeys(("line", "below", "absolute"), own["control"]),
        **dict.fromkeys(("name", "word"), own["no_name"]),
        **dict.fromkeys(("url", "front"), own["no_url"]),
        **{kind: [*own["no_secret"], _PRIVATE] for kind in ("secret", "fileref")},
        **dict.fromkeys(("outbox", "folder", "csv"), own["no_folder"]),
        "key": [_PRIVATE],
    }
    longer = {"name": [31, 200], "word": [63, 200], "line": [1000], "facts": [1000], "bucket": [63], "text": [4000]}
    return {
        kind: [*shared.get(kind, ()), *texts, *("x" * (n + 1) for n in longer.get(kind, ()))]
        for kind, texts in own.items()
        if kind in {one.kind for one in FIELDS}
    }


WRONG_TEXTS = _texts()


def short(value: object) -> str:
    """A value's text for a name, with its length when that is cut."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}… ({len(text)})"


def type_of(kind: str) -> str:
    """The type that YAML gives a good value of this kind."""
    return kind if kind in WRONG_TYPES else "str"


def _out_of_range(one: Field) -> list[float]:
    """Numbers just outside, and far outside."""
    if one.least is None or one.most is None:
        return []
    if one.kind == "int":
        return [one.least - 1, -(10**9), one.most + 1, 10**20, 10**400]
    return [one.least if one.above else one.least - 0.001, -1, one.most + 0.001, 1e308]


def put(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, or take it out."""
    *parents, last = key.split(".")
    node: Any = data
    for part in parents:
        node = node[int(part) if isinstance(node, list) else part]
    place = int(last) if isinstance(node, list) else last.replace(DOT, ".")
    if value is GONE:
        del node[place]
    else:
        node[place] = copy.deepcopy(next(iter(node.values()))) if value is LIKE else value


def at(path: str) -> str:
    """A field's dotted key in the good file: the first of the names that are free."""
    first = {"people": "ada", "gates": "release", "hosts": "worker-01" if ".workers" in path else "app-01"}
    return path.replace("*", first[path.partition(".")[0]]) if "*" in path else path


def _of_field(one: Field) -> Iterator[Mistake]:
    key = at(one.path)

    def holds(kind: str, value: Any) -> Mistake:
        return Mistake(kind, f"{key} = {short(value)}", key, ((key, value),))

    for value in WRONG_TYPES[type_of(one.kind)]:
        yield holds("wrong type", value)
    if not one.null:
        yield holds("null", None)
    if one.kind not in (*NUMBERS, *TREES, "bool", "any"):
        yield holds("empty", "")
    for number in (*_out_of_range(one), *(WRONG_NUMBERS if one.kind in NUMBERS else ())):
        yield holds("out of range", number)
    for text in WRONG_TEXTS.get(one.kind, ()):
        is_secret = any(word in text for word in ("hunter2", "PRIVATE", "AKIA", "ghp_"))
        yield holds("secret as a value" if is_secret else "wrong text", text)
    if one.needed and not one.path.endswith("*"):
        yield Mistake("missing key", f"no {key}", key, ((key, GONE),))
    if one.kind == "map" and one.path not in (*FREE, "watch.rules", "rehearsal", "application.probe_write_form"):
        for near in ("colour", one.path.rpartition(".")[2] + "s", "Name", "__class__", "a\nb"):
            yield Mistake("unknown key", f"{key}.{near!r}", key, ((f"{key}.{near}", "x"),))
    if one.path in FREE:
        for name in ("../x", "-rf", "Ada", "a b", "a\nb", "$(id)", "\u0430da", "", "a" * 40, "\x1b[2J"):
            like = ((f"{key}.{name.replace('.', DOT)}", LIKE),)
            yield Mistake("wrong name", f"{key}.{name!r}", key, like)


# --- what is wrong together --------------------------------------------------------------------------------------

_ADAS = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEXAMPLEada00000000000000000000000000000000"
_WEB = {"address": "ssh:deploy@app-09.example.com/srv/shop", "url": "http://app-09.example.com:8000"}
_TWO_CHECKS = [{"name": "log_in", "asks": "a?"}, {"name": "log_in", "asks": "b?"}]
_PEOPLE: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("backup: 2 of one", "gates.backup", {"gates.backup.quorum": 2}),
    ("migration: 2 of one", "gates.migration", {"gates.migration.quorum": 2}),
    ("release: 3 of two", "gates.release", {"gates.release.quorum": 3}),
    ("backup: a role that nobody has", "gates.backup", {"gates.backup.roles": ["captain"]}),
    ("migration: a role that nobody has", "gates.migration", {"gates.migration.roles": ["captain", "cook"]}),
    ("release: no role", "gates.release.roles", {"gates.release.roles": []}),
    ("nobody at all", "people", {"people": {}}),
    ("the lead has no role", "gates.backup", {"people.ada.roles": []}),
    ("a gate too many", "gates.announce", {"gates.announce": {"roles": ["qa"]}}),
    ("opened by nobody known", "opened_by", {"opened_by": "nobody"}),
    ("the only DBA opens", "gates.migration", {"opened_by": "dan"}),
    ("one key for two", "people.dan.keys", {"people.dan.keys": [_ADAS]}),
    ("one key for two, with a comment", "people.dan.keys", {"people.dan.keys": [_ADAS + " dan@home"]}),
    ("a person named recorder", "people.recorder", {"people.recorder": {"name": "R", "keys": ["ssh-rsa AAAA"]}}),
)
_PLACES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("staging is production", "are both shop_production", {"database.staging": "shop_production"}),
    ("no web host", "hosts.web", {"hosts.web": {}}),
    ("a worker named like a web host", "hosts.workers.app-01", {"hosts.workers.app-01": _WEB}),
    ("no web host has a url", "hosts.web", {"hosts.web.app-01.url": None, "hosts.web.app-02.url": None}),
    ("two spot checks of one name", "spot_checks", {"spot_checks.checks": _TWO_CHECKS}),
    ("archives: a level that gzip has not", "level", {"backup.archive": {"compression": "gzip", "level": 19}}),
    ("dumps: a level that gzip has not", "level", {"backup.dump": {"compression": "gzip", "level": 19}}),
    ("a KMS key and no KMS", "kms_key", {"backup.store.encryption": None}),
    ("a KMS key for AES256", "kms_key", {"backup.store.encryption": "AES256"}),
    ("a KMS key by its alias", "kms_key", {"backup.store.kms_key": "alias/backups"}),
)
_LOCAL: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("message folders", "messages.chat", {}),
    ("a web host", "hosts.app-01.address", {"hosts.web.app-01.address": "local:/srv/x"}),
    ("a worker", "hosts.worker-01.address", {"hosts.workers.worker-01.address": "local:/srv/x"}),
    ("a rehearsal block", "rehearsal", {"rehearsal": {"stack": "/srv/x"}}),
)


def _together() -> Iterator[Mistake]:
    for kind, table in (("people and gates", _PEOPLE), ("databases, hosts, backups and checks", _PLACES)):
        for name, says, change in table:
            yield Mistake(kind, name, says, tuple(change.items()))
    for name, says, change in _LOCAL:
        yield Mistake("local in production", name, says, (("production", True), *change.items()))
    for rules in [*_DATA["watch_rules"], {"floor_rps": 10**400}]:
        yield Mistake("watch rules", short(rules), "watch.rules", (("watch.rules", rules),))
    for limits in ({"cpu": 1.0}, {"p95_latency_s": -1.0}):
        yield Mistake("watch rules", f"limits {limits}", "hard_limits", (("watch.hard_limits", limits),))
    for start in ("2000-01-01T00:00:00+00:00", "2020-02-29T20:00:00+01:00", "2024-12-31T23:59:59Z"):
        yield Mistake("window that is over", start, "window.start", (("window.start", start),))
    yield from _not_there()


def _not_there() -> Iterator[Mistake]:
    def mistake(key: str, value: str, says: str, **more: Any) -> Mistake:
        return Mistake("file or program that is not there", f"{key} = {short(value)}", says, ((key, value),), **more)

    for key in ("deploy.playbooks", "deploy.inventory", "database.passfile", "database.bin", "watch.access_log"):
        for where in ("/nowhere/at/all", "/dev/null/x", f"/{'x' * 300}/x"):
            yield mistake(key, where, key)
    for where in ("/nowhere/at/all", "/dev/null/x", f"/{'x' * 300}/x"):
        yield mistake("backup.directory", where, "backup.directory")
        yield mistake("backup.store.credentials_file", where, "backup.store.credentials_file")
        yield mistake("record.key", f"file:{where}", "record.key")
        yield mistake("deploy.vault_password", f"file:{where}", "deploy.vault_password")
    for tool in ("no-such-tool", "/nowhere/dbmate", "$(id)", "dbmate --url x"):
        yield mistake("migrations.executable", tool, f"{tool} is not installed")
    for tool in ("-rf", "../../dbmate", "--version", "a\nb"):
        yield mistake("migrations.executable", tool, "migrations.executable")
    yield mistake("repository.url", "/nowhere/shop.git", "/nowhere/shop.git")


# --- facts, and files that are no params file --------------------------------------------------------------------


def _of_facts() -> Iterator[Mistake]:
    for name, says, where, change, files in _DATA["facts"]:
        yield Mistake("facts", name, says, (("facts", where), *map(tuple, change)), files=files)
    yield Mistake("facts", "a name without end", "facts", (("facts", "x" * 300),))
    deep = {"facts.json": "[" * 100_000}
    yield Mistake("facts", "brackets without end", "facts", (("facts", "facts.json"),), files=deep)
    yield Mistake("facts", "no facts, and a name of one", "is not among", (("database.host", "${database.host}"),))
    on_a_stack = {"change": (("rehearsal", {"stack": "there"}),), "words": ("run", "shop", "--version", "next")}
    for text in ("", "{", "[]", "7", "null", "\x00", "[" * 100_000):
        files = {"there/stack.json": text}
        yield Mistake("facts", f"stack.json is {short(text)}", "stack.json", files=files, **on_a_stack)
    for version in ('["v1"]', '"../x"', '""', '{"a": 1}', '"v1\\n"'):
        files = {"there/stack.json": f'{{"versions": {{"next": {version}}}}}'}
        yield Mistake("facts", f"the next version is {version}", "version", files=files, **on_a_stack)


def _bomb(form: str) -> str:
    lines = ["environment: shop", "a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} {form.format(', '.join([f'*a{n - 1}'] * 9))}" for n in range(1, 12)]
    return "\n".join(lines) + "\n"


def _files() -> dict[str, str | bytes]:
    return {
        **_DATA["files"],
        "a file of zeros": b"\x00" * 4096,
        "Latin-1": "environment: caf\xe9\n".encode("latin-1"),
        "UTF-16": "environment: shop\n".encode("utf-16"),
        "cut UTF-8": b"environment: \xc3",
        "a program": b"\x7fELF\x02\x01\x01\x00",
        "a zip": b"PK\x03\x04\x14\x00\x00\x00",
        "a number without end": "a: " + "1" * 5000 + "\n",
        "brackets without end": "[" * 3000,
        "braces without end": "{a: " * 3000,
        "dashes without end": "- " * 3000,
        "question marks without end": "? " * 3000,
        "a bomb of lists": _bomb("[{}]"),
        "a bomb of maps": _bomb("{{b: [{}]}}"),
        "a bomb of merges": _bomb("{{<<: [{}]}}"),
        "a bomb under a known key": _bomb("[{}]").replace("a11:", "watch:"),
        "a megabyte of a text": "environment: " + "x" * 1_000_000 + "\n",
        "ten thousand keys": "\n".join(f"k{n}: 1" for n in range(10_000)) + "\n",
    }


def all_of_the_file() -> list[Mistake]:
    """What is wrong in the params file and beside it."""
    top = ("colour", "Environment", "enviroment", "database.host", "$ref", "<<", "", "a\nb", "\x1b[2J", "\uff46acts")
    return [
        *(mistake for one in FIELDS for mistake in _of_field(one)),
        *(Mistake("unknown key", repr(key), "shop.yml", ((key.replace(".", DOT), "x"),)) for key in top),
        *_together(),
        *_of_facts(),
        *(Mistake("no params file", name, "shop.yml", text=text) for name, text in _files().items()),
        *(Mistake("key given twice", repr(text), "stands twice", text=text) for text in _DATA["twice"]),
    ]


# --- the command line --------------------------------------------------------------------------------------------


def all_of_the_command_line(*, by_every_verb: bool = True) -> list[Mistake]:
    """What is wrong in the words, the params file being good."""
    return [*_of_words(), *_of_a_run(), *(_by_other_verbs() if by_every_verb else ())]


def _mistake(kind: str, words: tuple[str, ...], says: str, *, also: str = "", **more: Any) -> Mistake:
    return Mistake(kind, " ".join(map(short, words)) + also, says, words=words, **more)


def _options(*texts: str) -> list[str]:
    """Words that begin with a dash are options to the command, and it names them as it likes."""
    return [text for text in texts if not text.startswith("-")]


def _of_words() -> Iterator[Mistake]:
    for version in (*_DATA["versions"], "x" * 80, "x" * 100_000):
        yield _mistake("--version", ("run", "shop", "--version", version), "version")
    for name in (*_DATA["environments"], "x" * 31, "x" * 32, "x" * 100_000):
        says = "" if name.startswith("-") else "x.yml" if name == "x" * 31 else "environment"
        yield _mistake("environment", ("run", name, "--version", "v1.5.0"), says)
    for pair, says in _DATA["sets"]:
        yield _mistake("--set", (*RUN, "--set", pair), says)
    for value in ("[" * 1000, "9" * 5000):
        yield _mistake("--set", (*RUN, "--set", f"watch.duration_s={value}"), "watch.duration_s")
    for pair in ("x" * 1000 + "=1", "a." * 500 + "b=1"):
        yield _mistake("--set", (*RUN, "--set", pair), pair[0])
    yield _mistake("--set", (*RUN, "--set", "rollback.automatic=true", "--set", "rollback.automatic=false"), "twice")
    for phase in (*_DATA["phases"][1:], "x" * 300):
        yield _mistake("--until", (*RUN, "--until", phase), "--until")
    for person in (*_DATA["persons"], "x" * 300):
        yield _mistake("--as", (*RUN, "--as", person), "--as")
    yield _mistake("--as", (*RUN, "--as", "dan"), "gates.migration")  # nobody else could approve gate 2
    for plan in (*_DATA["plans"], "0" * 63, "0" * 65, "A" * 64, "x" * 300):
        yield _mistake("--plan", (*RUN, "--plan", plan), "--plan")
    for run_id in (*_DATA["run_ids"], "x" * 300, "x" * 100_000):
        yield _mistake("run id", ("status", run_id), "" if run_id.startswith("-") else "run")
    for verb in _DATA["on_a_run"]:
        yield _mistake("run id", tuple(word.format(RUN_ID) for word in verb), "there is no run")
    yield _mistake("run id", ("resume", ""), "run id")
    for gate in _DATA["gates"]:
        yield _mistake("gate", ("gate", "show", RUN_ID, gate), "" if gate.startswith("-") else "there is no gate")
    for words, says in _DATA["words"]:
        yield _mistake("other words", tuple(words), says)
    for words in (("x" * 300,), ("verify", "x" * 300, "--trust", "/nowhere"), ("verify", "/", "--trust", "x" * 300)):
        yield _mistake("other words", words, "xxx")
    yield _mistake("other words", ("judge", "x" * 300), "File name too long")
    proof = ("backup", "prove", "{home}/there/vault", "--manifest", "{home}/m.json")
    of_shop = [
        '{"environment": "shop"}',
        '{"files": [{}], "environment": "shop"}',
        '{"files": 1, "environment": "shop"}',
    ]
    for text in ("[]", "7", *of_shop, "[" * 100_000, "\x00"):
        yield _mistake("other words", proof, "this is no manifest", files={"m.json": text}, also=f" {short(text)}")
    for text in ("{}", '{"environment": ""}'):
        yield _mistake("other words", proof, "names no environment", files={"m.json": text}, also=f" {short(text)}")
    yield _mistake(
        "other words", (*proof[:2], "x" * 300, "--manifest", "{home}/there/manifest.json"), "there is no dump"
    )
    for text in (*_DATA["rules"], "[" * 1000, f"floor_rps: {'9' * 400}\n"):
        words = ("judge", "{home}/there/series.csv", "--config", "{home}/rules.yml")
        yield _mistake("other words", words, "columns", files={"rules.yml": text}, also=f" {short(text)}")


def _of_a_run() -> Iterator[Mistake]:
    for gate in _options(*_DATA["gates"], "x" * 300):
        for words in (("gate", "show", RUN_ID, gate), ("gate", "approve", RUN_ID, gate, "--as", "ada", *_KEY)):
            yield _mistake("gate", words, "there is no gate", on_a_run=True, also=" on a run")
    for check in (*_DATA["checks"], "x" * 300):
        words = ("check", RUN_ID, check, "--pass", "--as", "quinn", *_KEY)
        yield _mistake("spot check", words, "there is no spot check", on_a_run=True)
    for person in _options(*_DATA["persons"], "quinn"):
        words = ("check", RUN_ID, "log_in", "--pass", "--as", person, *_KEY)
        yield _mistake("spot check", words, "is not at its spot checks", on_a_run=True)
    for step in (*_DATA["steps"], "x" * 300):
        words = ("resolve", RUN_ID, step, "--done", "--as", "ada", *_KEY, "--comment", "x")
        yield _mistake("step", words, "not blocked", on_a_run=True)
    for said in ("maybe", "Approve", "approve\n", "approve"):
        words = ("gate", "show", RUN_ID, "backup", "--statement", said, "--as", "ada")
        yield _mistake("decision", words, "is not open" if said == "approve" else "is no decision", on_a_run=True)
    for verb in ("approve", "reject"):
        for person in ("nobody", "ada", "-rf", "a\nb"):
            words = ("gate", verb, RUN_ID, "backup", "--as", person, *_KEY)
            yield _mistake("decision", words, "is not open", on_a_run=True)
        yield _mistake("decision", ("gate", verb, RUN_ID, "backup"), "--as", on_a_run=True)
    yield _mistake("decision", ("takeover", RUN_ID, "--reason", " "), "reason", on_a_run=True)
    yield _mistake("decision", ("seal", RUN_ID), "has not ended", on_a_run=True)


def _by_other_verbs() -> Iterator[Mistake]:
    for version in _DATA["versions"]:
        yield _mistake("--version", ("plan", "shop", "--version", version), "version")
    for name in _DATA["environments"]:
        says = "" if name.startswith("-") else "environment"
        yield _mistake("environment", ("plan", name, "--version", "v1.5.0"), says)
        yield _mistake("environment", ("doctor", name), says)
    for run_id in _options(*_DATA["run_ids"]):
        for verb in _DATA["on_a_run"]:
            if verb[0] != "status" and run_id != RUN_ID:
                yield _mistake("run id", tuple(word.format(run_id) for word in verb), "run")
