"""The params file's text: read strictly, facts substituted, settings put in. What may stand in it is `params`' business."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from runbook_lib.errors import UsageError

_PLACEHOLDER = re.compile(r"\$\{([a-z][a-z0-9_.-]*)\}")
# A good file has some two hundred; aliases of aliases make billions of a few lines.
_MOST_VALUES = 20_000


def read(path: Path, settings: Mapping[str, str]) -> dict[str, Any]:
    """Read and complete a params file; what comes back is plain data that nobody checked yet.

    Args:
        path: the YAML file, named after its environment.
        settings: `--set` overrides, dotted key to YAML scalar.

    Raises:
        UsageError: it is not there, is no YAML, or names facts that are not there.
    """
    if not path.is_file():
        others = ", ".join(sorted(p.stem for p in path.parent.glob("*.yml") if p.stem != "example")) or "none"
        raise UsageError(f"there is no params file {path.name} (known environments: {others})", remedy=f"write {path}")
    try:
        data: Any = yaml.load(path.read_text(), Loader=_UniqueKeys)  # noqa: S506  # a SafeLoader
        _bounded(data)
    except Exception as error:
        # PyYAML itself raises anything: 2026-02-31, a key that is a list, brackets without end, `!!bool maybe`.
        raise UsageError(f"{path.name} is not readable YAML: {one_line(error)}", remedy=f"mend {path}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path.name} must be a mapping, not {type(data).__name__}", remedy="see params/example.yml")
    try:
        facts = data.get("facts")
        known = _facts(path, facts) if isinstance(facts, str) else {}
        params = {key: _substituted(value, known, f"{path.name}: {one_line(key)}") for key, value in data.items()}
        for dotted, text in settings.items():
            _set(params, dotted, text)
        for key in _left_over(params):
            raise UsageError(
                f"{path.name}: {key}: a ${{…}} is left that names no fact", remedy="write ${a.b}; facts hold no facts"
            )
    except RecursionError as error:
        raise UsageError(f"{path.name} is nested too deeply", remedy=f"mend {path}") from error
    return params


def read_facts(path: Path, said: str) -> dict[str, Any]:
    """Read a JSON file of facts.

    Args:
        path: the file.
        said: how an error names it.

    Raises:
        UsageError: it is not there, or no JSON object.
    """
    try:
        data = json.loads(path.resolve().read_text())
    except FileNotFoundError as error:
        raise UsageError(f"{said} is not there: the stack that writes it is down", remedy="runbook stack up") from error
    except OSError as error:
        raise UsageError(f"{said} cannot be read: {error.strerror}", remedy="check it") from error
    except (ValueError, RuntimeError) as error:  # also a link to itself, and brackets without end
        raise UsageError(f"{said} is no JSON: {one_line(error)}", remedy="runbook stack up") from error
    if not isinstance(data, dict):
        raise UsageError(f"{said} is no JSON object", remedy="runbook stack up")
    return data


def _facts(path: Path, name: str) -> dict[str, Any]:
    return read_facts(path.parent.parent / name, f"{path.name}: facts: {one_line(name)}")


def _bounded(data: Any) -> None:
    left, found = [data], 0
    while left:
        value = left.pop()
        found += 1
        if found > _MOST_VALUES:
            raise UsageError(f"more than {_MOST_VALUES:,} values: aliases of aliases, or of itself")
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple | set):
            left += value


def _left_over(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _left_over(item, f"{key}.{one_line(name)}".lstrip("."))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _left_over(item, f"{key}.{number}")
    elif isinstance(value, str) and "${" in value:
        yield key


def _substituted(value: Any, facts: Mapping[str, Any], where: str) -> Any:
    if isinstance(value, dict):
        return {key: _substituted(item, facts, f"{where}.{one_line(key)}") for key, item in value.items()}
    if isinstance(value, list):
        return [_substituted(item, facts, f"{where}.{number}") for number, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    whole = _PLACEHOLDER.fullmatch(value)
    if whole:
        return _fact(facts, whole[1], where)
    return _PLACEHOLDER.sub(lambda match: str(_fact(facts, match[1], where)), value)


def _fact(facts: Mapping[str, Any], dotted: str, where: str) -> Any:
    value: Any = facts
    for part in dotted.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise UsageError(f"{where}: ${{{dotted}}} is not among the facts", remedy="look at the facts file")
        value = value[part]
    return value


def _set(data: dict[str, Any], dotted: str, text: str) -> None:
    said = f"--set {one_line(dotted)}"
    *parents, last = dotted.split(".")
    if dotted == "facts":
        raise UsageError(f"{said}: facts are read before anything is set", remedy="name them in the params file")
    node: Any = data
    for part in parents:
        node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise UsageError(f"{said}: {one_line(part)} is no mapping", remedy="see params/example.yml")
    try:
        node[last] = yaml.load(text, Loader=_UniqueKeys)  # noqa: S506  # a SafeLoader
        _bounded(node[last])
    except Exception as error:
        raise UsageError(f"{said}: {one_line(error)}", remedy="give a YAML scalar") from error


class _UniqueKeys(yaml.SafeLoader):
    """A key given twice is a mistake, not the last one's win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002  # PyYAML's
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise UsageError(f"key {key!r} stands twice, line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def one_line(error: object) -> str:
    """A text as one line of at most 300 characters: it goes to a terminal, so no line breaks and no escape sequences."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))[:300]
