"""How long a run of stage one will take, from decoding and encoding a few of its clips.

A store records no times (the same request gives the same bytes), so they are measured, on this
machine, each time they are asked for. Nothing is written.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from msq.extract.decode_pool import cores, intra_op_threads
from msq.extract.decode_task import Decoded, DecodeTask, decode
from msq.extract.shard_builder import FrameEncoder, Part, pictures_of
from msq.extract.store_writer import StoreWriter
from msq.extract.transforms import normalise

SAMPLED = 4  # clips, evenly spread over those to be made
BUDGET = 20.0  # seconds after which no further clip is begun


def expected_time(
    look: StoreWriter,
    encoders: Mapping[str, FrameEncoder],
    todo: Sequence[tuple[int, Part]],
    *,
    batch: int,
    workers: int | None,
    sampled: int = SAMPLED,
) -> dict[str, Any]:
    """Decode and encode a few clips as the run would, and multiply.

    Decode processes and encoders on a GPU work side by side, so the slower of the two counts; on
    a CPU they share its cores, and with no decode process they take turns. Writing and the start
    of the processes are not counted (both are small beside base-size encoders), nor are other
    workers of the same store.

    Args:
        look: of the store; knows its clips.
        encoders: name -> encoder.
        todo: (shard, (encoder, view)) of what the run would make.
        batch: clips of one forward pass.
        workers: decode processes; None for as many as there are cores.
        sampled: clips to measure, at most; fewer where they take long.

    Returns:
        `seconds` (None where nothing could be measured; `reason` says why), `clips` (to be made,
        without those that have no file),
        `sampled`, `workers`, `decode_seconds` (of one clip, one process) and `encode_seconds`
        (of one clip and view, by encoder; None for one that has nothing to do).
    """
    parts: dict[int, list[Part]] = {}
    for shard, part in todo:
        parts.setdefault(shard, []).append(part)
    clips = look.dataset.clips
    rows = [r for shard in sorted(parts) for r in look.rows(shard) if clips[r].path.exists()]
    processes = cores() if workers is None else workers
    found: dict[str, Any] = {
        "seconds": None, "reason": None, "clips": len(rows), "sampled": 0, "workers": processes,
        "decode_seconds": None, "encode_seconds": dict.fromkeys(encoders),
    }  # fmt: skip
    if not rows:
        return found | {"seconds": 0.0, "reason": "there is nothing to decode"}
    asked = list(dict.fromkeys(part for _, part in todo))
    spread = [rows[(2 * i + 1) * len(rows) // (2 * sampled)] for i in range(sampled)]
    decoded = _decoded(look, spread, asked, encoders)
    if not decoded:
        return found | {"reason": "none of the clips that were tried can be decoded"}
    with intra_op_threads(cores()):
        each = _encode_seconds(decoded[0], asked, encoders, batch)
    decoding = sum(clip.seconds for clip in decoded) / len(decoded)
    encoding = sum(len(look.rows(shard)) * each[slug] for shard, (slug, _) in todo)
    # A clip of which only some parts are to be made is taken to be decoded for all of them.
    total = len(rows) * decoding
    decoded_in = total / max(1, min(processes, cores()))
    shared = not processes or any(encoders[slug].device.type == "cpu" for slug in each)
    seconds = decoded_in + encoding if shared else max(decoded_in, encoding)
    return found | {
        "seconds": seconds,
        "sampled": len(decoded),
        "decode_seconds": decoding,
        "encode_seconds": {slug: each.get(slug) for slug in encoders},
    }


def _decoded(
    look: StoreWriter,
    rows: Sequence[int],
    parts: Sequence[Part],
    encoders: Mapping[str, FrameEncoder],
) -> list[Decoded]:
    """Of the rows those that can be decoded, as many as the time allows."""
    pictures, found = pictures_of(parts, encoders), []
    started = time.perf_counter()
    with intra_op_threads(1):  # as a decode process has
        for row in dict.fromkeys(rows):
            clip = look.dataset.clips[row]
            result = decode(
                DecodeTask(
                    row, clip.path, clip.start, clip.end, pictures, clip.fps, clip.id, clip.keep
                )
            )
            if result.reason is None:
                found.append(result)
            if time.perf_counter() - started > BUDGET:
                break
    return found


def _encode_seconds(
    clip: Decoded, parts: Sequence[Part], encoders: Mapping[str, FrameEncoder], batch: int
) -> dict[str, float]:
    """Seconds of one clip and view by encoder: on a GPU of a full batch, on a CPU of one clip."""
    pictures = pictures_of(parts, encoders)
    seconds = {}
    for slug, view in {part[0]: part for part in reversed(parts)}.values():
        encoder = encoders[slug]
        frames = clip.frames[pictures.index(pictures_of([(slug, view)], encoders)[0])]
        count = 1 if encoder.device.type == "cpu" else batch
        taken = []
        for _ in range(2):  # the first call of all chooses algorithms and fills caches
            started = time.perf_counter()
            pixels = torch.from_numpy(np.stack([frames] * count)).to(encoder.device)
            video = normalise(pixels, encoder.spec.mean, encoder.spec.std)
            encoder(video).sum().item()  # waits for a GPU
            taken.append((time.perf_counter() - started) / count)
            if taken[0] > BUDGET:
                break
        seconds[slug] = min(taken)
    return seconds
