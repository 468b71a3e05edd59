"""With the encoder frozen: do training on the cache and end to end follow the same curve?

    python benchmarks/cached_and_end_to_end.py --work end-to-end-demo --write
    python benchmarks/cached_and_end_to_end.py --work small --small

The demo world, its embedded encoders, no augmentation, dropout as usual, one seed. `--work` is that
of `end_to_end_demo.py`; a second store in float32 is made beside the first. Stage one encodes 8
clips at a time and a step as many as its batch has: that, and the rounding of a float16 store, is
all that the curves can differ by.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
from timing import machine

from msq.extract.store import open_store
from msq.extract.train_request import TrainRequest
from msq.head.end_to_end_clips import RunClips
from msq.head.end_to_end_config import EndToEndConfig, end_to_end_settings
from msq.head.end_to_end_training import EndToEndTraining
from msq.head.features import load_features
from msq.head.packed_choice import choose_step
from msq.head.train_material import load_material
from msq.head.training import Training
from msq.report.page import curves

RESULT = Path(__file__).parent / "results" / "cached_and_end_to_end_cpu_2026-11.md"
SETTINGS = ("head.width=128", "head.layers=2", "head.heads=4", "head.ffn=512", "optim.lr=2e-3",
            "head.classifier=text", "train.batch=32", "backbone.unfreeze=none",
            "clips.augment=none", "train.precision=fp32")  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}


def msq(*words: object) -> None:
    command = [sys.executable, "-m", "msq", *map(str, words), "-q"]
    subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True)


def followed(work: Path, store: Path, config: EndToEndConfig, steps: int) -> dict[str, list[float]]:
    """Losses of the steps on the cache and end to end, and the difference of the first logits."""
    choice = choose_step(config.run.train, torch.device("cpu"))
    cached = Training(load_features(open_store(store)), config.run, choice)
    request = TrainRequest(what=str(work / "world" / "manifest.csv"), store=store,
                           classes=work / "world" / "classes.txt", device="cpu")  # fmt: skip
    material = load_material(request, config, work / "unused")
    clips = RunClips(material, config, None)
    try:
        whole = EndToEndTraining(material, config, choice, clips)
        batch, part = cached.feed.of(0), next(whole.feed.of(0))
        assert batch.rows.tolist() == part.rows.tolist()
        with torch.no_grad():
            first = whole._logits(whole.backbone.tokens(part.frames), part.image)
            first = (first - cached._logits(batch.tokens, batch.image)).abs().max()
        found: dict[str, list[float]] = {"cached": [], "end to end": [], "first": [float(first)]}
        for _ in range(steps):
            for name, training in (("cached", cached), ("end to end", whole)):
                training._step()
                found[name].append(float(training.taking.loss))
        return found
    finally:
        clips.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("end-to-end-demo"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--small", action="store_true", help="a few clips and steps")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name} and its plot")
    given = parser.parse_args()
    work, steps = given.work, 20 if given.small else given.steps
    work.mkdir(parents=True, exist_ok=True)
    world, train, test = work / "world", *((48, 24) if given.small else (640, 240))
    if not (world / "manifest.csv").exists():
        msq("world", world, "--train", train, "--test", test, "--seed", 0)
    config = end_to_end_settings(None, SETTINGS)
    series, rows = {}, []
    for name, dtype in (("world", "float16"), ("world32", "float32")):
        store = work / f"{name}.zarr"
        msq("extract", "--manifest", world / "manifest.csv", "--classes", world / "classes.txt",
            "--out", store, "--store-dtype", dtype)  # fmt: skip
        found = followed(work, store, config, steps)
        pairs = list(zip(found["cached"], found["end to end"], strict=True))
        apart = [abs(a - b) / a for a, b in pairs]
        rows.append(f"| {dtype} | {found['first'][0]:.1e} | {max(apart[:20]):.1e} | "
                    f"{max(apart):.1e} | {pairs[-1][0]:.5f} | {pairs[-1][1]:.5f} |")  # fmt: skip
        series[f"{dtype}, cached"] = found["cached"]
    series["end to end"] = found["end to end"]
    text = "\n".join([
        "# The cached head and the end-to-end run with a frozen encoder, November 2026",
        "",
        f"- Command: `python {' '.join(sys.argv)}`",
        f"- Hardware: {machine('cpu')}",
        f"- Demo world, {train} training clips, batch 32, {steps} steps, dropout 0.1, one seed.",
        "",
        "| store | step 1, largest difference of a logit | first 20 losses, relative | all losses, "
        "relative | last loss, cached | end to end |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"![losses]({RESULT.with_suffix('.svg').name})",
        "",
    ])  # fmt: skip
    print(text)
    if given.write:
        RESULT.write_text(text, encoding="utf-8")
        plot = curves(series, x="step", y="training loss")
        plot = plot.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        RESULT.with_suffix(".svg").write_text(plot + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
