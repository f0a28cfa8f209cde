"""Migration tools' command lines, word for word, and what is read from migration files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from runbook_lib.commands import migrations
from runbook_lib.commands.migrations import Target
from runbook_lib.errors import UsageError

LOCAL = Target("127.0.0.1", 5433, "shop_migrate", "prod_db", "/run/pgpass", 0.8)
REMOTE = Target("db.example.com", 5432, "shop_migrate", "prod_db", "/run/pgpass", 0.8)
TREE = Path("/srv/tree")


def test_dbmate_applies_from_the_releases_tree_and_waits_for_locks_within_bounds() -> None:
    command = migrations.up("dbmate", "dbmate", LOCAL, tree=TREE, directory="db/migrations", timeout_s=1800)

    assert command.argv == (
        "dbmate",
        "--no-dump-schema",
        "--migrations-dir",
        "/srv/tree/db/migrations",
        "--url",
        "postgresql://shop_migrate@127.0.0.1:5433/prod_db?sslmode=disable&lock_timeout=800",
        "up",
    )
    assert (command.env, command.timeout_s) == ({"PGPASSFILE": "/run/pgpass"}, 1800)


def test_dbmate_undoes_by_rollback_and_lists_by_status() -> None:
    down = migrations.down("dbmate", "dbmate", LOCAL, tree=TREE, directory="m", timeout_s=9, version="20260101")
    status = migrations.status("dbmate", "dbmate", LOCAL, tree=TREE, directory="m")

    assert (down.argv[-1], status.argv[-1]) == ("rollback", "status")
    assert down.argv[:4] == status.argv[:4] == ("dbmate", "--no-dump-schema", "--migrations-dir", "/srv/tree/m")


def test_another_machine_is_not_spoken_to_in_the_clear() -> None:
    command = migrations.up("dbmate", "dbmate", REMOTE, tree=TREE, directory="m", timeout_s=9)

    assert command.argv[-2] == "postgresql://shop_migrate@db.example.com:5432/prod_db?lock_timeout=800"


def test_rails_gets_its_lock_time_out_where_rails_does_not_drop_it() -> None:
    command = migrations.up("rails", "bin/rails", REMOTE, tree=TREE, directory="db/migrate", timeout_s=9)

    assert (command.argv, command.cwd) == (("bin/rails", "db:migrate"), TREE)
    assert command.env == {
        "PGPASSFILE": "/run/pgpass",
        "DATABASE_URL": "postgresql://shop_migrate@db.example.com:5432/prod_db",
        "RAILS_ENV": "production",
        "PGOPTIONS": "-c lock_timeout=800",
    }


def test_what_lets_a_session_in_is_asked_for_by_each_session_of_either_tool() -> None:
    at = replace(REMOTE, options="-c role=runbook_1 -c role=none")

    dbmate = migrations.up("dbmate", "dbmate", at, tree=TREE, directory="m", timeout_s=9)
    rails = migrations.down("rails", "bin/rails", at, tree=TREE, directory="m", timeout_s=9, version="20260101")

    assert dbmate.argv[-2].endswith("?lock_timeout=800&options=-c%20role%3Drunbook_1%20-c%20role%3Dnone")
    assert rails.env["PGOPTIONS"] == "-c lock_timeout=800 -c role=runbook_1 -c role=none"


def test_rails_undoes_the_version_that_it_is_told() -> None:
    command = migrations.down(
        "rails", "bin/rails", REMOTE, tree=TREE, directory="db/migrate", timeout_s=9, version="20260301"
    )

    assert command.argv == ("bin/rails", "db:migrate:down")
    assert command.env["VERSION"] == "20260301"


def test_a_tiny_lock_time_out_is_never_none_at_all() -> None:
    assert Target("h", 1, "r", "d", "p", 0.0001).lock_timeout_ms == 1


def test_versions_are_read_from_names_oldest_first(tmp_path: Path) -> None:
    for name in ("20260202000000_b.sql", "20260101000000_a.sql", "README.md"):
        (tmp_path / name).write_text("")

    assert list(migrations.versions_in(tmp_path, ".")) == ["20260101000000", "20260202000000"]


@pytest.mark.parametrize("names", [("add_column.sql",), ("20260101000000_a.sql", "20260101000000_b.sql")])
def test_a_migration_without_a_version_of_its_own_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).write_text("")

    with pytest.raises(UsageError, match="no version of its own"):
        migrations.versions_in(tmp_path, ".")


@pytest.mark.parametrize(
    ("name", "text", "undone"),
    [
        ("1_a.sql", "-- migrate:up\nSELECT 1;\n-- migrate:down\nSELECT 2;\n", True),
        ("1_a.sql", "-- migrate:up\nSELECT 1;\n-- migrate:down\n\n-- cannot be undone\n", False),
        ("1_a.sql", "-- migrate:up\nSELECT 1;\n", False),
        ("1_a.sql", "-- migrate:up\nSELECT 1;\n--migrate:down\nSELECT 2;\n", True),
        ("1_a.sql", "-- migrate:up\nSELECT 1;\n--\tmigrate:down\nSELECT 2;\n", True),
        ("1_a.sql", "-- migrate:up\n-- no -- migrate:down\nSELECT 1;\n", False),
        ("1_a.rb", "class A\n  def change\n  end\nend\n", True),
        ("1_a.rb", "class A\n  def up\n  end\nend\n", False),
        ("1_a.rb", "class A\n  def down\n    raise ActiveRecord::IrreversibleMigration\n  end\nend\n", False),
    ],
)
def test_a_migration_says_whether_it_can_be_undone(tmp_path: Path, name: str, text: str, undone: bool) -> None:
    path = tmp_path / name
    path.write_text(text)

    assert migrations.reversible(path) is undone


@pytest.mark.parametrize(
    ("name", "text", "whole"),
    [
        ("1_a.sql", "-- migrate:up\nCREATE TABLE a ();\n", True),
        ("1_a.sql", "-- migrate:up transaction:false\nCREATE INDEX CONCURRENTLY i ON a (b);\n", False),
        ("1_a.sql", "-- migrate:up\nSELECT 1;\n-- migrate:down transaction:false\nSELECT 1;\n", True),
        ("1_a.sql", "--migrate:up\nCREATE TABLE a ();\n", True),
        ("1_a.sql", "--migrate:up transaction:false\nSELECT 1;\n", False),
        ("1_a.sql", "--  migrate:up transaction:false\nSELECT 1;\n", False),
        ("1_a.sql", "--\tmigrate:up\ttransaction:false\nSELECT 1;\n", False),
        ("1_a.sql", "-- migrate:up\nSELECT 1;\n-- migrate:up transaction:false\nSELECT 1;\n", False),
        ("1_a.sql", "-- migrate:up\nSELECT 1;\n-- migrate:up\nSELECT 1;\n", False),
        ("1_a.sql", "CREATE TABLE a ();\n", False),
        ("1_a.rb", "class A\n  disable_ddl_transaction!\nend\n", False),
        ("1_a.rb", "class A\nend\n", True),
    ],
)
def test_a_migration_outside_a_transaction_is_known(tmp_path: Path, name: str, text: str, whole: bool) -> None:
    path = tmp_path / name
    path.write_text(text)

    assert migrations.transactional(path) is whole
