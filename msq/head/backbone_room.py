"""Whether an end-to-end step fits, said before the first one, and which setting would make it fit.

What a step takes is estimated in `msq.head.backbone_memory`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from msq.errors import MsqError, UsageError, is_out_of_memory
from msq.head import memory
from msq.head.backbone_cost import forward_flops, learning, parameters
from msq.head.backbone_memory import EndToEndShape, step_flops, step_memory

# After a step that did not fit, a setting is named where its estimate is this share of that step's.
_SAFE = 0.8


def report_lines(shape: EndToEndShape, device: str | torch.device) -> list[str]:
    """What a step costs, for the user to read before the first one."""
    b, need = shape.backbone, step_memory(shape)
    c, device = b.encoder, torch.device(device)
    height, width = c.image_size
    part = f"{b.clips} clip{'s' if b.clips != 1 else ''}"
    where = f" on each of {shape.ranks} processes" if shape.ranks > 1 else ""
    pieces = {
        "activations of the encoder": need.encoder, "of the head or a layer": need.moment,
        "gradients": need.gradients, "optimiser": need.optimiser,
        "average": need.average, "best weights": need.best,
    }  # fmt: skip
    flops = step_flops(shape)
    return [
        f"encoder: {c.depth} layers of width {c.width}, {c.frames} frames of {height}x{width}: "
        f"{parameters(c) / 1e6:.1f} M parameters, {learning(c, b.unfreeze) / 1e6:.2f} M of them "
        f"learn (backbone.unfreeze = {b.unfreeze}; activations are kept in {b.layers} layers)",
        f"step: {shape.batch} clips, {shape.accumulate} x {part} at a time{where}, {b.precision}, "
        f"checkpointing {'on' if b.checkpointing else 'off'}: {flops / 1e12:.3g} TFLOP, "
        f"{flops / shape.batch / 1e9:.4g} GFLOP a clip, of which forward through the encoder "
        f"{forward_flops(c, 1) / 1e9:.4g}",
        f"memory on {device.type}, estimated: {_gb(need.total)} beside the weights ("
        + ", ".join(f"{name} {_gb(size)}" for name, size in pieces.items() if size)
        + f"); {_gb(memory.available_bytes(device))} are free",
    ]


def require_room(shape: EndToEndShape, device: str | torch.device, moving: int = 0) -> None:
    """Refuse a run whose steps cannot fit into the memory that is there.

    Args:
        shape: of a step.
        device: to train on; the weights are there.
        moving: bytes there that something else is about to take.

    Raises:
        UsageError: with the settings of which each alone would make it fit, computed.
    """
    there = memory.available_bytes(device) - moving
    need = step_memory(shape).total
    if need <= there:
        return
    raise UsageError(
        f"a training step of {_step(shape)} needs about {_gb(need)} on "
        f"{torch.device(device).type} beside the weights; expected at most the "
        f"{_gb(max(there, 0))} free. What would fit: {what_fits(shape, there)}"
    )


def memory_error(
    error: BaseException,
    shape: EndToEndShape | None,
    device: str | torch.device,
    free: int | None = None,
) -> MsqError | None:
    """What to tell of an error in a step: None where it is not one of memory.

    Args:
        error: that the step raised.
        shape: of the step; None where the encoder's layers are not known.
        device: it ran on.
        free: bytes that were free before the first step.
    """
    if not is_out_of_memory(error):
        return None
    where = torch.device(device).type
    if shape is None:
        return MsqError(
            f"out of memory on {where} in a training step. Take more parts "
            "(backbone.accumulate), fewer clips (train.batch), fewer frames (--frames), or let "
            "less learn (--unfreeze last:N)"
        )
    need = step_memory(shape).total
    known = "" if free is None else f", with {_gb(free)} free before the first step"
    there = int(_SAFE * (need if free is None else min(need, free)))
    return MsqError(
        f"out of memory on {where} in a training step of {_step(shape)}: about {_gb(need)} beside "
        f"the weights were expected{known}; other work on the device, or a step that takes more "
        f"than is known here. What would need {_gb(there)} at most: {what_fits(shape, there)}. The "
        "run goes on from its last checkpoint"
    )


def what_fits(shape: EndToEndShape, there: int) -> str:
    """Settings of which each alone brings a step below so many bytes, joined by `or`."""
    found = list(_fitting(shape, lambda changed: step_memory(changed).total <= there))
    return " or ".join(found) or (
        "no setting of these; a smaller encoder or head (head.width), or more memory"
    )


def _fitting(shape: EndToEndShape, fits: Callable[[EndToEndShape], bool]) -> Iterator[str]:
    """The least change of each setting that makes the step fit."""
    b = shape.backbone
    most = math.ceil(shape.batch / shape.ranks)
    again = replace(shape, backbone=replace(b, checkpointing=True))
    parts = _least(shape, most, fits)
    if parts:
        clips = shape.cut(accumulate=parts).backbone.clips
        yield f"backbone.accumulate={parts} (parts of {clips} clips)"
    if b.layers > 1 and not b.checkpointing:
        if fits(again):
            yield "backbone.checkpointing=on"
        elif not parts and (more := _least(again, most, fits)):
            yield f"backbone.checkpointing=on with backbone.accumulate={more}"
    for last in range(b.layers - (b.unfreeze.startswith("last:")), 0, -1):
        part = replace(shape, backbone=replace(b, unfreeze=f"last:{last}"))
        if fits(part):
            yield f"--unfreeze last:{last}"
            break
    frames = _largest(b.encoder.frames - 1, lambda t: fits(_with_frames(shape, t)))
    if frames:
        yield f"--frames {frames}"
    batch = _largest(shape.batch - 1, lambda n: fits(shape.cut(batch=n)))
    if batch:
        yield f"train.batch={batch}"


def _least(shape: EndToEndShape, most: int, fits: Callable[[EndToEndShape], bool]) -> int:
    """The smallest number of parts, more than now, with which a step fits; 0 if none does."""
    for parts in range(shape.accumulate + 1, most + 1):
        if fits(shape.cut(accumulate=parts)):
            return parts
    return 0


def _largest(most: int, fitting: Callable[[int], bool]) -> int:
    """The largest of 1 to `most` that fits, 0 if none does."""
    return next((n for n in range(most, 0, -1) if fitting(n)), 0)


def _with_frames(shape: EndToEndShape, frames: int) -> EndToEndShape:
    encoder = replace(shape.backbone.encoder, frames=frames)
    fewer = shape.backbone.encoder.frames - frames
    return replace(
        shape,
        backbone=replace(shape.backbone, encoder=encoder),
        head=replace(shape.head, tokens=max(shape.head.tokens - fewer, 1)),
    )


def _step(shape: EndToEndShape) -> str:
    b = shape.backbone
    parts = f" in {shape.accumulate} parts" if shape.accumulate > 1 else ""
    ranks = f" over {shape.ranks} processes" if shape.ranks > 1 else ""
    again = ", checkpointing on" if b.checkpointing else ""
    return (
        f"{shape.batch} clips{parts}{ranks}, {b.encoder.frames} frames each, unfreeze = "
        f"{b.unfreeze}, in {b.precision}{again}"
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
