"""A head at its start, for the features that it is to be trained on."""

from __future__ import annotations

from torch import Tensor

from msq.config import RunConfig
from msq.head.features import Features
from msq.head.loss import loss_kind
from msq.head.model import MSQNet
from msq.head.start import initialise


def build_head(features: Features, config: RunConfig, train_rows: Tensor) -> MSQNet:
    """A head at its start for these features; the class priors are those of `train_rows`."""
    image = features.image
    model = MSQNet(
        config.head,
        classes=len(features.classes),
        token_width=features.tokens.shape[-1],
        image_width=None if image is None else image.shape[-1],
        text=None if features.text is None else features.text.cpu(),
        seed=config.train.seed,
    )
    labels = features.labels[train_rows].double().cpu()
    # Half a clip is added to either side, so that a class never seen keeps a finite log-odds.
    counted: float | Tensor = len(labels)
    if features.known is not None:
        known = features.known[train_rows].double().cpu()
        labels, counted = labels * known, known.sum(0)
    positive = labels.sum(0) + 0.5
    if loss_kind(config.train.loss, features.task) != "ce":
        prior = (positive / (counted + 1 - positive)).log()
    else:
        prior = (positive / positive.sum()).log()
    seen = None if image is None else image[train_rows]
    initialise(model, config.train.seed, image=seen, prior=prior.float())
    return model
