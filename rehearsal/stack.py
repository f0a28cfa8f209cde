"""Up, down and status of the twin: everything on loopback, on free ports, under one supervisor."""

from __future__ import annotations

import configparser
import contextlib
import io
import json
import os
import random
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rehearsal import postgres, repository, s3
from rehearsal.people import make_people

PROJECT = Path(__file__).resolve().parent.parent
PLAYBOOKS = Path(__file__).resolve().parent / "playbooks"
WEB = ("app-01", "app-02", "app-03")
WORKERS = ("worker-01",)
VERSIONS = {"running": "v1.4.0", "next": "v1.5.0", "bad": "v1.6.0"}
SEEDED_ORDERS = 20_000
LOAD_RPS = 12
_used_ports: set[int] = set()


class StackError(Exception):
    """The twin cannot be brought where it should be; the message names the part and the next move."""


def up(folder: Path) -> dict[str, Any]:
    """Bring the twin up and return its facts; what is up already is left as it is.

    Raises:
        StackError: a part did not start; everything that was started is stopped again.
    """
    facts = status(folder)
    if facts["up"]:
        return facts
    _clear(folder)
    try:
        return _bring_up(folder)
    except BaseException as error:
        _stop_all(folder)
        if isinstance(error, (OSError, subprocess.CalledProcessError, StackError)):
            raise StackError(f"{error}. {_last_words(folder)}") from error
        raise


def down(folder: Path) -> None:
    """Stop every process and wait until each is gone; logs and data stay until the next `up`."""
    (folder / "stack.json").unlink(missing_ok=True)
    _stop_all(folder)


def status(folder: Path) -> dict[str, Any]:
    """The facts with `up`; only `up: false` when it is down."""
    try:
        facts = json.loads((folder / "stack.json").read_text())
    except (FileNotFoundError, ValueError):
        return {"up": False}
    supervisor = _supervisor(folder)
    return {"up": True, **facts} if supervisor is not None else {"up": False}


def free_port() -> int:
    """A port that nobody holds now and that was not given out before; below the range of outgoing connections."""
    while True:
        port = random.randrange(12_000, 32_000)
        if port in _used_ports:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _used_ports.add(port)
        return port


def _bring_up(folder: Path) -> dict[str, Any]:
    for name in ("log", "run", "secrets", "balancer", "backups", "outbox", "hosts"):
        (folder / name).mkdir(parents=True, mode=0o700 if name == "secrets" else 0o755)
    private = folder / "secrets"
    for name in ("bypass_token", "vault_password", "supervisor_password", "secret_key"):
        _write_secret(private / name, secrets.token_urlsafe(24))
    commits = repository.build(folder)
    people, recorder = make_people(folder / "keys")
    database = postgres.initialise(folder / "postgres", free_port(), private)
    objects = s3.initialise(folder / "s3", free_port, private)
    ports = {name: free_port() for name in (*WEB, "front", "admin", "supervisor")}
    facts = {
        "dir": str(folder),
        "versions": VERSIONS,
        "commits": {tag: commits[tag] for tag in VERSIONS.values()},
        "endpoints": {
            "front": f"http://127.0.0.1:{ports['front']}",
            "database": f"postgresql://postgres@127.0.0.1:{database.port}/prod_db?passfile={database.passfile}",
            "s3": objects.endpoint,
            "outbox": str(folder / "outbox"),
        },
        "people": people,
        "signers": {
            n: {"name": p["name"], "roles": p["roles"], "keys": [p["public_key"]]} for n, p in people.items()
        },
        "recorder": recorder,
        "database": {
            "host": "127.0.0.1",
            "port": database.port,
            "passfile": str(database.passfile),
            "bin": str(database.bin),
            "production": "prod_db",
            "staging": "staging_db",
            "app_role": "shop_app",
            "migrate_role": "shop_migrate",
            "backup_role": "backup_user",
            "admin_role": "postgres",
        },
        "s3": {
            "endpoint": objects.endpoint,
            "bucket": s3.BUCKET,
            "region": s3.REGION,
            "credentials_file": str(objects.credentials),
            "profile": "default",
        },
        "hosts": {
            **{n: {"home": str(folder / "hosts" / n), "url": f"http://127.0.0.1:{ports[n]}"} for n in WEB},
            **{n: {"home": str(folder / "hosts" / n)} for n in WORKERS},
        },
        "balancer": {
            "admin": f"http://127.0.0.1:{ports['admin']}",
            "access_log": str(folder / "balancer" / "access.log"),
        },
        "repository": str(folder / "shop.git"),
        "playbooks": str(PLAYBOOKS),
        "inventory": str(folder / "inventory.yml"),
        "vault_password_file": str(private / "vault_password"),
        "bypass_token_file": str(private / "bypass_token"),
        "backups": str(folder / "backups"),
        "dbmate": str(Path(sys.executable).parent / "dbmate"),
    }
    _write_configuration(folder, facts, ports, database, objects)
    vault = _encrypt_vault(folder)
    _start_supervisor(folder)
    _start(folder, "postgres")
    _wait("PostgreSQL", lambda: database.connect("postgres", "postgres").close(), 20.0, psycopg_errors())
    postgres.make_databases(database)
    for host in (*WEB, *WORKERS):
        _first_deploy(folder, host, facts, ports)
    for name in ("prod_db", "staging_db"):
        _migrate(facts, name)
    postgres.seed_orders(database, SEEDED_ORDERS)
    for program in (*WEB, *WORKERS, "balancer"):
        _start(folder, program)
    _wait(
        "the shop",
        lambda: urllib.request.urlopen(facts["endpoints"]["front"] + "/health", timeout=2).close(),
        20.0,
        (OSError,),
    )
    _start(folder, "load")
    s3.make_bucket(objects)
    if vault.wait(timeout=30):
        raise StackError("ansible-vault could not encrypt the deployment's values")
    _write(folder / "stack.json", json.dumps(facts, indent=1))
    return {"up": True, **facts}


