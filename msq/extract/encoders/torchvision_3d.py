"""The 3-D networks of torchvision as video encoders, in place of the paper's 3-D CNN rows.

Tokens are the places of the feature map before the global pooling, [B, D', t, h', w']: a token per
step t is the mean over space, and the mean over all takes the place of a global token, which is
just what the network's own classifier reads. t is T divided by the network's stride in time.
MViT has a class token of its own, and its tokens are those after its final LayerNorm.

The networks are cut by calling their modules one after the other. torchvision's own way,
`create_feature_extractor`, gives the same but for MViT, whose traced copy computes other numbers
than the network itself (seen with torchvision 0.29).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from msq.errors import UsageError
from msq.extract.encoders.pooling import TokenOrder
from msq.extract.encoders.spec import slugify
from msq.extract.encoders.url_weights import fetch_url
from msq.extract.encoders.video_model import VideoModel
from msq.extract.encoders.weights import WeightFiles, find_weights, load_strictly, read_tensors

PREFIX = "torchvision/"
_TAG = "DEFAULT"


@dataclass(frozen=True)
class _Network:
    """Which of a network's modules lead to its last feature map, and what comes out there.

    Attributes:
        modules: names of the modules, in order.
        head: prefix of the classifier's tensors, which are left out.
        frames: T that its weights were trained or evaluated with.
        layout: `channels-first` or `channels-last` feature map, or `tokens` with a class token.
    """

    modules: tuple[str, ...]
    head: str
    frames: int
    layout: str = "channels-first"


_RESNET = _Network(("stem", "layer1", "layer2", "layer3", "layer4"), "fc.", 16)
_SWIN = _Network(("patch_embed", "pos_drop", "features", "norm"), "head.", 32, "channels-last")
_MVIT = _Network(("conv_proj", "pos_encoding", "blocks", "norm"), "head.", 16, "tokens")
NETWORKS = {
    "r3d_18": _RESNET,
    "mc3_18": _RESNET,
    "r2plus1d_18": _RESNET,
    "s3d": _Network(("features",), "classifier.", 16),
    "swin3d_t": _SWIN,
    "swin3d_s": _SWIN,
    "swin3d_b": _SWIN,
    "mvit_v1_b": _MVIT,
    "mvit_v2_s": _MVIT,
}


class FeatureMap(nn.Module):
    """A network up to its last feature map; what comes after it is dropped."""

    def __init__(self, network: nn.Module, parts: _Network) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: getattr(network, name) for name in parts.modules})
        self.layout = parts.layout

    def map(self, video: Tensor) -> Tensor:
        """[B, T, 3, h, w] to [B, t, h', w', D'], or to [B, 1 + N·t, D'] for `tokens`."""
        x = video.transpose(1, 2)
        if self.layout == "tokens":
            return self._tokens(x)
        for part in self.parts.values():
            x = part(x)
        return x.permute(0, 2, 3, 4, 1) if self.layout == "channels-first" else x

    def _tokens(self, x: Tensor) -> Tensor:
        """MViT's: its blocks take the extent of the map along, since pooling shrinks it."""
        conv, position, blocks, norm = self.parts.values()
        x = position(conv(x).flatten(2).transpose(1, 2))
        extent = (cast(Any, position).temporal_size, *cast(Any, position).spatial_size)
        for block in cast(nn.ModuleList, blocks):
            x, extent = block(x, extent)
        return cast(Tensor, norm(x))

    def forward(self, video: Tensor) -> Tensor:
        """Encodes normalised frames.

        Args:
            video: [B, T, 3, h, w] float.

        Returns:
            [B, N·t, D'], time-major; with the class token first where the network has one.
        """
        out = self.map(video)
        return out if self.layout == "tokens" else out.flatten(1, 3)


