"""How much memory there is: for features, for a training step, for scoring.

What a step needs is computed beforehand, so that a run that cannot fit is refused in a sentence
before its first step, and not killed in the middle. M = B K rows, e bytes an element (4, or 2 in
bf16); a step keeps for its backward pass, in bytes:

* packed, a decoder layer: e (12 M D + M F + B H K^2 + B H K S + 2 B S D);
* packed, an encoder layer: e (8 B S D + B S F + B H S^2);
* plain, a decoder layer: e (18 M D + 3 M F + 3 B H K^2 + 3 B H K S + 2 B S D), and without dropout
  e (14 M D + M F + 2 B S D);
* plain, an encoder layer: e (12 B S D + 3 B S F + 3 B H S^2), and without dropout e (10 B S D +
  B S F);
* stacked, for each head: as plain, but its products keep the probabilities without dropout too,
  e (15 M D + M F + B H K^2 + B H K S + 2 B S D), and e (10 B S D + B S F + B H S^2) in the encoder;

and for a moment the larger of e (M F + 4 M D) and what attention needs (packed: 4 e B H K^2, half
of it without dropout; plain: e B H K^2, or nothing), one bit for each decision of dropout, 8 M D
for the classifier, the batch, what of streamed tokens waits beside it, and the gradients of the P
parameters, 4 P (2 P packed in bf16). Two moments of the optimiser and the best weights so far make
12 P more, from the first epoch on. A kernel for the self-attention keeps no probabilities: then the
terms with K^2 fall away.

Against what was allocated on a CPU, over shapes with many and few classes, both versions of the
head, both precisions, with dropout and without, this is 0.75 to 1.5 times as much
(`tests/test_training_errors.py`).
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from msq.errors import UsageError
from msq.head.stream import StreamedTokens, waiting_bytes

if TYPE_CHECKING:
    from msq.config import RunConfig
    from msq.head.features import Features
    from msq.head.packed_choice import StepChoice

Feed = Literal["auto", "resident", "stream"]
SHARE = 0.5  # of what is available may be features; the rest is for the training itself
_CGROUP = Path("/sys/fs/cgroup")
_RECLAIMABLE = ("active_file", "inactive_file", "slab_reclaimable")  # lines of memory.stat, bytes


def available_bytes(device: str | torch.device) -> int:
    """Bytes that can still be had: of the GPU, or of this machine within its group's limit."""
    device = torch.device(device)
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle  # what torch holds and does not use
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found = 1024 * int(line.split()[1])
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        found = found if limit == "max" else min(found, int(limit) - used + _reclaimable())
    except (OSError, ValueError):
        pass  # another system, or no group: what was found so far is what is known
    return max(found, 0)


def _reclaimable() -> int:
    """Bytes of this group's use that the kernel gives back when asked: files that were read."""
    try:
        lines = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        return sum(int(value) for key, value in map(str.split, lines) if key in _RECLAIMABLE)
    except (OSError, ValueError):
        return 0


def give_back(device: str | torch.device) -> None:
    """Free what is of no more use: recorded steps, and errors with their frames, are circles."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def fits(size: int, device: str | torch.device) -> bool:
    """Whether so many bytes of features may be resident on a device."""
    return size <= SHARE * available_bytes(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What the memory of a training step depends on.

    Attributes:
        batch: B.
        classes: K.
        tokens: S.
        token_width: D'.
        width: D.
        ffn: F.
        layers: L.
        encoder_layers: of self-attention over the tokens.
        heads: H.
        dropout: whether there is any.
        path: `packed`, `plain`, or `stacked` for one of several heads at once.
        precision: `fp32` or `bf16`.
        fused: whether a kernel does the self-attention of the queries.
        waiting: bytes of each number of tokens that batches take beside the one of the step:
            streamed ones come ahead (`stream.waiting_bytes`), others do not.
    """

    batch: int
    classes: int
    tokens: int
    token_width: int
    width: int
    ffn: int
    layers: int
    encoder_layers: int = 0
    heads: int = 8
    dropout: bool = True
    path: str = "packed"
    precision: str = "fp32"
    fused: bool = False
    waiting: int = 0

    @classmethod
    def of(
        cls,
        features: Features,
        config: RunConfig,
        choice: StepChoice,
        device: str | torch.device = "cpu",
    ) -> StepShape:
        """Of a run on a device."""
        head, text = config.head, features.text
        token_width = features.tokens.shape[-1]
        width = head.width or (token_width if text is None else text.shape[1])
        return cls(
            batch=min(config.train.batch, max(len(features.rows("train")), 1)),
            classes=len(features.classes),
            tokens=features.tokens.shape[1],
            token_width=token_width,
            width=width,
            ffn=head.ffn or 4 * width,
            layers=head.layers,
            encoder_layers=head.encoder_layers,
            heads=head.heads,
            dropout=bool(head.dropout),
            path=choice.path,
            precision=choice.precision,
            fused="self_attention" in choice.ops,
            waiting=waiting(features.tokens, device),
        )

    @property
    def parameters(self) -> int:
        """P, but for the small ones: of the layers, the classifier and the projections."""
        d, layer = self.width, 4 * self.width**2 + 2 * self.width * self.ffn
        layers = self.layers * (layer + 4 * d * d) + self.encoder_layers * layer
        return layers + d * (self.token_width + 2 * d + 2 * self.classes)


