"""Wrong parameters are refused in one line before anything was done: a sample of what `tests.soak.parameters` tries."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from runbook_lib.errors import UsageError
from runbook_lib.params import Params, check
from tests.soak import mistakes, mutants, parameters
from tests.soak.parameters import OBSERVER, World, Worlds, of_schema

FILES = random.Random(60).sample(mistakes.all_of_the_file(), 60)
WORDS = mistakes.all_of_the_command_line(by_every_verb=False)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    with Worlds.made(tmp_path_factory.mktemp("worlds")) as made:
        yield made


@pytest.mark.parametrize("kind", sorted({one.kind for one in FILES}))
def test_a_mistake_in_the_params_file_is_refused_and_nothing_is_done(worlds: Worlds, kind: str) -> None:
    results = [worlds.try_out(one) for one in FILES if one.kind == kind]

    assert [f"{r.name}: {r.wrong} {r.said}" for r in results if not r.good] == []


@pytest.mark.parametrize("kind", sorted({one.kind for one in WORDS}))
def test_a_mistake_on_the_command_line_is_refused_and_nothing_is_done(worlds: Worlds, kind: str) -> None:
    results = [worlds.try_out(one) for one in WORDS if one.kind == kind]

    assert [f"{r.name}: {r.wrong} {r.said}" for r in results if not r.good] == []


# What the schema alone refuses; the others are told by the file's text, by facts, or by a look at the machine.
SCHEMA = {
    *("wrong type", "null", "empty", "out of range", "wrong text", "secret as a value", "missing key", "unknown key"),
    *("wrong name", "people and gates", "databases, hosts, backups and checks", "local in production"),
}


def test_every_curated_mistake_in_a_value_is_refused_by_the_schema() -> None:
    found = []
    for one in mistakes.all_of_the_file():
        if one.kind in SCHEMA:
            data = copy.deepcopy(mutants.EXAMPLE)
            for key, value in one.change:
                mistakes.put(data, key, value)
            result = of_schema(one.kind, data, lambda data=data: check(data, where="shop.yml"))
            found += (
                [f"{one.kind}: {one.name}: {result.said}"] if not result.good or one.says not in result.said else []
            )

    assert found == []


@given(mutants.mutants())
def test_a_good_file_with_one_to_three_mistakes_is_refused(drawn: tuple[str, dict[str, Any]]) -> None:
    result = of_schema(drawn[0], drawn[1], lambda: check(drawn[1], where="example.yml"))

    assert result.good, (result.wrong, result.said, result.deeds, result.traceback)


@given(mutants.any_value())
def test_a_value_is_refused_or_can_be_pinned(data: dict[str, Any]) -> None:
    result = of_schema("", data, lambda: check(data, where="example.yml"), at_random=True)

    assert result.good, (result.wrong, result.said, result.deeds, result.traceback)


@given(words=mutants.words())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_words_at_random_are_refused_and_nothing_is_done(worlds: Worlds, words: tuple[str, ...]) -> None:
    seen = worlds.empty.call(words)

    assert seen.wrong() == [], seen


def _keys(data: object) -> Iterator[str]:
    if isinstance(data, dict):
        yield from map(str, data)
    for value in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        yield from _keys(value)


def test_every_key_of_the_example_is_in_the_table_of_fields() -> None:
    names = {"product_id", "app-01", "app-02", "worker-01", "floor_rps", *mutants.EXAMPLE["people"]}

    known = {name for one in mistakes.FIELDS for name in one.path.split(".")}

    assert set(_keys(mutants.EXAMPLE)) - known == names


def test_a_key_that_would_speak_for_two_opens_no_run(tmp_path: Path) -> None:
    world = World(tmp_path / "home")
    world.make_the_recorders_key()
    mistakes.put(world.good, "people.ada.keys", [(tmp_path / "home/there/recorder.pub").read_text().strip()])
    world.file.write_text(yaml.safe_dump(world.good))

    with pytest.raises(UsageError, match="ada and recorder have the same key"):
        world.open_a_run()

    assert not list(world.home.rglob("outputs/**/*"))


def test_the_observer_sees_what_is_done(tmp_path: Path) -> None:
    with OBSERVER.watching() as deeds:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").write_text("x")
        (tmp_path / "b").rename(tmp_path / "c")
        (tmp_path / "c").read_text()
        subprocess.run((sys.executable, "-c", ""), check=True)

    assert [deed.split()[0] for deed in deeds] == ["os.mkdir", "open", "os.rename", "subprocess.Popen"]
    assert deeds == deeds[:4]


def test_what_is_let_through_and_should_not_be_is_seen() -> None:
    kind, wrong = "unknown key", {**mutants.EXAMPLE, "colour": "blue"}

    lenient = type("Lenient", (Params,), {"model_config": {**Params.model_config, "extra": "allow"}})
    result = of_schema(kind, wrong, lambda: lenient.model_validate(wrong))

    assert not result.good
    assert parameters.table([result]).splitlines()[2] == "| drawn: unknown key | 1 | 0 | 0 | 0 | 0 |"
