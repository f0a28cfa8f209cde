"""Words to people outside: an outage stops nothing, and who was overtaken says nothing any more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from runbook_lib import lease, outward, wiring
from runbook_lib.errors import DeniedError, FencedError, UnavailableError
from runbook_lib.run import Run


def test_who_was_overtaken_says_nothing_any_more(run: Run) -> None:
    said: list[str] = []

    def say() -> Mapping[str, Any]:
        said.append("2.14.0 is live")
        return {}

    with lease.held(run):
        assert outward.deliver(run, say) == {}
        with lease.held(wiring.attach(run.run_id)), pytest.raises(FencedError, match="was taken over"):
            outward.deliver(run, say)

    assert said == ["2.14.0 is live"]


@pytest.mark.parametrize("error", [UnavailableError("nobody answers"), DeniedError("no")], ids=repr)
def test_a_probe_of_words_that_cannot_look_says_them_again(error: Exception) -> None:
    def look() -> str:
        raise error

    assert outward.found(look) is None
    assert outward.found(lambda: "https://chat.example/1") == "https://chat.example/1"
