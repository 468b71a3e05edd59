"""`msq attention`: what is looked at in a video, as a picture, a page, and numbers."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from msq.errors import UsageError
from msq.extract.atomic import write_file
from msq.extract.devices import resolve_device
from msq.head.predict_attention import AttentionMaps, EncoderLook
from msq.report import page, terminal
from msq.report.attention_rows import Row, notes, row_strip, rows_of, when
from msq.report.heat_map import sheet

TOP = 5  # classes of a picture where no labels are asked for
_SUFFIXES = (".html", ".htm", ".png")


def require_place(out: Path | None) -> None:
    """Refuse, before any work, what no picture can be written to.

    Raises:
        UsageError: a file of another kind, a file where a folder should be or the other way round.
    """
    if out is None:
        return
    if out.suffix.lower() in _SUFFIXES:
        if out.is_dir():
            raise UsageError(f"{out}: expected a place for a file, found a folder")
    elif out.suffix and not out.is_dir():
        raise UsageError(
            f"{out}: expected a name that ends in .html or .png, or a folder, found {out.suffix}"
        )
    elif out.exists() and not out.is_dir():
        raise UsageError(f"{out}: expected a folder, found a file")


def look(
    run: Path,
    video: Path,
    labels: Sequence[str] | None,
    *,
    start: float | None,
    end: float | None,
    top: int | None,
    head_only: bool,
    fps: float | None,
    weights: Mapping[str, str | None],
    device: str = "auto",
) -> AttentionMaps:
    """See `msq.head.predict.Head.attention`; the best five of a run's own classes by default."""
    from msq.head.partitions import require_one_run
    from msq.head.predict import load_head

    require_one_run(run)
    given = {kind: name for kind, name in weights.items() if name is not None}
    head = load_head(run, device=resolve_device(device), weights=given)
    return head.attention(
        video,
        labels,
        start=start,
        end=end,
        top=TOP if top is None and labels is None else top,
        through_encoder=not head_only,
        fps=fps,
    )


def title(video: Path, run: Path, start: float | None, end: float | None) -> str:
    """`new.mp4, 2 s to the end: runs/a`."""
    if start is None and end is None:
        return f"{video.name}: {run}"
    last = "the end" if end is None else f"{end:g} s"
    return f"{video.name}, {start or 0:g} s to {last}: {run}"


def write(maps: AttentionMaps, out: Path, title: str) -> list[Path]:
    """Write the picture.

    Args:
        maps: of one clip.
        out: a file that ends in .png or .html, or a folder, which takes both and the arrays.
        title: over the picture.

    Returns:
        What was written.
    """
    rows = rows_of(maps)
    made = {".png": lambda: _png(_sheet(rows, maps, title)),
            ".html": lambda: _page(rows, maps, title).encode(),
            ".npz": lambda: _arrays(maps)}  # fmt: skip
    if out.suffix.lower() in _SUFFIXES and not out.is_dir():
        wanted = {out: ".png" if out.suffix.lower() == ".png" else ".html"}
    else:
        wanted = {out / f"{maps.clip}{suffix}": suffix for suffix in made}
    for path, suffix in wanted.items():
        write_file(path, [made[suffix]()])
    return list(wanted)


def document(maps: AttentionMaps, written: Sequence[Path]) -> dict[str, Any]:
    """What `--json` prints: scores, and shares by frame; the files have the rest."""
    of_frames = len(maps.video.frames) + 1  # more tokens are patches, and no list for people
    return {
        "clip": maps.clip,
        "predictions": [
            {
                "label": label,
                "score": float(maps.scores[k]),
                "frames": maps.heat[k].sum(axis=(1, 2)).tolist(),
                "elsewhere": float(maps.elsewhere[k]),
                "tokens": maps.tokens[k].tolist() if maps.tokens.shape[1] <= of_frames else None,
            }
            for k, label in enumerate(maps.labels)
        ],
        "patches": list(maps.heat.shape[2:]),
        "video": _look(maps.video),
        "image": None if maps.image is None else _look(maps.image),
        "remarks": list(maps.remarks),
        "unknown_words": list(maps.unknown_words),
        "written": [str(path) for path in written],
    }


