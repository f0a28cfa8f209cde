"""What a text in the params file may be. Each function returns it unchanged, or says in a ValueError what is wanted.

Nothing that git, ssh, libpq, a path, a terminal or a template would read specially gets through by accident, and no secret.
"""

from __future__ import annotations

import ipaddress
import re
from datetime import UTC, datetime
from urllib.parse import parse_qsl

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL})*"
_AT = rf"(?P<host>{_HOST}|\[(?P<six>[^\]\s]*)\])(?::(?P<port>[0-9]{{1,5}}))?"
_USER = r"[a-z_][a-z0-9_-]*"
# Line breaks and escape sequences of any kind, and what turns the direction of the text that follows.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_URL = re.compile(rf"https?://{_AT}(?:/[^\s?#]*)?")
_ADDRESS = re.compile(rf"local:/\S*|ssh:(?:{_USER}@)?(?P<host>{_HOST})(?::(?P<port>[0-9]{{1,5}}))?/\S*")
# A folder, a URL without a password, or git's own user@host:path; never what git takes for an option or a helper.
_REMOTE = re.compile(
    rf"/\S*|file:///\S+|https://{_AT}/\S+|ssh://(?:{_USER}@)?{_AT.replace('P<', 'P<ssh_')}/\S+"
    rf"|(?:{_USER}@)?{_HOST}:(?![-:]|//)\S+"
)
_LEDGER = re.compile(
    rf"sqlite:////[^\s?#]+|postgresql(?:\+psycopg)?://(?:[^\s:@/?#]+@)?(?:{_AT})?/[\w.-]+(?:\?(?P<query>\S*))?"
)
_KEY = re.compile(r"(?:ssh|sk-ssh|ecdsa|sk-ecdsa)-[a-z0-9@.-]+ [A-Za-z0-9+/]+={0,2}(?: .*)?")


def line(value: str) -> str:
    """One line of text, in any script."""
    if _CONTROL.search(value):
        raise ValueError("must be one line without control characters")
    return value


def below(value: str) -> str:
    """A path in a folder that is given elsewhere, and never out of it."""
    if line(value).startswith(("/", "-", "~")) or ".." in value.split("/"):
        raise ValueError("must be a relative path without .., not beginning with a dash")
    return value


def absolute(value: str) -> str:
    """A path that means the same to every process of this machine."""
    if not line(value).startswith("/"):
        raise ValueError("must be an absolute path")
    return value


def program(value: str) -> str:
    """A name on PATH, an absolute path, or a path in the release."""
    return absolute(value) if value.startswith("/") else below(value)


def url(value: str) -> str:
    """Http or https, no credentials in it."""
    return _matched(_URL, value, "must be http(s)://HOST[:PORT][/PATH]")


def front(value: str) -> str:
    """A URL that paths are put behind."""
    if url(value).endswith("/"):
        raise ValueError("must not end with a slash")
    return value


def url_path(value: str) -> str:
    """What is put behind a front."""
    if not re.fullmatch(r"/\S*", line(value)):
        raise ValueError("must begin with a slash and have no blank")
    return value


def server(value: str) -> str:
    """One host by name or number."""
    if not re.fullmatch(_HOST, value) and not _is_six(value):
        raise ValueError("must be a host's name or number, alone")
    return value


def address(value: str) -> str:
    """Where a host's folder is."""
    return _matched(_ADDRESS, value, "must be local:/FOLDER or ssh:[user@]host[:port]/FOLDER")


def remote(value: str) -> str:
    """Where git finds the repository."""
    wanted = "must be /FOLDER, file:///FOLDER, https://HOST/PATH, ssh://[user@]HOST/PATH or [user@]HOST:PATH, without a password"
    return _matched(_REMOTE, value, wanted)


def ledger(value: str) -> str:
    """A database that stays; its password is in libpq's password file."""
    wanted = "must be sqlite:////FILE or postgresql://[USER@]HOST[:PORT]/DATABASE, without a password"
    _matched(_LEDGER, value, wanted)
    if any(
        "pass" in key and key != "passfile" for key, _ in parse_qsl(value.partition("?")[2], keep_blank_values=True)
    ):
        raise ValueError(wanted)
    return value


def secret(value: str) -> str:
    """Where a secret is, never the secret."""
    if not re.fullmatch(r"env:[A-Za-z_][A-Za-z0-9_]*|file:/\S+", value) or _CONTROL.search(value):
        raise ValueError("must be a reference, env:NAME or file:/PATH")
    return value


def file_secret(value: str) -> str:
    """A secret that a program reads from its file."""
    if not secret(value).startswith("file:"):
        raise ValueError("must be a reference file:/PATH")
    return value


def public_key(value: str) -> str:
    """A line of a .pub file."""
    if not _KEY.fullmatch(value) or _CONTROL.search(value):
        raise ValueError("must be a line of ~/.ssh/*.pub")
    return value


def moment(value: str) -> str:
    """A time with its offset."""
    try:
        there = datetime.fromisoformat(line(value))
        known = there.tzinfo is not None and 2000 <= there.astimezone(UTC).year < 2100
    except (ValueError, OverflowError):
        known = False
    if not known:
        raise ValueError("must be an ISO 8601 time of this century with its offset, such as 2026-03-01T20:00:00+00:00")
    return value


def _matched(form: re.Pattern[str], value: str, wanted: str) -> str:
    found = form.fullmatch(value)
    if found is None or _CONTROL.search(value):
        raise ValueError(wanted)
    for name, text in found.groupdict().items():
        if text is not None and (
            (name.endswith("port") and not 1 <= int(text) <= 65535) or (name.endswith("six") and not _is_six(text))
        ):
            raise ValueError(wanted)
    return value


def _is_six(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False
