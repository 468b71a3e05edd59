"""Honest opponents for a head, on the same features and the same clips."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from msq.errors import UsageError
from msq.head.features import Features
from msq.head.loss import head_loss, loss_kind
from msq.head.metrics import mean_average_precision
from msq.head.token_batches import with_next
from msq.head.train import split_rows

DECAYS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)  # tried by the linear probe


def class_frequency(features: Features, rows: Tensor) -> Tensor:
    """Log-odds of each class in the training and validation clips, the same for every clip.

    It ignores the video: a number it reaches is one that needs no model.

    Args:
        features: with a training split.
        rows: [n] the clips to score.

    Returns:
        [n, K].
    """
    labels = features.labels[features.rows("train", "val")].double()
    share = ((labels.sum(0) + 0.5) / (len(labels) + 1)).clamp(max=1 - 1e-9)
    return share.logit().expand(len(rows), -1)


def clip_similarity(features: Features, rows: Tensor, columns: list[int] | None = None) -> Tensor:
    """Cosine between a clip's image feature and each class text: CLIP without any training.

    It means something only where both lie in CLIP's joint space (projected outputs, not poolers).

    Args:
        features: with image and text features of one width.
        rows: [n] the clips to score.
        columns: the classes to score; all where None.

    Returns:
        [n, K].

    Raises:
        UsageError: one of them is missing, or they differ in width.
    """
    if features.image is None or features.text is None:
        raise UsageError(f"features of {features.name}: expected image and text, found only one")
    if features.image.shape[1] != features.text.shape[1]:
        raise UsageError(
            f"features of {features.name}: expected image and text of one width (projected "
            f"outputs), found {features.image.shape[1]} and {features.text.shape[1]}"
        )
    text = features.text if columns is None else features.text[columns]
    return F.normalize(features.image[rows].float(), dim=1) @ F.normalize(text.float(), dim=1).T


def averaged(features: Features) -> Tensor:
    """[N, D' + D'']: tokens averaged over S, beside the image feature where there is one."""
    rows = torch.arange(len(features.ids), device=features.tokens.device)
    means = [x.float().mean(1) for _, x in with_next(features.tokens, torch.split(rows, 256))]
    parts = [torch.cat(means)]
    if features.image is not None:
        parts.append(features.image.float())
    return torch.cat(parts, dim=1)


def linear_probe(
    features: Features, rows: Tensor, *, val: float = 0.1, seed: int = 0
) -> tuple[Tensor, dict[str, float]]:
    """Logistic regression on averaged features, one weight vector and bias per class.

    Features are standardised on the training clips. The strength of the weight decay is the one
    with the best mAP on the validation clips (those a head with this `val` and `seed` has), and
    the probe is then fitted again to training and validation clips together.

    Args:
        features: with a training split.
        rows: [n] the clips to score.
        val: share of the training clips held out where there is no validation split.
        seed: of that choice.

    Returns:
        logits [n, K], and what was chosen: `decay`, `val_map`.
    """
    train, held = split_rows(features, val, seed)
    x, y = averaged(features), features.labels
    x = (x - x[train].mean(0)) / x[train].std(0, correction=0).clamp(min=1e-6)
    kind = loss_kind("auto", features.task)
    decay, best = 1e-2, float("nan")
    for candidate in DECAYS if held.numel() else ():
        value = mean_average_precision(_fitted(x, y, train, candidate, kind)(x[held]), y[held])
        if best != best or value > best:
            decay, best = candidate, float(value)
    probe = _fitted(x, y, torch.cat([train, held]), decay, kind)
    return probe(x[rows]).detach(), {"decay": decay, "val_map": best}


def _fitted(x: Tensor, y: Tensor, rows: Tensor, decay: float, kind: str) -> torch.nn.Linear:
    """The minimum of mean loss per clip + decay / 2 * |W|^2, by L-BFGS from zero."""
    probe = torch.nn.Linear(x.shape[1], y.shape[1]).to(x.device)
    for parameter in probe.parameters():
        torch.nn.init.zeros_(parameter)
    x, y = x[rows], y[rows]
    scale = y.shape[1] if kind == "bce" else 1  # the sum over classes, so that each is fitted alone
    optimiser = torch.optim.LBFGS(
        probe.parameters(), max_iter=150, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = scale * head_loss(probe(x), y, kind) + decay / 2 * probe.weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return probe.requires_grad_(False)