def psycopg_errors() -> tuple[type[Exception], ...]:
    """What a server that is not there yet answers."""
    import psycopg

    return (psycopg.OperationalError,)


def _write_configuration(
    folder: Path,
    facts: dict[str, Any],
    ports: dict[str, int],
    database: postgres.Server,
    objects: s3.ObjectServer,
) -> None:
    backends = {name: facts["hosts"][name]["url"] for name in WEB}
    balancer = {
        "port": ports["front"],
        "admin_port": ports["admin"],
        "access_log": facts["balancer"]["access_log"],
        "backends": backends,
    }
    _write(folder / "balancer" / "config.json", json.dumps(balancer))
    python = sys.executable
    programs: dict[str, tuple[list[str], dict[str, str], str]] = {
        "postgres": (database.command(), {}, "INT"),
        "s3": (objects.command(), {}, "TERM"),
        "balancer": (
            [python, "-m", "rehearsal.balancer", "--config", str(folder / "balancer" / "config.json")],
            {},
            "TERM",
        ),
        "load": (
            [python, "-m", "rehearsal.load", "--front", facts["endpoints"]["front"], "--rate", str(LOAD_RPS)],
            {},
            "TERM",
        ),
    }
    for name in (*WEB, *WORKERS):
        home = folder / "hosts" / name
        script = home / "current" / ("web.py" if name in WEB else "worker.py")
        programs[name] = ([python, str(script)], {"SHOP_HOME": str(home)}, "TERM")
    parser = configparser.RawConfigParser()
    password = (folder / "secrets" / "supervisor_password").read_text()
    server = {"port": f"127.0.0.1:{ports['supervisor']}", "username": "twin", "password": password}
    parser["inet_http_server"] = server
    parser["supervisord"] = {
        "logfile": str(folder / "log" / "supervisord.log"),
        "pidfile": str(folder / "run" / "supervisord.pid"),
        "childlogdir": str(folder / "log"),
        "nodaemon": "true",
        **({"user": "root"} if os.geteuid() == 0 else {}),
    }
    parser["rpcinterface:supervisor"] = {
        "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
    }
    parser["supervisorctl"] = {
        "serverurl": f"http://127.0.0.1:{ports['supervisor']}",
        **{k: server[k] for k in ("username", "password")},
    }
    for name, (argv, env, stop) in programs.items():
        environment = {
            "PYTHONPATH": str(PROJECT),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            **env,
        }
        parser[f"program:{name}"] = {
            "command": shlex.join(argv).replace("%", "%%"),
            "directory": str(folder),
            "environment": ",".join(f'{k}="{v}"' for k, v in environment.items()),
            "autostart": "true" if name == "s3" else "false",
            "autorestart": "unexpected",
            "startsecs": "0",
            "stopsignal": stop,
            "stopwaitsecs": "10",
            "stopasgroup": "false",
            "killasgroup": "true",
            "redirect_stderr": "true",
            "stdout_logfile": str(folder / "log" / f"{name}.log"),
        }
    path = folder / "supervisord.conf"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        parser.write(file)
    _write(folder / "inventory.yml", json.dumps(_inventory(folder, facts, ports), indent=1))  # JSON is YAML


