"""The params file: what is refused, with which words, before anything starts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from runbook_lib.errors import UsageError
from runbook_lib.params import Params, check, load, version_text

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE: dict[str, Any] = yaml.safe_load((ROOT / "params" / "example.yml").read_text())
OUTWARD = {"chat": "outbox", "calendar": "folder", "pages": "folder", "tickets": "folder", "tracker": "csv"}


def changed(dotted: str, value: object) -> dict[str, Any]:
    """The example with one key set."""
    data = copy.deepcopy(EXAMPLE)
    *parents, last = dotted.split(".")
    node = data
    for part in parents:
        node = node[part]
    node[last] = value
    return data


def refused(data: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        check(data, where="some.yml")
    said = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in said
    assert said.startswith("some.yml: ")
    return said


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / "params" / f"{name}.yml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("colour", "blue"),
        ("database.prot", 5432),
        ("hosts.web.app-01.addres", "local:/x"),
        ("gates.release.quorums", 2),
        ("people.ada.role", []),
    ],
)
def test_an_unknown_key_is_named(key: str, value: object) -> None:
    assert f"{key}: " in refused(changed(key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("database.port", "5432"),
        ("database.port", True),
        ("database.port", 0),
        ("watch.duration_s", "900"),
        ("watch.duration_s", -1),
        ("watch.interval_s", float("nan")),
        ("watch.interval_s", float("inf")),
        ("gates.backup.quorum", 1.5),
        ("gates.backup.roles", []),
        ("backup.free_ratio", 95),
        ("production", "no"),
        ("application.name", 7),
        ("maintenance.lift", "whenever"),
        ("application.url", "ftp://shop.example.com"),
        ("migrations.tool", "flyway"),
        ("hosts.web", {}),
        ("ledger", "mysql://ledger"),
    ],
)
def test_a_wrong_type_or_range_is_named(key: str, value: object) -> None:
    assert f"{key}: " in refused(changed(key, value))


def test_a_missing_key_is_named() -> None:
    data = copy.deepcopy(EXAMPLE)
    del data["database"]["passfile"]
    assert "database.passfile: Field required" in refused(data)


def test_how_many_more_are_wrong_is_told() -> None:
    data = changed("database.port", "5432")
    data["colour"] = "blue"
    assert "(and 1 more)" in refused(data)


def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "twice", "environment: twice\nproduction: false\nenvironment: other\n")
    with pytest.raises(UsageError, match=r"key 'environment' stands twice, line 3"):
        load(path)


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "just words", "", "a: [1, 2", "a: !!python/object:os.system {}", "\x00"]
)
def test_what_is_no_mapping_or_no_yaml_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"some\.yml"):
        load(write(tmp_path, "some", text))


# What PyYAML or Python raise by themselves on the way to the schema.
ODD = [
    "? [a, b]\n: c\n",
    "? {a: 1}\n: b\n",
    "a: 2026-02-31\n",
    "[" * 3000,
    "a: " + "1" * 5000,
    "&a {b: *a}\n",
    'facts: "a\\0b"\n',
    "facts: params\n",
]


@pytest.mark.parametrize("text", ODD, ids=lambda text: text[:12])
def test_odd_yaml_is_refused_like_any_other_mistake(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"some\.yml"):
        load(write(tmp_path, "some", text))


def test_a_file_that_is_not_there_names_the_ones_that_are(tmp_path: Path) -> None:
    write(tmp_path, "staging", "{}")
    write(tmp_path, "example", "{}")
    with pytest.raises(UsageError, match=r"no params file nowhere\.yml \(known environments: staging\)"):
        load(tmp_path / "params" / "nowhere.yml")


def test_the_environment_must_be_named_like_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, "production", yaml.safe_dump(changed("environment", "staging")))
    with pytest.raises(UsageError, match="says 'staging', the file is named 'production'"):
        load(path)


@pytest.mark.parametrize("version", ["v1.4.0", "1.10", "7e12345", "v2.3.0-prod", "1.7.0-rc.1", "0", "20260301"])
def test_a_version_stays_the_text_that_it_was(version: str) -> None:
    assert version_text(version) == version


@pytest.mark.parametrize(
    "version",
    [
        "../../evil",
        "--output=x",
        "-oProxyCommand=touch x",
        "{{ x }}",
        "v1.4.0\n",
        "\nv1.4.0",
        "v1.4.0\x00",
        "v1..2",
        "a-b-c",
        "$(id)",
        "`id`",
        "a b",
        "refs/heads/main",
        "v1^",
        "HEAD~1",
        "v1@{0}",
        "١.٢",
        "",
        "x" * 80,
    ],
)
def test_a_version_that_git_a_path_or_a_template_would_read_is_refused(version: str) -> None:
    with pytest.raises(UsageError, match="outside the grammar") as caught:
        version_text(version)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    ["local:/srv/shop", "ssh:app-01/srv", "ssh:deploy@app-01.example.com:2222/srv/shop", "ssh:10.0.0.7/srv"],
)
def test_a_host_address_may_be(address: str) -> None:
    params = check(changed("hosts.web.app-01.address", address), where="some.yml")
    assert params.hosts.web["app-01"].address == address


@pytest.mark.parametrize(
    "address",
    [
        "app-01",
        "local:relative",
        "ssh:app-01",
        "ssh:-oProxyCommand=touch/x",
        "ssh:-oProxyCommand=x@host/srv",
        "ssh:a b@host/srv",
        "ssh:host:port/srv",
        "ssh:host/srv\n",
        "ssh:host/srv shop",
        "docker:web/srv",
        "",
    ],
)
def test_a_host_address_may_not_be(address: str) -> None:
    assert "hosts.web.app-01.address: " in refused(changed("hosts.web.app-01.address", address))


@pytest.mark.parametrize("key", ["application.bypass_token", "deploy.vault_password", "record.key"])
@pytest.mark.parametrize("value", ["hunter2", "env:", "env:NOT A NAME", "file:", "env:X\nY", "cmd:id"])
def test_a_secret_is_a_reference_and_never_itself(key: str, value: str) -> None:
    said = refused(changed(key, value))
    assert f"{key}: " in said
    assert "hunter2" not in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("repository.url", "/srv/git/shop.git"),
        ("repository.url", "file:///srv/git/shop.git"),
        ("repository.url", "https://git.example.com:8443/team/shop.git"),
        ("repository.url", "ssh://git@git.example.com:2222/team/shop.git"),
        ("repository.url", "git@git.example.com:team/shop.git"),
        ("repository.url", "git.example.com:/srv/git/shop.git"),
        ("ledger", "sqlite:////srv/runbook/ledger.sqlite"),
        ("ledger", "postgresql://db.example.com/runbook"),
        ("ledger", "postgresql+psycopg://runbook@db.example.com:5433/runbook?sslmode=require"),
        ("ledger", "postgresql://runbook@127.0.0.1:5433/ledger_1?passfile=/etc/runbook/pgpass"),
        ("ledger", "postgresql://runbook@[::1]:5433/runbook"),
        ("application.url", "http://127.0.0.1:8000"),
        ("application.url", "https://[::1]:8443/shop"),
        ("application.health_path", "/health?deep=1"),
        ("backup.store.endpoint", "https://s3.example.com/"),
        ("database.host", "db-1.example.com"),
        ("database.host", "2001:db8::1"),
        ("people.ada.name", "Ада Линд-O'Brien 李"),
        ("people.ada.keys", ["sk-ecdsa-sha2-nistp256@openssh.com AAAA ada@home"]),
        ("hosts.web.app-01.files", ["."]),
        ("hosts.web.app-01.log", "log/..app.log"),
        ("migrations.executable", "bin/rails"),
        ("migrations.executable", "/usr/local/bin/dbmate"),
        ("window.start", "2026-03-01T20:00:00Z"),
        ("window.start", "20260301T200000+0100"),
        ("record.key", "file:/etc/runbook/recorder"),
        ("watch.rules", {"effects": {"p95_latency_s": {"absolute": 0.2}}, "floor_rps": 1}),
    ],
)
def test_what_is_in_the_manual_may_be_written(key: str, value: object) -> None:
    check(changed(key, value), where="some.yml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ledger", "postgresql://runbook:hunter2@db.example.com/runbook"),
        ("ledger", "postgresql://runbook@db.example.com/runbook?password=hunter2"),
        ("repository.url", "https://robin:hunter2@git.example.com/shop.git"),
        ("application.url", "https://robin:hunter2@shop.example.com"),
    ],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(key: str, value: str) -> None:
    said = refused(changed(key, value))
    assert f"{key}: " in said
    assert "hunter2" not in said


def test_a_gate_that_only_its_opener_could_approve_is_refused() -> None:
    assert "gates.migration needs 1 of dba beside dan, who opens runs" in refused(changed("opened_by", "dan"))


def test_aliases_of_aliases_are_counted_and_not_walked(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 20)]

    with pytest.raises(UsageError, match="aliases of aliases"):
        load(write(tmp_path, "some", "\n".join(lines)))


@pytest.mark.parametrize("left", ["${Database.host}", "${}", "${database.name", "x${ database.name }"])
def test_a_fact_that_is_written_wrongly_is_named(tmp_path: Path, left: str) -> None:
    path = facts_file(tmp_path, json.dumps({"database": {"port": 6543, "name": left}}))

    with pytest.raises(UsageError, match=r"some\.yml: database\.host: a \$\{…\} is left that names no fact"):
        load(path)


def as_production() -> dict[str, Any]:
    data = changed("production", True)
    data["rehearsal"] = None
    return data


@pytest.mark.parametrize("name", OUTWARD)
def test_every_local_message_adapter_is_refused_in_production(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = as_production()
    # Outward adapters are not there yet, so the other four are taken out of the check by building past the field's grammar.
    params = check(changed("production", False), where="some.yml")
    others = {other: f"elsewhere:{other}" for other in OUTWARD if other != name}
    messages = params.messages.model_copy(update=others)
    with pytest.raises(ValueError, match=rf"messages\.{name}: a local folder is refused in production"):
        params.model_copy(update={"production": True, "messages": messages})._whole()
    assert "messages.chat: a local folder is refused in production" in refused(data)


def test_a_local_host_is_refused_in_production() -> None:
    data = as_production()
    data["hosts"]["workers"]["worker-01"]["address"] = "local:/srv/shop"
    assert "hosts.worker-01.address: local: is refused in production" in refused(data)


def test_production_has_no_rehearsal_block() -> None:
    data = as_production()
    data["rehearsal"] = {"stack": ".rehearsal"}
    assert "a production environment has no rehearsal block" in refused(data)


def test_a_gate_needs_people_enough() -> None:
    assert "gates.migration needs 2 of dba" in refused(changed("gates.migration.quorum", 2))
    assert "gates.backup needs 1 of captain" in refused(changed("gates.backup.roles", ["captain"]))


def facts_file(folder: Path, text: str) -> Path:
    (folder / "stack.json").write_text(text)
    data = changed("facts", "stack.json")
    data |= {"environment": "some"}
    data["database"] |= {"port": "${database.port}", "host": "db-${database.name}.example.com"}
    return write(folder, "some", yaml.safe_dump(data))


def test_a_fact_keeps_its_type_and_joins_text(tmp_path: Path) -> None:
    params = load(facts_file(tmp_path, json.dumps({"database": {"port": 6543, "name": "a"}})))
    assert (params.database.port, params.database.host) == (6543, "db-a.example.com")


def test_facts_that_are_not_there_say_that_the_stack_is_down(tmp_path: Path) -> None:
    path = facts_file(tmp_path, "{}")
    (tmp_path / "stack.json").unlink()
    with pytest.raises(UsageError, match="the stack that writes it is down") as caught:
        load(path)
    assert caught.value.remedy == "runbook stack up"


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is no JSON"), ('{"database": {"port": 1}}', r"\$\{database.name\} is not among")]
)
def test_facts_that_lack_something_are_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load(facts_file(tmp_path, text))


def test_set_overrides_with_a_yaml_scalar(tmp_path: Path) -> None:
    path = write(tmp_path, "some", yaml.safe_dump(changed("environment", "some")))
    params = load(
        path,
        settings={
            "watch.duration_s": "20",
            "rollback.automatic": "true",
            "window.start": "'2026-03-01T20:00:00+00:00'",
        },
    )
    assert (params.watch.duration_s, params.rollback.automatic) == (20.0, True)
    assert params.window.start == "2026-03-01T20:00:00+00:00"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("watch.durations", "20", "watch.durations"),
        ("watch.duration_s", "soon", "watch.duration_s"),
        ("environment.name", "x", "environment is no mapping"),
        ("window.start", "2026-02-31", "window.start"),
        ("watch.duration_s", "[1", "--set watch.duration_s"),
        ("", "1", "some.yml"),
    ],
)
def test_a_wrong_set_is_refused(tmp_path: Path, key: str, value: str, said: str) -> None:
    path = write(tmp_path, "some", yaml.safe_dump(changed("environment", "some")))
    with pytest.raises(UsageError) as caught:
        load(path, settings={key: value})
    assert said in str(caught.value)


def test_frozen_parameters_hold_references_only_and_load_again() -> None:
    params = check(EXAMPLE, where="example.yml")
    frozen = params.frozen()
    assert frozen["application"]["bypass_token"] == "env:SHOP_BYPASS_TOKEN"
    assert check(json.loads(json.dumps(frozen)), where="params.json") == params


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(Params.model_fields)) | st.text(max_size=10), values, max_size=8))
def test_no_mapping_raises_anything_but_a_usage_error(data: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        check(data, where="some.yml")


@given(st.sampled_from(sorted(EXAMPLE)), st.data())
def test_no_value_in_a_good_file_raises_anything_but_a_usage_error(key: str, draw: st.DataObject) -> None:
    data = copy.deepcopy(EXAMPLE)
    node, name = data, key
    while isinstance(node[name], dict) and node[name] and draw.draw(st.booleans()):
        node, name = node[name], draw.draw(st.sampled_from(sorted(node[name])))
    node[name] = draw.draw(values)
    try:
        check(data, where="some.yml")
    except UsageError as error:
        assert "\n" not in str(error)


@given(text=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_file_raises_anything_but_a_usage_error(text: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yml"
    path.write_bytes(text)
    with pytest.raises(UsageError):
        load(path)


@given(st.text(max_size=40))
def test_a_version_passes_unchanged_or_is_refused(text: str) -> None:
    try:
        assert version_text(text) == text
    except UsageError:
        return
    assert text.isascii()
    assert not set(text) & set("/\\ \t\n{}$`'\"~^:@")
    assert not text.startswith("-")
