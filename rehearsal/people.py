"""The twin's people: freshly made keys, and hands that go through the same doors as anybody's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any

PEOPLE = {
    "ada": ("Ada Lind", ["deploy_lead"]),
    "dan": ("Dan Okafor", ["dba"]),
    "quinn": ("Quinn Reyes", ["qa"]),
    "olga": ("Olga Brandt", ["on_call"]),
    "robin": ("Robin Meyer", []),
}


def make_people(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Make everybody's key and the recorder's; returns the people and the recorder."""
    folder.mkdir(mode=0o700)
    people: dict[str, Any] = {}
    for name, (full, roles) in PEOPLE.items():
        people[name] = {"name": full, "roles": roles, **_make_key(folder / name)}
    return people, _make_key(folder / "recorder")


def _make_key(path: Path) -> dict[str, str]:
    subprocess.run(
        ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", str(path)),
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    return {"key": str(path), "public_key": " ".join(path.with_suffix(".pub").read_text().split()[:2])}


def runbook(*words: str) -> subprocess.CompletedProcess[str]:
    """Call the installed command as a person would."""
    return subprocess.run(
        (sys.executable, "-m", "runbook_lib", *words), capture_output=True, text=True, check=False, timeout=60
    )


def sign(run_id: str, gate: str, people: dict[str, Any]) -> int:
    """Look at the gate's evidence; approve, or reject when any of it is red. Returns an exit code."""
    shown = runbook("gate", "show", run_id, gate, "--json")
    if shown.returncode:
        print(shown.stderr, file=sys.stderr)
        return shown.returncode
    facts = json.loads(shown.stdout.strip().splitlines()[-1])
    red = [card["name"] for card in facts["evidence"] if card.get("verdict") == "red"]
    able = [n for n, p in people.items() if set(p["roles"]) & set(facts["roles"]) and n != facts["opened_by"]]
    for name in able[: facts["quorum"]]:
        verb = "reject" if red else "approve"
        said = (
            f"red: {', '.join(red)}"
            if red
            else f"looked at {len(facts['evidence'])} cards, code {facts['check_code']}"
        )
        done = runbook(
            "gate", verb, run_id, gate, "--as", name, "--key", people[name]["key"], "--comment", said
        )
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return done.returncode
    return 0


def spot_check(run_id: str, facts: dict[str, Any]) -> int:
    """Quinn uses the shop through the front door and records what was seen, signed. Returns an exit code."""
    quinn = facts["people"]["quinn"]
    user = _Browser(facts["endpoints"]["front"], Path(facts["bypass_token_file"]).read_text().strip())
    order = ""

    def log_in() -> str:
        user.post("/login", {"user": "smoke", "password": "smoke"})
        return "logged in as smoke"

    def place_order() -> str:
        nonlocal order
        answer = user.post("/orders", {"product_id": "1", "quantity": "1"})
        found = re.search(r'"(?:id|order_id)":\s*(\d+)', answer) or re.search(r"/orders/(\d+)", answer)
        order = found[1] if found else ""
        if not order:
            raise ValueError(f"no order number in {answer[:80]!r}")
        return f"order {order} placed"

    def view_dashboard() -> str:
        return f"dashboard shown, {len(user.get('/dashboard'))} characters"

    def background_jobs() -> str:
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            if "processed" in user.get(f"/orders/{order}"):
                return f"order {order} was processed by the worker"
            time.sleep(0.2)
        raise TimeoutError(f"order {order} was not processed within 15 s")

    for check in (log_in, place_order, view_dashboard, background_jobs):
        try:
            note, verdict = check(), "--pass"
        except (OSError, ValueError, TimeoutError) as error:
            note, verdict = f"{type(error).__name__}: {error}", "--fail"
        done = runbook(
            "check", run_id, check.__name__, verdict, "--note", note, "--as", "quinn", "--key", quinn["key"]
        )
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return done.returncode
    return 0


class _Browser:
    """A person's browser: cookies, and the header that lets a check through the read-only mode."""

    def __init__(self, front: str, token: str) -> None:
        self.front = front
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        self._opener.addheaders = [("X-Maintenance-Bypass", token), ("User-Agent", "spot-check/1.0")]

    def get(self, path: str) -> str:
        with self._opener.open(self.front + path, timeout=10) as answer:
            return str(answer.read().decode())

    def post(self, path: str, form: dict[str, str]) -> str:
        with self._opener.open(
            self.front + path, urllib.parse.urlencode(form).encode(), timeout=10
        ) as answer:
            return str(answer.geturl() + "\n" + answer.read().decode())


def facts_of(folder: Path) -> dict[str, Any]:
    """The stack's facts as it wrote them."""
    return dict(json.loads((folder / "stack.json").read_text()))
