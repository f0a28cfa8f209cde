"""An executed notebook as one HTML page for reading: no script, nothing loaded from elsewhere.

nbconvert renders cells and outputs, then everything that is not on a short list of tags and attributes is taken out.
The heavy imports happen at the first call.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from runbook_lib.pages import page, text

# What an output may bring, best first; widgets and JavaScript have no place in a record.
_SHOWN = ("text/html", "image/png", "image/jpeg", "text/markdown", "text/latex", "text/plain")
_TAGS = frozenset(
    [
        "a",
        "abbr",
        "b",
        "blockquote",
        "br",
        "caption",
        "code",
        "col",
        "colgroup",
        "dd",
        "del",
        "details",
        "div",
        "dl",
        "dt",
        "em",
        "figcaption",
        "figure",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "hr",
        "i",
        "img",
        "ins",
        "kbd",
        "li",
        "ol",
        "p",
        "pre",
        "q",
        "s",
        "samp",
        "section",
        "small",
        "span",
        "strong",
        "sub",
        "summary",
        "sup",
        "table",
        "tbody",
        "td",
        "tfoot",
        "th",
        "thead",
        "tr",
        "tt",
        "u",
        "ul",
        "var",
    ]
)
_GLOBAL = frozenset(
    {"class", "id", "title", "role", "lang", "scope", "colspan", "rowspan", "aria-label", "aria-hidden"}
)
_INLINE_IMAGE = re.compile(r"data:image/(?:png|jpeg|gif);base64,[A-Za-z0-9+/=\s]+\Z")
_LINK = re.compile(r"(?:https?://|mailto:|#|(?![a-zA-Z][a-zA-Z0-9+.-]*:)(?!//)).*\Z", re.DOTALL)
_RAW_BLOCK = re.compile(r"<(script|style|iframe|object)\b[^>]*>.*?</\1\s*>", re.DOTALL | re.IGNORECASE)

_STYLE = """
header,main{max-width:1040px}
.cell{margin:14px 0}.prompt{color:var(--soft);font:12px/1.4 ui-monospace,Menlo,Consolas,monospace}
.inner_cell .input_area,.highlight pre{background:var(--code);border-radius:6px}
.output_area{margin:6px 0;overflow-x:auto}.output_area pre{background:none;border-left:3px solid var(--line)}
.output_stderr pre{border-left-color:var(--warn)}.output_error pre{border-left-color:var(--bad)}
.output_area img{max-width:100%;height:auto;background:#fff}.anchor-link{display:none}
.output_html table{width:auto}.output_html td,.output_html th{padding:4px 14px 4px 0}
.highlight .k,.highlight .kn,.highlight .kc{color:var(--link);font-weight:600}
.highlight .s,.highlight .s1,.highlight .s2,.highlight .sd{color:var(--good)}
.highlight .c,.highlight .c1{color:var(--soft);font-style:italic}.highlight .mi,.highlight .mf{color:var(--warn)}
.ansi-red-fg,.ansi-red-intense-fg{color:var(--bad)}.ansi-green-fg,.ansi-green-intense-fg{color:var(--good)}
.ansi-yellow-fg,.ansi-yellow-intense-fg{color:var(--warn)}.ansi-blue-fg,.ansi-blue-intense-fg{color:var(--link)}
.ansi-bold{font-weight:600}
"""


def notebook_html(notebook: Path, *, title: str) -> str:
    """Render a notebook file.

    Args:
        notebook: an `.ipynb` file.
        title: the page's title, plain text.

    Raises:
        ValueError: the file is no notebook.
    """
    import nbformat

    try:
        content = nbformat.read(notebook, as_version=4)  # type: ignore[no-untyped-call]
        body = _cleaned(_rendered(content))
    except Exception as error:  # nbformat and nbconvert raise many kinds; none of them may stop a seal
        raise ValueError(f"{notebook.name} cannot be shown: {type(error).__name__}: {error}") from error
    header = f'<header><h1>{text(title)}</h1><p class="soft">Executed notebook, as it was sealed · {text(notebook.name)}</p></header>'
    return page(title, f'{header}<main id="main"><div class="card nb">{body}</div></main>', more_style=_STYLE)


def unreadable_html(title: str, why: str) -> str:
    """The page that stands for a notebook that could not be rendered."""
    body = f'<header><h1>{text(title)}</h1></header><main id="main"><p class="why">{text(why)}</p></main>'
    return page(title, body)


def _rendered(content: Any) -> str:
    from nbconvert.exporters import HTMLExporter

    for cell in content.cells:
        for output in cell.get("outputs", []):
            data = output.get("data")
            if data is None:
                continue
            best = next((kind for kind in _SHOWN if kind in data), None)
            output["data"] = (
                {best: data[best]} if best else {"text/plain": f"[{', '.join(sorted(data))}: not shown here]"}
            )
            if best == "text/html":
                # Cosmetic: the cleaning below would show their source as text.
                output["data"][best] = _RAW_BLOCK.sub("", output["data"][best])
    exporter = HTMLExporter(template_name="basic", exclude_anchor_links=True, embed_images=False)  # type: ignore[no-untyped-call]
    body, _ = exporter.from_notebook_node(content)
    return str(body)


def _cleaned(body: str) -> str:
    import bleach  # type: ignore[import-untyped]

    def allowed(tag: str, name: str, value: str) -> bool:
        if tag == "img" and name in ("src", "alt", "width", "height"):
            return name != "src" or _INLINE_IMAGE.match(value) is not None
        if tag == "a" and name == "href":
            return _LINK.match(value.strip()) is not None
        # The page's skip link goes to the id `main`: no output may take it over.
        return name in _GLOBAL and (name, value) != ("id", "main")

    return str(
        bleach.clean(
            _RAW_BLOCK.sub("", body),
            tags=_TAGS,
            attributes=allowed,
            protocols={"http", "https", "mailto", "data"},
            strip=True,
            strip_comments=True,
        )
    )
