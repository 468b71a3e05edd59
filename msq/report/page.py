"""Pieces of a self-contained HTML page: film strips, bars, curves, tables; no script."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

STYLE = """
:root { color-scheme: light dark; --line: #8884; --mute: #888; --a: #2f6fb0; --b: #c8722c;
        --c: #3d8b55; --d: #8a56ac; --e: #777; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { margin-top: 2.4rem; font-size: 1.2rem; }
.note, figcaption { color: var(--mute); } figure { margin: 1rem 0; }
img.strip { max-width: 100%; border-radius: 4px; display: block; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } td.best { font-weight: 700; }
.scroll { overflow-x: auto; }
.bar { display: grid; grid-template-columns: 13rem 1fr 4rem; gap: .6rem; align-items: center; }
.bar i { display: block; height: .8rem; border-radius: 2px; background: var(--a); }
.bar.b i { background: var(--b); } .bar span { white-space: nowrap; overflow: hidden;
text-overflow: ellipsis; } .bar b { font-weight: 400; text-align: right; }
.bar.n { grid-template-columns: 13rem 1fr 4rem 6rem; } .bar em { color: var(--mute); }
.hit { font-weight: 700; } svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
.key { white-space: nowrap; margin-right: 1.2rem; } .key svg { vertical-align: middle; }
.facts td { text-align: left; overflow-wrap: anywhere; } pre { overflow-x: auto; }
"""
COLOURS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)", "var(--e)")
DASHES = ("none", "7 4", "2 3")  # tell lines of one colour apart


def page(title: str, lead: str, sections: Sequence[str]) -> str:
    """A whole HTML document."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(lead)}</p>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str, note: str = "") -> str:
    """A heading, an optional grey remark, and what belongs to it."""
    remark = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<h2>{html.escape(title)}</h2>\n{remark}\n" + "\n".join(parts)


def remarks(lines: Sequence[str]) -> str:
    """Grey remarks below something, one to a line; nothing without any."""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f'<ul class="note">{items}</ul>' if items else ""


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and what they are, as text."""
    body = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(what)}</td></tr>" for name, what in rows
    )
    return f'<div class="scroll"><table class="facts">{body}</table></div>'


def folded(title: str, text: str) -> str:
    """Text as it is, to be opened by a click (no script is in that)."""
    return (
        f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"
    )


def strip(frames: np.ndarray, caption: str, *, height: int = 96) -> str:
    """Frames uint8 [T, H, W, 3] side by side as one JPEG, with a caption."""
    import numpy as np  # most pages hold no film
    from PIL import Image

    width = max(1, round(frames.shape[2] * height / frames.shape[1]))
    small = [np.asarray(Image.fromarray(f).resize((width, height))) for f in frames]
    joined = Image.fromarray(np.concatenate(small, axis=1))
    buffer = io.BytesIO()
    joined.save(buffer, format="JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<figure><img class="strip" alt="{html.escape(caption, quote=True)}" '
        f'src="data:image/jpeg;base64,{data}"><figcaption>{html.escape(caption)}</figcaption>'
        "</figure>"
    )


def bars(
    rows: Sequence[tuple[str, float, bool]], *, digits: int = 2, beside: Sequence[str] = ()
) -> str:
    """Horizontal bars.

    Args:
        rows: name, fraction 0 to 1, whether it takes the second colour.
        digits: of the numbers.
        beside: a few grey words at the end of each row; () for none.
    """
    lines = []
    for k, (name, value, marked) in enumerate(rows):
        share = 100 * min(max(value, 0.0), 1.0)
        kind = f"bar{' b' if marked else ''}{' n' if beside else ''}"
        words = f"<em>{html.escape(beside[k])}</em>" if beside else ""
        lines.append(
            f'<div class="{kind}"><span title="{html.escape(name)}">{html.escape(name)}</span>'
            f'<i style="width:{share:.1f}%"></i><b>{value:.{digits}f}</b>{words}</div>'
        )
    return "\n".join(lines)


def grid(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    best: bool = True,
    marks: Collection[tuple[int, int]] = (),
) -> str:
    """A table.

    Args:
        header: names of its columns.
        rows: of text.
        best: put the largest number of each column in bold.
        marks: (row, column) of what stands in bold besides.
    """
    tops = {}
    for column in range(1, len(header)):
        numbers = [_number(row[column]) for row in rows]
        known = [x for x in numbers if x is not None]
        if best and len(set(known)) > 1:
            tops[column] = max(known)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = []
    for k, row in enumerate(rows):
        cells = []
        for column, cell in enumerate(row):
            mark = (column in tops and _number(cell) == tops[column]) or (k, column) in marks
            cells.append(f"<td{' class=best' if mark else ''}>{html.escape(cell)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def _number(cell: str) -> float | None:
    try:
        return float(cell.split("±")[0])
    except ValueError:
        return None


def curves(series: Mapping[str, Sequence[float | None]], *, x: str, y: str) -> str:
    """Lines over 1, 2, 3 … in one SVG, y from 0 to the largest value.

    Args:
        series: name -> a value at each place, None where there is none.
        x: what the places are.
        y: what the values are.
    """
    width, height, left, base, ceiling = 640, 240, 44, 206, 16
    longest = max((len(values) for values in series.values()), default=0)
    top = max((v for values in series.values() for v in values if v is not None), default=0) or 1.0
    parts, keys = [], []
    for share in (0.0, 0.5, 1.0):
        level = base - share * (base - ceiling)
        parts.append(f'<text x="4" y="{level + 4:.1f}">{share * top:.3g}</text>')
        parts.append(
            f'<line x1="{left}" y1="{level:.1f}" x2="{width}" y2="{level:.1f}" '
            f'stroke="currentColor" stroke-opacity="{0.12 if share else 0.4}"/>'
        )
    for k, (name, values) in enumerate(series.items()):
        known = [(i, v) for i, v in enumerate(values) if v is not None]
        if not known:
            continue
        step = (width - left - 8) / max(longest - 1, 1)
        places = [(left + step * i, base - v / top * (base - ceiling)) for i, v in known]
        parts.append(_line(places, _stroke(k)))
        keys.append(
            '<span class="key"><svg width="26" height="8"><line x1="0" y1="4" x2="24" y2="4" '
            f"{_stroke(k)}/></svg> {html.escape(name)} {known[-1][1]:.3f}</span>"
        )
    parts.append(f'<text x="{left}" y="{height - 8}">{html.escape(x)} 1 to {longest}</text>')
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" width="100%" style="max-width:{width}px" '
        f'role="img" aria-label="{html.escape(y)} over {html.escape(x)}">{"".join(parts)}</svg>'
        f"<figcaption>{html.escape(y)}, the last value: {' '.join(keys)}</figcaption></figure>"
    )


def _stroke(number: int) -> str:
    """How the line of this number is drawn."""
    dashes = DASHES[number // len(COLOURS) % len(DASHES)]
    return f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="2" stroke-dasharray="{dashes}"'


def _line(places: Sequence[tuple[float, float]], stroke: str) -> str:
    """A line through places; a ring where there is one, which makes no line."""
    if len(places) == 1:
        (x, y), *_ = places
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="none" {stroke}/>'
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{points}" fill="none" {stroke}/>'
