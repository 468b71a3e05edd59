"""Where the parameters of a head start."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from msq.head.model import MSQNet


def random_rows(rows: int, width: int, seed: int) -> Tensor:
    """Seeded standard normal [rows, width], made on the CPU so that every device gets the same."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def initialise(
    model: MSQNet, seed: int, *, image: Tensor | None = None, prior: Tensor | None = None
) -> None:
    """Set every parameter as `head.start` says: `fitted` to the training set, or as `torch` does.

    Args:
        model: the head.
        seed: of the draws, made in the order of `named_parameters`.
        image: [n, D''] image features of the training clips; read by `fitted`.
        prior: [K] log-odds of the classes in the training set; read by `fitted`.
    """
    generator = torch.Generator().manual_seed(seed)
    if model.config.start == "torch":
        start_as_torch(model, generator)
    else:
        start_fitted(model, generator, image, prior)


@torch.no_grad()
def start_fitted(
    model: MSQNet, generator: torch.Generator, image: Tensor | None, prior: Tensor | None
) -> None:
    """The start of the `paper` protocol.

    | parameter | start |
    |---|---|
    | W_out, q, k, v, out, contract | normal, std 1 / sqrt(inputs) |
    | expand (before ReLU) | normal, std sqrt(2 / inputs) |
    | W_l, W_v | fitted to their inputs: queries of unit size |
    | classifier weight | normal, std 1 / sqrt(D) |
    | classifier generator | fitted to its inputs: weights of size 1 / sqrt(D) |
    | classifier bias | log-odds of the class (their mean where one bias serves all), else 0 |
    | label offset, query position, other biases | 0 |
    | LayerNorm | 1 and 0 |

    Fitted to inputs x: normal, std (size / sqrt(inputs)) / rms(x - mean(x)), then blind to the
    direction of mean(x). CLIP's embeddings share a large common part; without this the queries of
    all classes would start nearly equal.

    Args:
        model: the head.
        generator: of the draws.
        image: [n, D''] image features of the training clips.
        prior: [K] log-odds of the classes in the training set.
    """
    start = model.start if model.config.queries == "vanilla" else model.text
    fitted = {
        "fuse_label.weight": (start, 1.0),
        "fuse_image.weight": (image, 1.0),
        "classifier.generate.weight": (model.text, 1 / math.sqrt(model.width)),
    }
    for name, parameter in model.named_parameters():
        if not name.endswith("weight"):
            parameter.zero_()  # biases, label offset, query position
        elif parameter.ndim == 1:
            parameter.fill_(1.0)  # LayerNorm
        else:
            weight = torch.randn(parameter.shape, generator=generator) / math.sqrt(
                parameter.shape[1] / (2 if ".expand." in name else 1)
            )
            inputs, size = fitted.get(name, (None, 1.0))
            parameter.copy_(weight if inputs is None else size * _fitted(weight, inputs))
    if prior is not None:
        bias = model.get_parameter("classifier.bias")
        bias.copy_(prior if bias.shape == prior.shape else prior.mean().expand_as(bias))


def _fitted(weight: Tensor, inputs: Tensor) -> Tensor:
    """`weight` [D, n] made blind to the mean of `inputs` [N, n] and scaled by their spread."""
    inputs = inputs.detach().float().cpu()
    mean = inputs.mean(0)
    # Rows that are all equal (or a single one) have no spread: keep their mean then.
    if float((inputs - mean).square().mean()) <= 1e-6 * float(inputs.square().mean()):
        return weight / max(float(inputs.square().mean().sqrt()), 1e-6)
    direction = F.normalize(mean, dim=0)
    blind = weight - torch.outer(weight @ direction, direction)
    return blind / float((inputs - mean).square().mean().sqrt())


@torch.no_grad()
def start_as_torch(model: MSQNet, generator: torch.Generator) -> None:
    """The start of the `official` protocol: that of torch's own modules, U(-bound, bound).

    | parameter | bound |
    |---|---|
    | W_out | 1 / sqrt(D') |
    | W_l, W_v (one `nn.Linear` over both) | 1 / sqrt(D_l + D'') |
    | q, k, v (one Xavier matrix [3 D, D]) | sqrt(6 / (4 D)) |
    | out, expand, contract (Xavier) | sqrt(6 / (inputs + outputs)) |
    | bias of expand and contract | 1 / sqrt(inputs) |
    | classifier weight and bias | 1 / sqrt(D) |
    | biases of attention, label offset, query position | 0 |
    | LayerNorm | 1 and 0 |

    Args:
        model: the head.
        generator: of the draws.
    """
    fused = sum(
        linear.in_features for linear in (model.fuse_label, model.fuse_image) if linear is not None
    )
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, nn.LayerNorm):
            parameter.fill_(1.0 if leaf == "weight" else 0.0)
            continue
        if owner.startswith("classifier"):
            bound = 1 / math.sqrt(model.width)
        elif not isinstance(module, nn.Linear):
            bound = 0.0  # label offset, query position
        elif owner in ("memory", "fuse_label", "fuse_image"):
            bound = 1 / math.sqrt(module.in_features if owner == "memory" else fused)
        elif owner.endswith((".expand", ".contract")) and leaf == "bias":
            bound = 1 / math.sqrt(module.in_features)
        elif leaf == "bias":
            bound = 0.0
        else:
            packed = 3 if owner.endswith((".q", ".k", ".v")) else 1
            bound = math.sqrt(6 / (module.in_features + packed * module.out_features))
        drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        parameter.copy_(drawn)
