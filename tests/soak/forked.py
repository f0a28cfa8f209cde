"""Kernels that are forked instead of started: their imports, most of a second, are done once for thousands of cases.

An executor's kernel is forked before the executor opens anything, so that no socket or database file is in two
processes, and sleeps until Jupyter would start it. From then on it is what it would be: a child of its executor with a
process group of its own, and the same words on its command line, which `ps` does not show.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

_GROUP_S = 30.0


class Ahead:
    """One kernel that sleeps; `install` lets Jupyter in this process take it for the next one that it starts."""

    def __init__(self) -> None:
        self._ear, self._mouth = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._mouth)
            _sleep_until_woken(self._ear)
        os.close(self._ear)

    def install(self) -> None:
        """From here on Jupyter wakes this kernel."""
        from jupyter_client.provisioning import local_provisioner

        local_provisioner.launch_kernel = self._wake  # type: ignore[assignment]

    def _wake(self, command: Sequence[str], **named: Any) -> subprocess.Popen[bytes]:
        deadline = time.monotonic() + _GROUP_S
        while os.getpgid(self.pid) != self.pid:  # Jupyter asks for its group as soon as it has it
            assert time.monotonic() < deadline, "the kernel has no process group of its own"
            time.sleep(0.001)
        words = {"command": [*command], "cwd": named["cwd"], "env": {**named["env"]}, "parent": os.getpid()}
        os.write(self._mouth, json.dumps(words).encode())
        os.close(self._mouth)
        return _Woken(self.pid, command)


class _Woken(subprocess.Popen[bytes]):
    """A child that is there already, to be waited for as Popen waits."""

    def __init__(self, pid: int, command: Sequence[str]) -> None:
        self.args, self.pid, self.returncode = command, pid, None
        self.stdin = self.stdout = self.stderr = None
        self._child_created, self._waitpid_lock = True, threading.Lock()


def _sleep_until_woken(ear: int) -> None:
    code = 70
    try:
        os.setsid()
        with os.fdopen(ear, "rb") as pipe:
            said = pipe.read()
        if said:  # its executor died before
            words = json.loads(said)
            os.environ.clear()
            os.environ.update(words["env"])
            os.chdir(words["cwd"])
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            # Jupyter's launcher tells by the environment whom a kernel must not outlive, read when it is imported.
            whom = f"--IPKernelApp.parent_handle={words['parent']}"
            sys.argv = [*words["command"][words["command"].index("-m") + 1 :], whom]
            from ipykernel import kernelapp

            kernelapp.launch_new_instance()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 70
    finally:
        os._exit(code)


def import_all() -> None:
    """Import what a kernel and an executor would, once for all."""
    import ipykernel.kernelapp
    import ipykernel.zmqshell
    import jupyter_client.manager
    import papermill

    import runbook_lib.phases
    import runbook_lib.wiring

    del ipykernel, jupyter_client, papermill, runbook_lib
