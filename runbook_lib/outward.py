"""Words to people outside: an outage of a chat or a wiki must not stop a release, least of all a rollback."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from runbook_lib import fence
from runbook_lib.errors import StepFailedError
from runbook_lib.run import Run

UNDELIVERED = "undelivered"
_Found = TypeVar("_Found")


def deliver(run: Run, what: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Do `what` and return its facts; when it cannot be delivered now, say so in them and go on.

    The review tries again what is left over, with the same keys: nothing is said twice.

    Raises:
        FencedError: another executor has the run, and says what is to be said.
    """
    fence.refuse_stale(run)
    try:
        return dict(what())
    except StepFailedError as error:
        return {UNDELIVERED: run.secrets.redacted(str(error))[:500]}


def post(run: Run, channel: str, message: str, *, what: str) -> dict[str, Any]:
    """Say a message once; `what` is its key within the run. Facts: channel, message, address."""

    def say() -> dict[str, Any]:
        return {
            "channel": channel,
            "message": message,
            "address": run.services.chat.post(channel, message, key=run.key(what)),
        }

    said = deliver(run, say)
    return said if UNDELIVERED not in said else {"channel": channel, "message": message, "what": what, **said}


def found(look: Callable[[], _Found | None]) -> _Found | None:
    """What a probe sees of words that were said before; None also when nobody answers.

    Saying them again under the same key says nothing twice, and when nobody answers then either, they are left over.
    """
    try:
        return look()
    except StepFailedError:
        return None


def found_post(run: Run, channel: str, message: str, *, what: str) -> dict[str, Any] | None:
    """The facts of a message that was said before, None when it was not: for probes."""
    address = found(lambda: run.services.chat.find(run.key(what)))
    return None if address is None else {"channel": channel, "message": message, "address": address}


def left_over(run: Run) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Steps whose words did not arrive, with their facts."""
    for key, state in run.state.steps.items():
        if run.state.green(key) and state.result is not None and UNDELIVERED in state.result.facts:
            yield key, state.result.facts
