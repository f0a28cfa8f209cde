"""Free ports on loopback."""

from __future__ import annotations

import random
import socket

# Below the range that the kernel takes outgoing connections from: those would steal a port that a restart needs.
_LOWEST, _HIGHEST = 12_000, 32_000
_given: set[int] = set()


def free_port() -> int:
    """A port that nobody holds now and that was not given out before in this process."""
    while True:
        port = random.randrange(_LOWEST, _HIGHEST)
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
