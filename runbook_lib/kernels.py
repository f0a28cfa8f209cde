"""Jupyter kernels: started ahead of their phase, watched while they work, and what they died of."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from runbook_lib.adapters import processes
from runbook_lib.cell import HEADLESS_VARIABLE
from runbook_lib.errors import StepFailedError

# The kernel's first imports cost most of a second: done while the phase before still runs, and taken out of the
# namespace again, so that the notebook starts empty.
_AHEAD = "import runbook_lib.wiring, runbook_lib.phases; del runbook_lib"


class Kernels:
    """One kernel is used while the next one starts; ipc sockets in a private folder, since TCP is open to all users."""

    def __init__(self, cwd: Path, env: dict[str, str]) -> None:
        self._cwd, self._env = cwd, env
        self._folder = Path(tempfile.mkdtemp(prefix="rb-"))
        self._thread: threading.Thread | None = None
        self._next: Any = None
        self._count = 0

    def start_next(self) -> None:
        """Begin to start a kernel in the background; nothing when one is waiting."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._start, daemon=True)
            self._thread.start()

    def _start(self) -> None:
        from jupyter_client.manager import AsyncKernelManager

        self._count += 1
        name = self._folder / f"k{self._count}"
        manager: Any = AsyncKernelManager(
            kernel_name="python3", transport="ipc", ip=str(name), connection_file=f"{name}.json"
        )
        asyncio.run(
            manager.start_kernel(
                cwd=str(self._cwd),
                env={**os.environ, HEADLESS_VARIABLE: "1", **self._env},
                extra_arguments=[f"--IPKernelApp.exec_lines={_AHEAD}", "--HistoryManager.enabled=False"],
            )
        )
        self._next = manager

    def take(self) -> Any:
        """The kernel that was started ahead."""
        self.start_next()
        if self._thread is not None:
            self._thread.join()
        manager, self._next, self._thread = self._next, None, None
        if manager is None:
            raise StepFailedError("no kernel could be started", remedy="runbook doctor ENV")
        return manager

    @staticmethod
    def end(manager: Any) -> None:
        """Shut a kernel down."""
        asyncio.run(manager.shutdown_kernel(now=True))

    def close(self) -> None:
        """End what was started ahead and remove the sockets."""
        if self._thread is not None:
            self._thread.join()
        if self._next is not None:
            self.end(self._next)
        shutil.rmtree(self._folder, ignore_errors=True)


# A kernel answers heartbeats from a thread of its own, whatever its cells do: silence means stopped, not busy.
_SILENT_S = 60.0
_BEAT_S = 1.0


class Pulse:
    """Watches a kernel; ends it when it is silent for a minute, since nothing would ever come of it."""

    def __init__(self, manager: Any) -> None:
        self._process = manager.provisioner.process
        self._killed_before = processes.out_of_memory_kills()
        self._hung = False
        self._stop = threading.Event()
        self._client = manager.client()
        self._client.start_channels(shell=False, iopub=False, stdin=False, hb=True, control=False)
        self._client.hb_channel.unpause()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        silent_s, last = 0.0, time.monotonic()
        while not self._stop.wait(_BEAT_S):
            now = time.monotonic()
            # A long gap is this machine's sleep, not the kernel's silence.
            silent_s = (
                0.0 if self._client.hb_channel.is_beating() or now - last > 5 * _BEAT_S else silent_s + now - last
            )
            last = now
            if silent_s > _SILENT_S:
                self._hung = True
                os.kill(self._process.pid, signal.SIGKILL)
                return

    def end(self) -> str:
        """Stop watching; how the kernel ended, in words that follow "the kernel"."""
        self._stop.set()
        self._thread.join()
        self._client.stop_channels()
        code = self._process.poll()
        if self._hung:
            return f"was silent for {_SILENT_S:g} s and was ended"
        if code == -signal.SIGKILL and processes.out_of_memory_kills() > self._killed_before:
            return "was ended by the machine: out of memory"
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return "died"
