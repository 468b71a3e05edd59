"""The sections of a head's configuration: what can be set, its defaults, and what cannot be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from msq.errors import UsageError
from msq.protocol import Protocol

SEEDS = 2**43  # a generator takes 64 bits, and each epoch has a seed of its own
Queries = Literal["vanilla", "text", "multimodal"]
Classifier = Literal["per-class", "shared", "text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig:
    """Shape and ablation switches of the head.

    Attributes:
        queries: what the class queries start from (Section 3.2 of the paper): `vanilla` random,
            `text` the class text embeddings, `multimodal` text plus the clip's image feature.
        classifier: `per-class` (Eq. 7), `shared` (one vector for all classes) or `text` (a vector
            generated from the class text). Only the last two can score classes never trained.
        width: D; None means the width of the text embeddings (of the tokens where no text is).
        layers: decoder layers L.
        heads: attention heads H; must divide the width.
        ffn: hidden width of the feed-forward part; None means 4 * width.
        dropout: probability of every dropout of encoder and decoder.
        memory_position: `sincos` adds a position code to the keys of the cross-attention,
            `sincos-input` to the tokens themselves, followed by a dropout; `none` adds none.
        query_position: learned position per class, added to query and key; starts at zero.
        encoder_layers: layers of self-attention over the tokens, before the decoder.
        label_projection: `always` projects the label embeddings; `fused` only where an image
            feature is fused with them, and else takes them as queries as they are.
        start: `fitted` to the training set, or as `torch` starts its own modules.
    """

    queries: Queries = "multimodal"
    classifier: Classifier = "per-class"
    width: int | None = None
    layers: int = 6
    heads: int = 8
    ffn: int | None = None
    dropout: float = 0.1
    memory_position: Literal["sincos", "sincos-input", "none"] = "sincos"
    query_position: bool = False
    encoder_layers: int = 0
    label_projection: Literal["always", "fused"] = "always"
    start: Literal["fitted", "torch"] = "fitted"

    def __post_init__(self) -> None:
        """Refuse values that no head can have."""
        _at_least("head.layers", self.layers, 1)
        _at_least("head.encoder_layers", self.encoder_layers, 0)
        _at_least("head.heads", self.heads, 1)
        if self.width is not None:
            _at_least("head.width", self.width, 1)
        if self.ffn is not None:
            _at_least("head.ffn", self.ffn, 1)
        _share("head.dropout", self.dropout)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """The optimiser and its schedule.

    Attributes:
        name: `adamw` (decoupled decay) or `adam` (as in the paper).
        lr: highest learning rate; the paper's is 1e-5 with `adam` and 100 epochs.
        weight_decay: applied to matrices only, never to biases and LayerNorm.
        schedule: `cosine` to zero over all epochs, `constant`, or `warm-restarts`, a cosine that
            begins again every `restart_epochs` and moves once an epoch; all after the warm-up.
        restart_epochs: read by `warm-restarts`.
        warmup: epochs of linear warm-up, fractions allowed.
        clip_grad: largest gradient norm; 0 switches clipping off.
        beta2: second-moment decay.
    """

    name: Literal["adamw", "adam"] = "adamw"
    lr: float = 5e-4
    weight_decay: float = 0.01
    schedule: Literal["cosine", "constant", "warm-restarts"] = "cosine"
    restart_epochs: int = 10
    warmup: float = 1.0
    clip_grad: float = 1.0
    beta2: float = 0.999

    def __post_init__(self) -> None:
        """Refuse values that no optimiser can have."""
        for key in ("lr", "weight_decay", "warmup"):
            _finite(f"optim.{key}", getattr(self, key))
        _at_least("optim.clip_grad", self.clip_grad, 0)
        _at_least("optim.restart_epochs", self.restart_epochs, 1)
        _share("optim.beta2", self.beta2)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The loop.

    Attributes:
        protocol: which reading of the method the run follows; every result names it.
        loss: `bce`, `ce`, or `auto`: `bce` for multilabel and `ce` for singlelabel (Eq. 8);
            `asymmetric` (Ridnik et al. 2021) or `focal` (Lin et al. 2017), for rare labels.
        gamma_neg: of `asymmetric`: exponent of the weight of classes that a clip has not.
        gamma_pos: of `asymmetric`: exponent of the weight of classes that it has.
        clip_margin: of `asymmetric`: what is taken off the probability of a class that a clip has
            not; where nothing is left, the pair adds nothing.
        focal_gamma: of `focal`: exponent of the weight of every class.
        focal_alpha: of `focal`: share of the classes that a clip has; 0.5 weighs both sides alike.
        epochs: passes over the training clips, or over `epoch_clips` of them.
        epoch_clips: clips drawn for each epoch, none twice unless there are fewer, and its last
            batch may be short; 0 means the training set, in batches of one size.
        batch: clips per step; a smaller training set makes it smaller where `epoch_clips` is 0.
        seed: of the start, the order, the dropout and the validation tenth.
        val: share of the training clips held out, where the dataset has no validation split;
            0 trains on everything, and then nothing is selected and nothing stops early.
        select: `best` keeps the weights of the epoch with the highest validation score, `last`
            those of the last epoch.
        select_by: that score: `map`, or `official`, the authors' micro AP per batch of 32 (top-1
            for singlelabel).
        patience: epochs without a better validation score after which training stops; 0 never.
        ema: decay of the averaged weights, which are then the ones validated, kept and tested;
            0 uses the raw weights.
        path: `packed` (large fused operations), `plain` (the readable head), or `auto`: packed.
            Both compute the same, with the same dropout.
        precision: of the training steps: `fp32`, `bf16` (with float32 parameters, optimiser, norms
            and loss), or `auto`: bf16 on a GPU, fp32 elsewhere. Scoring is float32.
        kernels: of the packed head: `reference` (PyTorch), `triton` (refused where it cannot run),
            or `auto`: Triton where a recorded measurement on this kind of GPU says it is faster.
        graph: whether the whole step is one CUDA graph: `on` (refused without a CUDA device),
            `off`, or `auto`: off until it has been measured. Its dropout masks are others.
        tensorboard: also write the epochs and the scores as TensorBoard's event files; decides
            nothing else, and needs the package `tensorboard`.
    """

    protocol: Protocol = "paper"
    loss: Literal["auto", "bce", "ce", "asymmetric", "focal"] = "auto"
    gamma_neg: float = 4.0
    gamma_pos: float = 0.0
    clip_margin: float = 0.05
    focal_gamma: float = 2.0
    focal_alpha: float = 0.25
    epochs: int = 30
    epoch_clips: int = 0
    batch: int = 32
    seed: int = 0
    val: float = 0.1
    select: Literal["best", "last"] = "best"
    select_by: Literal["map", "official"] = "map"
    patience: int = 0
    ema: float = 0.99
    path: Literal["auto", "plain", "packed"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    kernels: Literal["auto", "triton", "reference"] = "auto"
    graph: Literal["auto", "on", "off"] = "auto"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no loop can have."""
        _at_least("train.epochs", self.epochs, 1)
        _at_least("train.epoch_clips", self.epoch_clips, 0)
        _at_least("train.batch", self.batch, 1)
        _at_least("train.patience", self.patience, 0)
        if abs(self.seed) > SEEDS:
            raise UsageError(
                f"train.seed: expected a whole number from {-SEEDS} to {SEEDS}, found {self.seed}"
            )
        _share("train.val", self.val)
        _share("train.ema", self.ema)
        for key in ("gamma_neg", "gamma_pos", "focal_gamma"):
            _finite(f"train.{key}", getattr(self, key))
        _share("train.clip_margin", self.clip_margin)
        if not 0 < self.focal_alpha < 1:
            raise UsageError(
                "train.focal_alpha: expected a share between 0 and 1, both left out, found "
                f"{self.focal_alpha}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureConfig:
    """Which arrays of the store are read.

    Attributes:
        video: name of the video encoder; None where the store has one only.
        image: name of the image encoder; None where the store has one only.
        text: name of the text encoder; None where the store has one only.
        prompt: name of the prompt; None where the store has one only.
        view: 0 is the clean view.
        partition: which of the store's official splits, such as `split1`; None takes the first,
            where it has several. `all` (of `train-head` alone) is one run for each.
        train_views: what training clips are shown in: `clean`, the `augmented` views of the
            store, or `all` of both, one drawn for each clip at each step. Validation and test
            clips are always clean.
        feed: `resident` keeps the tokens in memory, `stream` leaves them on disk and reads each
            batch ahead of its step, `auto` streams what would take more than half of the memory.
    """

    video: str | None = None
    image: str | None = None
    text: str | None = None
    prompt: str | None = None
    view: int = 0
    partition: str | None = None
    train_views: Literal["clean", "augmented", "all"] = "clean"
    feed: Literal["auto", "resident", "stream"] = "auto"

    def __post_init__(self) -> None:
        """Refuse a view that no store can have."""
        _at_least("features.view", self.view, 0)
        if self.view and self.train_views != "clean":
            raise UsageError(
                f"features.train_views={self.train_views}: validation and test clips are clean; "
                f"expected features.view=0, found {self.view}"
            )


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise UsageError(f"{name}: expected at least {low}, found {value}")


def _finite(name: str, value: float) -> None:
    _at_least(name, value, 0)
    if value == math.inf:
        raise UsageError(f"{name}: expected a finite number, found {value}")


def _share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise UsageError(f"{name}: expected a share in [0, 1), found {value}")
