"""Train the two encoders that come with the package, on the world's generator.

    python training/train_embedded.py --out msq/weights --seed 0

Stages: `image` and `video` make the TimeSformer (single frames first, then clips from those
spatial weights, with attention over time at zero), `clip` the image-text pair, `probe` measures
what the result is worth on encoded videos. Any of them can be run alone; `video` needs the
checkpoint that `image` left in the scratch folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the embedded encoders.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default="image,clip,video,probe")
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()) / "msq-training"
    )
    parser.add_argument("--clips", type=int, default=15_000, help="clips in the pool")
    parser.add_argument("--scenes", type=int, default=15_000, help="scenes in the frame pool")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--image-minutes", type=float, default=10.0)
    parser.add_argument("--video-minutes", type=float, default=30.0)
    parser.add_argument("--clip-minutes", type=float, default=12.0)
    parser.add_argument(
        "--warm", action="store_true", help="stage image: go on from the scratch folder's weights"
    )
    parser.add_argument(
        "--warm-video", action="store_true", help="stage video: go on from the exported weights"
    )
    return parser.parse_args()


def logger(path: Path) -> Any:
    """A function that prints a line of JSON and adds it to the curves."""

    def log(entry: dict[str, Any]) -> None:
        line = json.dumps(entry)
        print(line, flush=True)
        with path.open("a") as file:
            file.write(line + "\n")

    return log


def main() -> None:
    args = arguments()
    # Passive waiting: two busy-waiting threads on two shared cores cost more than they give.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    torch.set_num_threads(args.threads)
    from pools import SCRATCH_FRAMES, make_pool

    stages = args.stages.split(",")
    args.scratch.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    log = logger(args.scratch / "curves.jsonl")
    log(
        {
            "stage": "start", "stages": stages, "seed": args.seed, "torch": torch.__version__,
            "python": platform.python_version(), "threads": args.threads,
        }
    )  # fmt: skip

    def pool(name: str) -> Any:
        clips, frames, size = SCRATCH_FRAMES[name]
        clips = {"clips": args.clips, "frames": args.scenes}.get(name, clips)
        began = time.monotonic()
        made = make_pool(
            args.scratch, name, clips=clips, frames=frames, size=size, seed=args.seed,
            workers=args.threads,
        )  # fmt: skip
        seconds = round(time.monotonic() - began, 1)
        log({"stage": "pool", "name": name, "clips": clips, "seconds": seconds})
        return made

    if "image" in stages or "video" in stages:
        _video(args, stages, pool, log)
    if "clip" in stages:
        import text_stage

        text_stage.train(
            pool("frames"), pool("validation-frames"), args.out, minutes=args.clip_minutes,
            batch=128, rate=1e-3, seed=args.seed, log=log,
        )  # fmt: skip
    if "probe" in stages:
        import probe

        log({"stage": "probe", **probe.measure(args.out, args.scratch)})
    shutil.copyfile(args.scratch / "curves.jsonl", args.out / "curves.jsonl")


def _video(args: argparse.Namespace, stages: list[str], pool: Any, log: Any) -> None:
    import video_stage

    clips, validation = pool("clips"), pool("validation")
    checkpoint = args.scratch / "image.pt"
    if "image" in stages:
        still = video_stage.build(1)
        if args.warm:
            still.load_state_dict(torch.load(checkpoint, weights_only=True))
        video_stage.train(
            still, clips, validation, minutes=args.image_minutes, batch=128, rate=1e-3,
            seed=args.seed, log=log, stage="image",
            save=lambda model, heads: torch.save(model.state_dict(), checkpoint),
        )  # fmt: skip
    if "video" in stages:
        model = video_stage.build(8)
        spatial = torch.load(checkpoint, weights_only=True)
        spatial.pop("time_embed")
        missing, unexpected = model.load_state_dict(spatial, strict=False)
        assert not unexpected
        assert all(name == "time_embed" or ".temporal_" in name for name in missing)
        with torch.no_grad():
            if args.warm_video:
                exported = load_file(args.out / "timesformer-embedded" / "model.safetensors")
                model.load_state_dict({k: v.float() for k, v in exported.items()})
            model.time_embed += video_stage.time_code(8, model.config.width)
        video_stage.train(
            model, clips, validation, minutes=args.video_minutes, batch=48, rate=1e-3,
            seed=args.seed, log=log, stage="video",
            save=lambda model, heads: video_stage.export(model, args.out),
        )  # fmt: skip


if __name__ == "__main__":
    main()
