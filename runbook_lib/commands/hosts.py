"""A command on another machine as one argv: ssh joins its words into a line for a shell there, so they are quoted."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

# BatchMode: a prompt would hang a headless run. StrictHostKeyChecking: an unknown machine is no host of ours.
OPTIONS = (
    "-o",
    "BatchMode=yes",
    "-o",
    "StrictHostKeyChecking=yes",
    "-o",
    "ConnectTimeout=10",
    "-o",
    "ServerAliveInterval=15",
    "-o",
    "ServerAliveCountMax=4",
)


def over_ssh(
    argv: Sequence[str],
    *,
    host: str,
    home: str,
    user: str | None = None,
    port: int | None = None,
    options: Sequence[str] = (),
) -> tuple[str, ...]:
    """The ssh command that runs `argv` in `home` on a host.

    Raises:
        ValueError: a name begins with a dash and would be read as an option.
    """
    if host.startswith("-") or (user or "").startswith("-"):
        raise ValueError(f"{user or ''}@{host} is no host name")
    line = f"cd {shlex.quote(home)} && exec {shlex.join(argv)}"
    who = () if user is None else ("-l", user)
    where = () if port is None else ("-p", str(port))
    return ("ssh", "-T", *OPTIONS, *options, *who, *where, "--", host, line)
