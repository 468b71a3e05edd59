"""Whether an end-to-end step fits, said before the first one, and which setting would make it fit.

The activations of the encoder (`msq.head.backbone_cost`) and those of the head (`msq.head.memory`)
are not there at the same time at their worst: the head's are given back before the backward pass
through the encoder begins. To them come the gradients of what learns, two moments of its optimiser,
its average, and its best values so far, 4 bytes a number each. The weights themselves lie on the
device already when this is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from msq.errors import MsqError, UsageError, is_out_of_memory
from msq.head import memory
from msq.head.backbone_cost import (
    BackboneShape,
    forward_flops,
    kept_bytes,
    learning,
    moment_bytes,
    parameters,
)
from msq.head.backbone_cost import step_flops as encoder_step_flops
from msq.head.memory import StepShape

if TYPE_CHECKING:
    from msq.extract.encoders.encoder import VideoEncoder
    from msq.head.end_to_end_config import EndToEndConfig
    from msq.head.features import Features
    from msq.head.packed_choice import StepChoice

# After a step that did not fit, a setting is named where its estimate is this share of that step's.
_SAFE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class EndToEndShape:
    """What the memory of an end-to-end step depends on.

    Attributes:
        backbone: the encoder; `clips` of it are those of a part.
        head: likewise `batch`.
        batch: clips of a whole step, over all processes and parts.
        ranks: processes that take it together.
        accumulate: parts of it in each process.
        average: whether weights are averaged.
        best: whether the best weights so far are kept.
        sharded: whether the encoder's weights, gradients and moments are divided among the ranks.
    """

    backbone: BackboneShape
    head: StepShape
    batch: int
    ranks: int = 1
    accumulate: int = 1
    average: bool = True
    best: bool = True
    sharded: bool = False

    @classmethod
    def of(
        cls,
        encoder: VideoEncoder,
        features: Features,
        config: EndToEndConfig,
        choice: StepChoice,
        ranks: int = 1,
    ) -> EndToEndShape | None:
        """Of a run; None where the encoder is no TimeSformer: its layers are not known here."""
        from msq.extract.encoders.timesformer import TimeSformer

        model, backbone, train = encoder.model, config.backbone, config.run.train
        if not isinstance(model, TimeSformer):
            return None
        head = StepShape.of(features, config.run, choice)
        shape = BackboneShape(
            encoder=model.config,
            clips=1,
            precision=choice.precision,
            unfreeze=backbone.unfreeze,
            checkpointing=backbone.checkpointing == "on",
            fused=any(getattr(m, "fused", False) for m in model.modules()),
            band=encoder.spec.pooling == "band",
        )
        return cls(
            backbone=shape,
            head=head,
            batch=head.batch,
            ranks=ranks,
            average=bool(train.ema),
            best=train.select == "best",
            sharded=backbone.shard == "fsdp",
        ).cut(accumulate=backbone.accumulate)

    def cut(self, *, batch: int | None = None, accumulate: int | None = None) -> EndToEndShape:
        """With another batch or number of parts; the clips of a part follow."""
        made = replace(self, batch=batch or self.batch, accumulate=accumulate or self.accumulate)
        part = math.ceil(made.batch / (made.ranks * made.accumulate))
        return replace(
            made,
            backbone=replace(made.backbone, clips=part),
            head=replace(made.head, batch=part),
        )

    @property
    def learning(self) -> int:
        """Numbers of the encoder that learn, of those that lie on one device."""
        found = learning(self.backbone.encoder, self.backbone.unfreeze)
        return math.ceil(found / self.ranks) if self.sharded else found


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes of a step on one device, the weights left out.

    Attributes:
        encoder: activations of the encoder that are kept.
        moment: the larger of the head's part, and of what a layer takes for a moment.
        gradients: that are there while the activations are.
        optimiser: its moments.
        average: of the weights.
        best: the best weights so far.
    """

    encoder: int
    moment: int
    gradients: int
    optimiser: int
    average: int
    best: int

    @property
    def total(self) -> int:
        """All of it."""
        fixed = self.optimiser + self.average + self.best
        return self.encoder + self.moment + self.gradients + fixed


def step_memory(shape: EndToEndShape) -> StepMemory:
    """What a step takes at its worst, from the end of the first epoch on."""
    backbone, numbers, of_head = shape.backbone, shape.learning, shape.head.parameters
    kept = kept_bytes(backbone)
    moment = max(moment_bytes(backbone), memory.step_bytes(shape.head))
    gradients = 4 * of_head
    if shape.accumulate > 1 or shape.ranks > 1:
        gradients += 4 * numbers  # of the parts before, or of the buckets that are sent
    else:  # they grow while the activations shrink: at the lowest layer all others' are there
        above = max(backbone.layers - 1, 0)
        gradients += max(0, above * (4 * numbers - kept) // max(backbone.layers, 1))
    both = numbers + of_head
    return StepMemory(
        encoder=kept,
        moment=moment,
        gradients=gradients,
        optimiser=8 * both,
        average=4 * both if shape.average else 0,
        best=4 * both if shape.best else 0,
    )


def step_flops(shape: EndToEndShape) -> int:
    """Operations of a whole step, over all processes, two per product and sum."""
    from msq.head.flops import step_flops as head_step_flops

    head = shape.head
    whole = replace(shape.backbone, clips=shape.batch)
    return encoder_step_flops(whole) + head_step_flops(
        shape.batch, head.classes, head.tokens, width=head.width, ffn=head.ffn,
        layers=head.layers, encoder_layers=head.encoder_layers,
    )  # fmt: skip


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
