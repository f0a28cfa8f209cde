"""The documents say what the code does, and nothing of the machine that they were written on."""

from __future__ import annotations

import inspect
import re
import subprocess
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from runbook_lib import cli, errors
from runbook_lib.errors import RunbookError, UsageError
from runbook_lib.model import Recovery
from runbook_lib.params import Params, load
from runbook_lib.phases import ALL, FORWARD
from runbook_lib.step import Step

ROOT = Path(__file__).resolve().parents[2]
PARAMS = ROOT / "params"
README = (ROOT / "README.md").read_text()
FAILURES = (ROOT / "docs" / "failures.md").read_text()
MARKDOWN = sorted(p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "outputs" / "README.md"))


def blocks(text: str) -> list[list[str]]:
    """The lines of each code block."""
    return [
        block.strip("\n").splitlines() for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


def tracked() -> list[Path]:
    """Every file of the repository that is or may be committed."""
    argv = ("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no git checkout")
    return [ROOT / name for name in done.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


# --- params ------------------------------------------------------------------------------------------------------


def models_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The model in an annotation, and whether it is a mapping's or list's value."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation, False
    origin = typing.get_origin(annotation)
    if origin is None:
        return None, False
    parts = typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        return next((found for found in map(models_in, parts) if found[0]), (None, False))
    return (next((model for model, _ in map(models_in, parts) if model), None), True)


def missing_keys(model: type[BaseModel], data: Any, where: str, text: str) -> list[str]:
    """Keys of the schema that a params file does not have; of an optional block that is null, the comments count."""
    if data is None:
        return [f"{where}.{key}" for key in model.model_fields if not re.search(rf"^#\s+{key}:", text, re.MULTILINE)]
    missing = []
    for key, field in model.model_fields.items():
        here = f"{where}.{key}".lstrip(".")
        if key not in data:
            missing.append(here)
            continue
        inner, many = models_in(field.annotation)
        if inner is None:
            continue
        if not many:
            missing += missing_keys(inner, data[key], here, text)
            continue
        values = list(data[key].values()) if isinstance(data[key], dict) else data[key]
        # Each key must be shown once, not in every host.
        together = {name: value for one in reversed(values) for name, value in one.items()}
        missing += missing_keys(inner, together, here, text)
    return missing


def test_the_example_shows_every_key_of_the_schema() -> None:
    text = (PARAMS / "example.yml").read_text()
    assert missing_keys(Params, yaml.safe_load(text), "", text) == []


def test_a_key_that_the_example_lacks_would_be_seen() -> None:
    data = yaml.safe_load((PARAMS / "example.yml").read_text())
    del data["database"]["bin"]
    for host in data["hosts"]["web"].values():
        host.pop("balanced", None)
    assert missing_keys(Params, data, "", "") == [
        "hosts.web.balanced",
        "database.bin",
        "rehearsal.stack",
        "rehearsal.people_sign",
    ]


def test_the_example_explains_every_key_that_has_a_default() -> None:
    text = (PARAMS / "example.yml").read_text().splitlines()

    def explained(model: type[BaseModel]) -> list[str]:
        missing = []
        for key, field in model.model_fields.items():
            inner, _ = models_in(field.annotation)
            if inner is not None:
                missing += explained(inner)
            elif not field.is_required():
                near = [n for n, line in enumerate(text) if re.match(rf"#?\s*(- )?{key}:", line)]
                said = any(
                    "efault" in text[n]
                    or any(before.lstrip().startswith("#") and "efault" in before for before in text[max(0, n - 2) : n])
                    for n in near
                )
                if not said:
                    missing.append(f"{model.__name__}.{key}")
        return missing

    assert explained(Params) == []


@pytest.mark.parametrize("name", ["example", "staging"])
def test_a_template_is_accepted_by_the_schema(name: str) -> None:
    assert load(PARAMS / f"{name}.yml").environment == name


def test_production_is_refused_as_shipped_and_accepted_on_a_teams_own_decision() -> None:
    with pytest.raises(UsageError, match=r"messages\.chat: a local folder is refused in production") as caught:
        load(PARAMS / "production.yml")
    assert caught.value.exit_code == 2
    accepted = load(PARAMS / "production.yml", settings={"production": "false"})
    assert all(host.address.startswith("ssh:") for host in accepted.all_hosts.values())
    assert "messages.chat" in README
    assert "`production: false`" in README


# --- failures ----------------------------------------------------------------------------------------------------

ERRORS = sorted(
    (e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, RunbookError)), key=lambda e: e.__name__
)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: e.__name__)
def test_every_error_and_its_exit_code_is_in_failures(error: type[RunbookError]) -> None:
    assert f"`{error.__name__}`" in FAILURES
    if error is not RunbookError:
        row = next(line for line in FAILURES.splitlines() if line.startswith("|") and f"`{error.__name__}`" in line)
        assert row.startswith(f"| {error.exit_code} |")
    assert re.search(rf"^## {error.exit_code}: ", FAILURES, re.MULTILINE)
    assert f"| {error.exit_code} |" in README


