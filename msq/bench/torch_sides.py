"""The head as others would write it, from torch's own modules, with the weights of an `MSQNet`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from msq.bench.cases import Side
from msq.bench.runner import interleaved
from msq.head.model import MSQNet
from msq.head.official import to_official
from msq.head.position_code import sincos

Step = Callable[[], object]


class TorchDecoder(nn.Module):
    """The plain head with `nn.TransformerDecoder` in place of its layers.

    Args:
        head: a head without an encoder and without positions; its layers are taken from it.
    """

    def __init__(self, head: MSQNet) -> None:
        super().__init__()
        c, width = head.config, head.width
        layer = nn.TransformerDecoderLayer(
            width, c.heads, c.ffn or 4 * width, c.dropout, batch_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, c.layers, nn.LayerNorm(width))
        self.decoder.to(head.offset)
        theirs: Any
        mine: Any
        for theirs, mine in zip(self.decoder.layers, head.layers, strict=True):
            for own, other in (
                (mine.self_attention, theirs.self_attn),
                (mine.cross_attention, theirs.multihead_attn),
            ):
                parts = (own.q, own.k, own.v)
                other.in_proj_weight.data = torch.cat([p.weight.data for p in parts])
                other.in_proj_bias.data = torch.cat([p.bias.data for p in parts])
                other.out_proj.load_state_dict(own.out.state_dict())
            theirs.linear1.load_state_dict(mine.expand.state_dict())
            theirs.linear2.load_state_dict(mine.contract.state_dict())
            theirs.norm1.load_state_dict(mine.norm_self.state_dict())
            theirs.norm2.load_state_dict(mine.norm_cross.state_dict())
            theirs.norm3.load_state_dict(mine.norm_ffn.state_dict())
        assert self.decoder.norm is not None
        self.decoder.norm.load_state_dict(head.norm.state_dict())
        self.head = head
        del head.layers

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        """Logits [B, K] of tokens [B, S, D'] and image [B, D'']."""
        head = self.head
        assert head.fuse_label is not None
        assert head.fuse_image is not None
        label, _, weight, bias = head.class_parts(None, None)
        x = head.fuse_label(label) + head.fuse_image(image)[:, None]
        x = self.decoder(x, head.memory(tokens))
        logits: Tensor = (x * weight).sum(-1) + bias
        return logits


class AuthorsHead(nn.Module):
    """What the authors' code computes after its encoders: 6 + 6 layers of `nn.Transformer`.

    The label embeddings and the image feature are concatenated for every clip and class before
    they are projected.

    Args:
        head: of the official protocol.
    """

    code: Tensor

    def __init__(self, head: MSQNet) -> None:
        super().__init__()
        c, width = head.config, head.width
        named = to_official(head)
        classes, label = named["query_embed"].shape
        joined = named["linear2.weight"].shape[1]
        self.query_embed = nn.Parameter(torch.empty(classes, label))
        self.linear1 = nn.Linear(named["linear1.weight"].shape[1], width, bias=False)
        self.linear2 = nn.Linear(joined, width, bias=False)
        self.drop = nn.Dropout(c.dropout)
        self.transformer = nn.Transformer(
            width, c.heads, c.encoder_layers, c.layers, c.ffn or 4 * width, c.dropout,
            batch_first=True,
        )  # fmt: skip
        self.group_linear = nn.ParameterDict(
            {"W": torch.empty(1, classes, width), "b": torch.empty(1, classes)}
        )
        self.to(head.offset)
        self.load_state_dict(named)
        self.register_buffer("code", sincos(2000, width).to(head.offset), persistent=False)

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        """Logits [B, K] of tokens [B, T, D'] and image [B, D'']."""
        clips, classes = len(tokens), len(self.query_embed)
        source = self.linear1(tokens)
        source = self.drop(source + self.code[: source.shape[1]])
        label = self.query_embed.expand(clips, -1, -1)
        both = torch.cat([label, image[:, None].expand(-1, classes, -1)], dim=2)
        out = self.transformer(source, self.linear2(both))
        logits: Tensor = (self.group_linear["W"] * out).sum(-1) + self.group_linear["b"]
        return logits


def framework_forward(
    logits: Callable[[], Tensor],
    *,
    device: str,
    low: bool = False,
    backend: SDPBackend | None = None,
    cache: bool = True,
) -> Callable[[], Tensor]:
    """The forward pass of `framework_step`.

    Args:
        logits: the forward pass of a module.
        device: `cpu` or `cuda`.
        low: bfloat16 autocast.
        backend: of torch's attention; None leaves the choice to torch.
        cache: weights are cast once for all uses; not where it is to stand in a CUDA graph.
    """

    def forward() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=low, cache_enabled=cache):
            if backend is None:
                return logits()
            with sdpa_kernel(backend):
                return logits()

    return forward


def framework_step(
    logits: Callable[[], Tensor],
    loss: Callable[[Tensor], Tensor],
    parameters: list[nn.Parameter],
    *,
    device: str,
    low: bool = False,
    backend: SDPBackend | None = None,
    capturable: bool = False,
) -> Step:
    """A training step as a framework user writes it: autocast, autograd, fused AdamW.

    Args:
        logits: the forward pass.
        loss: of the logits.
        parameters: to be trained.
        device: `cpu` or `cuda`.
        low: bfloat16 autocast.
        backend: of torch's attention; None leaves the choice to torch.
        capturable: the optimiser can stand in a CUDA graph.
    """
    optimiser = torch.optim.AdamW(parameters, lr=1e-5, fused=True, capturable=capturable)
    forward = framework_forward(
        logits, device=device, low=low, backend=backend, cache=not capturable
    )

    def step() -> None:
        value = loss(forward())
        optimiser.zero_grad()
        torch.autograd.backward(value)
        optimiser.step()

    return step


def fastest_backend(
    step_of: Callable[[SDPBackend], Step], device: str, rounds: int = 3
) -> tuple[SDPBackend, Mapping[str, float]]:
    """The attention backend of torch with which a step is fastest, and the seconds of each.

    Args:
        step_of: makes a step with a backend; one that cannot run it raises `RuntimeError`.
        device: `cpu` or `cuda`.
        rounds: how often each is timed.
    """
    known = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
    if device == "cuda":
        known += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    usable: dict[str, Side] = {}
    for backend in known:
        step = step_of(backend)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # why a backend cannot be used
                step()
        except RuntimeError:  # "No available kernel"
            continue
        usable[backend.name] = Side(step)
    seconds = {
        name: min(t.wall for t in times) for name, times in interleaved(usable, rounds).items()
    }
    return SDPBackend.__members__[min(seconds, key=lambda name: seconds[name])], seconds
