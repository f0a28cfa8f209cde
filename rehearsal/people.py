"""The twin's people: freshly made keys, and hands that go through the same doors as anybody's."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any

PEOPLE: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "ada": ("Ada Lind", ("deploy_lead",)),
    "dan": ("Dan Okafor", ("dba",)),
    "quinn": ("Quinn Reyes", ("qa",)),
    "olga": ("Olga Brandt", ("on_call",)),
    # Opens runs; holds no role, so nobody approves what they started.
    "robin": ("Robin Meyer", ()),
}
CHECKER = "quinn"
COMMAND_TIMEOUT_S = 90.0
JOB_TIMEOUT_S = 15.0


def make_people(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Make everybody's key and the recorder's below `folder`; returns the people and the recorder.

    Keys that are there are used again: a world is made anew, but its people stay who they are, so that yesterday's
    records go on verifying.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    people: dict[str, Any] = {}
    for name, (full, roles) in PEOPLE.items():
        people[name] = {"name": full, "roles": list(roles), **_make_key(folder / name)}
    return people, _make_key(folder / "recorder")


def _make_key(path: Path) -> dict[str, str]:
    if not path.with_suffix(".pub").exists():
        path.unlink(missing_ok=True)
        subprocess.run(
            ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", str(path)),
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
    kind, key, *_ = path.with_suffix(".pub").read_text(encoding="utf-8").split()
    return {"key": str(path), "public_key": f"{kind} {key}"}


def runbook(*words: str) -> subprocess.CompletedProcess[str]:
    """Call the release tool as a person would: by its command, through no other door."""
    return subprocess.run(
        (sys.executable, "-m", "runbook_lib", *words),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=COMMAND_TIMEOUT_S,
    )


def sign(run_id: str, gate: str, people: Mapping[str, Any]) -> int:
    """Look at the gate's evidence; approve, or reject when any of it is red. Returns an exit code."""
    shown = runbook("gate", "show", run_id, gate, "--json")
    if shown.returncode:
        return _pass_on(shown)
    facts = json.loads(shown.stdout.strip().splitlines()[-1])
    if not facts.get("open", True):
        print(f"rehearsal: gate {facts['gate']} of {run_id} is not open; nothing was signed", file=sys.stderr)
        return 1
    names = [card["name"] for card in facts["evidence"]]
    red = [card["name"] for card in facts["evidence"] if card.get("verdict") == "red"]
    able = [
        name
        for name, person in people.items()
        if set(person["roles"]) & set(facts["roles"]) and name != facts["opened_by"]
    ]
    # One rejection is enough; approvals come from as many distinct people as the gate asks for.
    needed = 1 if red else int(facts["quorum"])
    if len(able) < needed:
        roles = ", ".join(facts["roles"])
        print(
            f"rehearsal: gate {facts['gate']} needs {needed} people with a role of {roles}, "
            f"the twin has {len(able)}; lower its quorum in params",
            file=sys.stderr,
        )
        return 1
    verb, comment = ("reject", f"red: {', '.join(red)}") if red else ("approve", f"looked at: {', '.join(names)}")
    for name in able[:needed]:
        done = runbook("gate", verb, run_id, gate, "--as", name, "--key", people[name]["key"], "--comment", comment)
        if done.returncode:
            return _pass_on(done)
        print(f"{name} {verb}s gate {facts['gate']}: {comment}")
    return 0


def spot_check(run_id: str, facts: Mapping[str, Any]) -> int:
    """Quinn uses the shop through the front door and records what was seen. Returns an exit code."""
    key = facts["people"][CHECKER]["key"]
    token = Path(facts["bypass_token_file"]).read_text(encoding="utf-8").strip()
    visit = Visit(Browser(facts["endpoints"]["front"], token))
    for check in (visit.log_in, visit.place_order, visit.view_dashboard, visit.background_jobs):
        try:
            note, seen = check(), "--pass"
        except (OSError, ValueError, KeyError) as error:
            note, seen = f"{type(error).__name__}: {error}", "--fail"
        name = check.__name__
        done = runbook("check", run_id, name, seen, "--note", note, "--as", CHECKER, "--key", key)
        if done.returncode:
            return _pass_on(done)
        print(f"{CHECKER}: {name} {seen.removeprefix('--')}: {note}")
    return 0


def _pass_on(done: subprocess.CompletedProcess[str]) -> int:
    print(done.stderr.strip() or done.stdout.strip(), file=sys.stderr)
    return done.returncode


class Browser:
    """A person's browser: cookies, and the header that lets a check through the read-only mode."""

    def __init__(self, front: str, token: str) -> None:
        """Proxies of the machine have no say in a look at the front door."""
        self._front = front
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor(CookieJar())
        )
        self._opener.addheaders = [("X-Maintenance-Bypass", token), ("User-Agent", "spot-check/1.0")]

    def ask(self, path: str, form: Mapping[str, str] | None = None) -> Any:
        """Read a page, or send a form to it; the answer's JSON.

        Raises:
            OSError: nobody answered, or with an HTTP error.
            ValueError: the answer is no JSON.
        """
        data = urllib.parse.urlencode(form).encode() if form is not None else None
        with self._opener.open(self._front + path, data, timeout=15) as answer:
            return json.loads(answer.read())


@dataclass(slots=True)
class Visit:
    """One walk through the shop; each check says what was seen or raises what was wrong."""

    browser: Browser
    order: str = ""

    def log_in(self) -> str:
        """Can a user log in?"""
        return f"logged in as {self.browser.ask('/login', {'user': 'smoke', 'password': 'demo-smoke'})['user']}"

    def place_order(self) -> str:
        """Can a test order be placed?"""
        placed = self.browser.ask("/orders", {"product_id": "1", "quantity": "1"})
        self.order = str(placed["id"])
        return f"order {self.order} placed, status {placed['status']}"

    def view_dashboard(self) -> str:
        """Does the dashboard show today's figures?"""
        figures = self.browser.ask("/dashboard")
        if not figures["orders"] > 0:
            raise ValueError(f"the dashboard shows {figures['orders']} orders")
        return f"{figures['orders']} orders, {figures['queue_depth_jobs']} jobs waiting"

    def background_jobs(self) -> str:
        """Does the worker do the order's job?"""
        if not self.order:
            raise ValueError("no order was placed, so no job could be seen")
        began = time.monotonic()
        while time.monotonic() - began < JOB_TIMEOUT_S:
            if self.browser.ask(f"/orders/{self.order}")["status"] == "processed":
                return f"order {self.order} processed after {time.monotonic() - began:.1f} s"
            time.sleep(0.1)
        raise TimeoutError(f"order {self.order} was not processed within {JOB_TIMEOUT_S:g} s")
