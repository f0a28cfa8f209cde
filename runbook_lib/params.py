"""The params file: strict schema, facts substituted, checked before anything starts.

The only module that knows pydantic. `params/example.yml` is its manual.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from runbook_lib import grammar, params_file
from runbook_lib.canonical import canonical_json
from runbook_lib.errors import UsageError
from runbook_lib.params_file import one_line

VERSION = re.compile(r"v?[0-9A-Za-z][0-9A-Za-z.]{0,30}(-[0-9A-Za-z][0-9A-Za-z.]{0,30})?")
NAME = re.compile(r"[a-z][a-z0-9_-]{0,30}")
_MOST_BYTES = 2**53 - 1  # JSON's largest whole number

# pydantic matches in Rust, where `$` is the end of the text and nothing else.
Name = Annotated[str, StringConstraints(pattern=rf"^{NAME.pattern}$")]
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,62}$")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=4000, pattern=r"^[^\x00]*$")]
_Short = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Line = Annotated[_Short, AfterValidator(grammar.line)]
Below = Annotated[_Short, AfterValidator(grammar.below)]
Absolute = Annotated[_Short, AfterValidator(grammar.absolute)]
Program = Annotated[_Short, AfterValidator(grammar.program)]
Url = Annotated[_Short, AfterValidator(grammar.url)]
Front = Annotated[_Short, AfterValidator(grammar.front)]
UrlPath = Annotated[_Short, AfterValidator(grammar.url_path)]
Server = Annotated[_Short, AfterValidator(grammar.server)]
Address = Annotated[_Short, AfterValidator(grammar.address)]
Remote = Annotated[_Short, AfterValidator(grammar.remote)]
LedgerUrl = Annotated[_Short, AfterValidator(grammar.ledger)]
SecretRef = Annotated[_Short, AfterValidator(grammar.secret)]
FileRef = Annotated[_Short, AfterValidator(grammar.file_secret)]
PublicKey = Annotated[str, StringConstraints(max_length=4000), AfterValidator(grammar.public_key)]
Moment = Annotated[_Short, AfterValidator(grammar.moment)]
Rule = Annotated[
    str, StringConstraints(pattern="^(floor_rps|max_traffic_ratio|error_share|expected_instances|effects)$")
]
Seconds = Annotated[float, Field(gt=0, le=7 * 86400)]


def _json(value: Any) -> Any:
    try:
        canonical_json(value)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    return value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Person(_Strict):
    name: Line
    roles: list[Name] = []
    keys: list[PublicKey]


class GateParams(_Strict):
    roles: Annotated[list[Name], Field(min_length=1)]
    quorum: Annotated[int, Field(ge=1, le=10)] = 1
    timeout_s: Seconds = 3600.0


class Gates(_Strict):
    backup: GateParams
    migration: GateParams
    release: GateParams


class Application(_Strict):
    name: Word
    url: Front
    health_path: UrlPath = "/health"
    version_path: UrlPath = "/version"
    critical_paths: list[UrlPath] = []
    probe_write_path: UrlPath
    probe_write_form: dict[str, str] = {}
    bypass_token: SecretRef
    refusal_header: Word = "X-Maintenance"


class Repository(_Strict):
    url: Remote
    branch: Word = "main"
    ci_notes_ref: Word = "ci"
    freeze: Literal["hook-file"] = "hook-file"
    changelog: Below = "CHANGELOG.md"


class Host(_Strict):
    address: Address
    url: Front | None = None
    balanced: bool = True
    log: Below = "log/app.log"
    python: Line = "python3"
    files: Annotated[list[Below], Field(min_length=1)] = ["."]


class Hosts(_Strict):
    web: Annotated[dict[Name, Host], Field(min_length=1)]
    workers: dict[Name, Host] = {}


class Database(_Strict):
    host: Server
    port: Annotated[int, Field(ge=1, le=65535)]
    passfile: Absolute
    bin: Absolute | None = None
    production: Word
    staging: Word
    maintenance: Word = "postgres"
    admin_role: Word
    backup_role: Word
    migrate_role: Word
    app_role: Word
    lock_timeout_s: Seconds = 0.8
    long_transaction_s: Seconds = 60.0
    critical_reads: Annotated[list[Line], Field(min_length=1)]


class Migrations(_Strict):
    tool: Literal["dbmate", "rails"] = "dbmate"
    executable: Program = "dbmate"
    directory: Below = "db/migrations"
    timeout_s: Seconds = 1800.0


class ObjectStore(_Strict):
    bucket: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{1,62}$")]
    prefix: Line = "runbook"
    endpoint: Url | None = None
    region: Word = "us-east-1"
    profile: Word = "default"
    credentials_file: Absolute | None = None
    capacity_bytes: Annotated[int, Field(gt=0, le=_MOST_BYTES)] | None = None
    encryption: Literal["AES256", "aws:kms"] | None = None
    kms_key: Line | None = None
    retain_days: Annotated[int, Field(ge=0, le=36500)] = 0
    retain_mode: Literal["GOVERNANCE", "COMPLIANCE"] = "GOVERNANCE"

    @model_validator(mode="after")
    def _key(self) -> ObjectStore:
        if self.kms_key is not None and self.encryption != "aws:kms":
            raise ValueError("kms_key: a store takes one with encryption: aws:kms only")
        if self.kms_key is not None and re.search(r"(^|:)alias/", self.kms_key):
            raise ValueError("kms_key: of a copy a store names the key and no alias: give the key's id or ARN")
        return self


class ArchiveParams(_Strict):
    compression: Literal["auto", "zstd", "gzip"] = "auto"
    level: Annotated[int, Field(ge=1, le=19)] | None = None
    threads: Annotated[int, Field(ge=0, le=64)] = 0

    @model_validator(mode="after")
    def _level(self) -> ArchiveParams:
        if self.level is not None and self.level > 9 and self.compression != "zstd":
            raise ValueError("level: gzip knows 1 to 9; more needs compression: zstd")
        return self


class DumpParams(_Strict):
    format: Literal["custom", "directory"] = "custom"
    compression: Literal["auto", "zstd", "gzip", "none"] = "auto"
    level: Annotated[int, Field(ge=1, le=19)] | None = None

    @model_validator(mode="after")
    def _level(self) -> DumpParams:
        if self.level is not None and self.level > 9 and self.compression == "gzip":
            raise ValueError("level: gzip knows 1 to 9; more needs compression: zstd")
        return self


class Backup(_Strict):
    directory: Absolute
    free_ratio: Annotated[float, Field(ge=0.0, le=0.9)] = 0.15
    max_age_s: Seconds = 86400.0
    timeout_s: Seconds = 7200.0
    stall_s: Seconds = 120.0
    scratch_capacity_bytes: Annotated[int, Field(gt=0, le=_MOST_BYTES)] | None = None
    parallel: Annotated[int, Field(ge=1, le=32)] = 4
    jobs: Annotated[int, Field(ge=1, le=64)] = 2
    dump: DumpParams = DumpParams()
    archive: ArchiveParams = ArchiveParams()
    store: ObjectStore


class Deploy(_Strict):
    playbooks: Absolute
    inventory: Absolute
    vault_password: FileRef | None = None
    balancer: Front | None = None
    drain_timeout_s: Seconds = 30.0
    timeout_s: Seconds = 600.0


class SpotCheck(_Strict):
    name: Name
    asks: Line
    path: UrlPath = "/"
    url: Url | None = None


class SpotChecks(_Strict):
    required: bool = True
    checks: list[SpotCheck]


class Watch(_Strict):
    duration_s: Annotated[float, Field(ge=5, le=86400)] = 900.0
    interval_s: Annotated[float, Field(gt=0, le=600)] = 15.0
    baseline_s: Annotated[float, Field(ge=5, le=7 * 86400)] = 3600.0
    extensions: Annotated[int, Field(ge=0, le=5)] = 1
    access_log: Absolute
    queue_depth_sql: Text | None = None
    hard_limits: dict[Word, float] = {}
    rules: Annotated[dict[Rule, Any], AfterValidator(_json)] = {}


class Window(_Strict):
    start: Moment | None = None
    budget_s: Seconds = 600.0
    early_s: Annotated[float, Field(ge=0, le=86400)] = 900.0


class Maintenance(_Strict):
    lift: Literal["after_gate_3", "before_watch"] = "after_gate_3"


class Messages(_Strict):
    chat: Annotated[Line, StringConstraints(pattern=r"^outbox:/\S+$")]
    deployments: Line = "#deployments"
    incidents: Line = "#incidents"
    calendar: Annotated[Line, StringConstraints(pattern=r"^folder:/\S+$")]
    pages: Annotated[Line, StringConstraints(pattern=r"^folder:/\S+$")]
    tickets: Annotated[Line, StringConstraints(pattern=r"^folder:/\S+$")]
    tracker: Annotated[Line, StringConstraints(pattern=r"^csv:/\S+$")]


class Record(_Strict):
    key: FileRef


class Rollback(_Strict):
    automatic: bool = False


class Rehearsal(_Strict):
    stack: Line
    people_sign: bool = False


# A step in doubt is settled by who decides at the gate behind it; of the last phases by whoever decides at any.
_DECIDED_AT = {
    "prepare": "backup",
    "backup": "backup",
    "begin": "migration",
    "migrate": "migration",
    "deploy": "release",
    "verify": "release",
}


class Params(_Strict):
    environment: Name
    production: bool = False
    facts: Line | None = None
    opened_by: Name | None = None
    people: Annotated[dict[Name, Person], Field(min_length=1)]
    gates: Gates
    application: Application
    repository: Repository
    hosts: Hosts
    database: Database
    migrations: Migrations
    backup: Backup
    deploy: Deploy
    smoke_timeout_s: Seconds = 300.0
    spot_checks: SpotChecks
    watch: Watch
    window: Window = Window()
    maintenance: Maintenance = Maintenance()
    messages: Messages
    record: Record
    rollback: Rollback = Rollback()
    ledger: LedgerUrl | None = None
    rehearsal: Rehearsal | None = None

    @model_validator(mode="after")
    def _whole(self) -> Params:
        for said in self._wrong_together():
            raise ValueError(said)
        return self

    def _wrong_together(self) -> Iterator[str]:
        roles = {role for person in self.people.values() for role in person.roles}
        if self.opened_by is not None and self.opened_by not in self.people:
            yield f"opened_by: {self.opened_by} is none of the people"
        for name in ("backup", "migration", "release"):
            gate: GateParams = getattr(self.gates, name)
            if len(self.able(name)) < gate.quorum:
                yield f"gates.{name} needs {gate.quorum} of {'/'.join(gate.roles)}, people have {sorted(roles)}"
            elif len(self.able(name, opener=self.opened_by)) < gate.quorum:
                yield f"gates.{name} needs {gate.quorum} of {'/'.join(gate.roles)} beside {self.opened_by}, who opens runs"
        owners: dict[str, str] = {}
        for name, person in self.people.items():
            if name == "recorder":
                yield "people.recorder: this name signs records, and no gates"
            for key in person.keys:
                owner = owners.setdefault(" ".join(key.split(" ")[:2]), name)
                if owner != name:
                    yield f"people.{name}.keys: {owner} has the same key: one could sign for the other"
        twice = sorted(self.hosts.web.keys() & self.hosts.workers.keys())
        if twice:
            yield f"hosts.workers.{twice[0]}: a web host has the same name"
        if all(host.url is None for host in self.hosts.web.values()):
            yield "hosts.web: none has a url, so none can say which release it runs"
        if self.database.production == self.database.staging:
            both = f"database.production and database.staging are both {self.database.production}"
            yield f"{both}: a release is rehearsed on staging first"
        checks = [check.name for check in self.spot_checks.checks]
        if len(set(checks)) < len(checks):
            yield f"spot_checks.checks: two have the name {max(checks, key=checks.count)}"
        if self.production:
            yield from self._local()

    def _local(self) -> Iterator[str]:
        if self.rehearsal is not None:
            yield "rehearsal: a production environment has no rehearsal block"
        for name, host in self.all_hosts.items():
            if host.address.startswith("local:"):
                yield f"hosts.{name}.address: local: is refused in production"
        for name in ("chat", "calendar", "pages", "tickets", "tracker"):
            if str(getattr(self.messages, name)).partition(":")[0] in ("outbox", "folder", "csv"):
                yield f"messages.{name}: a local folder is refused in production"

    def able(self, gate: str, *, opener: str | None = None) -> list[str]:
        """Who may approve a gate of a run that `opener` opens."""
        roles = set(getattr(self.gates, gate).roles)
        return [name for name, person in self.people.items() if roles & set(person.roles) and name != opener]

    def settling_roles(self, step: str) -> list[str]:
        """Whose signed word settles a step that is in doubt: the roles that decide at the gate behind its phase."""
        gate = _DECIDED_AT.get(step.partition(".")[0])
        gates = self.gates
        asked = [getattr(gates, gate)] if gate is not None else [gates.backup, gates.migration, gates.release]
        return sorted({role for one in asked for role in one.roles})

    def may_settle(self, step: str, *, opener: str) -> list[str]:
        """The people who may, as at a gate without who opened the run."""
        roles = set(self.settling_roles(step))
        return sorted(name for name, person in self.people.items() if roles & set(person.roles) and name != opener)

    @property
    def all_hosts(self) -> dict[str, Host]:
        """Web hosts first, then workers: the order of a deployment."""
        return {**self.hosts.web, **self.hosts.workers}

    def frozen(self) -> dict[str, Any]:
        """JSON form for params.json: references only, no secret can be in it."""
        return self.model_dump(mode="json")


def version_text(value: str) -> str:
    """Check a version or tag against its grammar and return it unchanged, as text.

    Raises:
        UsageError: it is not `[v]WORD[-WORD]`; nothing that git, a path or a template would read specially passes.
    """
    if not VERSION.fullmatch(value) or ".." in value:
        raise UsageError(
            f"version {value[:60]!r} is outside the grammar letters, digits and dots, one hyphen allowed",
            remedy="give a release tag such as v2.3.0-prod",
        )
    return value


def load(path: Path, *, settings: Mapping[str, str] | None = None) -> Params:
    """Read, complete and check a params file.

    Args:
        path: the YAML file, named after its environment.
        settings: `--set` overrides, dotted key to YAML scalar.

    Raises:
        UsageError: naming file and key; nothing was started.
    """
    return check(params_file.read(path, settings or {}), where=path.name, environment=path.stem)


def check(data: Mapping[str, Any], *, where: str, environment: str | None = None) -> Params:
    """Check a mapping against the schema.

    Raises:
        UsageError: one line with the first wrong key and how many there are.
    """
    try:
        params = Params.model_validate(data)
    except RecursionError as error:
        raise UsageError(f"{where} is nested too deeply", remedy="compare with params/example.yml") from error
    except ValidationError as error:
        problems = error.errors()
        first = problems[0]
        key = one_line(".".join(str(part) for part in first["loc"])) or "the whole"
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UsageError(
            f"{where}: {key}: {one_line(first['msg'])}{more}", remedy="compare with params/example.yml"
        ) from error
    if environment is not None and params.environment != environment:
        raise UsageError(
            f"{where}: environment: says {params.environment!r}, the file is named {environment!r}",
            remedy="make them equal",
        )
    return params
