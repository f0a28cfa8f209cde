"""environment.yml and pyproject.toml say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from rattler import MatchSpec

ROOT = Path(__file__).resolve().parents[2]
CONDA_NAMES = {"matplotlib": "matplotlib-base"}  # conda-forge's name for the library without its toolkits


def conda_specs() -> list[str]:
    """The match specs of environment.yml, without the pip block."""
    found = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    return [spec for spec in found if isinstance(spec, str)]


@pytest.mark.parametrize("spec", conda_specs())
def test_every_conda_spec_is_one_that_conda_understands(spec: str) -> None:
    assert MatchSpec(spec).name is not None


def test_environment_holds_every_dependency_with_the_same_lower_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    conda = dict(re.split(r" +", spec, maxsplit=1) for spec in conda_specs())

    for wanted in (*project["dependencies"], *extras["lab"], *extras["ansible"]):
        name, bound = re.fullmatch(r"([a-z0-9-]+)(?:\[[a-z,]+\])?(>=[0-9.]+)", wanted).groups()  # type: ignore[union-attr]
        assert conda[CONDA_NAMES.get(name, name)] == bound


def test_environment_has_the_python_that_the_package_requires() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert f"python {project['requires-python']}" in conda_specs()


def test_environment_has_the_tools_that_no_wheel_brings() -> None:
    names = {spec.split()[0] for spec in conda_specs()}

    assert {"postgresql", "openssh", "git"} <= names
