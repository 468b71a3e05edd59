"""Stage one's encoders on a GPU: TimeSformer-B and ViT-B/16 at 16 frames, and clips a second.

Weights are random. The ViT is plain (`random_encoders.PlainViT`), so that nothing has to be
installed. `eager` is what `msq extract --precision bf16` runs; `compiled` is what torch.compile
makes of it. Operations are counted as the models' equations have them, two per product and sum.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from msq.bench.gpu_steps import compiled
from msq.bench.gpu_timing import Run, Session, compare
from msq.bench.random_encoders import PlainViT, timesformer_flops, vit_flops
from msq.extract.device_batches import Arriving, Moment, Sender
from msq.extract.encoders.timesformer import TimeSformer
from msq.extract.encoders.timesformer_config import TimeSformerConfig

BASE = TimeSformerConfig(frames=16)
TINY = TimeSformerConfig(image_size=(32, 32), frames=2, width=16, depth=1, heads=2)
CLIPS = 16  # of a batch
BATCHES = 24  # end to end
CHARADES = 9848  # videos


def encoders(session: Session) -> None:
    """Part 4."""
    for name, work in (("TimeSformer-B", _video), ("ViT-B/16", _image)):
        session.attempt(f"encoder {name}", functools.partial(work, session), needs=150)
    session.attempt("end to end", functools.partial(end_to_end, session), needs=60)


def _video(session: Session) -> None:
    config, clips = _sizes(session)
    model = _random(TimeSformer(config), session.device)
    shape = (clips, config.frames, 3, *config.image_size)
    _encoder(session, "encoder TimeSformer-B", model, shape, timesformer_flops(clips, config))


def _image(session: Session) -> None:
    config, clips = _sizes(session)
    images, size = clips * config.frames, config.image_size[0]
    patch, width, depth = config.patch_size, config.width, config.depth
    model = _random(PlainViT(size, patch, width, depth, config.heads), session.device)
    flops = vit_flops(images, size, patch, width, depth)
    _encoder(session, "encoder ViT-B/16", model, (images, 3, size, size), flops)


def _encoder(
    session: Session, name: str, model: nn.Module, shape: tuple[int, ...], flops: int
) -> None:
    """The gate, then eager and compiled, interleaved."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(shape, generator=generator).to(session.device)
    eager = functools.partial(_low, model, pixels)
    fast = compiled(eager, session.device)
    with torch.no_grad():
        exact = model(pixels)
        errors = [float((run().float() - exact).abs().max()) for run in (eager, fast)]
    gate = {"ok": errors[1] <= 2 * errors[0], "worst": errors[1], "tolerance": 2 * errors[0],
            "what": "compiled and eager in bf16, against float32"}  # fmt: skip
    runs: dict[str, Run] = {
        "eager": _without_gradients(eager),
        "compiled": _without_gradients(fast),
    }
    sides = compare(session, runs) if gate["ok"] else {}
    for side in sides.values():
        if "median" in side:
            side["flops"] = flops / (1e-3 * side["median"])
    session.add(name, gate=gate, sides=sides, flops=flops, shape=list(shape))


def end_to_end(session: Session) -> None:
    """Uint8 clips in the host's memory to float16 features in it, through both encoders."""
    config, clips = _sizes(session)
    batches = 2 if session.tiny else BATCHES
    size, device = config.image_size[0], torch.device(session.device)
    video = _random(TimeSformer(config), session.device)
    image = _random(
        PlainViT(size, config.patch_size, config.width, config.depth, config.heads), session.device
    )
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (config.frames, 3, size, size), np.uint8) for _ in range(clips)]
    sender = Sender(device)

    def launch() -> list[Arriving]:
        began = Moment(device)
        # As `transforms.normalise` does, which needs more packages than this script.
        values = sender.send(frames).to(torch.float32).mul_(1 / 63.75).sub_(2.0)
        tokens = _low(video, values)[:, :17].float()
        vectors = _low(image, values.flatten(0, 1)).float().view(clips, config.frames, -1).mean(1)
        return [Arriving(found, torch.float16, began) for found in (tokens, vectors)]

    def fetch(arriving: list[Arriving]) -> None:
        for one in arriving:
            one.fetch()

    def overlapped(count: int) -> None:
        waiting = launch()
        for _ in range(count - 1):
            waiting, before = launch(), waiting
            fetch(before)
        fetch(waiting)

    def in_turn(count: int) -> None:
        for _ in range(count):
            fetch(launch())

    found = {}
    with torch.no_grad():
        for name, run in (("overlapped", overlapped), ("in turn", in_turn)):
            run(2)
            speeds = [
                _clips_per_second(run, batches, clips) for _ in range(2 if session.tiny else 5)
            ]
            found[name] = sorted(speeds)[len(speeds) // 2]
    session.add(
        "end to end", clips=clips, batches=batches, clips_per_second=found,
        charades_seconds=CHARADES / found["overlapped"],
    )  # fmt: skip


def _clips_per_second(run: Callable[[int], None], batches: int, clips: int) -> float:
    started = time.perf_counter()
    run(batches)
    return batches * clips / (time.perf_counter() - started)


def _low(model: nn.Module, pixels: Tensor) -> Tensor:
    with torch.autocast(pixels.device.type, torch.bfloat16, cache_enabled=False):
        found: Tensor = model(pixels)
        return found


def _without_gradients(run: Callable[[], Tensor]) -> Run:
    def work() -> object:
        with torch.no_grad():
            return run()

    return work


def _random(model: nn.Module, device: str) -> nn.Module:
    """Every weight other than zero, so that nothing can be left out."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    return model.eval().to(device)


def _sizes(session: Session) -> tuple[TimeSformerConfig, int]:
    return (TINY, 2) if session.tiny else (BASE, CLIPS)
