"""The demo's tables for the terminal, and its page of pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msq.report import page, terminal
from msq.report.terminal import percent
from msq.whole_file import write_text

if TYPE_CHECKING:
    from msq.world import World

STRIP_FRAMES = 8
TOP = 8
NAMES = {
    "frequency": "class frequency (ignores the video)",
    "clip_similarity": "CLIP similarity (no training)",
    "linear_probe": "linear probe on averaged features",
    "vanilla": "MSQNet head, vanilla queries",
    "text": "MSQNet head, text queries",
    "multimodal": "MSQNet head, multi-modal queries",
}
TRAIN_HEADER = ("", "mAP", "micro AP", "official micro AP per batch", "top-1")
ZERO_HEADER = ("", "unseen", "told by looks", "told by motion", "chance", "seen")


def train_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Baselines and heads, all metrics in percent."""
    return [
        (NAMES[name], *(percent(m.get(k)) for k in ("map", "map_micro", "map_official", "top1")))
        for name, m in {**result["baselines"], **result["train"]}.items()
    ]


def zero_shot_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Unseen classes apart by what tells them, chance, and seen classes, in percent."""
    keys = ("unseen_map", "unseen_map_looks", "unseen_map_motion", "chance_map", "seen_map")
    chance = next(iter(result["zero_shot"].values()))["chance_map"]
    clip = {**result["baselines"]["clip_similarity"], "chance_map": chance}
    return [
        (NAMES[name], *(percent(scores.get(key)) for key in keys))
        for name, scores in {"clip_similarity": clip, **result["zero_shot"]}.items()
    ]


def print_tables(result: Mapping[str, Any]) -> None:
    """Both tables and the two predictions on stdout."""
    terminal.table(f"all {result['classes']} classes trained (%)", TRAIN_HEADER, train_rows(result))
    unseen = len(next(iter(result["zero_shot"].values()))["unseen_classes"])
    terminal.table(
        f"zero-shot: {unseen} classes never trained (mAP %)", ZERO_HEADER, zero_shot_rows(result)
    )
    for item in result["predictions"]:
        rows = [
            (p["label"], percent(p["score"]), "yes" if p["label"] in item["truth"] else "")
            for p in item["predictions"][:5]
        ]
        terminal.table(item["clip"], ("label", "%", "true"), rows)
    print(f"page: {result['artifacts']['report']}")


def build(
    result: Mapping[str, Any], world: World, runs: Mapping[str, Mapping[str, Any]], out: Path
) -> Path:
    """Write `report.html`, one file with everything in it.

    Args:
        result: as `Demo.run` returns it.
        world: with manifest and classes.
        runs: mode -> contents of `result.json`.
        out: folder of the demo.
    """
    first = next(iter(result["zero_shot"].values()))
    sections = [
        page.section(
            "The world",
            *_gallery(world),
            note="One video of each kind of actor; labels are actor-action pairs.",
        ),
        page.section(
            "All classes trained",
            page.grid(TRAIN_HEADER, train_rows(result)),
            note="mAP is the mean over classes of average precision over the whole test set (%). "
            "The other columns are what else is called mAP; they are not comparable with it.",
        ),
        page.section(
            "Zero-shot: classes never trained",
            page.grid(ZERO_HEADER, zero_shot_rows(result)),
            note=f"{len(first['unseen_classes'])} pairs were held out, their words were not "
            "(mAP over unseen classes, %): " + ", ".join(first["unseen_classes"]) + ".",
        ),
        page.section(
            "Two videos that no training has seen",
            *(_prediction(item) for item in result["predictions"]),
            note="Multi-modal queries; true labels in the second colour.",
        ),
        page.section(
            "Validation mAP while training",
            page.curves(
                {mode: _validation(Path(str(run["run"]))) for mode, run in runs.items()},
                x="epoch",
                y="mAP",
            ),
        ),
        page.section(
            "Average precision of each class, multi-modal queries",
            page.bars(_classes(runs["multimodal"]["per_class"], world)),
            note="Second colour: told by motion, which no single frame shows.",
        ),
    ]
    lead = (
        f"{result['videos']} generated videos, {result['classes']} classes, embedded encoders "
        f"trained on the same kind of world with other seeds. World seed {result['seed']}."
    )
    path = out / "report.html"
    write_text(path, page.page("msq demo", lead, sections))
    return path


def _gallery(world: World) -> list[str]:
    """A strip for each kind: its first test video with one actor."""
    from msq.extract.datasets import read_manifest
    from msq.extract.video import decode_clip

    data = read_manifest(world.manifest, classes=world.classes_file)
    strips: dict[str, str] = {}
    for clip in data.clips:
        labels = [data.classes[k] for k in clip.labels]
        kinds = {label.split(" ")[0] for label in labels}
        if clip.split == "test" and len(kinds) == 1 and not kinds & strips.keys():
            frames = decode_clip(clip.path, STRIP_FRAMES).frames
            strips[kinds.pop()] = page.strip(frames, ", ".join(labels))
    return [strips[kind] for kind in sorted(strips)]


def _prediction(item: Mapping[str, Any]) -> str:
    from msq.extract.video import decode_clip

    frames = decode_clip(Path(item["path"]), STRIP_FRAMES).frames
    truth = set(item["truth"])
    rows = [(p["label"], p["score"], p["label"] in truth) for p in item["predictions"][:TOP]]
    return page.strip(frames, "truth: " + ", ".join(item["truth"])) + page.bars(rows)


def _validation(run: Path) -> list[float]:
    """Validation mAP of each epoch, from `metrics.jsonl`."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    values = [json.loads(line).get("val_map") for line in lines]
    return [v for v in values if v is not None and math.isfinite(v)]


def _classes(per_class: Mapping[str, float], world: World) -> list[tuple[str, float, bool]]:
    known = [(name, ap) for name, ap in per_class.items() if ap is not None and ap == ap]
    known.sort(key=lambda row: -row[1])
    return [(name, ap, world.told_by[name] == "motion") for name, ap in known]
