"""Which family of video encoders a name means, and the loading of each family.

Names are those of the command line: `embedded`, `hf-hub:ORG/NAME`, `local-dir:DIR`, a folder or a
file, the directory of a run that trained an encoder, `timm/TAG`, `open_clip/ARCH/TAG`,
`torchvision/NAME`, the last three also with a local file or folder at their end. What a folder or
a repository holds is told by its `config.json`: `model_type` of Hugging Face's models,
`architecture` of timm's and of msq's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from msq.errors import UsageError, WeightsNotFound
from msq.extract.encoders.embedded import EMBEDDED_VIDEO
from msq.extract.encoders.pooling import TokenOrder
from msq.extract.encoders.run_encoder import RUN_PREFIX, find_video_weights, require_whole
from msq.extract.encoders.spec import slugify
from msq.extract.encoders.timesformer_config import TimeSformerConfig
from msq.extract.encoders.timesformer_weights import SpaceResize, TimeResize, load_timesformer
from msq.extract.encoders.video_model import VideoModel
from msq.extract.encoders.weights import FOLDER_PREFIX, HUB_PREFIX, WeightFiles

Family = Literal["timesformer", "videomae", "timm", "open_clip", "torchvision"]

AUTO: Final = "auto"
FORMS: Final = (
    "embedded, hf-hub:ORG/NAME, local-dir:DIR, a folder, a file, a run of msq train, timm/TAG, "
    "open_clip/ARCH/TAG, torchvision/NAME"
)
LIBRARIES: tuple[Family, ...] = ("timm", "open_clip", "torchvision")
_MODEL_TYPES: dict[str, Family] = {"timesformer": "timesformer", "videomae": "videomae"}


@dataclass(frozen=True)
class VideoName:
    """What a name means.

    Attributes:
        family: of the encoder.
        name: the library's own name of the model, with its tag; empty where the weights say it.
        weights: `hf-hub:`, `local-dir:`, a folder or a file; None for the embedded weights of
            TimeSformer and for a library's own.
    """

    family: Family
    name: str = ""
    weights: str | None = None

    @property
    def typed(self) -> str:
        """The name without the weights, as `load_video_encoder` takes it."""
        return f"{self.family}/{self.name}" if self.family in LIBRARIES else self.family


def find_family(name: str, weights: str | None = None) -> VideoName:
    """Resolves a name.

    Args:
        name: `timesformer`, `videomae`, `auto` (the weights tell), or a name of the command line.
        weights: likewise, where `name` does not say it all.

    Raises:
        UsageError: for a name that means nothing.
        WeightsNotFound: for weights that are not there.
    """
    if name in ("embedded", EMBEDDED_VIDEO):
        if weights is not None:
            raise UsageError(
                f"{EMBEDDED_VIDEO} has weights of its own; use 'timesformer' with others"
            )
        return VideoName("timesformer")
    if name == "timesformer":
        return VideoName("timesformer", weights=weights)
    if name == "videomae":
        if weights is None:
            raise UsageError("videomae needs weights: hf-hub:MCG-NJU/videomae-base-finetuned-"
                             "kinetics, or local-dir:PATH in the same layout")  # fmt: skip
        return VideoName("videomae", weights=weights)
    if name == AUTO:
        return find_family("embedded" if weights is None else weights)
    for family in LIBRARIES:
        if name == family or name.startswith(f"{family}/"):
            return _of_library(family, name.removeprefix(family).removeprefix("/"), weights)
    if weights is not None:
        raise UsageError(f"no video encoder {name!r}; there are {AUTO}, timesformer, videomae, "
                         f"{', '.join(f'{x}/…' for x in LIBRARIES)}")  # fmt: skip
    return _of_files(name)


def _of_library(family: Family, rest: str, weights: str | None) -> VideoName:
    """Splits a file or folder off the end of a library's name."""
    if weights is None and rest.startswith((HUB_PREFIX, FOLDER_PREFIX)):
        return VideoName(family, "", rest)
    architecture, slash, end = rest.partition("/")
    if weights is None and slash:
        is_file = end.startswith((HUB_PREFIX, FOLDER_PREFIX)) or Path(end).expanduser().exists()
        # timm's tags are joined by a dot; the others' stand where a file may stand, too.
        if is_file or family == "timm" or Path(end).suffix in (".pt", ".pth", ".safetensors"):
            return VideoName(family, architecture, end)
    if not rest and weights is None:
        raise UsageError(f"{family}/: expected a model's name after it; names are {FORMS}")
    return VideoName(family, rest, weights)


def _of_files(name: str) -> VideoName:
    """Files, a folder or a repository of the hub, by the configuration beside the weights."""
    path = Path(name.removeprefix(FOLDER_PREFIX)).expanduser()
    is_named = name.startswith((HUB_PREFIX, FOLDER_PREFIX, RUN_PREFIX))
    if not is_named and not path.exists():
        if path.suffix or len(path.parts) > 1:
            raise WeightsNotFound(f"weights {name!r}: no such file; names are {FORMS}")
        raise UsageError(f"no video encoder {name!r}; names are {FORMS}")
    if path.suffix == ".pyth" and path.is_file():
        return VideoName("timesformer", weights=name)
    values = find_video_weights(name).read_json("config.json") or {}
    kind = values.get("model_type")
    if isinstance(values.get("architecture"), str):
        return VideoName("timm", "", name)
    if isinstance(values.get("architecture"), dict) or kind is None:
        return VideoName("timesformer", weights=name)
    if kind not in _MODEL_TYPES:
        raise UsageError(
            f"{name}: its config.json says model_type {kind!r}; as video encoder msq knows "
            f"{', '.join(_MODEL_TYPES)}, and image models of timm"
        )
    return VideoName(_MODEL_TYPES[str(kind)], weights=name)


