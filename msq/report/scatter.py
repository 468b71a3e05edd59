"""Points in the plane as one SVG: several panels beside one another, and a legend below.

The text of a document of its own as well as part of a page: styles stand in the elements, where the
page's cannot reach them, and the ground is white.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

PANEL, GAP, MARGIN, HEAD = 470, 20, 16, 84  # pixels
COLUMN, LINE = 320, 19  # of the legend
# Told apart by most kinds of colour blindness (after Okabe and Ito); then the shape changes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e6a000", "#56b4e9", "#6a3d9a", "#8c564b",
           "#1b1b1b", "#a0a800")  # fmt: skip
SHAPES = ("circle", "square", "triangle")
GREY = "#b8b8b8"
TEXT = "font-family:system-ui,sans-serif;fill:#222;font-size:"
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Points that look alike.

    Attributes:
        name: in the legend.
        number: of its colour and shape; None is grey.
        hollow: rings in place of discs.
        places: which points.
    """

    name: str
    number: int | None
    places: Sequence[int]
    hollow: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A picture.

    Attributes:
        title: above it.
        lines: below that, in small letters.
        points: x and y of each point.
    """

    title: str
    lines: Sequence[str]
    points: Sequence[Sequence[float]]


def scatter(
    title: str,
    panels: Sequence[Panel],
    groups: Sequence[Group],
    names: Sequence[str],
    notes: Sequence[str] = (),
) -> str:
    """One SVG element.

    Args:
        title: of it all.
        panels: from left to right.
        groups: which of the points look how; the last are drawn first, below the others.
        names: of each point, shown where a pointer rests on it.
        notes: lines at the foot.
    """
    width = 2 * MARGIN + len(panels) * PANEL + (len(panels) - 1) * GAP
    columns = max(1, (width - 2 * MARGIN) // COLUMN)
    legend = HEAD + PANEL + 30
    foot = legend + LINE * -(-len(groups) // columns) + 10
    height = foot + LINE * len(notes)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" style="max-width:100%;height:auto" role="img" '
        f'aria-label="{text(title)}">',
        f"<title>{text(title)}</title>",
        f'<rect width="{width}" height="{height}" style="fill:#fff"/>',
        _words(MARGIN, 24, title, 16, bold=True),
    ]
    for k, panel in enumerate(panels):
        parts += _panel(panel, MARGIN + k * (PANEL + GAP), groups, names)
    for k, group in enumerate(groups):
        x, y = MARGIN + (k % columns) * COLUMN, legend + (k // columns) * LINE
        parts.append(f'<g class="key"{_look(group)}>{_mark(group, x + 6, y - 4, 5)}</g>')
        parts.append(_words(x + 18, y, f"{_short(group.name)} ({len(group.places)})", 12))
    parts += [_words(MARGIN, foot + k * LINE, line, 11) for k, line in enumerate(notes)]
    return "\n".join([*parts, "</svg>\n"])


def text(value: str) -> str:
    """As text of an XML document; characters that none can hold become the replacement one."""
    return html.escape(_NOT_XML.sub("\ufffd", value), quote=True)


def _panel(panel: Panel, left: float, groups: Sequence[Group], names: Sequence[str]) -> list[str]:
    parts = [_words(left, 46, panel.title, 13, bold=True)]
    parts += [_words(left, 62 + 15 * k, line, 11) for k, line in enumerate(panel.lines)]
    parts.append(
        f'<rect x="{left}" y="{HEAD}" width="{PANEL}" height="{PANEL}" '
        'style="fill:none;stroke:#ccc"/>'
    )
    places = _placed(panel.points, left)
    size = 4.0 if len(places) <= 400 else 3.0 if len(places) <= 2000 else 2.0
    for group in reversed(groups):
        parts.append(f'<g class="clips"{_look(group)}>')
        parts += [
            f"<g><title>{text(names[k])}</title>{_mark(group, *places[k], size)}</g>"
            for k in group.places
        ]
        parts.append("</g>")
    return parts


def _placed(points: Sequence[Sequence[float]], left: float) -> list[tuple[float, float]]:
    """Where points are drawn: one scale for both directions, in the middle of the panel."""
    if not points:
        return []
    lows = [min(p[axis] for p in points) for axis in (0, 1)]
    highs = [max(p[axis] for p in points) for axis in (0, 1)]
    scale = (PANEL - 24) / (max(high - low for high, low in zip(highs, lows, strict=True)) or 1.0)
    middle = [(high + low) / 2 for high, low in zip(highs, lows, strict=True)]
    x, y = left + PANEL / 2, HEAD + PANEL / 2
    return [(x + scale * (p[0] - middle[0]), y - scale * (p[1] - middle[1])) for p in points]


def _look(group: Group) -> str:
    """Colours of a group, once for all its points."""
    colour = GREY if group.number is None else COLOURS[group.number % len(COLOURS)]
    fill, stroke = ("none", colour) if group.hollow else (colour, "#fff")
    return f' style="fill:{fill};stroke:{stroke};stroke-width:{1 if group.hollow else 0.5}"'


def _mark(group: Group, x: float, y: float, r: float) -> str:
    """A disc, a square or a triangle about a place."""
    shape = SHAPES[(group.number or 0) // len(COLOURS) % len(SHAPES)]
    if shape == "circle":
        return f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{r:g}"/>'
    if shape == "square":
        return f'<rect x="{x - r:.2f}" y="{y - r:.2f}" width="{2 * r:g}" height="{2 * r:g}"/>'
    corners = ((x, y - 1.2 * r), (x + 1.1 * r, y + 0.8 * r), (x - 1.1 * r, y + 0.8 * r))
    return f'<polygon points="{" ".join(f"{a:.2f},{b:.2f}" for a, b in corners)}"/>'


def _words(x: float, y: float, line: str, size: int, bold: bool = False) -> str:
    weight = ";font-weight:700" if bold else ""
    return f'<text x="{x:g}" y="{y:g}" style="{TEXT}{size}px{weight}">{text(line)}</text>'


def _short(name: str, most: int = 40) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
