"""One self-contained HTML file: no link; readable on a light and on a dark screen, and on a narrow one.

Figures are SVG elements inside the page. Their black is the colour of the page's text, whatever that is, and they have
no background of their own.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #ffffff; --rule: #dddddd; --soft: #666666; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e4; --paper: #161616; --rule: #3c3c3c; --soft: #9a9a9a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1080px;
  margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.1em; margin: 2em 0 .4em; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 12px; }
.plots svg { width: 100%; height: auto; } .plots svg text { fill: currentColor; }
pre { font-size: 12px; overflow-x: auto; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: 2px 14px 2px 0; text-align: left; border-bottom: 1px solid var(--rule); }
td { font-variant-numeric: tabular-nums; } .note { color: var(--soft); }
"""


def write_page(title: str, body: Sequence[str], path: Path) -> None:
    """title: text. body: elements."""
    write_text(page(title, body), path)


def page(title: str, body: Sequence[str], *, head: str = "", style: str = "") -> str:
    """title: text. body: elements. head: more elements of the head; style: more rules."""
    name = html.escape(title)
    first = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{head}<title>{name}</title>'
    meta = f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}{style}</style></head>'
    return "\n".join([f"{first}{meta}<body>", f"<h1>{name}</h1>", *body, "</body></html>"]) + "\n"


def write_text(text: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def as_svg(save: Callable[..., Any]) -> str:
    """A figure as an element. save: writes it, with the keywords of `savefig`; the same bytes for the same numbers."""
    out = io.StringIO()
    save(out, format="svg", metadata={"Date": None}, transparent=True)
    text = out.getvalue()
    return f"<figure style='margin:0'>{text[text.index('<svg') :].replace('#000000', 'currentColor')}</figure>"
