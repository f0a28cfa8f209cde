"""What a time-out or a kill left half done is neither begun again nor called as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runbook_lib.commands import migrations
from runbook_lib.errors import StepFailedError, StepInDoubtError
from runbook_lib.model import Status
from runbook_lib.phases import migrate
from runbook_lib.run import Run
from tests.phases.conftest_backup import Opened, opened, twin  # noqa: F401  # fixtures

Open = Callable[..., Opened]
STEP = "migrate.migrate_production"


@pytest.fixture
def half(opened: Open, tmp_path: Path, twin: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: F811
    """A run whose migration, outside a transaction, was ended by its time-out after its first statement."""
    d = twin["database"]
    tool = tmp_path / "half"
    tool.write_text(
        "#!/bin/sh\n"
        f"psql -h 127.0.0.1 -p {d['port']} -U {d['migrate_role']} {d['production']} "
        "-c 'ALTER TABLE orders ADD COLUMN half int'\nexec sleep 600\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(migrations, "transactional", lambda _path: False)
    run = opened(migrations__executable=str(tool), migrations__timeout_s="3").run
    run.ledger.take_lock(run.run_id, "rehearsal")
    migrate.record_schema(run)
    with pytest.raises(StepFailedError, match="was ended after 3 s"):
        migrate.migrate_production(run)
    yield run
    with admin(run) as session:
        session.execute("ALTER TABLE orders DROP COLUMN IF EXISTS half")


def admin(run: Run) -> Any:
    d = run.params.database
    return run.services.database.connect(d.admin_role, d.production, application="test")


def test_a_migration_that_its_time_out_ended_half_done_is_not_begun_again(half: Run) -> None:
    with pytest.raises(StepInDoubtError, match="may be half done"):
        migrate.migrate_production(half)

    assert half.state.step(STEP).status is Status.BLOCKED
    logs = sorted(path.name for path in (half.folder / "logs" / STEP).iterdir())
    assert logs == ["1"]
