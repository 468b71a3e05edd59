"""Pieces of a self-contained HTML page: film strips, bars, curves, tables; no script."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

STYLE = """
:root { color-scheme: light dark; --line: #8884; --mute: #888; --a: #2f6fb0; --b: #c8722c;
        --c: #3d8b55; --d: #8a56ac; --e: #777; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { margin-top: 2.4rem; font-size: 1.2rem; }
p.note { color: var(--mute); } figure { margin: 1rem 0; } figcaption { color: var(--mute); }
img.strip { max-width: 100%; border-radius: 4px; display: block; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } td.best { font-weight: 700; }
.scroll { overflow-x: auto; }
.bar { display: grid; grid-template-columns: 13rem 1fr 4rem; gap: .6rem; align-items: center; }
.bar i { display: block; height: .8rem; border-radius: 2px; background: var(--a); }
.bar.b i { background: var(--b); } .bar span { white-space: nowrap; overflow: hidden;
text-overflow: ellipsis; } .bar b { font-weight: 400; text-align: right; }
.hit { font-weight: 700; } svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
"""
COLOURS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)", "var(--e)")


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


def strip(frames: np.ndarray, caption: str, *, height: int = 96) -> str:
    """Frames uint8 [T, H, W, 3] side by side as one JPEG, with a caption."""
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


def bars(rows: Sequence[tuple[str, float, bool]], *, digits: int = 2) -> str:
    """(name, fraction 0 to 1, marked) as horizontal bars; marked rows take the second colour."""
    lines = []
    for name, value, marked in rows:
        share = 100 * min(max(value, 0.0), 1.0)
        lines.append(
            f'<div class="bar{" b" if marked else ""}"><span>{html.escape(name)}</span>'
            f'<i style="width:{share:.1f}%"></i><b>{value:.{digits}f}</b></div>'
        )
    return "\n".join(lines)


def grid(header: Sequence[str], rows: Sequence[Sequence[str]], best: bool = True) -> str:
    """A table; the largest number of each column stands in bold when `best`."""
    tops = {}
    for column in range(1, len(header)):
        numbers = [_number(row[column]) for row in rows]
        known = [x for x in numbers if x is not None]
        if best and len(set(known)) > 1:
            tops[column] = max(known)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = []
    for row in rows:
        cells = []
        for column, cell in enumerate(row):
            mark = column in tops and _number(cell) == tops[column]
            cells.append(f"<td{' class=best' if mark else ''}>{html.escape(cell)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def _number(cell: str) -> float | None:
    try:
        return float(cell.split("±")[0])
    except ValueError:
        return None


def curves(series: Mapping[str, Sequence[float]], *, x: str, y: str) -> str:
    """Lines over 1, 2, 3 … in one SVG, y from 0 to the largest value."""
    width, height, left, bottom = 640, 260, 44, 34
    longest = max((len(v) for v in series.values()), default=0)
    top = max((max(v) for v in series.values() if v), default=0.0) or 1.0
    parts = [
        f'<line x1="{left}" y1="{height - bottom}" x2="{width}" y2="{height - bottom}" '
        'stroke="currentColor" stroke-opacity=".4"/>'
    ]
    for share in (0.0, 0.5, 1.0):
        level = height - bottom - share * (height - bottom - 16)
        parts.append(f'<text x="4" y="{level + 4:.1f}">{share * top:.2f}</text>')
        parts.append(
            f'<line x1="{left}" y1="{level:.1f}" x2="{width}" y2="{level:.1f}" '
            'stroke="currentColor" stroke-opacity=".12"/>'
        )
    for k, (name, values) in enumerate(series.items()):
        points = [
            (
                left + (width - left - 150) * i / max(longest - 1, 1),
                height - bottom - v / top * (height - bottom - 16),
            )
            for i, v in enumerate(values)
        ]
        if not points:
            continue
        colour = COLOURS[k % len(COLOURS)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            f'<text x="{width - 140}" y="{30 + 18 * k}" style="fill:{colour}">'
            f"{html.escape(name)} {values[-1]:.3f}</text>"
        )
    parts.append(f'<text x="{left}" y="{height - 8}">{html.escape(x)} 1 to {longest}</text>')
    parts.append(f'<text x="4" y="10">{html.escape(y)}</text>')
    return (
        f'<svg viewBox="0 0 {width} {height}" width="100%" style="max-width:{width}px" '
        f'role="img" aria-label="{html.escape(y, quote=True)} over {html.escape(x, quote=True)}">'
        + "".join(parts)
        + "</svg>"
    )
