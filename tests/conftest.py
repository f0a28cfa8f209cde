"""A project folder of its own with a real twin, for tests that walk releases."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.ledgers import LedgerServer
from tests.project import ROOT, Project
from tests.soak.proxies import NO_DEVICES

# `make soak` draws many more: pytest's --hypothesis-profile takes the other one.
settings.register_profile("quick", max_examples=60, deadline=None)
settings.register_profile("soak", max_examples=5000, deadline=None)
settings.load_profile("quick")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--ledger postgresql` runs the whole suite over a ledger that is shared; a test that names its own keeps it."""
    parser.addoption("--ledger", choices=("sqlite", "postgresql"), default="sqlite", help="what runs are kept in")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole releases first: they take minutes and mostly wait, so that the short tests fill the gaps."""
    items.sort(key=lambda item: item.path.parent.name not in ("release", "runbooks"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where a real part is missing a test is skipped and says so; under CI nothing may be missing that can be installed."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and NO_DEVICES not in str(report.longrepr):
        report.outcome, report.longrepr = "failed", f"skipped, and CI=true forbids it: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def ledger_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LedgerServer]:
    """A PostgreSQL server for ledgers, apart from the twin's."""
    server = LedgerServer.start(tmp_path_factory.mktemp("ledgers"))
    yield server
    server.stop()


def pytest_configure() -> None:
    """Whoever starts the tests in the background may have them ignore an interrupt, and all that they start."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def new_ledger(request: pytest.FixtureRequest) -> Callable[[], str | None]:
    """Makes an empty ledger for a project's params, as `--ledger` says; None for the default, a file of its own."""
    if request.config.getoption("--ledger") == "sqlite":
        return lambda: None
    server: LedgerServer = request.getfixturevalue("ledger_server")
    return server.new_ledger


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty ledger's address, once for each kind of database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    server: LedgerServer = request.getfixturevalue("ledger_server")
    return server.new_ledger()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, new_ledger: Callable[[], str | None]) -> Iterator[Project]:
    root = tmp_path_factory.mktemp("project")
    for folder in ("params", "runbooks"):
        shutil.copytree(ROOT / folder, root / folder)
    made = Project(root, new_ledger())
    made.name_ledger()
    done = made.runbook("stack", "up", "--json")
    assert done.returncode == 0, done.stderr
    yield made
    made.runbook("stack", "down")
