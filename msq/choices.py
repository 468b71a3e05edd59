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


class Loss(StrEnum):
    """What training makes small; asymmetric and focal are for rare labels."""

    auto = "auto"
    bce = "bce"
    ce = "ce"
    asymmetric = "asymmetric"
    focal = "focal"


class Task(StrEnum):
    """Many labels a clip, or exactly one."""

    multilabel = "multilabel"
    singlelabel = "singlelabel"


class Protocol(StrEnum):
    """The equations as printed, or the authors' code."""

    paper = "paper"
    official = "official"


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


class Kernels(StrEnum):
    """By what an operation that has a Triton kernel is computed."""

    auto = "auto"
    triton = "triton"
    reference = "reference"


class ClipOutput(StrEnum):
    """Which of CLIP's outputs are stored."""

    projected = "projected"
    pooler = "pooler"


class TextPooling(StrEnum):
    """What of a text model's states becomes the vector of a class name."""

    pooler = "pooler"
    mean = "mean"
    cls = "cls"


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


class Ensemble(StrEnum):
    """How the probabilities over several test views become one."""

    none = "none"
    mean = "mean"
    max = "max"


class OnDegraded(StrEnum):
    """What becomes of a damaged video that still gives frames."""

    keep = "keep"
    skip = "skip"
    fail = "fail"


class Policy(StrEnum):
    """What becomes of a manifest line that cannot be used."""

    skip = "skip"
    error = "error"
    keep = "keep"


class EncoderKind(StrEnum):
    """What a name is taken for."""

    auto = "auto"
    video = "video"
    image = "image"


class FeatureKind(StrEnum):
    """What imported features become: tokens of a video, or one vector."""

    video = "video"
    image = "image"


class GlobalToken(StrEnum):
    """What stands before the tokens of imported features."""

    mean = "mean"
    none = "none"


class QueryWeights(StrEnum):
    """How the queries of a clip become one vector."""

    mean = "mean"
    scores = "scores"


class TableFormat(StrEnum):
    """How results are written: as a table, or as a page with curves and bars."""

    terminal = "terminal"
    markdown = "markdown"
    latex = "latex"
    csv = "csv"
    html = "html"


class RowFormat(StrEnum):
    """Rows of predictions."""

    csv = "csv"
    jsonl = "jsonl"
