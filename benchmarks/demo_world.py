"""The demo world over seeds: query modes on seen and unseen classes, beside chance and a probe.

    python benchmarks/demo_world.py --world demo --seeds 3 --write

`--world` is the folder of a finished `msq demo`: its store and manifest are used. Seeds change the
start, the order and dropout of the training, the validation tenth, and the class split.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch

from msq.demo import MODES, UNSEEN_SHARE, clip_unseen, demo_config, mean_told_by
from msq.extract.store import open_store
from msq.head.baselines import class_frequency, linear_probe
from msq.head.features import load_features
from msq.head.metrics import chance_map, mean_average_precision
from msq.head.train import train_head
from msq.head.zeroshot import ClassSplit, class_split, evaluate_split, seen_features
from msq.world import compositional_split


def cell(values: list[float]) -> str:
    """Mean ± sample standard deviation in percent."""
    std = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{std}"


def seen_classes(features, seeds):
    """Macro mAP with all classes trained: (name, values over seeds)."""
    rows = features.rows("test")
    labels = features.labels[rows]
    yield "chance (a random order)", [chance_map(labels)]
    yield (
        "class frequency",
        [float(mean_average_precision(class_frequency(features, rows), labels))],
    )
    probes = [linear_probe(features, rows, seed=seed)[0] for seed in seeds]
    yield "linear probe", [float(mean_average_precision(p, labels)) for p in probes]
    for mode in MODES:
        runs = [train_head(features, demo_config(mode, s, zero_shot=False)) for s in seeds]
        yield f"head, {mode} queries", [run.metrics["map"] for run in runs]


def unseen_classes(features, seeds, told_by, draw):
    """Rows (name, unseen, looks, motion, seen) of values over seeds; a class split each."""
    splits = [draw(seed) for seed in seeds]
    rows = features.rows("test")
    table = {}
    for split, seed in zip(splits, seeds, strict=True):
        columns = [features.classes.index(name) for name in split.unseen]
        labels = features.labels[rows][:, columns]
        keep = (labels != 0).any(1)
        scored = {
            "chance": {"unseen": chance_map(labels[keep])},
            "CLIP similarity": {"per_class": clip_unseen(features, split.unseen)},
        }
        for mode in MODES:
            run = train_head(
                seen_features(features, split), demo_config(mode, seed, zero_shot=True)
            )
            scored[f"head, {mode} queries"] = evaluate_split(run.model, features, split)
        for name, result in scored.items():
            aps = result.get("per_class", {})
            values = [x for x in aps.values() if x == x]
            line = table.setdefault(name, {"unseen": [], "looks": [], "motion": [], "seen": []})
            line["unseen"].append(result.get("unseen", statistics.fmean(values or [0])))
            for kind in ("looks", "motion"):
                mean = mean_told_by(aps, told_by, kind)
                if mean is not None:
                    line[kind].append(mean)
            if "seen" in result:
                line["seen"].append(result["seen"])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=Path, default=Path("demo"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write the result file")
    options = parser.parse_args()
    began = time.perf_counter()
    seeds = list(range(options.seeds))
    features = load_features(open_store(options.world / "world.zarr"))
    told_by = json.loads((options.world / "world" / "world.json").read_text())["told_by"]

    def with_words(seed):
        seen, unseen = compositional_split(features.classes, UNSEEN_SHARE, seed)
        return ClassSplit(tuple(seen), tuple(unseen), seed)

    def at_random(seed):
        return class_split(features.classes, 1 - UNSEEN_SHARE, seed)

    lines = [
        "# The demo world over seeds, CPU",
        "",
        f"{options.seeds} seeds; macro mAP in percent, mean ± sample standard deviation. "
        f"{features.coverage()}; {len(features.rows('test'))} test clips, "
        f"{len(features.classes)} classes. torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}, commit {commit()}.",
        "",
        "## All classes trained",
        "",
        "| | mAP |",
        "|---|---|",
    ]
    lines += [f"| {name} | {cell(values)} |" for name, values in seen_classes(features, seeds)]
    for title, draw in (
        ("Unseen pairs whose words were seen apart", with_words),
        ("Unseen pairs drawn at random", at_random),
    ):
        lines += ["", f"## {title}", "", "| | unseen | by looks | by motion | seen |"]
        lines += ["|---|---|---|---|---|"]
        for name, values in unseen_classes(features, seeds, told_by, draw).items():
            cells = " | ".join(cell(v) if v else "–" for v in values.values())
            lines.append(f"| {name} | {cells} |")
    lines += ["", f"{time.perf_counter() - began:.0f} s in all."]
    print("\n".join(lines))
    if options.write:
        target = Path(__file__).parent / "results" / "demo_world_cpu_2026-11.md"
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
