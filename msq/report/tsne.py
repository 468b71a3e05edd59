"""`msq tsne`: clips before and after the decoder, as a picture, a page or a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msq.class_list import class_names
from msq.errors import UsageError
from msq.extract.devices import resolve_device
from msq.report import page, terminal
from msq.report.scatter import Group, Panel, scatter
from msq.whole_file import write_text

SUFFIXES = (".svg", ".html", ".csv", ".json")
SIDES = ("before", "after")
NOTES = (
    "t-SNE keeps who is near whom: distances between groups, their sizes and the axes mean "
    "nothing, and each panel has axes of its own.",
    "Agreement: how often the nearest clips, by the features themselves and not in the picture, "
    "share a label with a clip; chance: how often any clips do.",
)


def of_run(
    run: Path,
    store: Path,
    out: Path | None,
    *,
    classes: str | None = None,
    device: str = "auto",
    json: bool = False,
    quiet: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """What `tsne_of_run` gives, written to a file as its name ends.

    Args:
        run: a finished run directory.
        store: a feature store.
        out: the file; None with `json` alone.
        classes: names, as a line of CSV.
        device: where the head computes.
        json: whether the document is shown.
        quiet: say nothing on what comes next.
        options: of `tsne_of_run`.

    Raises:
        UsageError: a file of another kind, or none and no `json`; as `tsne_of_run`.
    """
    from msq.extract.store import open_store
    from msq.head.tsne_of_run import tsne_of_run

    if out is None and not json:
        raise UsageError("expected --out FILE or --json, found neither")
    if out is not None and out.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--out {out}: expected a file that ends in {', '.join(SUFFIXES)}")
    found = tsne_of_run(
        run,
        open_store(store),
        classes=class_names(classes, "--classes"),
        device=resolve_device(device),
        progress=None if quiet else terminal.say,
        **options,
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, _text(found, out.suffix.lower()))
    return found


def show(found: Mapping[str, Any], out: Path | None, *, json: bool = False) -> None:
    """The numbers beside the picture, and where it is."""
    for reason, count in found["left_out"].items():
        if count:
            terminal.say(f"not shown: {count} clips {reason}")
    if found["split"] == "train":
        terminal.say("note: the head was trained on these clips; --split test says what it learned")
    if json:
        terminal.print_json(dict(found))
    else:
        terminal.table(_title(found), *_numbers(found))
    if out is not None:
        terminal.say(str(out))


def _title(found: Mapping[str, Any]) -> str:
    return f"{found['run']}: {found['clips']} of {found['clips_of']} clips of {_place(found)}"


def _place(found: Mapping[str, Any]) -> str:
    part = f" ({found['partition']})" if found["partition"] else ""
    return f"{found['dataset']}, {found['split']}{part}"


def _numbers(found: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table of both sides."""
    k = found["before"]["neighbours"]
    header = ("", f"agreement of {k} neighbours (%)", "chance (%)", "values", "KL left")
    rows: list[tuple[str, ...]] = [
        (
            f"{side} the decoder",
            terminal.percent(found[side]["agreement"]),
            terminal.percent(found[side]["chance"]),
            str(found[side]["dimensions"]),
            f"{found[side]['divergence']:.3f}",
        )
        for side in SIDES
    ]
    return header, rows


def _text(found: Mapping[str, Any], suffix: str) -> str:
    if suffix == ".json":
        return terminal.json_text(dict(found))
    if suffix == ".csv":
        return table(found)
    picture = svg(found)
    return picture if suffix == ".svg" else document(found, picture)


def table(found: Mapping[str, Any]) -> str:
    """A line of CSV for each clip, in the order of the store."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["clip", "labels", "class", "before_x", "before_y", "after_x", "after_y"])
    for point in found["points"]:
        labels = ";".join(point["labels"])
        places = [repr(x) for side in SIDES for x in point[side]]
        writer.writerow([point["clip"], labels, point["class"] or "", *places])
    return buffer.getvalue()


def svg(found: Mapping[str, Any]) -> str:
    """Both sides in one picture, a point for each clip in each of them."""
    points = found["points"]
    panels = [
        Panel(
            title=f"{side.capitalize()} the decoder",
            lines=(f"{found[side]['what']}, {found[side]['dimensions']} values",
                   _agreement(found[side])),
            points=[point[side] for point in points],
        )
        for side in SIDES
    ]  # fmt: skip
    names = [f"{p['clip']}: {'; '.join(p['labels']) or 'no label'}" for p in points]
    return scatter(_title(found), panels, _groups(found), names, NOTES)


def _agreement(side: Mapping[str, Any]) -> str:
    if side["agreement"] is None:
        return "agreement: fewer than two clips have a label"
    return (
        f"agreement of the {side['neighbours']} nearest: {terminal.percent(side['agreement'])} %, "
        f"chance {terminal.percent(side['chance'])} %"
    )


def _groups(found: Mapping[str, Any]) -> list[Group]:
    """The classes shown apart, then the other labelled clips, then those without a label."""
    points: Sequence[Mapping[str, Any]] = found["points"]
    groups = [
        Group(
            name=one["class"],
            number=number,
            places=[k for k, point in enumerate(points) if point["class"] == one["class"]],
        )
        for number, one in enumerate(found["classes"])
    ]
    rest = [k for k, point in enumerate(points) if point["class"] is None]
    other = [k for k in rest if points[k]["labels"]]
    bare = [k for k in rest if not points[k]["labels"]]
    if other:
        groups.append(Group(name="other classes", number=None, places=other, hollow=True))
    if bare:
        groups.append(Group(name="no label", number=None, places=bare))
    return groups


def document(found: Mapping[str, Any], picture: str) -> str:
    """A page with the picture, its numbers and how it was made; nothing is loaded from anywhere."""
    keys = ("run", "protocol", "dataset", "split", "partition", "views", "clips", "clips_of",
            "coverage", "seed", "weights")  # fmt: skip
    facts = [(key, "–" if found[key] is None else str(found[key])) for key in keys]
    facts += [(f"left out {reason}", str(n)) for reason, n in found["left_out"].items()]
    facts += [
        (f"{side}.{key}", str(found[side][key]))
        for side in SIDES
        for key in ("what", "distinct", "perplexity", "divergence")
    ]
    header, rows = _numbers(found)
    return page.page(
        f"{found['run']}: clips before and after the decoder",
        "Each clip is a point; a clip of several classes has the colour of the rarest that is "
        "shown apart. A pointer that rests on a point names its clip and its labels.",
        [
            page.section(_place(found), f'<div class="scroll">{picture}</div>'),
            page.section("Numbers", page.grid(header, rows, best=False), page.remarks(NOTES)),
            page.section("How it was made", page.facts(facts)),
        ],
    )
