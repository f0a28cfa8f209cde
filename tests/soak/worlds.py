"""A twin whose state can be taken down as a checkpoint and put back within a second, and observers that look at it.

The observers use nothing of the code under test: files, `git`, SQL, S3's own listing, HTTP.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
import xmlrpc.client
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
from psycopg import sql

from rehearsal import supervisor
from tests.project import Project

PRODUCTION, STAGING = "prod_db", "staging_db"
# Folders and files of the twin that steps write to; what is not here is a server's own.
OUTWARD = ("outbox", "calendar", "pages", "tickets", "tracker.csv")
_A_MANIFEST = re.compile(r"/manifest-[0-9a-f]{64}\.json$")
_FENCE = "default_transaction_read_only=on"

View = dict[str, Any]


@dataclass
class World:
    """One twin with the project folder that releases to it."""

    project: Project
    checkpoints: Path
    ledger: str = ""  # a PostgreSQL ledger's address; empty: the default file
    _known: dict[str, Any] = field(default_factory=dict)

    @property
    def twin(self) -> Path:
        return self.project.root / ".rehearsal"

    @property
    def hosts(self) -> list[str]:
        return list(self.project.facts["hosts"])

    # --- looking -------------------------------------------------------------------------------------------------

    def look(self) -> View:
        """Everything that a release changes, as it is now; equal views are equal worlds."""
        return {
            # Beside each lies a note of what was verified: a backup is what is left without it.
            "backups": [name for name in self._listed(self.twin / "backups") if not name.endswith(".json")],
            "s3": dict(self._stored()),
            "schema": {name: self._schema(name) for name in (PRODUCTION, STAGING)},
            "scratch databases": self._query(
                "postgres", "SELECT datname FROM pg_database WHERE datname LIKE '%scratch%'"
            ),
            "write fence": bool(self._fenced()),
            "hosts": {host: self._host(host) for host in self.hosts},
            "balancer": {name: said["state"] for name, said in self._balancer("GET", "/backends").items()},
            "outward": {name: self._listed(self.twin / name) for name in OUTWARD},
            "repository": self._repository(),
        }

    def _host(self, host: str) -> View:
        home = self.twin / "hosts" / host
        lines = (home / "revisions.log").read_text().splitlines()
        return {
            "release": (home / "current").readlink().name[:12],
            "switched": [line.split()[1][:12] for line in lines],
            "read-only": (home / "shared" / "maintenance").exists(),
            "runs": self._runs(host),
            "serves": self._serves(host),
        }

    def _serves(self, host: str) -> str | None:
        url = self.project.facts["hosts"][host].get("url")
        if url is None:
            return None
        with urllib.request.urlopen(f"{url}/version", timeout=10) as answer:
            return str(json.load(answer)["commit"])[:12]

    def _runs(self, host: str) -> bool:
        return supervisor.state_of(self.twin, host) == "RUNNING"

    def _stop(self, program: str) -> None:
        # The keeper's command starts a Python each time, and there are thousands of looks.
        with contextlib.suppress(xmlrpc.client.Fault):
            supervisor._ask(self.twin).stopProcess(program)

    def restart_database(self) -> None:
        """Restart the twin's PostgreSQL; it answers again afterwards."""
        self._stop("postgres")
        supervisor.start(self.twin, "postgres")
        supervisor.wait_for(self.twin, "postgres", lambda: self._query("postgres", "SELECT 1"), timeout_s=60)

    def _listed(self, path: Path) -> Any:
        """Names, or lines, with what is random or the time of day taken out."""
        if path.is_file():
            return len(path.read_text().splitlines())
        # A name with a dot before it is a file that was being written when its process died: nobody reads it.
        return sorted(p.name for p in path.iterdir() if not p.name.startswith(".")) if path.is_dir() else []

    def _repository(self) -> View:
        folder = self.twin / "shop.git"
        words = ("git", f"--git-dir={folder}", "log", "--format=%s", "main")
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        freeze = folder / "runbook-freeze.json"
        frozen = json.loads(freeze.read_text()).get("run_id") if freeze.exists() else None
        return {"commits": done.stdout.splitlines(), "frozen by": frozen}

    def _query(self, database: str, statement: str, *words: Any) -> list[Any]:
        with self._session(database) as session:
            return [row[0] for row in session.execute(statement, words or None).fetchall()]

    def _session(self, database: str) -> psycopg.Connection[Any]:
        d = self.project.facts["database"]
        return psycopg.connect(
            host=d["host"],
            port=d["port"],
            user=d["admin_role"],
            dbname=database,
            passfile=d["passfile"],
            autocommit=True,
            application_name="observer",
        )

    def _schema(self, database: str) -> View:
        versions = self._query(database, "SELECT version FROM schema_migrations ORDER BY version")
        columns = self._query(
            database,
            "SELECT table_name || '.' || column_name || ' ' || data_type FROM information_schema.columns "
            "WHERE table_schema = 'public' ORDER BY 1",
        )
        return {"versions": versions, "columns": hashlib.sha256("\n".join(columns).encode()).hexdigest()[:12]}

    def _fenced(self) -> list[Any]:
        return self._query(
            "postgres",
            "SELECT 1 FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase "
            "WHERE d.datname = %s AND s.setrole <> 0 AND %s = ANY (s.setconfig)",
            PRODUCTION,
            _FENCE,
        )

    def _balancer(self, method: str, path: str) -> Any:
        url = self.project.facts["balancer"]["admin"] + path
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10) as answer:
            return json.load(answer)

    @property
    def _s3(self) -> Any:
        if "s3" not in self._known:
            import boto3

            s3 = self.project.facts["s3"]
            os.environ["AWS_SHARED_CREDENTIALS_FILE"] = s3["credentials_file"]
            session = boto3.Session(profile_name=s3["profile"], region_name=s3["region"])
            self._known["s3"] = session.client("s3", endpoint_url=s3["endpoint"])
        return self._known["s3"]

    def _versions(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        pages = self._s3.get_paginator("list_object_versions").paginate(Bucket=self.project.facts["s3"]["bucket"])
        for page in pages:
            for version in page.get("Versions", []):
                # The run's folder as it is mirrored: its logs tell of each attempt, and what the ledger names is
                # compared byte for byte when another machine fetches it.
                if "/runs/" in version["Key"]:
                    continue
                found.setdefault(version["Key"], []).append(version["VersionId"])
        return found

    def _stored(self) -> Counter[str]:
        """Key → versions; a manifest is named by its content, which tells how long each part took."""
        found: Counter[str] = Counter()
        for key, versions in self._versions().items():
            found[_A_MANIFEST.sub("/manifest-SHA256.json", key)] += len(versions)
        return found

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def take(self, name: str) -> View:
        """Write the world down; returns its view."""
        folder = self.checkpoints / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in (self.project.root / "outputs", self.twin / "backups", self.twin / "shop.git"):
            shutil.copytree(path, folder / path.name, symlinks=True)
        for part in OUTWARD:
            source = self.twin / part
            if source.is_dir():
                shutil.copytree(source, folder / part)
            elif source.exists():
                shutil.copy2(source, folder / part)
        view = self.look()
        for host in self.hosts:
            self._keep_host(host, view["hosts"][host])
        for database in (PRODUCTION, STAGING):
            self._keep_schema(database, view["schema"][database])
        (folder / "view.json").write_text(json.dumps({"view": view, "versions": self._versions()}))
        if self.ledger:
            self._copy_ledger("ledger", f"ledger_{_word(name)}")
        return view

    def put_back(self, name: str) -> View:
        """Make the world what it was; only what differs is touched. Returns its view."""
        folder = self.checkpoints / name
        kept = json.loads((folder / "view.json").read_text())
        wanted, now = kept["view"], self.look()
        for path in (self.project.root / "outputs", self.twin / "backups"):
            for old in path.iterdir():  # the folder itself may be a disk
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
            shutil.copytree(folder / path.name, path, symlinks=True, dirs_exist_ok=True)
        if now["repository"] != wanted["repository"]:
            shutil.rmtree(self.twin / "shop.git")
            shutil.copytree(folder / "shop.git", self.twin / "shop.git", symlinks=True)
        for part in OUTWARD:
            self._put_back_outward(folder / part, self.twin / part)
        for key, versions in self._versions().items():
            for version in set(versions) - set(kept["versions"].get(key, [])):
                self._s3.delete_object(Bucket=self.project.facts["s3"]["bucket"], Key=key, VersionId=version)
        for database in now["scratch databases"]:
            self._run_sql(f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)')
        for database in (PRODUCTION, STAGING):
            if now["schema"][database] != wanted["schema"][database]:
                self._swap_schema(database, wanted["schema"][database])
        self._put_back_fence(wanted=bool(wanted["write fence"]))
        self._forget_coming_epochs()
        for host in self.hosts:
            if now["hosts"][host] != wanted["hosts"][host]:
                self._put_back_host(host, wanted["hosts"][host])
        for backend, state in wanted["balancer"].items():
            if now["balancer"][backend] != state:
                self._balancer("POST", f"/backends/{backend}/{'ready' if state == 'ready' else 'drain'}")
        if self.ledger:
            self._copy_ledger(f"ledger_{_word(name)}", "ledger")
        return dict(wanted)

    def _put_back_outward(self, source: Path, target: Path) -> None:
        if target.is_dir():
            for path in target.iterdir():
                path.unlink()
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
        elif source.exists():
            shutil.copy2(source, target)
        else:
            target.unlink(missing_ok=True)

    def _run_sql(self, statement: str, database: str = "postgres") -> None:
        with self._session(database) as session:
            session.execute(statement.encode())

    def _keep_schema(self, database: str, schema: View) -> None:
        template = f"kept_{database}_{_word(str(schema))}"
        if not self._query("postgres", "SELECT 1 FROM pg_database WHERE datname = %s", template):
            self._copy_database(database, template)

    def _swap_schema(self, database: str, schema: View) -> None:
        settings = self._query(
            "postgres",
            "SELECT unnest(setconfig) FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase "
            "WHERE d.datname = %s AND s.setrole = 0",
            database,
        )
        self._run_sql(f"DROP DATABASE {database} WITH (FORCE)")
        self._copy_database(f"kept_{database}_{_word(str(schema))}", database)
        for setting in settings:
            key, _, value = setting.partition("=")
            self._run_sql(f"ALTER DATABASE {database} SET {key} = '{value}'")

    def _copy_database(self, source: str, target: str) -> None:
        with self._session("postgres") as session:
            owner = session.execute(
                "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = %s", (source,)
            ).fetchone()
            assert owner is not None
            # A copy needs its source to itself; who is sent away connects again.
            session.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(sql.Identifier(source)))
            try:
                session.execute(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s", (source,)
                )
                session.execute(
                    sql.SQL("CREATE DATABASE {} TEMPLATE {} OWNER {}").format(
                        sql.Identifier(target), sql.Identifier(source), sql.Identifier(owner[0])
                    )
                )
            finally:
                session.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(sql.Identifier(source)))

    def _put_back_fence(self, *, wanted: bool) -> None:
        role = self.project.facts["database"]["app_role"]
        if wanted != bool(self._fenced()):
            verb = "SET default_transaction_read_only = on" if wanted else "RESET default_transaction_read_only"
            self._run_sql(f"ALTER ROLE {role} IN DATABASE {PRODUCTION} {verb}")
            with self._session("postgres") as session:
                session.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", (role,))

    def _forget_coming_epochs(self) -> None:
        """A clock that was ahead gave an epoch that this world's ledger, put back, knows nothing of."""
        now = int(time.time() * 1000)
        for host in self.hosts:
            epoch = self.twin / "hosts" / host / ".runbook" / "epoch"
            if epoch.exists() and int(epoch.read_text()) > now:
                epoch.unlink()
        with self._session("postgres") as session:
            settings = session.execute(
                "SELECT datname, split_part(setting, '=', 2)::bigint FROM pg_db_role_setting "
                "JOIN pg_database d ON d.oid = setdatabase, unnest(setconfig) setting "
                "WHERE setrole = 0 AND setting LIKE 'runbook.epoch=%'"
            ).fetchall()
            for database, epoch_there in settings:
                if epoch_there > now:
                    session.execute(sql.SQL('ALTER DATABASE {} RESET "runbook.epoch"').format(sql.Identifier(database)))

    def _keep_host(self, host: str, view: View) -> None:
        kept = self.checkpoints / "hosts" / f"{host}-{_word(str(view))}"
        if not kept.exists():
            shutil.copytree(self.twin / "hosts" / host, kept, symlinks=True)

    def _put_back_host(self, host: str, view: View) -> None:
        home, kept = self.twin / "hosts" / host, self.checkpoints / "hosts" / f"{host}-{_word(str(view))}"
        self._stop(host)
        for path in home.iterdir():
            if path.name in ("log", ".runbook"):  # epochs only rise, also for a world that is put back
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        for path in kept.iterdir():
            if path.name in ("log", ".runbook"):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, home / path.name, symlinks=True)
            else:
                shutil.copy2(path, home / path.name, follow_symlinks=False)
        if view["runs"]:
            supervisor.start(self.twin, host)
            deadline = time.monotonic() + 30
            while True:
                try:
                    if self._serves(host) == view["serves"]:
                        return
                except OSError:
                    pass
                assert time.monotonic() < deadline, f"{host} does not come back"
                time.sleep(0.05)

    def _copy_ledger(self, source: str, target: str) -> None:
        with psycopg.connect(urlsplit(self.ledger)._replace(path="/postgres").geturl(), autocommit=True) as session:
            session.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = ANY (%s)",
                ([source, target],),
            )
            session.execute(f"DROP DATABASE IF EXISTS {target} WITH (FORCE)".encode())
            session.execute(f"CREATE DATABASE {target} TEMPLATE {source}".encode())


def _word(text: str) -> str:
    """A short name that stands for a text."""
    plain = re.sub(r"[^a-z0-9]", "_", text.lower())
    return plain if len(plain) < 30 else hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any], at: str = "") -> list[str]:
    """Where two views differ, as `where: wanted → found`."""
    said = []
    for key in sorted({*wanted, *found}):
        one, other, where = wanted.get(key), found.get(key), f"{at}{key}"
        if isinstance(one, dict) and isinstance(other, dict):
            said += differences(one, other, f"{where}/")
        elif one != other:
            said.append(f"{where}: {one!r} → {other!r}")
    return said
