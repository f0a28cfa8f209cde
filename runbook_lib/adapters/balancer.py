"""Load balancers: one is told by a small JSON API over HTTP."""

from __future__ import annotations

import time
from dataclasses import dataclass

from runbook_lib.adapters import http
from runbook_lib.errors import StepFailedError, UnavailableError
from runbook_lib.ports import Backend

_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class HttpBalancer:
    """`GET /backends`, `POST /backends/NAME/drain`, `POST /backends/NAME/ready`."""

    url: str

    def backends(self) -> list[Backend]:
        """See `ports.Balancer`."""
        known = http.get_json(f"{self.url}/backends")
        return [Backend(name, said["state"], int(said["sessions"])) for name, said in sorted(known.items())]

    def drain(self, name: str, *, timeout_s: float) -> None:
        """See `ports.Balancer`."""
        self._tell(name, "drain")
        deadline = time.monotonic() + timeout_s
        while True:
            left = next(backend.sessions for backend in self.backends() if backend.name == name)
            if left == 0:
                return
            if time.monotonic() > deadline:
                raise StepFailedError(
                    f"{name} still has {left} sessions after {timeout_s:g} s of draining",
                    remedy="wait for them, or raise deploy.drain_timeout_s",
                )
            time.sleep(_POLL_S)

    def ready(self, name: str) -> None:
        """See `ports.Balancer`."""
        self._tell(name, "ready")

    def _tell(self, name: str, what: str) -> None:
        answer = http.request("POST", f"{self.url}/backends/{name}/{what}")
        if answer.status != 200:
            raise UnavailableError(f"the balancer answered {answer.status} to {what} {name}", remedy="look at it")
