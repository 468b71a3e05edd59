"""Stage one on a GPU: the whole of it against decoding alone and encoding alone.

The most there is to reach is the slower of the two; the goal is nine tenths of that. On a CPU the
cases run with `--quick` alone, to see that they do.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from msq.bench.cases import Case, Figure, Gate, Prepared, Settings, Side
from msq.bench.extract_cases import BASE, TINY, Runs, Taken, dataset, videos
from msq.bench.random_encoders import image_encoder, video_encoder
from msq.extract.datasets.dataset import Dataset
from msq.extract.decode_pool import DecodeTask, Picture, cores, decode, decode_in_order
from msq.extract.device_batches import Arriving, Moment, Sender
from msq.extract.encoders.encoder import Encoder
from msq.extract.shard_builder import encode_pixels
from msq.extract.store import open_store

CHARADES = 9848  # videos
BATCH = 16
_Any = TypeVar("_Any", bound=Encoder)


def cases() -> Iterable[Case]:
    """TimeSformer-B and ViT-B/16 at 8 and 16 frames."""
    for frames in (8, 16):
        yield Case(
            name=f"on a GPU, T={frames}",
            compares=f"extract with TimeSformer-B and ViT-B/16, {frames} frames, bf16, against "
            "decoding alone and encoding alone",
            base="extract",
            unit="ms",
            rounds=5,
            prepare=functools.partial(_whole, frames),
        )


@contextmanager
def _whole(frames: int, settings: Settings) -> Iterator[Prepared]:
    clips = 6 if settings.quick else 512
    config = TINY if settings.quick else dataclasses.replace(BASE, frames=frames)
    device = torch.device(settings.device)
    with tempfile.TemporaryDirectory(prefix="msq-bench-") as name:
        folder = Path(name)
        data = dataset(folder, clips, videos(folder, 8, 1 if settings.quick else 8))
        video = _placed(video_encoder(config), device)
        image = _placed(image_encoder(config), device)
        runs = Runs(folder, (video, image), batch=BATCH)
        pictures = tuple(dict.fromkeys(Picture.of(e.spec) for e in (video, image)))
        shown = [
            [decode(DecodeTask(0, clip.path, None, None, (picture,))).frames[0]
             for clip in data.clips[:8]]
            for picture in pictures
        ]  # fmt: skip

        def decoding() -> None:
            for result in decode_in_order(_tasks(data, pictures), cores()):
                result.release()

        def encoding() -> None:
            """Of frames that lie in the host's memory, their features back there."""
            sender, under_way = Sender(device), list[Arriving]()
            for first in range(0, clips, BATCH):
                count = min(BATCH, clips - first)
                for encoder in (video, image):
                    which = shown[pictures.index(Picture.of(encoder.spec))]
                    began = Moment(device)
                    pixels = sender.send([which[i % len(which)] for i in range(count)])
                    features = encode_pixels(encoder, pixels)
                    under_way.append(Arriving(features, torch.float16, began))
                while len(under_way) > 2:
                    under_way.pop(0).fetch()
            for arriving in under_way:
                arriving.fetch()

        def gate() -> Gate:
            runs(data, store_dtype="float32")
            count = min(BATCH, clips)
            kept = open_store(runs.store).tokens(range(count))
            which = shown[pictures.index(Picture.of(video.spec))]
            pixels = Sender(device).send([which[i % len(which)] for i in range(count)])
            wanted = encode_pixels(video, pixels).cpu()
            runs.forget()
            runs.results.clear()
            worst = float((kept - wanted).abs().max() / wanted.abs().max())
            return Gate(worst, 1e-2, "features in the store, and of the same clips by hand (bf16)")

        def figures(taken: Taken) -> dict[str, Figure]:
            walls = {side: statistics.median(w for w, _ in found) for side, found in taken.items()}
            slower = max(walls["decoding"], walls["encoding"])
            rate = clips / walls["extract"]
            return {
                "extract over the slower of decoding and encoding": Figure(
                    slower / walls["extract"], 0.9
                ),
                "clips/s end to end": Figure(rate),
                f"hours for {CHARADES} such videos": Figure(CHARADES / rate / 3600),
            }

        sides = {
            "decoding": Side(decoding),
            "encoding": Side(encoding),
            "extract": Side(lambda: runs(data), runs.forget),
        }
        yield Prepared(gate, lambda: sides, figures=figures)


def _placed(encoder: _Any, device: torch.device) -> _Any:
    """On its device; in bf16 where that is a GPU."""
    if device.type == "cuda":
        encoder.spec = dataclasses.replace(encoder.spec, precision="bf16")
    return encoder.to(device)


def _tasks(data: Dataset, pictures: tuple[Picture, ...]) -> Iterator[DecodeTask]:
    for row, clip in enumerate(data.clips):
        yield DecodeTask(row, clip.path, None, None, pictures)