def test_every_message_in_failures_is_one_that_the_code_says() -> None:
    sources = [p.read_text() for p in sorted((ROOT / "runbook_lib").rglob("*.py"))]
    strangers = []
    for line in FAILURES.splitlines():
        cells = line.split(" | ")
        if not line.startswith("| `") or len(cells) != 3:
            continue
        for quoted in re.findall(r"`([^`]+)`", cells[0]):
            parts = [part.strip(" ,") for part in quoted.replace("${…}", "…").split("…")]
            if not any(all(part in source for part in parts) for source in sources):
                strangers.append(quoted)
    assert strangers == []


# --- commands ----------------------------------------------------------------------------------------------------


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_readme_starts_with_two_commands_that_the_makefile_has() -> None:
    start = next(block for block in blocks(README) if block[0].startswith("make "))
    assert start == ["make rehearse", "make test"]
    for text in (p.read_text() for p in MARKDOWN):
        assert set(re.findall(r"(?:`|^)make ([a-z]+)", text, re.MULTILINE)) <= targets()


def test_continuous_integration_calls_the_readmes_test_command() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_runbook_command_in_the_documents_exists() -> None:
    import typer.main

    root = typer.main.get_command(cli.app)
    verbs: dict[str, Any] = dict(root.commands)  # type: ignore[attr-defined]
    for text in (p.read_text() for p in MARKDOWN):
        code = [line for block in blocks(text) for line in block] + re.findall(r"`([^`\n]+)`", text)
        for words in re.findall(
            r"^runbook ([a-z]+(?: (?:show|approve|reject|up|down|status|prove|list))?)\b(.*)",
            "\n".join(code),
            re.MULTILINE,
        ):
            names, rest = words[0].split(), words[1].partition("#")[0]
            if names[0] not in verbs:
                pytest.fail(f"there is no `runbook {words[0]}`")
            command = verbs[names[0]]
            if hasattr(command, "commands") and len(names) > 1:
                command = command.commands[names[1]]
            known = {o for parameter in command.params for o in (*parameter.opts, *parameter.secondary_opts)} | {
                "--help"
            }
            assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= known, f"{words}: {known}"


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_to_a_file(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        if "://" not in link:
            assert (path.parent / link).exists(), link


def test_the_picture_is_small() -> None:
    assert (ROOT / "docs" / "pictures" / "record.png").stat().st_size < 400_000


# --- words -------------------------------------------------------------------------------------------------------


def test_the_glossary_has_the_words_of_the_model() -> None:
    words = (ROOT / "docs" / "glossary.md").read_text()
    model = (
        "Release",
        "Run",
        "Phase",
        "Step",
        "StepResult",
        "Ledger",
        "Gate",
        "Decision",
        "Adapter",
        "Verdict",
        "Record",
        "Event",
        "Artifact",
        "Command",
    )
    for word in model:
        assert f"| **{word}**" in words, word
    for recovery in Recovery:
        assert f"`{recovery.value}`" in words
    for verdict in ("green", "red", "inconclusive"):
        assert f"`{verdict}`" in words
    for gate in ("backup", "migration", "release"):
        assert f"`{gate}`" in words


def test_every_phase_has_steps_and_a_notebook() -> None:
    assert len(list((ROOT / "runbooks").glob("0*.ipynb"))) == len(ALL)
    assert all(isinstance(step, Step) for module in FORWARD for step in module.STEPS)


def test_no_file_tells_of_the_machine_or_the_conversation_that_it_came_from() -> None:
    # Put together here, so that this file does not contain them.
    forbidden = re.compile(
        "|".join(
            ("/wo" + "rk/", "/ro" + "ot/", r"\b[Ii]ssue" + r" #?\d", r"(?<![\w&;])#" + r"\d{1,4}\b(?!\d*[a-fA-F;])")
        )
    )
    found = []
    for path in tracked():
        if path.suffix in (".png", ".lock", ".svg") or path.name == "LICENSE":
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{n}: {line.strip()[:80]}"
            for n, line in enumerate(text.splitlines(), 1)
            if forbidden.search(line)
        ]
    assert found == []
