"""What the embedded encoders are worth: on direct renders, and on encoded videos.

The gap between the two is what H.264, other sizes and the resizing cost. Scores come from a
linear probe (ridge regression on averaged tokens) trained on a world of its own.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pools import PAIRS, average_precision
from torch import Tensor
from video_stage import HELD_OUT

from msq.extract.encoders import load_clip, load_video_encoder
from msq.extract.sampling import sample_indices
from msq.extract.transforms import normalise, resize_crop
from msq.extract.video import decode_clip
from msq.world import CLASSES, KINDS, generate_world, plan_world, render
from msq.world.render import frame_times

SEED, TRAIN, TEST = 900_001, 900, 450


def _features(batch: list[Any], encoder: Any, image: Any) -> tuple[Tensor, Tensor]:
    """uint8 clips [T, h, w, 3] to tokens [B, S, D'] and frame-averaged image features."""

    def prepare(spec: Any) -> Tensor:
        clips = [resize_crop(frames, spec.size) for frames in batch]
        return normalise(torch.stack(clips), spec.mean, spec.std)

    with torch.inference_mode():
        return encoder(prepare(encoder.spec)), image(prepare(image.spec)).mean(1)


def ridge(x: Tensor, y: Tensor, test: Tensor, strength: float = 30.0) -> np.ndarray:
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, test = (x - mean) / std, (test - mean) / std
    gram = x.T @ x + strength * torch.eye(x.shape[1])
    weights = torch.linalg.solve(gram, x.T @ (y - y.mean(0)))
    return (test @ weights).numpy()


def _scores(x: Tensor, labels: np.ndarray, kinds: np.ndarray, cut: int) -> dict[str, float]:
    y = torch.from_numpy(labels)
    ap = average_precision(ridge(x[:cut], y[:cut], x[cut:]), labels[cut:])
    looks = np.array([row.told_by == "looks" for row in CLASSES])
    held = np.array([row.action in HELD_OUT for row in CLASSES])
    guess = ridge(x[:cut], torch.from_numpy(kinds[:cut]), x[cut:])
    alone = kinds[cut:].sum(1) == 1
    right = guess[alone].argmax(1) == kinds[cut:][alone].argmax(1)
    out = {
        "map": np.nanmean(ap), "looks": np.nanmean(ap[looks]), "motion": np.nanmean(ap[~looks]),
        "held_out": np.nanmean(ap[held]), "kinds": right.mean(),
    }  # fmt: skip
    return {key: round(float(value), 4) for key, value in out.items()}


def measure(out: Path, scratch: Path) -> dict[str, Any]:
    """Linear-probe mAP on videos and on direct renders of the same scenes, and zero-shot mAP."""
    world = generate_world(scratch / "probe-world", train=TRAIN, test=TEST, seed=SEED)
    films = plan_world(train=TRAIN, test=TEST, seed=SEED)
    encoder = load_video_encoder(weights=f"local-dir:{out / 'timesformer-embedded'}")
    image, text = load_clip(f"local-dir:{out / 'clip-embedded'}", frames=8)
    labels = np.zeros((len(films), len(PAIRS)), np.float32)
    kinds = np.zeros((len(films), len(KINDS)), np.float32)
    for i, film in enumerate(films):
        labels[i, [PAIRS.index(p) for p in film.scene.pairs]] = 1
        kinds[i, [KINDS.index(k) for k in film.scene.kinds]] = 1
    result: dict[str, Any] = {"train": TRAIN, "test": TEST, "seed": SEED}
    for source in ("videos", "renders"):
        began, tokens, frames = time.monotonic(), [], []
        for i in range(0, len(films), 32):
            batch = []
            for film in films[i : i + 32]:
                if source == "videos":
                    batch.append(decode_clip(world.root / film.path, 8).frames)
                else:
                    times = frame_times(sample_indices(film.length, 8), film.length)
                    batch.append(render(film.scene, times, 96, 96))
            a, b = _features(batch, encoder, image)
            tokens.append(a)
            frames.append(b)
        t, f = torch.cat(tokens), torch.cat(frames)
        pooled = torch.cat([t[:, 0], t[:, 1:].mean(1)], 1)
        both = torch.cat([pooled, torch.nn.functional.normalize(f, dim=-1) * 8], 1)
        result[source] = {
            "timesformer": _scores(pooled, labels, kinds, TRAIN),
            "clip_image": _scores(f, labels, kinds, TRAIN),
            "both": _scores(both, labels, kinds, TRAIN),
            "clip_zero_shot": _zero_shot(f[TRAIN:], text, labels[TRAIN:]),
            "seconds": round(time.monotonic() - began, 1),
        }
    chance = labels[TRAIN:].mean(0)
    result["chance"] = round(float(chance[chance > 0].mean()), 4)
    return result


def _zero_shot(image: Tensor, text: Any, labels: np.ndarray) -> dict[str, float]:
    queries = torch.nn.functional.normalize(text(list(PAIRS), prompt="a video of a {}"), dim=-1)
    scores = torch.nn.functional.normalize(image, dim=-1) @ queries.T
    ap = average_precision(scores.numpy(), labels)
    looks = np.array([row.told_by == "looks" for row in CLASSES])
    return {
        "looks": round(float(np.nanmean(ap[looks])), 4),
        "motion": round(float(np.nanmean(ap[~looks])), 4),
    }
