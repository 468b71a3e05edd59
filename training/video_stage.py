"""Stages `image` and `video`: the tiny TimeSformer, first on single frames, then on clips."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pools import PAIRS, Pool, average_precision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from msq.extract.encoders.timesformer import Attention, TimeSformer
from msq.extract.encoders.timesformer_config import TimeSformerConfig
from msq.extract.encoders.timesformer_stems import ConvStem
from msq.world import ACTION_TOLD_BY, ACTIONS, CLASSES, KINDS

REPORT = 150.0  # seconds between evaluations, each of which also saves
MEAN, STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)
ARCHITECTURE = {
    "image_size": 48, "patch_size": 8, "frames": 8, "width": 128, "depth": 4, "heads": 4,
    "mlp_ratio": 4.0, "stem": "conv",
}  # fmt: skip
# Actions that the video encoder never has a label for, as Kinetics lacks most of the world's.
# They are on the screen like anything else that nobody labelled.
HELD_OUT = (
    *("backing", "bouncing", "fleeing", "gliding", "pointing", "posing", "sinking", "uncoiling"),
    *("carrying box", "hiding", "hissing", "nesting", "reading"),
)
ACTION_IDS = [i for i, a in enumerate(ACTIONS) if a not in HELD_OUT]
PAIR_IDS = [i for i, row in enumerate(CLASSES) if row.action not in HELD_OUT]
LOOKS_IDS = [i for i in PAIR_IDS if CLASSES[i].told_by == "looks"]
LOOKS_ACTION_IDS = [i for i in ACTION_IDS if ACTION_TOLD_BY[ACTIONS[i]] == "looks"]
MIRROR = {"turning left": "turning right", "turning right": "turning left"}


class _FastAttention(Attention):
    """The same attention as plain bfloat16 products, on CPUs much faster than the fused one."""

    def forward(self, x: Tensor) -> Tensor:
        m, s, d = x.shape
        qkv = self.qkv(x).view(m, s, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2)).float() * (d // self.heads) ** -0.5
        attended = weights.softmax(-1).to(v.dtype) @ v
        return self.out(attended.transpose(1, 2).reshape(m, s, d))


class _FastStem(ConvStem):
    """The convolutional stem in float32, for the same reason."""

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(images)


class _Still(nn.Module):
    """Stands for attention over time while there is one frame: it would add exactly zero."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def build(frames: int) -> TimeSformer:
    model = TimeSformer(TimeSformerConfig(**{**ARCHITECTURE, "frames": frames}))
    model.stem.__class__ = _FastStem
    for module in model.modules():
        if type(module) is Attention:
            module.__class__ = _FastAttention
    if frames == 1:
        for block in model.blocks:
            block.temporal_norm = nn.Identity()
            block.temporal_attention = _Still()
            block.temporal_out = nn.Identity()
    return model


