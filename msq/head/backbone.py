"""The video encoder as a part of training: what of it learns, at which rate, and its tokens.

Depth is counted from the input: 0 for the stem and the embeddings, i + 1 for block i, and one more
for the norm at the end. A parameter at depth d of n learns at `lr * layer_decay ** (n - d)`
(layer-wise learning-rate decay, as Clark et al., "ELECTRA", arXiv 2003.10555, section 3.2).
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from msq.errors import UsageError
from msq.head import distributed_backbone as distributed
from msq.head.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from msq.config import OptimConfig
    from msq.extract.encoders.encoder import VideoEncoder
    from msq.head.end_to_end_config import BackboneConfig

_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_NORMS = (nn.LayerNorm, nn.GroupNorm)


class Backbone:
    """A video encoder that learns.

    Args:
        encoder: loaded, on its device; its model is trained in place.
        config: what learns, and how.
        precision: of the training steps, `fp32` or `bf16`; parameters stay as they are.
        ranks: the processes that train it together.

    Attributes:
        encoder: the given one, which scores in its spec's precision.
        learning: name -> parameter, of those that learn, in the model's order.
        module: what the steps run: the model, or a compiled or distributed one around it.
        divided: whether each process has a part of its parameters only.

    Raises:
        UsageError: the encoder has nothing by the name that is to be unfrozen.
    """

    def __init__(
        self,
        encoder: VideoEncoder,
        config: BackboneConfig,
        precision: str,
        ranks: Ranks = ALONE,
    ) -> None:
        self.encoder, self.config, self.precision = encoder, config, precision
        model = encoder.model
        names = learning_names(model, config.unfreeze)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
            parameter.grad = None
        several = ranks.world > 1 and bool(names)
        self.divided = several and config.shard == "fsdp"
        if self.divided:
            distributed.divide(model, ranks)
        self.learning = {n: p for n, p in model.named_parameters() if n in names}
        model.eval()  # no encoder here has dropout or statistics that training should move
        if config.checkpointing == "on":
            if not hasattr(model, "checkpointing"):
                raise UsageError(
                    f"backbone.checkpointing = on: {encoder.spec.slug} cannot; use off, or more "
                    "parts (backbone.accumulate)"
                )
            setattr(model, "checkpointing", True)  # noqa: B010  a module's attributes are typed
        self.module: Any = model
        if config.compile == "on" and self.learning:
            self.module = torch.compile(model)
        if several and not self.divided:
            self.module = distributed.whole_in_each(self.module, ranks)

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        return self.encoder.device

    def tokens(self, frames: Tensor) -> Tensor:
        """Tokens with their gradients.

        Args:
            frames: uint8 [B, T, 3, h, w] on the encoder's device.

        Returns:
            [B, S, D'] float32 (float64 where the encoder is), pooled as the encoder's spec says.
        """
        low = torch.bfloat16 if self.precision == "bf16" else None
        with nullcontext() if self.learning else torch.no_grad():
            return self._pooled(self.module, frames, low)

    def adding(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward pass of a part; gradients are summed with the last one."""
        return distributed.adding(self.module, last)

    def _pooled(self, module: Any, frames: Tensor, low: torch.dtype | None) -> Tensor:
        from msq.extract.encoders.pooling import pool
        from msq.extract.transforms import normalise

        spec = self.encoder.spec
        video = normalise(frames, spec.mean, spec.std)
        dtype = next(self.encoder.model.parameters()).dtype
        with torch.autocast(self.device.type, low, enabled=low is not None):
            tokens = module(video.to(dtype))
        pooling: Any = spec.pooling
        wide = tokens if tokens.dtype == torch.float64 else tokens.float()
        return pool(wide, spec.frames, pooling, self.encoder.order)

    def scored(self, frames: Tensor) -> Tensor:
        """Tokens without gradients, in the precision of the encoder's spec; as `tokens`."""
        from msq.extract.encoders.encoder import DTYPES
        from msq.extract.shard_builder import encode_pixels

        if self.divided:  # what is put together in inference mode could not be trained after it
            with torch.no_grad():
                low = DTYPES.get(self.encoder.spec.precision)
                return self._pooled(self.encoder.model, frames, low)
        return encode_pixels(self.encoder, frames)

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups by depth, matrices and vectors apart; `scale` is of the rate."""
        depths = {name: depth_of(self.encoder.model, name) for name in self.learning}
        top = layer_count(self.encoder.model) + 1
        found: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for name, parameter in self.learning.items():
            found.setdefault((depths[name], parameter.ndim >= 2), []).append(parameter)
        return [
            {
                "params": parameters,
                "weight_decay": self.config.weight_decay if matrices else 0.0,
                "scale": self.config.layer_decay ** (top - depth),
            }
            for (depth, matrices), parameters in sorted(found.items(), key=lambda item: item[0])
        ]

    def optimiser(self, config: OptimConfig) -> torch.optim.Optimizer | None:
        """Adam or AdamW as the head's; None where nothing learns."""
        groups = self.groups()
        if not groups:
            return None
        kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
        return kind(groups, lr=self.config.lr, betas=(0.9, config.beta2), fused=True)

    def state(self) -> dict[str, Tensor]:
        """What learns, by name; the rest is as it was loaded."""
        return {name: parameter.detach() for name, parameter in self.learning.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        for name, parameter in self.learning.items():
            parameter.copy_(distributed.placed_as(state[name], parameter))

    def whole_state(self) -> dict[str, Tensor] | None:
        """The model's `state_dict`, put together by all processes; None where each has it."""
        if not self.divided:
            return None
        found: dict[str, Tensor] = distributed.gathered(self.encoder.model.state_dict())
        return found


def layer_count(model: nn.Module) -> int:
    """Blocks of the model."""
    found = [int(m[1]) for name, _ in model.named_parameters() if (m := _BLOCK.search(name))]
    return max(found, default=-1) + 1


def depth_of(model: nn.Module, name: str) -> int:
    """Depth of a parameter: 0 below the blocks, i + 1 in block i, one more behind the last."""
    block = _BLOCK.search(name)
    if block is not None:
        return int(block[1]) + 1
    return layer_count(model) + 1 if name.startswith("norm.") else 0


def learning_names(model: nn.Module, unfreeze: str) -> set[str]:
    """Names of the parameters that learn.

    Raises:
        UsageError: the model has no such part, or fewer layers.
    """
    everything = [name for name, _ in model.named_parameters()]
    if unfreeze == "all":
        return set(everything)
    if unfreeze == "none":
        return set()
    if unfreeze == "norms":
        owners = [name for name, module in model.named_modules() if isinstance(module, _NORMS)]
        return {name for name in everything if name.rpartition(".")[0] in owners}
    if unfreeze == "temporal":
        temporal = getattr(model, "temporal_parameters", None)
        if temporal is None:
            raise UsageError(
                f"backbone.unfreeze = temporal: expected an encoder with attention over time, "
                f"found {type(model).__name__}; use norms, last:N or all"
            )
        return {name for name, _ in temporal()}
    layers, wanted = layer_count(model), int(unfreeze.partition(":")[2])
    if not 1 <= wanted <= layers:
        raise UsageError(
            f"backbone.unfreeze = {unfreeze}: expected at most last:{layers}, which is all layers "
            f"of {type(model).__name__}"
        )
    first = layers - wanted + 1
    return {name for name in everything if depth_of(model, name) >= first}
