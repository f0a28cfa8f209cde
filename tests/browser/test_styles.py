"""One output of ours under JupyterLab's own rules for what notebooks show."""

from __future__ import annotations

from typing import Any

from runbook_lib.card import Card

# As JupyterLab 4 has them.
_JUPYTERLAB = """
:not(.jp-RenderedMarkdown).jp-RenderedHTMLCommon td, :not(.jp-RenderedMarkdown).jp-RenderedHTMLCommon th,
:not(.jp-RenderedMarkdown).jp-RenderedHTMLCommon tr { text-align: right; vertical-align: middle; }
.jp-RenderedHTMLCommon tbody tr:nth-child(odd) { background: rgb(245, 245, 245); }
"""


def test_a_cards_facts_stand_beside_their_names(page: Any) -> None:
    card = Card(facts={"rows": 25422}, title="Dump", status="green").bundle()["text/html"]
    page.set_content(f"<style>{_JUPYTERLAB}</style><div class='jp-RenderedHTMLCommon'>{card}</div>")

    style = "e => { const s = getComputedStyle(e); return [s.textAlign, s.backgroundColor] }"
    assert page.locator("td").evaluate(style) == ["left", "rgba(0, 0, 0, 0)"]
    assert page.locator("tr").evaluate(style)[1] == "rgba(0, 0, 0, 0)"
