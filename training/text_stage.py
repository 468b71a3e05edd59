"""Stage `clip`: a tiny CLIP on frames and captions, with a vocabulary of its own."""

from __future__ import annotations

import gzip
import json
import math
import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from pools import PAIRS, Pool, average_precision
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from video_stage import REPORT, augment, normalise

from msq.world import ACTION_TOLD_BY, ACTIONS, CLASSES, KINDS
from msq.world.captions import EXTRA_WORDS, PROMPTS, caption_of

SIZE, CONTEXT = 96, 24
MEAN = (0.48145466, 0.4578275, 0.40821073)  # the public CLIP's own
STD = (0.26862954, 0.26130258, 0.27577711)


def vocabulary() -> list[str]:
    """Every word that means something to the text tower, ascending."""
    words = {w for row in CLASSES for w in row.name.split()} | set(EXTRA_WORDS)
    return sorted(words | {w for p in PROMPTS for w in p.replace("{}", "").split()})


def _letters(word: str) -> list[str]:
    return [*word[:-1], word[-1] + "</w>"]


def merges_for(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges under which each word is one token.

    Every word's merges come after those of the words before it, so they never disturb them; what
    earlier merges already do to a word is taken as it is, and the rest is joined from the left.
    """
    merges: list[tuple[str, str]] = []
    for word in words:
        parts = _letters(word)
        rank = {merge: k for k, merge in enumerate(merges)}
        while len(parts) > 1:
            known = [(rank[p], p) for p in pairwise(parts) if p in rank]
            pair = min(known)[1] if known else (parts[0], parts[1])
            if not known:
                rank[pair] = len(merges)
                merges.append(pair)
            joined, k = [], 0
            while k < len(parts):
                if k + 1 < len(parts) and (parts[k], parts[k + 1]) == pair:
                    joined.append(parts[k] + parts[k + 1])
                    k += 2
                else:
                    joined.append(parts[k])
                    k += 1
            parts = joined
    return merges


def write_vocabulary(folder: Path) -> SimpleTokenizer:
    """Write `bpe.txt.gz` and `vocabulary.txt`; returns the tokenizer that reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    words = vocabulary()
    lines = ["#version: msq world"] + [" ".join(m) for m in merges_for(words)]
    with open(folder / "bpe.txt.gz", "wb") as file, gzip.GzipFile("", "wb", 9, file, 0) as packed:
        packed.write("\n".join(lines).encode())
    (folder / "vocabulary.txt").write_text("".join(f"{w}\n" for w in words))
    tokenizer = SimpleTokenizer(bpe_path=str(folder / "bpe.txt.gz"), context_length=CONTEXT)
    split = [w for w in words if len(tokenizer.encode(w)) != 1]
    if split:
        raise ValueError(f"not single tokens: {split}")
    return tokenizer


def model_config(tokenizer: SimpleTokenizer) -> dict[str, Any]:
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
        "text_cfg": {
            "context_length": CONTEXT, "vocab_size": tokenizer.vocab_size, "width": 128,
            "heads": 4, "layers": 2, "tokenizer_kwargs": {"bpe_path": "bpe.txt.gz"},
        },
    }  # fmt: skip


def build(config: dict[str, Any]) -> open_clip.CLIP:
    text = {k: v for k, v in config["text_cfg"].items() if k != "tokenizer_kwargs"}
    return open_clip.CLIP(config["embed_dim"], config["vision_cfg"], text)


def export(model: open_clip.CLIP, config: dict[str, Any], out: Path) -> None:
    folder = out / "clip-embedded"
    state = {}
    for name, value in model.state_dict().items():
        value = value.detach()
        value = value.to(torch.float16) if value.is_floating_point() else value
        state[name] = value.contiguous().clone()
    save_file(state, folder / ".model.part")
    (folder / ".model.part").chmod(0o644)
    os.replace(folder / ".model.part", folder / "open_clip_model.safetensors")
    preprocess = {
        "size": SIZE, "mean": MEAN, "std": STD, "interpolation": "bicubic",
        "resize_mode": "shortest",
    }  # fmt: skip
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=1)
    (folder / "open_clip_config.json").write_text(text + "\n")


