"""What memory an end-to-end step takes, and how many operations it is.

The activations of the encoder (`msq.head.backbone_cost`) and those of the head (`msq.head.memory`)
are not there at the same time at their worst: the head's are given back before the backward pass
through the encoder begins. To them come the gradients of what learns, two moments of its optimiser,
its average, and its best values so far, 4 bytes a number each. The weights themselves lie on the
device already when this is asked. `msq.head.backbone_room` says whether it fits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from msq.head import memory
from msq.head.backbone_cost import BackboneShape, kept_bytes, learning, moment_bytes
from msq.head.backbone_cost import step_flops as encoder_step_flops
from msq.head.memory import StepShape

if TYPE_CHECKING:
    from msq.extract.encoders.encoder import VideoEncoder
    from msq.head.end_to_end_config import EndToEndConfig
    from msq.head.features import Features
    from msq.head.packed_choice import StepChoice


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
