"""The params file: strict schema, facts substituted, checked before anything starts.

The only module that knows pydantic. `params/example.yml` is its manual.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from runbook_lib.errors import UsageError

VERSION = re.compile(r"v?[0-9A-Za-z][0-9A-Za-z.]{0,30}(-[0-9A-Za-z][0-9A-Za-z.]{0,30})?")
NAME = re.compile(r"[a-z][a-z0-9_-]{0,30}")
_PLACEHOLDER = re.compile(r"\$\{([a-z][a-z0-9_.-]*)\}")
_SECRET = re.compile(r"(env:[A-Za-z_][A-Za-z0-9_]*|file:\S+)")

# pydantic matches in Rust, where `$` is the end of the text and nothing else.
Name = Annotated[str, StringConstraints(pattern=rf"^{NAME.pattern}$")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=4000, pattern=r"^[^\x00]*$")]
Line = Annotated[str, StringConstraints(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f]*$")]
SecretRef = Annotated[str, StringConstraints(pattern=rf"^{_SECRET.pattern}$")]
Url = Annotated[str, StringConstraints(pattern=r"^https?://[A-Za-z0-9.:\[\]_-]+(/[^\s]*)?$")]
Seconds = Annotated[float, Field(gt=0, le=7 * 86400)]
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,62}$")]


def _address(value: str) -> str:
    if re.fullmatch(r"local:/\S*", value):
        return value
    if re.fullmatch(r"ssh:([a-z_][a-z0-9_-]*@)?[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]{1,5})?(/\S*)", value):
        return value
    raise ValueError("must be local:/FOLDER or ssh:[user@]host[:port]/FOLDER")


def _moment(value: str) -> str:
    try:
        there = datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        there = False
    if not there:
        raise ValueError("must be an ISO 8601 time with its offset, such as 2026-03-01T20:00:00+00:00")
    return value


Address = Annotated[str, AfterValidator(_address)]
Moment = Annotated[Line, AfterValidator(_moment)]
# A folder, a URL, or git's own user@host:path; never what git would take for an option.
Remote = Annotated[
    str,
    StringConstraints(
        pattern=r"^(/|(https|ssh|file)://|([a-z_][a-z0-9_-]*@)?[A-Za-z0-9][A-Za-z0-9.-]*:)[^\s\x00-\x1f]*$"
    ),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Person(_Strict):
    name: Line
    roles: list[Name] = []
    keys: list[Annotated[str, StringConstraints(pattern=r"^(ssh|sk-ssh|ecdsa)-\S+ [A-Za-z0-9+/=]+( [^\n]*)?$")]]


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
    url: Url
    health_path: Line = "/health"
    version_path: Line = "/version"
    critical_paths: list[Line] = []
    probe_write_path: Line
    probe_write_form: dict[str, str] = {}
    bypass_token: SecretRef
    refusal_header: Word = "X-Maintenance"


class Repository(_Strict):
    url: Remote
    branch: Word = "main"
    ci_notes_ref: Word = "ci"
    freeze: Literal["hook-file"] = "hook-file"
    changelog: Line = "CHANGELOG.md"


class Host(_Strict):
    address: Address
    url: Url | None = None
    balanced: bool = True
    log: Line = "log/app.log"
    python: Line = "python3"
    files: Annotated[list[Line], Field(min_length=1)] = ["."]


class Hosts(_Strict):
    web: Annotated[dict[Name, Host], Field(min_length=1)]
    workers: dict[Name, Host] = {}


class Database(_Strict):
    host: Line
    port: Annotated[int, Field(ge=1, le=65535)]
    passfile: Line
    bin: Line | None = None
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
    executable: Line = "dbmate"
    directory: Line = "db/migrations"
    timeout_s: Seconds = 1800.0


class ObjectStore(_Strict):
    bucket: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{1,62}$")]
    prefix: Line = "runbook"
    endpoint: Url | None = None
    region: Word = "us-east-1"
    profile: Word = "default"
    credentials_file: Line | None = None
    capacity_bytes: Annotated[int, Field(gt=0)] | None = None
    encryption: Literal["AES256", "aws:kms"] | None = None
    kms_key: Line | None = None
    retain_days: Annotated[int, Field(ge=0, le=36500)] = 0
    retain_mode: Literal["GOVERNANCE", "COMPLIANCE"] = "GOVERNANCE"


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


class Backup(_Strict):
    directory: Line
    free_ratio: Annotated[float, Field(ge=0.0, le=0.9)] = 0.15
    max_age_s: Seconds = 86400.0
    timeout_s: Seconds = 7200.0
    scratch_capacity_bytes: Annotated[int, Field(gt=0)] | None = None
    parallel: Annotated[int, Field(ge=1, le=32)] = 4
    jobs: Annotated[int, Field(ge=1, le=64)] = 2
    dump: DumpParams = DumpParams()
    archive: ArchiveParams = ArchiveParams()
    store: ObjectStore


class Deploy(_Strict):
    playbooks: Line
    inventory: Line
    vault_password: SecretRef | None = None
    balancer: Url | None = None
    drain_timeout_s: Seconds = 30.0
    timeout_s: Seconds = 600.0


class SpotCheck(_Strict):
    name: Name
    asks: Line
    path: Line = "/"


class SpotChecks(_Strict):
    required: bool = True
    checks: list[SpotCheck]


class Watch(_Strict):
    duration_s: Annotated[float, Field(ge=5, le=86400)] = 900.0
    interval_s: Annotated[float, Field(gt=0, le=600)] = 15.0
    baseline_s: Annotated[float, Field(ge=5, le=7 * 86400)] = 3600.0
    extensions: Annotated[int, Field(ge=0, le=5)] = 1
    access_log: Line
    queue_depth_sql: Text | None = None
    hard_limits: dict[Word, float] = {}
    rules: dict[Word, Any] = {}


class Window(_Strict):
    start: Moment | None = None
    budget_s: Seconds = 600.0
    early_s: Annotated[float, Field(ge=0, le=86400)] = 900.0


class Maintenance(_Strict):
    lift: Literal["after_gate_3", "before_watch"] = "after_gate_3"


class Messages(_Strict):
    chat: Annotated[str, StringConstraints(pattern=r"^outbox:/\S+$")]
    deployments: Line = "#deployments"
    incidents: Line = "#incidents"
    calendar: Annotated[str, StringConstraints(pattern=r"^folder:/\S+$")]
    pages: Annotated[str, StringConstraints(pattern=r"^folder:/\S+$")]
    tickets: Annotated[str, StringConstraints(pattern=r"^folder:/\S+$")]
    tracker: Annotated[str, StringConstraints(pattern=r"^csv:/\S+$")]


class Record(_Strict):
    key: SecretRef


class Rollback(_Strict):
    automatic: bool = False


class Rehearsal(_Strict):
    stack: Line
    people_sign: bool = False


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
    ledger: Annotated[str, StringConstraints(pattern=r"^(sqlite|postgresql(\+psycopg)?)://\S*$")] | None = None
    rehearsal: Rehearsal | None = None

    @model_validator(mode="after")
    def _whole(self) -> Params:
        roles = {role for person in self.people.values() for role in person.roles}
        for name in ("backup", "migration", "release"):
            gate: GateParams = getattr(self.gates, name)
            able = [p for p, person in self.people.items() if set(person.roles) & set(gate.roles)]
            if len(able) < gate.quorum:
                raise ValueError(
                    f"gates.{name} needs {gate.quorum} of {'/'.join(gate.roles)}, people have {sorted(roles)}"
                )
        if self.production:
            if self.rehearsal is not None:
                raise ValueError("rehearsal: a production environment has no rehearsal block")
            local = [name for name, host in self.all_hosts.items() if host.address.startswith("local:")]
            if local:
                raise ValueError(f"hosts.{local[0]}.address: local: is refused in production")
            for name in ("chat", "calendar", "pages", "tickets", "tracker"):
                if str(getattr(self.messages, name)).partition(":")[0] in ("outbox", "folder", "csv"):
                    raise ValueError(f"messages.{name}: a local folder is refused in production")
        return self

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
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yml") if p.stem != "example")) or "none"
        raise UsageError(f"there is no params file {path.name} (known environments: {known})", remedy=f"write {path}")
    try:
        data = yaml.load(path.read_text(), Loader=_UniqueKeys)  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, OSError, ValueError, TypeError, RecursionError, UsageError) as error:
        # PyYAML itself raises the plain ones: 2026-02-31, a key that is a list, brackets without end.
        raise UsageError(f"{path.name} is not readable YAML: {_one_line(error)}", remedy=f"mend {path}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path.name} must be a mapping, not {type(data).__name__}", remedy="see params/example.yml")
    facts = data.get("facts")
    try:
        data = _substituted(data, _facts(path, facts) if isinstance(facts, str) else {}, path.name)
    except RecursionError as error:
        raise UsageError(f"{path.name} refers to itself without end", remedy=f"mend {path}") from error
    for dotted, value in (settings or {}).items():
        _set(data, dotted, value)
    return check(data, where=path.name, environment=path.stem)


def check(data: Mapping[str, Any], *, where: str, environment: str | None = None) -> Params:
    """Check a mapping against the schema.

    Raises:
        UsageError: one line with the first wrong key and how many there are.
    """
    try:
        params = Params.model_validate(data)
    except ValidationError as error:
        problems = error.errors()
        first = problems[0]
        key = _one_line(".".join(str(part) for part in first["loc"])) or "the whole"
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UsageError(
            f"{where}: {key}: {_one_line(first['msg'])}{more}", remedy="compare with params/example.yml"
        ) from error
    if environment is not None and params.environment != environment:
        raise UsageError(
            f"{where}: environment: says {params.environment!r}, the file is named {environment!r}",
            remedy="make them equal",
        )
    return params


def _facts(path: Path, name: str) -> dict[str, Any]:
    try:
        data = json.loads((path.parent.parent / name).resolve().read_text())
    except FileNotFoundError as error:
        raise UsageError(
            f"{path.name}: facts: {name} is not there: the stack that writes it is down", remedy="runbook stack up"
        ) from error
    except OSError as error:
        raise UsageError(f"{path.name}: facts: {name} cannot be read: {error.strerror}", remedy="check it") from error
    except ValueError as error:
        raise UsageError(
            f"{path.name}: facts: {_one_line(name)} is no JSON: {_one_line(error)}", remedy="runbook stack up"
        ) from error
    if not isinstance(data, dict):
        raise UsageError(f"{path.name}: facts: {name} is no JSON object", remedy="runbook stack up")
    return data


def _substituted(value: Any, facts: Mapping[str, Any], where: str) -> Any:
    if isinstance(value, dict):
        return {key: _substituted(item, facts, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_substituted(item, facts, where) for item in value]
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
    *parents, last = dotted.split(".")
    node: Any = data
    for part in parents:
        node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise UsageError(f"--set {dotted}: {part} is no mapping", remedy="see params/example.yml")
    try:
        node[last] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"--set {dotted}: {_one_line(error)}", remedy="give a YAML scalar") from error


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


def _one_line(error: object) -> str:
    # What a file says goes to a terminal: no line breaks, no escape sequences.
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))[:300]
