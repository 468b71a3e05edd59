"""The image tower of a CLIP model as a per-frame video encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from msq.errors import UsageError
from msq.extract.encoders.clip_source import find_clip
from msq.extract.encoders.clip_weights import load_clip_model
from msq.extract.encoders.per_frame import PerFrame
from msq.extract.encoders.pooling import TokenOrder
from msq.extract.encoders.spec import slugify
from msq.extract.encoders.video_model import VideoModel

PREFIX = "open_clip/"
FRAMES = 16  # the paper's T; an image model has none of its own


class OpenClipFrames(PerFrame):
    """An image tower of open_clip; tokens after its last LayerNorm, before the projection."""

    def split(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        """The class token and the patches, from the library's `forward_intermediates`."""
        found = cast(Any, self.tower).forward_intermediates(
            images,
            indices=1,
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        prefix = found.get("image_intermediates_prefix")
        patches = cast(Tensor, found["image_intermediates"][-1])
        has_class = prefix is not None and prefix[-1].shape[1] > 0
        return prefix[-1][:, 0] if has_class else None, patches


def load_open_clip(
    name: str,
    weights: str | None = None,
    *,
    frames: int | None = None,
    size: int | None = None,
    strict: bool = True,
) -> VideoModel:
    """Loads the image tower of a CLIP.

    Args:
        name: an open_clip architecture, with a tag (`ViT-B-16/openai`) unless `weights` are given.
        weights: a file, a folder, `hf-hub:org/name` or `local-dir:PATH`.
        frames: T; 16 by default.
        size: height and width in pixels; the model's own by default.
        strict: refuse missing and unexpected names; otherwise they are logged.

    Raises:
        UsageError: for an unknown architecture, or a tower without tokens.
        WeightsError: if the weights cannot be found, read or do not fit.
    """
    source = find_clip(name, weights) if name else find_clip(weights or "", None)
    loaded = load_clip_model(source, size=size, pooler=False, strict=strict)
    model = OpenClipFrames(cast(Any, loaded.model).visual).eval()
    try:
        patches, channels = model.places(loaded.size)
    except (AssertionError, AttributeError, KeyError, TypeError, NotImplementedError) as error:
        raise UsageError(
            f"{source.name}: its image tower gives no tokens ({error}); as video encoder it has to "
            "be a ViT. Any CLIP serves as --image-encoder"
        ) from error
    t = frames or FRAMES
    # A tag's id is its name already; files are named after the architecture they are for.
    label = source.files.id if weights is None or not name else f"{name}/{source.files.id}"
    return VideoModel(
        model=model,
        order=TokenOrder(t),
        patches=patches,
        channels=channels,
        files=replace(source.files, id=PREFIX + label),
        stem=f"open-clip-{slugify(name or source.name)}",
        architecture=f"per frame {loaded.architecture}",
        frames=t,
        size=loaded.size,
        mean=loaded.mean,
        std=loaded.std,
        resized=loaded.resized,
    )
