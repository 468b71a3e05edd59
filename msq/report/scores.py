"""Metrics as a person sees them: the table of a run, of its partitions, of a submission."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msq.report import terminal

METRICS = (
    ("map", "mAP (macro, whole set)"),
    ("map_chance", "  the same for a random order"),
    ("map_micro", "micro AP (whole set)"),
    ("map_official", "micro AP per batch of 32 (official)"),
    ("map_charades", "mAP of the Charades scorer"),
    ("top1", "top-1"),
    ("top5", "top-5"),
    ("accuracy", "element-wise accuracy at 0.5"),
    ("accuracy_all_negative", "  the same for 'nothing happens'"),
    ("f1_macro", "F1 at 0.5 (macro)"),
    ("f1_micro", "F1 at 0.5 (micro)"),
)
SHOWN = 5
OFFICIAL = 1863  # test videos of Charades; `msq.head.export` checks submissions against it


def scope(result: Mapping[str, Any]) -> str:
    """What was scored, in words: dataset and its variant, partition, split, views."""
    dataset = str(result.get("dataset") or "")
    variant = f" ({result['variant']})" if result.get("variant") else ""
    parts = [f"{dataset}{variant}"] if dataset else []
    if result.get("partition"):
        names = ", ".join(result.get("partitions", ()))
        parts.append(f"partitions {names}" if names else f"partition {result['partition']}")
    parts.append(f"{result['split']} split")
    if result.get("views"):
        parts.append(f"views {result['views']}")
    return ", ".join(parts)


def metric_rows(
    result: Mapping[str, Any],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table; with partitions the mean, its spread, and a column for each."""
    metrics, spread = result["metrics"], result.get("spread", {})
    partitions: Mapping[str, Mapping[str, Any]] = result.get("partitions", {})
    rows = []
    for key, title in (*METRICS[:2], *_groups(metrics), *METRICS[2:]):
        of_charades = str(result.get("dataset", "")).startswith("charades")
        if key in metrics and (key != "map_charades" or of_charades):
            mean = terminal.spread(metrics[key], spread.get(key))
            rows.append((title, mean, *(terminal.percent(p.get(key)) for p in partitions.values())))
    return ("metric", "mean %" if partitions else "%", *partitions), rows


def counts(metrics: Mapping[str, Any]) -> str:
    """What the means are over, in words."""
    words = f"{metrics['classes_scored']:g} classes scored"
    if metrics.get("pairs_unknown"):
        words += f", {metrics['pairs_unknown']:g} pairs of clip and class unknown and left out"
    return words


def _groups(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows for the groups of classes that were scored on their own."""
    prefix = "classes_scored_"
    names = [key.removeprefix(prefix) for key in metrics if key.startswith(prefix)]
    return [
        (f"map_{name}", f"  of {name} classes ({metrics[prefix + name]:g} scored)")
        for name in names
    ]


def say_exports(result: Mapping[str, Any]) -> None:
    """Which files were written, and which clips have no line in them."""
    exports = result.get("exports") or {"": result.get("export")}
    for written in exports.values():
        if written is None:
            continue
        lost = written["without_line"]
        terminal.say(f"{written['file']}: {written['clips']} lines")
        if lost:
            shown = ", ".join(lost[:SHOWN]) + (", …" if len(lost) > SHOWN else "")
            terminal.say(
                f"warning: {len(lost)} clips of the {result['split']} split have no features and "
                f"get no line; the official scorer ranks them last: {shown}"
            )
        listed = written["clips"] + len(lost)
        if (result.get("dataset"), result["split"]) == ("charades", "test") and listed != OFFICIAL:
            terminal.say(
                f"warning: the official test list has {OFFICIAL} videos, the store {listed}: it "
                "was made without the others (--option unlabelled=skip, --limit)"
            )
