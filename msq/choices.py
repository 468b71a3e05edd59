"""What the options of the command line can be; each value stands in its help."""

from __future__ import annotations

from enum import StrEnum


class Queries(StrEnum):
    """Where the class queries come from."""

    vanilla = "vanilla"
    text = "text"
    multimodal = "multimodal"


class Classifier(StrEnum):
    """How a query becomes a score."""

    per_class = "per-class"
    shared = "shared"
    text = "text"


class Task(StrEnum):
    """Many labels a clip, or exactly one."""

    multilabel = "multilabel"
    singlelabel = "singlelabel"


class Pooling(StrEnum):
    """What is kept of a video encoder's tokens."""

    frame = "frame"
    band = "band"
    patch = "patch"


class Precision(StrEnum):
    """Arithmetic of the encoders' forward pass."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class ClipOutput(StrEnum):
    """Which of CLIP's outputs are stored."""

    projected = "projected"
    pooler = "pooler"


class Sampling(StrEnum):
    """Which frames of a clip are shown to the encoders."""

    uniform = "uniform"
    official = "official"


class Resize(StrEnum):
    """How frames are resized."""

    torch = "torch"
    pil = "pil"


class StoreType(StrEnum):
    """Number type of stored features."""

    float16 = "float16"
    float32 = "float32"
    bfloat16 = "bfloat16"


class OnDegraded(StrEnum):
    """What becomes of a damaged video that still gives frames."""

    keep = "keep"
    skip = "skip"
    fail = "fail"


class Policy(StrEnum):
    """What becomes of a manifest line that cannot be used."""

    skip = "skip"
    error = "error"
