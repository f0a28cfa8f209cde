"""The shell of every page we write: no script, one style sheet in the page, a strict content security policy; pure."""

from __future__ import annotations

import base64
import hashlib
import html
import re
import unicodedata

# Colours: every text/background pair below has a contrast of at least 4.5:1 in both schemes (WCAG 2.2 AA).
_STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--text:#1b2330;--soft:#525e70;--line:#d9dee6;--link:#0b57c2;
--good:#116b38;--good-bg:#e0f3e7;--bad:#b01c1c;--bad-bg:#fde7e6;--warn:#8a4b00;--warn-bg:#fcf0d9;--bar:#2d8a55;
--code:#eef1f5}
@media (prefers-color-scheme:dark){:root{--bg:#10151d;--card:#182029;--text:#e6ebf2;--soft:#a3b0c2;--line:#303b49;
--link:#85b8ff;--good:#7ddba1;--good-bg:#143423;--bad:#ff9c94;--bad-bg:#471d1d;--warn:#f3c26b;--warn-bg:#402f10;
--bar:#3fa56c;--code:#222c38}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main,header,footer{max-width:1240px;margin:0 auto;padding:0 20px}
header{padding-top:24px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:18px;margin:0 0 12px}
h3{font-size:15px;margin:16px 0 4px}
p{margin:0 0 8px}
a{color:var(--link)}
a:focus-visible{outline:3px solid var(--link);outline-offset:2px}
code,pre{font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
code{background:var(--code);padding:1px 4px;border-radius:4px;overflow-wrap:anywhere}
pre{background:var(--code);padding:10px 12px;border-radius:6px;overflow-x:auto;margin:0 0 8px}
.soft{color:var(--soft)}
.skip{position:absolute;left:-9999px}.skip:focus{left:20px;top:6px;background:var(--card);padding:6px 10px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 20px;margin:16px 0;min-width:0}
.two{display:grid;grid-template-columns:minmax(0,3fr) minmax(0,2fr);gap:0 16px;align-items:start}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,520px),1fr));gap:16px}
@media (max-width:900px){.two{grid-template-columns:minmax(0,1fr)}}
figure{margin:0}figure img{width:100%;height:auto;border:1px solid var(--line);border-radius:6px;background:#fff}
figcaption{color:var(--soft);font-size:13px}
.facts{display:flex;flex-wrap:wrap;gap:4px 28px;margin:12px 0 0}
.facts div{min-width:0}.facts dt{color:var(--soft);font-size:13px}.facts dd{margin:0;overflow-wrap:anywhere}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%}
caption{text-align:left;color:var(--soft);font-size:13px;padding-bottom:6px}
th,td{text-align:left;vertical-align:top;padding:6px 12px 6px 0;border-bottom:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:0}
thead th{font-size:13px;color:var(--soft);font-weight:600}
th[scope=row]{font-weight:500}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.pill{display:inline-block;border-radius:999px;padding:2px 10px;font-size:13px;font-weight:600;white-space:nowrap}
.good{color:var(--good);background:var(--good-bg)}.bad{color:var(--bad);background:var(--bad-bg)}
.warn{color:var(--warn);background:var(--warn-bg)}
.plain{color:var(--soft);background:var(--code)}
.row-phase th{background:var(--code);padding-left:8px;font-weight:600}
.why{color:var(--bad);overflow-wrap:anywhere}
.lane{width:34%;min-width:200px}.lane svg{display:block;width:100%;height:16px;margin-top:3px}
.lane rect.track{fill:var(--code)}.lane rect.done{fill:var(--bar)}.lane rect.failed{fill:var(--bad)}
.lane rect.open{fill:var(--soft)}
blockquote{margin:6px 0;padding:2px 12px;border-left:3px solid var(--line);overflow-wrap:anywhere}
ul.flat{list-style:none;margin:0;padding:0}ul.flat li{margin:0 0 4px}
footer{color:var(--soft);font-size:13px;padding-bottom:32px}
@media print{.card{break-inside:avoid}}
"""

# For one output in a notebook: the same words in the same colours, in JupyterLab's theme, touching nothing around it.
_LIGHT, _DARK = (";".join(re.findall(r"--[a-z-]+:#[0-9a-f]+", block)) for block in _STYLE.split("@media")[:2])
_OUTPUT_STYLE = (
    f".rb{{{_LIGHT};color:var(--text);font:14px/1.45 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}}"
    f"body[data-jp-theme-light=false] .rb{{{_DARK}}}"
    ".rb code,.rb pre{font:12.5px/1.4 ui-monospace,Menlo,Consolas,monospace;background:var(--code);border-radius:4px;padding:1px 4px;"
    "overflow-wrap:anywhere}.rb pre{padding:8px 10px;overflow-x:auto;white-space:pre-wrap}"
    ".rb .card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:8px 14px;margin:4px 0;max-width:1000px}"
    ".rb p{margin:0 0 4px}.rb .soft{color:var(--soft)}.rb .why{color:var(--bad)}.rb a{color:var(--link)}"
    # Said twice and thrice: JupyterLab puts every cell to the right and stripes the rows.
    ".rb table{border-collapse:collapse;margin:2px 0}.rb.rb th,.rb.rb td{text-align:left;vertical-align:top}"
    ".rb.rb.rb tr{background:none}.rb th,.rb td{padding:2px 14px 2px 0;background:none;border:0;white-space:normal}"
    ".rb th{font-weight:600}"
    ".rb .pill{display:inline-block;border-radius:999px;padding:1px 9px;font-size:12.5px;font-weight:600;white-space:nowrap}"
    ".rb .good{color:var(--good);background:var(--good-bg)}.rb .bad{color:var(--bad);background:var(--bad-bg)}"
    ".rb .warn{color:var(--warn);background:var(--warn-bg)}.rb .plain{color:var(--soft);background:var(--code)}"
    ".rb summary{cursor:pointer}.rb summary:focus-visible{outline:3px solid var(--link);outline-offset:2px}"
)

_TONES = {
    "completed": "good",
    "rolled_back": "warn",
    "aborted": "bad",
    "failed": "bad",
    "paused": "warn",
    "green": "good",
    "approved": "good",
    "rejected": "bad",
    "interrupted": "warn",
    "blocked": "bad",
    "inconclusive": "warn",
    "red": "bad",
}


def page(title: str, body: str, *, more_style: str = "") -> str:
    """A whole document.

    Args:
        title: plain text.
        body: trusted HTML with its own header and main.
        more_style: CSS behind the common one.
    """
    style = _STYLE + more_style
    # The hash lets in this style sheet alone: a `style` attribute in some output has no effect, a script even less.
    hashed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src 'self' file: data:; style-src 'sha256-{hashed}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{text(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#main">Skip to content</a>\n{body}\n</body>\n</html>\n'
    )


def output(body: str, *, more_style: str = "") -> str:
    """One output of a notebook's cell.

    Args:
        body: trusted HTML; where a viewer drops the style sheet it must read well without.
        more_style: CSS behind the common one; every selector begins with `.rb`.
    """
    return f'<div class="rb"><style>{_OUTPUT_STYLE}{more_style}</style>{body}</div>'


def text(value: object) -> str:
    """Any value as HTML text or attribute value."""
    return html.escape(visible(str(value), keep="\n\t"))


def visible(value: str, *, keep: str = "") -> str:
    """A string in which nothing hides: control, bidi and surrogate characters are shown as escapes."""
    return "".join(
        c if c in keep or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else f"\\u{ord(c):04x}"
        for c in value
    )


def pill(word: str, *, tone: str = "") -> str:
    """A state in a word, coloured: the word itself says it, the colour repeats it."""
    return f'<span class="pill {tone or _TONES.get(word, "plain")}">{text(word.replace("_", " "))}</span>'


def moment(time: str) -> str:
    """An ISO 8601 time of the ledger for people: to the second, with its zone."""
    if not time:
        return "–"
    shown = time[:19].replace("T", " ") + " UTC"
    return f'<time datetime="{text(time)}">{text(shown)}</time>'


def seconds(value: float) -> str:
    """A duration for people."""
    if value < 10:
        return f"{value:.1f} s"
    if value < 100:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size(value: int) -> str:
    """A number of bytes for people, in powers of ten."""
    amount = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"
