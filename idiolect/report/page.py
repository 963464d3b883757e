"""The frame of the report: one HTML page with its style, its script and Plotly inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from idiolect.report.figures import FONT
from idiolect.report.tables import NOTHING

Rows = Sequence[Mapping[str, str]]
"""A table: one mapping from column header to text per row."""


@dataclass(frozen=True)
class Section:
    """A part of the page: heading, one sentence that says how to read it, and HTML or a figure."""

    name: str
    aid: str
    body: str | go.Figure


def table(rows: Rows, colors: Mapping[str, str] | None = None) -> str:
    """Return an HTML table; the first column may carry the color of its method in the figures."""
    headers = list(dict.fromkeys(header for row in rows for header in row))
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    body = ""
    for row in rows:
        first, *others = (escape(str(row.get(header, NOTHING))) for header in headers)
        color = (colors or {}).get(row.get(headers[0], ""))
        swatch = f'<i class="swatch" style="background:{color}"></i>' if color else ""
        body += f"<tr><th>{swatch}{first}</th>{''.join(f'<td>{cell}</td>' for cell in others)}</tr>\n"
    kind = "numbers" if colors else "words"
    content = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table class="{kind}">{content}</table></div>'


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Return the whole page, with links to its sections on top."""
    links, bodies = "", ""
    for number, section in enumerate(sections):
        links += f'<a href="#s{number}">{escape(section.name)}</a>\n'
        body = section.body if isinstance(section.body, str) else _plot(section.body, f"plot{number}")
        bodies += (
            f'<section id="s{number}"><h2>{escape(section.name)}</h2>'
            f'<p class="aid">{escape(section.aid)}</p>{body}</section>\n'
        )
    return _PAGE.format(
        title=escape(title), subtitle=subtitle, links=links, sections=bodies,
        style=_STYLE, font=FONT, plotly=get_plotlyjs(), script=_SCRIPT,
    )  # fmt: skip


def _plot(figure: go.Figure, name: str) -> str:
    """Return the place of a figure and the call that draws it; its JSON has no <, which could end the script."""
    place = f'<div id="{name}" class="plot" style="height:{figure.layout.height}px"></div>'
    return f'{place}<script>draw("{name}", {figure.to_json()})</script>'


# The policy lets the page run what is in it and load nothing from anywhere.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>body {{ font-family: {font} }}
{style}</style>
<script>{plotly}</script>
<script>{script}</script>
</head>
<body>
<header><h1>{title}</h1><p>{subtitle}</p>
<nav>
{links}</nav></header>
<main>
{sections}</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light }
body { margin: 0; background: #f5f7fa; color: #1f2933; font-size: 15px; line-height: 1.5 }
header, main { max-width: 1080px; margin: 0 auto; padding: 0 24px }
header { padding-top: 40px }
h1 { margin: 0; font-size: 30px; line-height: 1.2; letter-spacing: -0.01em; overflow-wrap: anywhere }
header p { margin: 6px 0 18px; color: #52606d }
nav { display: flex; flex-wrap: wrap; gap: 6px 18px; padding: 12px 0 20px; border-top: 1px solid #cbd2d9 }
nav a { color: #0067a3; text-decoration: none; font-size: 14px }
nav a:hover { text-decoration: underline }
section { background: #fff; border: 1px solid #e4e7eb; border-radius: 10px }
section { padding: 22px 26px; margin: 0 0 22px }
h2 { margin: 0 0 4px; font-size: 19px; letter-spacing: -0.005em; overflow-wrap: anywhere }
.aid { margin: 0 0 14px; color: #52606d; max-width: 84ch }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: 7px 10px; border-bottom: 1px solid #e4e7eb; vertical-align: top; text-align: left }
thead th { border-bottom: 1.5px solid #9aa5b1; color: #52606d; font-size: 13px; vertical-align: bottom }
th { font-weight: 600 }
.numbers td, .numbers thead th + th { text-align: right }
.numbers td, .numbers tbody th { white-space: nowrap }
.facts th { width: 170px; color: #52606d }
.facts td { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 13px }
.facts td { white-space: pre-wrap; overflow-wrap: anywhere }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 8px }
@media (max-width: 600px) {
  .facts th, .facts td { display: block; width: auto; border: 0; padding: 2px 0 }
  .facts th { padding-top: 8px }
}
@media print {
  @page { size: A4; margin: 14mm }
  body { background: #fff; font-size: 11px }
  header, main { padding: 0; max-width: none }
  nav, .modebar { display: none }
  section { border: 0; padding: 0; break-inside: avoid }
  h2 { font-size: 15px }
  th, td { padding: 4px 6px }
}
"""

_SCRIPT = """
// Plotly's button that uploads a figure to its makers' cloud stays off: the data of clients is private.
// On a narrow screen there are no buttons, since they would cover the legend.
const options = { responsive: true, displaylogo: false, showSendToCloud: false,
                  displayModeBar: matchMedia("(min-width: 700px)").matches && "hover",
                  modeBarButtonsToRemove: ["select2d", "lasso2d"],
                  toImageButtonOptions: { format: "svg" } };
function draw(name, figure) { Plotly.newPlot(name, figure.data, figure.layout, options); }
function resize(width) {
  for (const plot of document.querySelectorAll(".plot"))
    Plotly.relayout(plot, { width: width, autosize: !width });
}
addEventListener("beforeprint", () => resize(680));
addEventListener("afterprint", () => resize(null));
"""
