"""The paper's zero-shot sweep at true size: measured steps on true label files, the rest computed.

    python benchmarks/sweep_scale.py --annotations ../shared/annotations [--steps 20] [--write]

Charades (157 classes, 9,848 videos) and HMDB51 (split 1) with their true labels and random features
of the true size (17 tokens of 768, image and text of 512), multi-modal queries, one class split of
each share (50 and 75 % seen). Measured: seconds per step and the peak of memory. Computed from them
and labelled so: 180 runs (3 kinds of query, 2 shares, 10 splits, 3 datasets) of 100 epochs of 32
clips a step, with every kind of query at the price of the dearest, and THUMOS14 from the measured
speed and the number of products in its steps. Beside it the authors' procedure, backbone and CLIP
in every step: its FLOPs, at the speed that the measured steps reached.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path

import torch
from timing import machine

from msq import config as configuration
from msq.config import RunConfig
from msq.extract.datasets.charades import read_charades
from msq.extract.datasets.hmdb51 import read_hmdb51
from msq.head.class_splits import class_split
from msq.head.features import Features
from msq.head.flops import step_flops
from msq.head.split_scores import seen_features
from msq.head.train import train_head

RESULT = Path(__file__).parent / "results" / "sweep_scale_cpu_2026-11.md"
EPOCHS, BATCH, RUNS = 100, 32, 180
AUTHORS_EFLOP = 131.6  # 180 runs of 100 epochs end to end; 2,935 GFLOP a clip at K = 157
THUMOS = {"clips": 2600, "classes": 20}  # UCF101 clips of its classes, about


def features_of(name: str, data: object) -> Features:
    """True labels and splits; random features."""
    clips, classes = data.clips, tuple(data.classes)  # type: ignore[attr-defined]
    labels = torch.zeros(len(clips), len(classes), dtype=torch.uint8)
    for row, clip in enumerate(clips):
        labels[row, list(clip.labels)] = 1
    g = torch.Generator().manual_seed(0)
    return Features(
        name=name, task=data.task, classes=classes,  # type: ignore[attr-defined]
        ids=tuple(clip.id for clip in clips), splits=tuple(clip.split for clip in clips),
        tokens=torch.randn(len(clips), 17, 768, generator=g, dtype=torch.float32).half(),
        labels=labels, image=torch.randn(len(clips), 512, generator=g),
        text=torch.randn(len(classes), 512, generator=g),
    )  # fmt: skip


def measured(features: Features, share: float, steps: int) -> dict[str, float]:
    """Seconds per step for one class split, without what the first step alone costs."""
    split = class_split(features.classes, share, 0)
    seen = seen_features(features, split)
    config = configuration.override(
        RunConfig(), ["head.classifier=text", f"train.batch={BATCH}", "train.val=0.1"]
    )
    warm = 2
    took = []
    for count in (warm, warm + steps):
        began = time.perf_counter()
        train_head(seen, config, None, stop_after=count)
        took.append(time.perf_counter() - began)
    step = (took[1] - took[0]) / steps
    classes = len(split.seen)
    flops = step_flops(BATCH, classes, seen.tokens.shape[1])
    return {"share": share, "classes": classes, "clips": len(seen.rows("train")), "step": step,
            "flops": flops, "rate": flops / step}  # fmt: skip


def forget_peak() -> None:
    """Let the peak of memory begin anew: each dataset has its own (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_gib() -> float:
    """The most memory that this process held since `forget_peak`, torch itself included."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(peak) / 2**20


def extrapolated(lines: list[dict[str, float]]) -> float:
    """Hours of 180 runs, 30 for each dataset and share."""
    rate = sum(line["flops"] for line in lines) / sum(line["step"] for line in lines)
    hours = 0.0
    for line in lines:
        hours += 30 * EPOCHS * (line["clips"] / BATCH) * line["step"] / 3600
    for share in (0.5, 0.75):
        flops = step_flops(BATCH, int(THUMOS["classes"] * share), 17)
        steps = EPOCHS * share * THUMOS["clips"] / BATCH
        hours += 30 * steps * flops / rate / 3600
    return hours


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    rows, lines = [], []
    for name, read, folder in (("charades", read_charades, "charades"),
                               ("hmdb51", read_hmdb51, "hmdb51")):  # fmt: skip
        forget_peak()
        began = time.perf_counter()
        features = features_of(name, read(given.annotations / folder))
        ready = time.perf_counter() - began
        for share in (0.5, 0.75):
            line = measured(features, share, given.steps)
            lines.append(line)
            rows.append(
                f"| {name}, {len(features.classes)} classes, {len(features.ids)} clips | "
                f"{100 * share:.0f} % | {line['classes']:.0f} | {line['clips']:.0f} | "
                f"{1000 * line['step']:.0f} | {line['rate'] / 1e9:.0f} | {ready:.1f} | "
                f"{peak_gib():.2f} |"
            )
            print(rows[-1], file=sys.stderr)
        del features
    hours = extrapolated(lines)
    rate = sum(line["flops"] for line in lines) / sum(line["step"] for line in lines)
    authors = AUTHORS_EFLOP * 1e18 / rate / 3600
    text = "\n".join([
        "# The paper's zero-shot sweep at true size, November 2026",
        "",
        f"- Command: `python {' '.join(sys.argv)}`",
        f"- Hardware: {machine('cpu')}",
        f"- Measured: {given.steps} steps of {BATCH} clips on true labels and random features.",
        "",
        "| dataset | seen | K | training clips | ms per step | GFLOP/s | loading s | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"**Extrapolated, not run:** {RUNS} runs of {EPOCHS} epochs (3 kinds of query x 2 shares x "
        "10 splits x 3 datasets, THUMOS14 by its number of products), on this machine:",
        "",
        "| | hours |",
        "|---|---|",
        f"| heads on stores, from the measured steps | {hours:,.0f} |",
        f"| the authors' procedure, {AUTHORS_EFLOP} EFLOP at the same FLOP/s | {authors:,.0f} |",
        "",
        f"Ratio {authors / hours:,.0f}. Stage one, once per dataset, is not in the first line.",
        "",
    ])  # fmt: skip
    print(text)
    if given.write:
        RESULT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