def moved_name(recorded: str, moved: str) -> tuple[str, str | None]:
    """Name and weights of an encoder whose weights were moved.

    Args:
        recorded: `EncoderSpec.weights` of the encoder.
        moved: what is given in its place: a full name, or only the new place of the weights,
            which for a library's model does not say which model.
    """
    library, _, rest = recorded.partition("/")
    place = moved.removeprefix(FOLDER_PREFIX)
    if library in LIBRARIES and Path(place).expanduser().exists():
        model = "" if rest.startswith((HUB_PREFIX, FOLDER_PREFIX)) else rest.partition("/")[0]
        return f"{library}/{model}", moved
    return moved, None


def location_key(recorded: str, sha256: str) -> str:
    """What `locations.remember` notes an encoder's weights under.

    One file can be a CLIP for `load_clip` and an image tower for the video encoder, which are
    loaded by different names.
    """
    library = recorded.partition("/")[0]
    return f"{library}-{sha256}" if library in LIBRARIES else sha256


def load_video_model(
    found: VideoName,
    files: WeightFiles | None = None,
    *,
    frames: int | None = None,
    size: int | None = None,
    strict: bool = True,
    time_resize: TimeResize = "nearest",
    space_resize: SpaceResize = "nearest",
) -> VideoModel:
    """Loads what `find_family` found.

    Args:
        found: family, model and weights.
        files: the weights' files, where they are known already.
        frames: T; the checkpoint's own by default.
        size: height and width in pixels; the checkpoint's own by default.
        strict: refuse a checkpoint with missing or unexpected names.
        time_resize: interpolation of TimeSformer's time embedding.
        space_resize: of its position embedding.

    Raises:
        UsageError: for names and options that mean nothing.
        WeightsError: if the weights cannot be found, read or do not fit.
    """
    if found.family == "timesformer":
        files = files or require_whole(find_video_weights(found.weights or ""))
        return _timesformer(files, frames, size, time_resize, space_resize, strict)
    if (time_resize, space_resize) != ("nearest", "nearest"):
        raise UsageError(f"{found.family}: time_resize and space_resize are TimeSformer's")
    if found.family == "videomae":
        files = files or require_whole(find_video_weights(found.weights or ""))
        return _videomae(files, frames, size, strict)
    # Each of these imports a library that takes seconds.
    if found.family == "timm":
        from msq.extract.encoders.per_frame_timm import load_timm as load
    elif found.family == "open_clip":
        from msq.extract.encoders.per_frame_open_clip import load_open_clip as load
    else:
        from msq.extract.encoders.torchvision_3d import load_torchvision as load
    return load(found.name, found.weights, frames=frames, size=size, strict=strict)


def _timesformer(
    files: WeightFiles,
    frames: int | None,
    size: int | None,
    time_resize: TimeResize,
    space_resize: SpaceResize,
    strict: bool,
) -> VideoModel:
    loaded = load_timesformer(
        files,
        frames=frames,
        size=size,
        time_resize=time_resize,
        space_resize=space_resize,
        strict=strict,
    )
    config = loaded.model.config
    return VideoModel(
        model=loaded.model,
        order=TokenOrder(config.frames),
        patches=config.patches,
        channels=config.width,
        files=files,
        stem=slug_stem("timesformer", files.name),
        architecture=describe_timesformer(config),
        frames=config.frames,
        size=_square(config.image_size, files),
        mean=loaded.mean,
        std=loaded.std,
        resized=loaded.resized,
    )


def _videomae(files: WeightFiles, frames: int | None, size: int | None, strict: bool) -> VideoModel:
    from msq.extract.encoders.videomae_weights import describe, load_videomae

    loaded = load_videomae(files, frames=frames, size=size, strict=strict)
    config = loaded.model.config
    return VideoModel(
        model=loaded.model,
        order=TokenOrder(config.steps, time_major=True, global_token=False),
        patches=config.patches,
        channels=config.width,
        files=files,
        stem=slug_stem("videomae", files.name),
        architecture=describe(config),
        frames=config.frames,
        size=_square(config.image_size, files),
        mean=loaded.mean,
        std=loaded.std,
        resized=loaded.resized,
    )


def slug_stem(family: str, name: str) -> str:
    """`timesformer-…`, the family's name once."""
    rest = slugify(name).removeprefix(family).strip("-")
    return f"{family}-{rest}" if rest else family


def _square(size: tuple[int, int], files: WeightFiles) -> int:
    if size[0] != size[1]:
        raise UsageError(
            f"{files.id}: made for {size[0]}x{size[1]} pixels; videos are cropped to squares, so "
            "give size="
        )
    return size[0]


def describe_timesformer(config: TimeSformerConfig) -> str:
    """The architecture in words, for specs."""
    stem = "" if config.stem == "patch" else f" {config.stem}-stem"
    return (
        f"timesformer p{config.patch_size} d{config.depth} w{config.width} h{config.heads} "
        f"m{config.mlp_width}{stem}"
    )