def _inventory(folder: Path, facts: dict[str, Any], ports: dict[str, int]) -> dict[str, Any]:
    control = [sys.executable, "-m", "supervisor.supervisorctl", "-c", str(folder / "supervisord.conf")]

    def host(name: str) -> dict[str, Any]:
        return {
            "home": str(folder / "hosts" / name),
            "restart_command": [*control, "restart", name],
            "stop_command": [*control, "stop", name],
            "start_command": [*control, "start", name],
            "state_command": [*control, "status", name],
            **({"url": facts["hosts"][name]["url"], "port": ports[name]} if name in WEB else {}),
        }

    variables = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "repository": facts["repository"],
        "vault_file": str(folder / "secrets" / "vault.yml"),
        "database_url": _app_database_url(facts),
        "passfile": facts["database"]["passfile"],
        "bypass_token_file": facts["bypass_token_file"],
    }
    children = {
        "web": {"hosts": {name: host(name) for name in WEB}},
        "workers": {"hosts": {name: host(name) for name in WORKERS}},
    }
    return {"all": {"children": {"prod": {"vars": variables, "children": children}}}}


def _app_database_url(facts: dict[str, Any]) -> str:
    database = facts["database"]
    return f"postgresql://{database['app_role']}@127.0.0.1:{database['port']}/{database['production']}"


