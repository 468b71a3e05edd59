"""t-SNE of clips, and a number beside it that no layout can flatter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msq.errors import UsageError

COMPONENTS = 50  # of the principal component analysis before t-SNE, as van der Maaten advises
PERPLEXITY = 30.0
NEIGHBOURS = 10
FEWEST = 4  # distinct clips
_AT_ONCE = 256  # clips whose distances to all others are computed together


@dataclass(frozen=True, eq=False)
class Layout:
    """Clips in the plane.

    Attributes:
        points: [N, 2] float64; only who is near whom means something.
        perplexity: the one used: at most a third of the other clips.
        divergence: Kullback-Leibler divergence that is left, in nats.
        distinct: clips that differ; equal ones have one place.
    """

    points: np.ndarray
    perplexity: float
    divergence: float
    distinct: int


def require_tsne() -> None:
    """Refuse to begin what could not be computed.

    Raises:
        UsageError: scikit-learn is not there.
    """
    try:
        import sklearn.manifold  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"t-SNE needs the package scikit-learn: pip install 'msq[plots]'; found: {error}"
        ) from None


def require_perplexity(perplexity: float) -> None:
    """Refuse what is no number of neighbours.

    Raises:
        UsageError: it is not above 0.
    """
    if not perplexity > 0:
        raise UsageError(f"--perplexity: expected a number above 0, found {perplexity:g}")


def layout(x: Tensor, perplexity: float = PERPLEXITY) -> Layout:
    """t-SNE (van der Maaten and Hinton 2008) by scikit-learn, in one thread.

    It starts from the first two principal components, so that no luck is in it, and is the same
    again on one machine with the same libraries. Clips are equal where all their values are: t-SNE
    sees one of them, and they share its place.

    Args:
        x: [N, D] finite, on the CPU.
        perplexity: about how many neighbours a clip keeps.

    Raises:
        UsageError: fewer than four clips that differ, values that are not finite, a perplexity that
            is not above 0, or scikit-learn is not there.
    """
    require_tsne()
    require_perplexity(perplexity)
    broken = int((~x.isfinite().all(1)).sum())
    if broken:
        raise UsageError(f"t-SNE: expected finite values, found others in {broken} of {len(x)} "
                         "clips")  # fmt: skip
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    values = x.double().numpy() + 0.0  # no -0, which differs from 0 as bytes do
    _, first, same = np.unique(values, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)  # of first appearance
    place = np.argsort(order)[same.reshape(-1)]
    values = values[first[order]]
    n = len(values)
    if n < FEWEST:
        raise UsageError(f"t-SNE: expected at least {FEWEST} clips that differ, found {n}")
    used = min(perplexity, (n - 1) / 3)
    with threadpool_limits(limits=1):  # sums over threads have no order of their own
        if values.shape[1] > COMPONENTS:
            parts = min(COMPONENTS, n)
            values = PCA(parts, svd_solver="full").fit_transform(values)
        made = TSNE(2, perplexity=used, init="pca", learning_rate="auto", random_state=0)
        points = made.fit_transform(values)
    return Layout(points.astype(np.float64)[place], used, float(made.kl_divergence_), n)


def label_agreement(
    x: Tensor, labels: Tensor, neighbours: int = NEIGHBOURS
) -> dict[str, float | int | None]:
    """How often the nearest clips show what a clip shows, in the space of the features themselves.

    The mean over clips of the share of their k nearest others (Euclidean distance, no reduction)
    that have a label in common with them. Clips at the same distance as the k-th share the places
    that are left. Clips without a label neither ask nor answer.

    Args:
        x: [N, D] features, on the CPU.
        labels: [N, K], not 0 where a clip has a class.
        neighbours: k.

    Returns:
        `agreement` (fraction), `chance` (the same among all others: what a space that knows nothing
        gives), `neighbours` (k, fewer where there are not so many others), `clips` (with a label).
        The first two are None with fewer than two such clips.
    """
    keep = (labels != 0).any(1)
    x, shown = x[keep].double(), (labels[keep] != 0).float()
    n = len(x)
    k = min(neighbours, n - 1)
    found: dict[str, float | int | None] = {
        "agreement": None,
        "chance": None,
        "neighbours": max(k, 0),
        "clips": n,
    }
    if n < 2:
        return found
    agreeing, others = [], []
    for rows in torch.split(torch.arange(n), _AT_ONCE):
        own = rows[:, None] == torch.arange(n)
        far = torch.cdist(x[rows], x, compute_mode="donot_use_mm_for_euclid_dist")
        far[own] = torch.inf
        alike = ((shown[rows] @ shown.T) > 0).double()
        alike[own] = 0
        last = far.kthvalue(k, dim=1, keepdim=True).values
        near, tied = (far < last).double(), (far == last).double()
        weight = near + tied * (k - near.sum(1, keepdim=True)) / tied.sum(1, keepdim=True)
        agreeing.append((weight * alike).sum(1) / k)
        others.append(alike.sum(1) / (n - 1))
    return {
        **found,
        "agreement": float(torch.cat(agreeing).mean()),
        "chance": float(torch.cat(others).mean()),
    }


def panel(x: Tensor, labels: Tensor, made: Layout, what: str) -> dict[str, Any]:
    """What is said of one picture, but for its points."""
    return {
        "what": what,
        "dimensions": x.shape[1],
        **label_agreement(x, labels),
        "distinct": made.distinct,
        "perplexity": made.perplexity,
        "divergence": made.divergence,
    }