def show(maps: AttentionMaps, written: Sequence[Path], *, json: bool = False) -> None:
    """The numbers on stdout; what could not be shown, and what was written, on stderr."""
    for line in maps.remarks:
        terminal.say(f"note: {maps.clip}: {line}")
    if maps.unknown_words:
        terminal.say(
            f"warning: the text encoder does not know {', '.join(maps.unknown_words)}; what is "
            "shown of labels with these words means nothing"
        )
    if json:
        terminal.print_json(document(maps, written))
        return
    rows = [row for row in rows_of(maps) if row.heat is not None]
    terminal.table(
        f"{maps.clip}: where most of each look lies",
        ("", "score", "frame with most", "its share, %", "brightest patch, times even"),
        [_summary(row) for row in rows],
    )
    for path in written:
        terminal.say(f"wrote {path}")
    if not written:
        terminal.say("--out FILE.html or FILE.png writes the pictures")


def _summary(row: Row) -> tuple[str, ...]:
    assert row.heat is not None
    best = int(row.shares.argmax())
    score = "–" if row.score is None else f"{row.score:.3f}"
    over = float(row.heat.max() / row.heat.mean())
    share = terminal.percent(float(row.shares[best]))
    return row.name, score, when(row.look.times[best]), share, f"{over:.2f}"


def _look(found: EncoderLook) -> dict[str, Any]:
    """An encoder's frames, and its shares of them where it was watched."""
    return {
        "times": found.times.tolist(),
        "size": list(found.frames.shape[1:3]),
        "box": list(found.box),
        "frames": None if found.heat is None else found.heat.sum(axis=(1, 2)).tolist(),
        "elsewhere": None if found.heat is None else found.elsewhere,
    }


def _sheet(rows: Sequence[Row], maps: AttentionMaps, title: str) -> Image.Image:
    return sheet(
        title,
        [(row.name, row.words, row_strip(row)) for row in rows],
        [*notes(rows), *maps.remarks],
    )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _page(rows: Sequence[Row], maps: AttentionMaps, title: str) -> str:
    """One HTML file with everything in it; no script."""
    frames, *looks = rows
    encoders = [row for row in looks if row.score is None]
    classes = [row for row in looks if row.score is not None]
    sections = [
        page.section("The video", _figure(frames)),
        *([page.section("What the encoders look at", *map(_figure, encoders))] if encoders else []),
        page.section("What each class's query looks at", *map(_figure, classes)),
        page.section("Share of each frame (%)", *_tables(looks)),
        page.remarks(maps.remarks),
    ]
    return page.page(title, " ".join(notes(rows)), sections)


def _figure(row: Row) -> str:
    buffer = io.BytesIO()
    row_strip(row).save(buffer, format="JPEG", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    caption = row.name if row.heat is None else f"{row.name}: {row.words}"
    return (
        f'<figure><img class="strip" alt="{html.escape(row.alt, quote=True)}" '
        f'src="data:image/jpeg;base64,{data}"><figcaption>{html.escape(caption)}</figcaption>'
        "</figure>"
    )


def _tables(rows: Sequence[Row]) -> list[str]:
    """A table for each list of frames: encoders may have seen other ones."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(when(t) for t in row.look.times), []).append(row)
    return [
        page.grid(
            ("", "score", *times, "elsewhere"),
            [
                (row.name, "" if row.score is None else f"{row.score:.3f}",
                 *(f"{100 * share:.1f}" for share in row.shares), f"{100 * row.elsewhere:.1f}")
                for row in some
            ],
            best=False,
        )
        for times, some in found.items()
    ]  # fmt: skip


def _arrays(maps: AttentionMaps) -> bytes:
    """All arrays of the maps, as `numpy.load` reads them without pickle."""
    arrays: dict[str, Any] = {
        "labels": np.array(maps.labels),
        "scores": maps.scores,
        "tokens": maps.tokens,
        "heat": maps.heat,
        "elsewhere": maps.elsewhere,
    }
    for name, found in (("video", maps.video), ("image", maps.image)):
        if found is not None:
            arrays |= {f"{name}_times": found.times, f"{name}_box": np.array(found.box)}
            if found.heat is not None:
                arrays[f"{name}_heat"] = found.heat
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()