def _encrypt_vault(folder: Path) -> subprocess.Popen[bytes]:
    """The values that a deployment takes from the vault; encrypted in the background, it costs a second."""
    private = folder / "secrets"
    values = {
        "payment_webhook_url": f"https://payments.example/hook/{secrets.token_hex(12)}",
        "secret_key": (private / "secret_key").read_text(),
    }
    _write_secret(private / "vault.yml", json.dumps(values))
    program = Path(sys.executable).parent / "ansible-vault"
    return subprocess.Popen(
        [
            str(program),
            "encrypt",
            "--vault-password-file",
            str(private / "vault_password"),
            str(private / "vault.yml"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(folder / "log" / "vault.log").open("wb"),
        env={**os.environ, "ANSIBLE_LOCAL_TEMP": str(folder / "run" / "ansible")},
    )


def _first_deploy(folder: Path, host: str, facts: dict[str, Any], ports: dict[str, int]) -> None:
    """Lay the running release out as the deploy playbook would have."""
    home, commit = folder / "hosts" / host, facts["commits"][VERSIONS["running"]]
    release = home / "releases" / commit
    for part in (release, home / "shared" / "uploads", home / "log"):
        part.mkdir(parents=True)
    archived = subprocess.run(
        ("git", "-C", facts["repository"], "archive", "--format=tar", commit), check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archived)) as tar:
        tar.extractall(release, filter="data")
    (release / "REVISION").write_text(f"{commit}\n")
    values = {
        "INSTANCE": host,
        "DATABASE_URL": _app_database_url(facts),
        "PGPASSFILE": facts["database"]["passfile"],
        "BYPASS_TOKEN_FILE": facts["bypass_token_file"],
        "SECRET_KEY": (folder / "secrets" / "secret_key").read_text(),
        **({"PORT": str(ports[host])} if host in ports else {}),
    }
    env = home / "shared" / "env"
    _write_secret(env, "".join(f"{key}={value}\n" for key, value in values.items()))
    noise = random.Random(host)
    for number in range(6):
        (home / "shared" / "uploads" / f"picture-{number}.bin").write_bytes(noise.randbytes(300_000))
        (home / "shared" / "uploads" / f"invoice-{number}.txt").write_text(
            f"invoice {number} of {host}\n" * 4000
        )
    (home / "current").symlink_to(f"releases/{commit}")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    (home / "revisions.log").write_text(f"{now} {commit} -\n")


def _migrate(facts: dict[str, Any], database: str) -> None:
    server = facts["database"]
    home = Path(facts["hosts"]["app-01"]["home"])
    subprocess.run(
        (
            facts["dbmate"],
            "--no-dump-schema",
            "--migrations-dir",
            str(home / "current" / "db" / "migrations"),
            "--url",
            f"postgres://{server['migrate_role']}@127.0.0.1:{server['port']}/{database}?sslmode=disable",
            "up",
        ),
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PGPASSFILE": server["passfile"]},
    )


# --- the supervisor ----------------------------------------------------------------------------------------------


def _control(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    argv = (sys.executable, "-m", "supervisor.supervisorctl", "-c", str(folder / "supervisord.conf"), *words)
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)


def _start_supervisor(folder: Path) -> None:
    log = (folder / "log" / "supervisord.out").open("wb")
    subprocess.Popen(
        (sys.executable, "-m", "supervisor.supervisord", "-c", str(folder / "supervisord.conf")),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        cwd=folder,
    )
    _wait("the supervisor", lambda: _rpc(folder).supervisor.getState(), 10.0, (OSError,))


def _rpc(folder: Path) -> Any:
    import xmlrpc.client

    parser = configparser.RawConfigParser()
    parser.read(folder / "supervisord.conf")
    server = parser["inet_http_server"]
    return xmlrpc.client.ServerProxy(
        f"http://{server['username']}:{server['password']}@{server['port']}/RPC2"
    )


def _start(folder: Path, program: str) -> None:
    if not _rpc(folder).supervisor.startProcess(program):
        raise StackError(f"{program} did not start")


def _supervisor(folder: Path) -> int | None:
    """The supervisor's pid when it is this folder's and alive."""
    try:
        pid = int((folder / "run" / "supervisord.pid").read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None
    return pid if os.fsencode(folder / "supervisord.conf") in words else None


def _stop_all(folder: Path) -> None:
    """Ask the supervisor to end its programs and itself; whatever is left after a bound is killed."""
    pid = _supervisor(folder)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 40.0
        while _alive(pid) and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError, OSError):
                os.waitpid(pid, os.WNOHANG)
            time.sleep(0.05)
    for left in _leftovers(folder):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(left, signal.SIGKILL)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _leftovers(folder: Path) -> list[int]:
    """Processes of a twin whose supervisor died: their command line names a file below the folder."""
    mark, found = os.fsencode(f"{folder}/"), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            line = (entry / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        programs = (
            b"/supervisord.conf",
            b"/postgres\0",
            b"/s3\0",
            b"/balancer/config.json",
            b"/web.py",
            b"/worker.py",
        )
        if mark in line and (any(p in line for p in programs) or b"-dir=" in line):
            if b"supervisorctl" not in line:
                found.append(int(entry.name))
        elif b"rehearsal.load" in line and _cwd(entry) == str(folder):
            found.append(int(entry.name))
    return found


def _cwd(entry: Path) -> str:
    try:
        return os.readlink(entry / "cwd")
    except OSError:
        return ""


def _clear(folder: Path) -> None:
    """A fresh world: what an earlier twin left is stopped and removed."""
    if folder.exists():
        known = {"log", "run", "secrets", "stack.json"}
        if any(folder.iterdir()) and not known & {p.name for p in folder.iterdir()}:
            raise StackError(f"{folder} holds something that is no rehearsal stack; give another --dir")
        down(folder)
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _wait(
    what: str, look: Callable[[], object], seconds: float, not_yet: tuple[type[Exception], ...]
) -> None:
    deadline, last = time.monotonic() + seconds, ""
    while time.monotonic() < deadline:
        try:
            look()
        except not_yet as error:
            last = " ".join(str(error).split())[:300]
            time.sleep(0.05)
        else:
            return
    raise StackError(f"{what} was not ready after {seconds:g} s: {last}")


def _last_words(folder: Path) -> str:
    logs = (
        sorted((folder / "log").glob("*"), key=lambda p: p.stat().st_mtime)
        if (folder / "log").is_dir()
        else []
    )
    for log in reversed(logs):
        lines = log.read_text(errors="replace").strip().splitlines()
        if lines:
            return f"The last log, {log}, ends: {lines[-1][:300]}"
    return f"Nothing was logged in {folder}/log"


def _write_secret(path: Path, content: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(content)


def _write(path: Path, content: str) -> None:
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(content)
    scratch.replace(path)
