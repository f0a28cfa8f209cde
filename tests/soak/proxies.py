"""A process between a client and its server that can refuse, cut, slow down, corrupt, or fall off the network."""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

NO_DEVICES = "a disk of a test's own needs root, iproute2, and a kernel or container that lets it"
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of sched.h


@dataclass
class Proxy:
    """Passes bytes on to a server, until the word in its file tells it to behave badly.

    Attributes:
        target: the real server.
        file: where its mode is written: `pass`, `refuse`, `503`, `cut BYTES` (of an answer), `cut sent BYTES` (of what is
            asked), `slow` (both ways), `other bytes`, `other bytes sent` (one in each big piece on its way to the server).
        network: it listens in a network namespace of its own, whose link can be taken down: packets are lost and nobody
            is told, which is what a half-open connection is. Needs root and iproute2.
    """

    target: tuple[str, int]
    file: Path
    network: str = ""
    host: str = "127.0.0.1"
    port: int = 0
    pid: int = 0

    @property
    def mode(self) -> str:
        return self.file.read_text()

    @mode.setter
    def mode(self, word: str) -> None:
        if self.network:
            _ip("-n", self.network, "link", "set", "there", "down" if word == "half-open" else "up")
        self.file.write_text(word)

    def start(self) -> Proxy:
        """Listen on a free port, in a process of its own: whoever forks must have no threads."""
        self.file.write_text("pass")
        server = self._listening()
        self.port = server.getsockname()[1]
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._accept(server)
            finally:
                os._exit(1)
        server.close()
        return self

    def stop(self) -> None:
        """End it, and its network."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        if self.network:
            _forget(self.network)

    def _listening(self) -> socket.socket:
        if not self.network:
            return socket.create_server((self.host, 0))
        _forget(self.network)
        number = int(self.network.rpartition("-")[2])
        here, self.host = f"10.201.{number}.1", f"10.201.{number}.2"
        _ip("netns", "add", self.network)
        _ip("link", "add", self.network, "type", "veth", "peer", "name", "there", "netns", self.network)
        _ip("addr", "add", f"{here}/30", "dev", self.network)
        _ip("link", "set", self.network, "up")
        _ip("-n", self.network, "addr", "add", f"{self.host}/30", "dev", "there")
        _ip("-n", self.network, "link", "set", "there", "up")
        # A socket belongs to the network in which it was made; what this process connects to stays in its own.
        libc = ctypes.CDLL(None, use_errno=True)
        home, there = os.open("/proc/self/ns/net", 0), os.open(f"/run/netns/{self.network}", 0)
        try:
            assert libc.setns(there, _NEW_NETWORK) == 0, os.strerror(ctypes.get_errno())
            server = socket.create_server((self.host, 0))
            assert libc.setns(home, _NEW_NETWORK) == 0, os.strerror(ctypes.get_errno())
        finally:
            os.close(home)
            os.close(there)
        return server

    def _accept(self, server: socket.socket) -> None:
        while True:
            client, _ = server.accept()
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            if self.mode == "refuse":
                return
            if self.mode == "503":
                client.recv(65536)
                client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            try:
                server = socket.create_connection(self.target)
            except OSError:
                return  # it is down: so is its proxy
            with server:
                self._pump(client, server)

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        passed = {client: 0, server: 0}
        while True:
            for ready in select.select([client, server], [], [], 300)[0] or [None]:
                try:
                    data = ready.recv(65536) if ready is not None else b""
                except OSError:
                    return
                if not data:
                    return
                assert ready is not None
                passed[ready] += len(data)
                word, _, more = self.mode.partition(" ")
                if word == "cut" and more.startswith("sent ") == (ready is client):
                    if passed[ready] > int(more.removeprefix("sent ")):
                        return  # in the middle of it
                elif word == "slow":
                    time.sleep(0.05)
                elif self.mode == "other bytes sent" and ready is client and len(data) > 4096:
                    data = data[:2048] + bytes([data[2048] ^ 1]) + data[2049:]
                elif self.mode == "other bytes" and ready is server and b"\r\n\r\n" in data:
                    head, _, body = data.partition(b"\r\n\r\n")
                    data = head + b"\r\n\r\n" + bytes(255 - byte for byte in body)
                try:
                    (server if ready is client else client).sendall(data)
                except OSError:
                    return


@cache
def has_own_devices() -> bool:
    """True where a test may make networks and disks of its own: root, iproute2, and a kernel or container that lets it."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("mount") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        network = subprocess.run(("ip", "netns", "add", "rbsoak-99"), check=False, capture_output=True).returncode == 0
        disk = (
            subprocess.run(("mount", "-t", "tmpfs", "none", folder), check=False, capture_output=True).returncode == 0
        )
        if network:
            _forget("rbsoak-99")
        if disk:
            subprocess.run(("umount", folder), check=True)
    return network and disk


def _ip(*words: str) -> None:
    subprocess.run(("ip", *words), check=True, capture_output=True)


def _forget(network: str) -> None:
    for words in (("link", "del", network), ("netns", "del", network)):
        subprocess.run(("ip", *words), check=False, capture_output=True)