def step_bytes(shape: StepShape) -> int:
    """Bytes that a training step allocates at its worst, weights and their state left out."""
    b, k, s, d, f, h = (shape.batch, shape.classes, shape.tokens, shape.width, shape.ffn,
                        shape.heads)  # fmt: skip
    md, mf, square, cross = b * k * d, b * k * f, b * h * k * k, b * h * k * s
    bsd, bsf, own = b * s * d, b * s * f, b * h * s * s
    square = 0 if shape.fused else square
    if shape.path == "packed":
        kept = 12 * md + mf + square + cross + 2 * bsd
        encoder, moment = 8 * bsd + bsf + own, (4 if shape.dropout else 2) * square
    elif shape.dropout:
        kept = 18 * md + 3 * mf + 3 * (square + cross) + 2 * bsd
        encoder, moment = 12 * bsd + 3 * bsf + 3 * own, square
    elif shape.path == "stacked":
        kept, encoder = 15 * md + mf + square + cross + 2 * bsd, 10 * bsd + bsf + own
        moment = 2 * square
    else:
        kept, encoder, moment = 14 * md + mf + 2 * bsd, 10 * bsd + bsf, 0
    low = shape.precision == "bf16"
    element = 2 if low else 4
    numbers = shape.layers * kept + shape.encoder_layers * encoder + max(moment, mf + 4 * md)
    bits = shape.layers * (square + cross + 3 * md + mf) // 8 if shape.dropout else 0
    batch = b * s * ((4 + shape.waiting) * shape.token_width + 4 * d) + 8 * md
    gradients = (2 if low and shape.path == "packed" else 4) * shape.parameters
    return element * numbers + bits + batch + gradients


def scoring_bytes(shape: StepShape) -> int:
    """Bytes that scoring B clips in float32 allocates at its worst, nothing kept."""
    rows = shape.batch * shape.classes
    pairs = shape.batch * shape.heads * shape.classes * max(shape.classes, shape.tokens)
    words = shape.batch * shape.tokens * (shape.token_width + 4 * shape.layers * shape.width)
    ahead = shape.waiting * shape.batch * shape.tokens * shape.token_width
    numbers = rows * (7 * shape.width + shape.ffn) + 2 * pairs + words + shape.parameters // 3
    return 4 * numbers + ahead


def waiting(tokens: object, device: str | torch.device) -> int:
    """Bytes of each number of tokens in batches beside that of the step; 0 where none come ahead.

    Args:
        tokens: as `Features` have them, on this device or still to be brought there.
        device: to compute on.
    """
    device = torch.device(device)
    if isinstance(tokens, StreamedTokens):
        return tokens.waiting(torch.float32, device)
    if not isinstance(tokens, torch.Tensor) or tokens.device.type == device.type:
        return 0
    streamed = device.type == "cuda" and not fits(tokens.nbytes, device)
    return waiting_bytes(tokens.dtype, torch.float32, device) if streamed else 0


def moving_bytes(features: Features, device: str | torch.device) -> int:
    """Bytes of a device that features take when they are brought there from another one."""
    device, total = torch.device(device), 0
    views = features.train_views
    arrays = [features.tokens, features.image, features.labels]
    arrays += [] if views is None else [views.tokens, views.image]
    for x in arrays:
        if isinstance(x, torch.Tensor) and x.device.type != device.type:
            whole = x is not features.tokens or fits(x.nbytes, device)
            total += x.nbytes if whole else 0  # else they come batch by batch
    return total


def require_room(shape: StepShape, device: str | torch.device, moving: int = 0) -> None:
    """Refuse a run whose steps cannot fit into the memory that is there.

    Args:
        shape: of a step.
        device: to train on.
        moving: bytes there that the features are about to take.

    Raises:
        UsageError: with the largest batch, and the largest K at this batch, that would fit.
    """
    there = available_bytes(device) - moving

    def fitting(x: StepShape) -> bool:
        return step_bytes(x) + 12 * x.parameters <= there

    if fitting(shape):
        return
    batch = _largest(shape.batch, lambda b: fitting(replace(shape, batch=b)))
    classes = _largest(shape.classes, lambda k: fitting(replace(shape, classes=k)))
    fits = [f"train.batch={batch}"] if batch else []
    fits += [f"{classes} classes at this batch"] if classes else []
    size = (step_bytes(shape) + 12 * shape.parameters) / 1e9
    raise UsageError(
        f"a training step of {shape.batch} clips with {shape.classes} classes and {shape.tokens} "
        f"tokens in {shape.precision} needs about {size:.2f} GB on {torch.device(device).type}, "
        f"with the optimiser; expected at most the {max(there, 0) / 1e9:.2f} GB free. What would "
        f"fit: {' or '.join(fits) or 'no batch of this head; make it smaller (head.width)'}"
    )


def scoring_batch(shape: StepShape, device: str | torch.device) -> int:
    """How many clips can be scored at a time, at most those of `shape`.

    Raises:
        UsageError: not a single one.
    """
    there = available_bytes(device)
    batch = _largest(shape.batch, lambda b: scoring_bytes(replace(shape, batch=b)) <= there)
    if not batch:
        size = scoring_bytes(replace(shape, batch=1)) / 1e9
        raise UsageError(
            f"scoring one clip with {shape.classes} classes needs about {size:.2f} GB on "
            f"{torch.device(device).type}; expected at most the {there / 1e9:.2f} GB that are free"
        )
    return batch


def _largest(most: int, fitting: Callable[[int], bool]) -> int:
    """The largest of 1 to `most` that fits, 0 if none does; what is smaller fits too."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fitting(middle) else (low, middle - 1)
    return low
