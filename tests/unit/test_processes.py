"""A command outlives its starter and is found again."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from runbook_lib.adapters import processes
from runbook_lib.adapters.secrets import Secrets
from runbook_lib.adapters.shell import LocalShell
from runbook_lib.errors import PausedError, StepFailedError
from runbook_lib.model import Command
from tests.project import wait_until


@pytest.fixture
def shell(tmp_path: Path) -> LocalShell:
    return LocalShell(lambda: tmp_path, Secrets())


def test_a_command_leaves_its_pid_log_and_exit_status(shell: LocalShell, tmp_path: Path) -> None:
    done = shell.run(Command(("sh", "-c", "echo out; echo err >&2; exit 3"), ok_exits=(3,)), name="three")

    assert (done.exit_code, done.output) == (3, "out\nerr\n")
    assert (tmp_path / "three.exit").read_text() == "3\n"
    pid, start, boot = (tmp_path / "three.pid").read_text().split()
    assert int(pid) > 1
    assert int(start) > 0
    assert boot == processes.boot_id()


def test_a_wrong_exit_status_fails_with_the_last_words(shell: LocalShell) -> None:
    with pytest.raises(StepFailedError, match="exited 7: disk full"):
        shell.run(Command(("sh", "-c", "echo disk full; exit 7")), name="seven")


def test_a_time_out_ends_the_whole_group(shell: LocalShell, tmp_path: Path) -> None:
    script = "sleep 60 & echo $! > child; wait"
    with pytest.raises(StepFailedError, match=r"after 0\.5 s"):
        shell.run(Command(("sh", "-c", script), timeout_s=0.5, cwd=tmp_path), name="slow")

    child = int((tmp_path / "child").read_text())
    assert processes.start_time(child) is None


@pytest.mark.parametrize("left", [True, False])
def test_who_is_interrupted_leaves_a_command_only_where_somebody_finds_it_again(tmp_path: Path, left: bool) -> None:
    shell = LocalShell(lambda: tmp_path, Secrets(), left_on_interrupt=left)
    script = f"sleep 60 & echo $! > child; kill -INT {os.getpid()}; wait"

    with pytest.raises(KeyboardInterrupt):
        shell.run(Command(("sh", "-c", script), cwd=tmp_path), name="held")

    child = int((tmp_path / "child").read_text())
    goes_on = processes.start_time(child) is not None
    processes.end_group(int((tmp_path / "held.pid").read_text().split()[0]))
    assert goes_on == left


def test_arguments_are_never_read_by_a_shell(shell: LocalShell, tmp_path: Path) -> None:
    done = shell.run(Command(("printf", "%s\n", "$(touch pwned); `id` | x", "-o"), cwd=tmp_path), name="literal")

    assert done.output == "$(touch pwned); `id` | x\n-o\n"
    assert not (tmp_path / "pwned").exists()


def test_secrets_are_redacted_in_the_log(tmp_path: Path) -> None:
    secrets = Secrets()
    secrets.remember("hunter2-secret")

    done = LocalShell(lambda: tmp_path, secrets).run(Command(("echo", "password hunter2-secret")), name="leak")

    assert "hunter2" not in done.output


def test_a_child_whose_starter_was_killed_is_waited_for(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from runbook_lib.adapters.shell import LocalShell; from runbook_lib.adapters.secrets import Secrets\n"
        "from runbook_lib.model import Command\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "LocalShell(lambda: folder, Secrets()).run(Command(('sh', '-c', f'while [ ! -e {folder}/go ]; do sleep 0.05; done; echo done > {folder}/effect')), name='held')\n"
    )
    starter = subprocess.Popen((sys.executable, "-c", code))
    deadline = time.monotonic() + 20
    while not (tmp_path / "held.pid").exists():
        assert time.monotonic() < deadline
    os.kill(starter.pid, signal.SIGKILL)
    starter.wait()
    with pytest.raises(PausedError, match="still runs"):
        processes.wait_for_children(tmp_path, timeout_s=0.2)

    (tmp_path / "go").touch()
    processes.wait_for_children(tmp_path, timeout_s=20)

    assert (tmp_path / "effect").read_text() == "done\n"
    assert (tmp_path / "held.exit").read_text() == "0\n"


def test_a_command_whose_starter_was_killed_before_it_wrote_its_pid_is_waited_for(tmp_path: Path) -> None:
    with (tmp_path / "held.lock").open("a+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        child = subprocess.Popen(("sleep", "60"), stdin=lock)
    try:
        with pytest.raises(PausedError, match=r"its command \(held\) still runs"):
            processes.wait_for_children(tmp_path, timeout_s=0.2)
    finally:
        child.kill()
        child.wait()
    processes.wait_for_children(tmp_path, timeout_s=20)


def test_a_command_whose_wrapper_was_killed_alone_is_waited_for(tmp_path: Path) -> None:
    with subprocess.Popen(("sh", "-c", "sleep 60 & wait"), start_new_session=True) as wrapper:
        start = processes.start_time(wrapper.pid)
        (tmp_path / "held.pid").write_text(f"{wrapper.pid} {start} {processes.boot_id()}\n")
        wait_until(lambda: processes.children_of(wrapper.pid), "the command", 20)
        wrapper.kill()
    try:
        with pytest.raises(PausedError, match=r"its command \(pids \[\d+\], held\) still runs"):
            processes.wait_for_children(tmp_path, timeout_s=0.2)
    finally:
        os.killpg(wrapper.pid, signal.SIGKILL)
    processes.wait_for_children(tmp_path, timeout_s=20)


def test_a_reused_pid_is_not_taken_for_the_old_process(tmp_path: Path) -> None:
    (tmp_path / "old.pid").write_text(f"{os.getpid()} 1 {processes.boot_id()}\n")
    (tmp_path / "old.exit").write_text("0\n")

    processes.wait_for_children(tmp_path, timeout_s=0.1)

    assert not processes.alive({**processes.me(), "start": 1})
    assert processes.alive(processes.me())


INITIAL = "pid:[4026531836]"


def on(machine: str = "m1", boot: str = "an earlier one", pids: str = INITIAL, host: str = "one") -> dict[str, Any]:
    return {"host": host, "machine": machine, "pids": pids, "boot": boot, "pid": 1, "start": 1}


@pytest.mark.parametrize(
    ("here", "process", "told"),
    [
        pytest.param(on(), on(), True, id="of an earlier boot"),
        pytest.param(on(), on(host="two"), False, id="of another name"),
        pytest.param(on(), on("m2"), False, id="of another machine"),
        pytest.param(on(""), on(""), False, id="of a twin of the same name"),  # without a machine-id none can be told
        # An image's machine-id is that of all its containers.
        pytest.param(on(pids="pid:[7]"), on(pids="pid:[7]"), False, id="of a container that is gone"),
        pytest.param(on(), on(pids="pid:[7]"), False, id="of another container"),
        pytest.param(on(), on(boot="now"), True, id="of this boot"),
        pytest.param(on(""), on("", boot="now"), True, id="of this boot, without a machine-id"),
        pytest.param(on(pids="pid:[7]"), on(boot="now", pids="pid:[7]"), True, id="of this container"),
        pytest.param(on(pids="pid:[7]"), on(boot="now"), False, id="outside of this container"),
    ],
)
def test_a_process_is_only_taken_for_gone_where_this_machine_can_tell(
    monkeypatch: pytest.MonkeyPatch, here: dict[str, Any], process: dict[str, Any], told: bool
) -> None:
    monkeypatch.setattr(processes, "_machine", lambda: {key: here[key] for key in ("host", "machine", "pids")})
    monkeypatch.setattr(processes, "boot_id", lambda: "now")

    assert processes.is_here(process) is told


def test_a_process_of_an_earlier_boot_is_gone_though_its_pid_and_start_came_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = on()
    monkeypatch.setattr(processes, "_machine", lambda: {key: here[key] for key in ("host", "machine", "pids")})

    assert processes.alive(processes.me())
    assert not processes.alive({**processes.me(), "boot": "an earlier one"})


def test_a_command_that_the_machine_ended_for_want_of_memory_is_named(
    shell: LocalShell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = tmp_path / "memory.events"
    counter.write_text("low 0\noom_kill 2\n")
    monkeypatch.setattr(processes, "_OUT_OF_MEMORY_COUNTERS", (str(counter),))

    with pytest.raises(StepFailedError, match=r"exited 137 \(SIGKILL\): Killed"):
        shell.run(Command(("sh", "-c", "kill -9 $$")), name="killed")
    with pytest.raises(StepFailedError, match=r"exited 137 \(the machine had no memory left for it\): Killed"):
        shell.run(Command(("sh", "-c", f"echo oom_kill 3 > {counter}; kill -9 $$")), name="too-big")


def test_a_command_learns_nothing_of_the_notebook_server_that_its_kernel_belongs_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JUPYTER_TOKEN_FILE", "/somewhere/token")
    monkeypatch.setenv("JPY_SESSION_NAME", "/somewhere/01_backup.ipynb")
    monkeypatch.setenv("RUNBOOK_LAB", "RUN-1")
    monkeypatch.setenv("LANG", "C.UTF-8")

    told = processes.environment()

    assert not [name for name in told if name.startswith(("JUPYTER_", "JPY_", "RUNBOOK_LAB"))]
    assert told["LANG"] == "C.UTF-8"