class Sentences:
    """Captions and class texts with the rule that says which scenes they are true of."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.names = [*PAIRS, *ACTIONS, *KINDS]
        self.of_action = np.array([[r.action == a for r in CLASSES] for a in ACTIONS], np.float32)
        self.of_kind = np.array([[r.kind == k for r in CLASSES] for k in KINDS], np.float32)

    def draw(self, rows: np.ndarray, extra: int, rng: np.random.Generator) -> tuple[Any, ...]:
        """Texts, truth [B, M], and the words each names [M, actions + kinds].

        A sentence is true of every scene that shows all it names, whichever scene it was made
        for: no false negatives.
        """
        texts, needs, anyof = [], [], []
        for row in rows:
            text, named = caption_of(self.pool.cast[row], rng)
            need = np.zeros(len(PAIRS), np.float32)
            need[[PAIRS.index(n) for n in named]] = 1
            texts.append(text)
            needs.append(need)
            anyof.append(False)
        for k in rng.choice(len(self.names), extra, replace=False):
            texts.append(PROMPTS[int(rng.integers(len(PROMPTS)))].format(self.names[k]))
            if k < len(PAIRS):
                need = np.eye(len(PAIRS), dtype=np.float32)[k]
            elif k < len(PAIRS) + len(ACTIONS):
                need = self.of_action[k - len(PAIRS)]
            else:
                need = self.of_kind[k - len(PAIRS) - len(ACTIONS)]
            needs.append(need)
            anyof.append(k >= len(PAIRS))
        need, some = np.stack(needs), np.array(anyof)
        hits = self.pool.pairs[rows] @ need.T
        truth = np.where(some, hits > 0, hits >= need.sum(1))
        words = np.zeros((len(texts), len(ACTIONS) + len(KINDS)), np.float32)
        for m, text in enumerate(texts):
            for j, name in enumerate([*ACTIONS, *KINDS]):
                words[m, j] = f" {name} " in f" {text} "
        return texts, torch.from_numpy(truth.astype(np.float32)), torch.from_numpy(words)


@torch.no_grad()
def evaluate(model: open_clip.CLIP, tokenizer: Any, pool: Pool) -> dict[str, float]:
    """Zero-shot by class names: mean of frame features against the texts of the pairs."""
    model.eval()
    images = []
    for i in range(0, len(pool.frames), 64):
        x = np.array(pool.frames[i : i + 64])
        b, t = x.shape[:2]
        x = torch.from_numpy(x).flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        features = F.normalize(model.encode_image(normalise(x, MEAN, STD)).float(), dim=-1)
        images.append(features.view(b, t, -1).mean(1))
    image = F.normalize(torch.cat(images), dim=-1)

    def score(names: list[str]) -> np.ndarray:
        text = model.encode_text(tokenizer([f"a video of a {n}" for n in names])).float()
        return (image @ F.normalize(text, dim=-1).T).numpy()

    pair = average_precision(score(PAIRS), pool.pairs)
    action = average_precision(score(list(ACTIONS)), pool.actions)
    looks = np.array([r.told_by == "looks" for r in CLASSES])
    looks_a = np.array([ACTION_TOLD_BY[a] == "looks" for a in ACTIONS])
    alone = pool.kinds.sum(1) == 1
    kind = score(list(KINDS))[alone].argmax(1) == pool.kinds[alone].argmax(1)
    text = F.normalize(model.encode_text(tokenizer(PAIRS)).float(), dim=-1)
    near = (text @ text.T - 2 * torch.eye(len(PAIRS))).max(1).values
    model.train()
    result = {
        "kind_accuracy": kind.mean(), "pair_map_looks": np.nanmean(pair[looks]),
        "pair_map_motion": np.nanmean(pair[~looks]),
        "action_map_looks": np.nanmean(action[looks_a]),
        "nearest_text_cosine": float(near.mean()),
    }  # fmt: skip
    return {k: round(float(v), 4) for k, v in result.items()}


def train(
    pool: Pool, validation: Pool, out: Path, *, minutes: float, batch: int, rate: float, seed: int,
    log: Callable[[dict[str, Any]], None], stage: str = "clip",
) -> None:  # fmt: skip
    """Train and export; a usable version lies in `out` after the first minute."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 77])
    tokenizer = write_vocabulary(out / "clip-embedded")
    config = model_config(tokenizer)
    model = build(config)
    model.visual.to(memory_format=torch.channels_last)
    sentences = Sentences(pool)
    words_head = nn.Linear(config["embed_dim"], len(ACTIONS) + len(KINDS))
    bias = nn.Parameter(torch.tensor(-4.0))
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1] + [bias, *words_head.parameters()]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.03}, {"params": plain, "weight_decay": 0.0}], lr=rate
    )
    began, reported, step, losses = time.monotonic(), time.monotonic(), 0, []

    def done() -> float:
        return (time.monotonic() - began) / (60 * minutes)

    model.train()
    while done() < 1:
        for group in optimiser.param_groups:
            cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done())))
            group["lr"] = rate * min(1.0, (step + 1) / 100) * cosine
        reach = 1.0 if done() > 0.2 else (0.12 if done() < 0.06 else 0.3)
        rows = np.sort(rng.integers(0, int(reach * len(pool.frames)), batch))
        x = pool.frames[rows][np.arange(batch), rng.integers(0, pool.frames.shape[1], batch)]
        images = augment(x[:, None], rng, MEAN, STD)[:, 0].to(memory_format=torch.channels_last)
        texts, truth, words = sentences.draw(rows, 64, rng)
        with torch.autocast("cpu", torch.bfloat16):
            image = model.encode_image(images)
            text = model.encode_text(tokenizer(texts))
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        logits = model.logit_scale.exp() * image @ text.T + bias
        match = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / batch
        # Frames cannot tell walking from running, but their texts must not fall together.
        spell = F.binary_cross_entropy_with_logits(words_head(8 * text), words)
        loss = match + 3.0 * spell
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*decay, *plain], 5.0)
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(50.0))
        step += 1
        losses.append((float(match.detach()), float(spell.detach())))
        if time.monotonic() - reported > REPORT or done() >= 1:
            export(model, config, out)
            mean = np.mean(losses, 0)
            log(
                {
                    "stage": stage, "step": step, "images": step * batch,
                    "minutes": round(done() * minutes, 2), "loss": round(float(mean[0]), 3),
                    "loss_words": round(float(mean[1]), 4),
                    "scale": round(float(model.logit_scale.detach().exp()), 2),
                    **evaluate(model, tokenizer, validation),
                }
            )  # fmt: skip
            reported, losses = time.monotonic(), []
