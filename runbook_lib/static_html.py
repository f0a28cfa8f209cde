"""Tells whether a page is only text and pictures; pure."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_FORBIDDEN = frozenset(
    [
        "script",
        "iframe",
        "frame",
        "frameset",
        "object",
        "embed",
        "applet",
        "base",
        "form",
        "portal",
        "foreignobject",
        "animate",
        "set",
    ]
)
_URLS = frozenset({"href", "src", "srcset", "action", "formaction", "data", "xlink:href", "poster", "background"})
# Searched in the bytes as well: a browser's parser and ours may disagree on where a tag begins.
_SCRIPT = re.compile(rb"<\s*/?\s*(?:[a-z]+:)?script", re.IGNORECASE)


def active_content(data: bytes) -> str:
    """Say what in a page could run or load something; empty when nothing could."""
    try:
        page = data.decode("utf-8")
    except UnicodeDecodeError:
        return "is not UTF-8"
    if "\0" in page:
        return "holds a NUL character"
    if _SCRIPT.search(data):
        return "holds a script"
    reader = _Reader()
    reader.feed(page)
    reader.close()
    return reader.why


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.why = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _FORBIDDEN:
            self.why = self.why or f"holds a <{tag}>"
        for name, value in attrs:
            given = re.sub(r"[\x00-\x20]", "", value or "").lower()
            if name.startswith("on"):
                self.why = self.why or f"has the event handler {name}"
            elif name == "srcdoc" or (tag == "meta" and name == "http-equiv" and given == "refresh"):
                self.why = self.why or f"has {name} in a <{tag}>"
            elif name in _URLS and given.startswith(("javascript:", "vbscript:", "data:")):
                if not (tag == "img" and name == "src" and given.startswith("data:image/")):
                    self.why = self.why or f"has a {given.partition(':')[0]}: address"
            elif name in _URLS and tag not in ("a", "area") and given.startswith(("http:", "https:", "//")):
                self.why = self.why or f"loads {given[:60]} from elsewhere"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