def time_code(frames: int, width: int) -> Tensor:
    """Sine and cosine of periods from 4 to 32 frames, [1, T, D'], as large as the position code.

    From a time embedding of zero the order of frames was still not used after 13,000 clips:
    attention over time cannot see an order until the embedding has grown by chance.
    """
    rates = torch.logspace(math.log10(math.pi / 2), math.log10(math.pi / 16), width // 2)
    angles = torch.arange(frames)[:, None] * rates
    return 0.14 * torch.cat([angles.sin(), angles.cos()], 1)[None]


class Heads(nn.Module):
    """One classifier on the global token and one on the mean of the frame tokens."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        width = ARCHITECTURE["width"]
        self.globe, self.frame = nn.Linear(width, outputs), nn.Linear(width, outputs)
        for head in (self.globe, self.frame):
            nn.init.constant_(head.bias, -3.0)

    def forward(self, tokens: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """Tokens [B, 1 + N·T, D'] to two rows of logits [B, outputs]."""
        b, _, d = tokens.shape
        per_frame = tokens[:, 1:].reshape(b, -1, frames, d).mean(1)  # [B, T, D']
        return self.globe(tokens[:, 0]), self.frame(per_frame.mean(1))


def augment(frames: np.ndarray, rng: np.random.Generator, mean: Any, std: Any) -> Tensor:
    """uint8 [B, T, h, w, 3] to normalised [B, T, 3, h, w] with light, gain, blur and noise."""
    x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 1, 4, 2, 3).float() / 255
    b = len(x)
    gain = torch.from_numpy(
        rng.uniform(0.75, 1.25, (b, 1, 1, 1, 1)) * rng.uniform(0.92, 1.08, (b, 1, 3, 1, 1))
    ).float()
    shift = torch.from_numpy(rng.uniform(-0.08, 0.08, (b, 1, 1, 1, 1))).float()
    soft = torch.from_numpy((rng.random((b, 1, 1, 1, 1)) < 0.3) * rng.uniform(0, 0.8)).float()
    if float(soft.max()) > 0:
        flat = x.flatten(0, 1)
        x = x + soft * (F.avg_pool2d(flat, 3, 1, 1, count_include_pad=False).view_as(x) - x)
    x = (x - 0.5) * gain + 0.5 + shift
    sigma = torch.from_numpy(rng.uniform(0, 0.035, (b, 1, 1, 1, 1))).float()
    x = (x + sigma * torch.randn_like(x)).clamp(0, 1)
    return normalise(x, mean, std)


def normalise(x: Tensor, mean: Any, std: Any) -> Tensor:
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def mirror_permutations() -> tuple[np.ndarray, np.ndarray]:
    """Columns of actions and pairs after a left-right flip."""
    actions = [ACTIONS.index(MIRROR.get(a, a)) for a in ACTIONS]
    pairs = [PAIRS.index(f"{r.kind} {MIRROR.get(r.action, r.action)}") for r in CLASSES]
    return np.array(actions), np.array(pairs)


def targets(pool: Pool, rows: np.ndarray, flipped: np.ndarray, still: bool) -> Tensor:
    """[B, outputs]: kinds, actions, pairs; of these, only looks while frames are single."""
    move_a, move_p = mirror_permutations()
    actions, pairs = pool.actions[rows], pool.pairs[rows]
    actions = np.where(flipped[:, None], actions[:, move_a], actions)
    pairs = np.where(flipped[:, None], pairs[:, move_p], pairs)
    a, p = (LOOKS_ACTION_IDS, LOOKS_IDS) if still else (ACTION_IDS, PAIR_IDS)
    return torch.from_numpy(np.concatenate([pool.kinds[rows], actions[:, a], pairs[:, p]], 1))


def outputs(still: bool) -> int:
    return len(KINDS) + (
        len(LOOKS_ACTION_IDS) + len(LOOKS_IDS) if still else len(ACTION_IDS) + len(PAIR_IDS)
    )


def batches(
    pool: Pool, size: int, frames: int, rng: np.random.Generator, done: Callable[[], float]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Frames, rows and flips, from plain to cluttered to two actors as time goes on."""
    total = len(pool.frames)
    while done() < 1:
        progress = done()
        ends = (0.07, 0.22) if frames == 1 else (0.03, 0.1)
        share = 0.12 if progress < ends[0] else 0.3 if progress < ends[1] else 1.0
        reach = int(total * share)
        start = 0 if progress < 0.5 else int(0.12 * total)
        rows = np.sort(rng.integers(start, reach, size))
        x = pool.frames[rows]
        if frames == 1:
            x = x[np.arange(size), rng.integers(0, x.shape[1], size)][:, None]
        flipped = rng.random(size) < 0.5
        x = np.where(flipped[:, None, None, None, None], x[:, :, :, ::-1], x)
        yield x, rows, flipped


@torch.no_grad()
def evaluate(model: TimeSformer, heads: Heads, pool: Pool, frames: int) -> dict[str, float]:
    model.eval()
    scores = []
    for i in range(0, len(pool.frames), 64):
        x = pool.frames[i : i + 64]
        x = x[:, [3]] if frames == 1 else x
        x = torch.from_numpy(np.array(x)).permute(0, 1, 4, 2, 3).float() / 255
        with torch.autocast("cpu", torch.bfloat16):
            globe, frame = heads(model(normalise(x, MEAN, STD)), frames)
        scores.append((globe.float().sigmoid() + frame.float().sigmoid()) / 2)
    model.train()
    s = torch.cat(scores).numpy()
    still, k = frames == 1, len(KINDS)
    a, p = (LOOKS_ACTION_IDS, LOOKS_IDS) if still else (ACTION_IDS, PAIR_IDS)
    alone = pool.kinds.sum(1) == 1
    ap = average_precision(s[:, k + len(a) :], pool.pairs[:, p])
    action_ap = average_precision(s[:, k : k + len(a)], pool.actions[:, a])
    looks = np.array([CLASSES[i].told_by == "looks" for i in p])
    looks_a = np.array([ACTION_TOLD_BY[ACTIONS[i]] == "looks" for i in a])
    hit = s[alone, :k].argmax(1) == pool.kinds[alone].argmax(1)
    result = {
        "kind_accuracy": float(hit.mean()),
        "pair_map_looks": float(np.nanmean(ap[looks])),
        "action_map_looks": float(np.nanmean(action_ap[looks_a])),
    }
    if not still:
        result["pair_map_motion"] = float(np.nanmean(ap[~looks]))
        result["action_map_motion"] = float(np.nanmean(action_ap[~looks_a]))
    return {key: round(value, 4) for key, value in result.items()}


def export(model: TimeSformer, out: Path) -> None:
    """Write the weights as float16 with their configuration, each in one step."""
    folder = out / "timesformer-embedded"
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to(torch.float16).contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / ".model.part")
    (folder / ".model.part").chmod(0o644)
    os.replace(folder / ".model.part", folder / "model.safetensors")
    config = {
        "architecture": ARCHITECTURE, "mean": MEAN, "std": STD, "frames": 8, "size": 48,
        "held_out_actions": sorted(HELD_OUT),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def train(
    model: TimeSformer, pool: Pool, validation: Pool, *, minutes: float, batch: int, rate: float,
    seed: int, log: Callable[[dict[str, Any]], None], save: Callable[[Any, Any], None], stage: str,
) -> Heads:  # fmt: skip
    """Train for a stretch of time; the cosine follows the clock, so that it always ends."""
    frames = model.config.frames
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, frames])
    heads = Heads(outputs(frames == 1))
    temporal = {name for name, _ in model.temporal_parameters()}
    fast, slow = [*heads.parameters()], []
    for name, parameter in model.named_parameters():
        (slow if frames > 1 and name not in temporal else fast).append(parameter)
    groups = [{"params": fast, "base": rate}, {"params": slow, "base": 0.6 * rate}]
    optimiser = torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, weight_decay=0.03)
    began, reported, losses = time.monotonic(), time.monotonic(), []

    def done() -> float:
        return (time.monotonic() - began) / (60 * minutes)

    stream = batches(pool, batch, frames, rng, done)
    for step, (x, rows, flipped) in enumerate(stream, 1):
        for group in optimiser.param_groups:
            cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done())))
            group["lr"] = group["base"] * min(1.0, step / 150) * cosine
        y = targets(pool, rows, flipped, frames == 1)
        with torch.autocast("cpu", torch.bfloat16):
            globe, frame = heads(model(augment(x, rng, MEAN, STD)), frames)
        loss = sum(
            F.binary_cross_entropy_with_logits(o.float(), y, reduction="sum") / batch
            for o in (globe, frame)
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *heads.parameters()], 5.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        if time.monotonic() - reported > REPORT or done() >= 1:
            save(model, heads)
            log(
                {
                    "stage": stage, "step": step, "clips": step * batch,
                    "minutes": round(done() * minutes, 2), "loss": round(np.mean(losses), 3),
                    **evaluate(model, heads, validation, frames),
                }
            )  # fmt: skip
            reported, losses = time.monotonic(), []
    return heads