def load_torchvision(
    name: str,
    weights: str | None = None,
    *,
    frames: int | None = None,
    size: int | None = None,
    strict: bool = True,
) -> VideoModel:
    """Loads a 3-D network of torchvision.

    Args:
        name: a network, with or without a tag of its weights (`r3d_18/KINETICS400_V1`).
        weights: a file with its state dict; None for torchvision's own weights.
        frames: T; the network's own by default.
        size: height and width in pixels; that of the weights by default.
        strict: refuse missing and unexpected names.

    Raises:
        UsageError: for an unknown network, or a T or size that it cannot take.
        WeightsError: if the weights cannot be found, read or do not fit.
    """
    from torchvision.models import get_model

    name, _, tag = name.partition("/")
    if name not in NETWORKS:
        raise UsageError(f"{PREFIX}{name}: no such network; there are {', '.join(NETWORKS)}")
    published, transforms = _published(name, tag)
    files = _files(name, published, weights)
    network = NETWORKS[name]
    t = frames or network.frames
    pixels = size or int(transforms.crop_size[0])
    own = (network.frames, int(transforms.crop_size[0]))
    if network is _MVIT and (t, pixels) != own:
        raise UsageError(
            f"{PREFIX}{name}: its position embeddings are for {own[0]} frames of {own[1]} pixels "
            f"only, found {t} of {pixels}; leave out frames and size"
        )
    state = read_tensors(files.file)
    full = get_model(name, weights=None)
    head = {k: v for k, v in full.state_dict().items() if k.startswith(network.head)}
    # Of any number of classes: it is not used.
    state = {k: v for k, v in state.items() if not k.startswith(network.head)}
    load_strictly(full, {**state, **head}, files.id, strict=strict)
    model = FeatureMap(full, network).eval()
    steps, patches, channels = _shape(model, t, pixels, name)
    return VideoModel(
        model=model,
        order=TokenOrder(steps, time_major=True, global_token=network is _MVIT),
        patches=patches,
        channels=channels,
        files=files,
        stem=f"torchvision-{slugify(name)}",
        architecture=f"torchvision {name} {network.modules[-1]}",
        frames=t,
        size=pixels,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )


def _published(name: str, tag: str) -> tuple[Any, Any]:
    """The library's entry of a network's weights, and their transforms."""
    from torchvision.models import get_model_weights

    known = get_model_weights(name)
    if tag not in ("", _TAG) and tag not in known.__members__:
        tags = ", ".join(known.__members__)
        raise UsageError(
            f"{PREFIX}{name}: weights {tag!r} are neither a file nor one of its tags: {tags}"
        )
    entry = known[tag or _TAG]
    return entry, entry.transforms()


def _files(name: str, published: Any, weights: str | None) -> WeightFiles:
    if weights is None:
        label = f"{PREFIX}{name}/{published.name}"
        path = fetch_url(published.url, label, f"Without network, give {PREFIX}{name}/FILE")
        return WeightFiles(path, path.parent, label, name)
    files = find_weights(weights)
    return replace(files, id=f"{PREFIX}{name}/{files.id}")


@torch.inference_mode()
def _shape(model: FeatureMap, frames: int, size: int, name: str) -> tuple[int, int, int]:
    """t, N and D', by a forward pass that computes shapes alone."""
    shapes = copy.deepcopy(model).to("meta")
    try:
        out = shapes.map(torch.zeros(1, frames, 3, size, size, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UsageError(
            f"{PREFIX}{name}: cannot take {frames} frames of {size} pixels: {error}"
        ) from error
    if model.layout == "tokens":
        steps = int(cast(Any, model.parts["pos_encoding"]).temporal_size)
        return steps, (out.shape[1] - 1) // steps, out.shape[2]
    _, steps, height, width, channels = out.shape
    if 0 in (steps, height, width):
        raise UsageError(f"{PREFIX}{name}: nothing is left of {frames} frames of {size} pixels; "
                         "give more")  # fmt: skip
    return steps, height * width, channels
