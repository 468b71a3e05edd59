"""A model with its spec, called on batches: what the pipeline and the Python API hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from msq.errors import UsageError
from msq.extract.encoders.pooling import TokenOrder, pool
from msq.extract.encoders.spec import EncoderSpec, Pooling, Precision

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")


class Encoder:
    """A frozen model and the spec of its outputs.

    Calling it runs in evaluation mode, without gradients, in the spec's precision, and returns
    ordinary float32 tensors on the model's device. `model` itself is an ordinary trainable module,
    untouched by that.

    Attributes:
        model: the module.
        spec: how the outputs are made.
    """

    def __init__(self, model: nn.Module, spec: EncoderSpec) -> None:
        if spec.precision not in PRECISIONS:
            raise UsageError(f"precision is one of {', '.join(PRECISIONS)}, not {spec.precision!r}")
        self.model = model
        self.spec = spec

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> Self:
        """Moves the model, in place, and returns the encoder."""
        self.model.to(device)
        return self

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Evaluation mode, no gradients, the spec's precision; module modes are put back."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        dtype = DTYPES.get(self.spec.precision)
        try:
            with (
                torch.inference_mode(),
                torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None),
            ):
                yield
        finally:
            for module in training:
                module.training = True

    def _run(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        with self._inference():
            out = function(*inputs).float()
        # Tensors made in inference mode can never take part in autograd; a head may be trained
        # on these, hence a copy made outside.
        return out.clone()

    def _check_video(self, video: Tensor, frames: int | None) -> None:
        """The size must be that of the spec, T `frames` where it is given; B is free."""
        spec = self.spec
        picture = (3, spec.size, spec.size)
        fits = video.ndim == 5 and tuple(video.shape[2:]) == picture and video.shape[1] > 0
        if not fits or frames not in (None, video.shape[1]) or not video.is_floating_point():
            raise UsageError(
                f"{spec.slug}: expected normalised float video [B, {frames or 'T'}, 3, "
                f"{spec.size}, {spec.size}], found {str(video.dtype).removeprefix('torch.')} "
                f"{list(video.shape)}; load the encoder with other frames or size, or sample and "
                "resize the video as its spec says"
            )


class VideoEncoder(Encoder):
    """Video to tokens [B, S, D'], pooled as the spec says.

    Attributes:
        order: what the model's tokens stand for; None for TimeSformer's order.
    """

    def __init__(
        self, model: nn.Module, spec: EncoderSpec, order: TokenOrder | None = None
    ) -> None:
        super().__init__(model, spec)
        self.order = order

    def __call__(self, video: Tensor) -> Tensor:
        """Encodes a batch.

        Args:
            video: [B, T, 3, h, w], normalised with the spec's mean and std, on any device.

        Returns:
            [B, S, D'] float32.

        Raises:
            UsageError: if the video's shape is not the spec's.
        """
        self._check_video(video, self.spec.frames)
        return self._run(self._tokens, video.to(self.device))

    def _tokens(self, video: Tensor) -> Tensor:
        tokens = self.model(video).float()
        return pool(tokens, self.spec.frames, cast(Pooling, self.spec.pooling), self.order)
