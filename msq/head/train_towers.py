"""Features of the frozen towers for `msq train`, where no store has them: stage one makes them.

Image features of the clean view of every clip go into the run's own `towers.zarr`, where a run that
was interrupted, or is begun again, finds them. A head without image features needs the text tower
alone, and no clip is decoded for it.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msq.config import HeadConfig
from msq.errors import SpecMismatch, StoreError, UsageError, VideoError
from msq.head.end_to_end_config import EndToEndConfig
from msq.head.ranks import ALONE, Ranks
from msq.head.run import TOWERS
from msq.head.store_like import DEGRADED, FAILED, MISSING
from msq.head.store_rows import prompt_template

if TYPE_CHECKING:
    from msq.extract.datasets import Dataset
    from msq.extract.encoders import ImageEncoder
    from msq.extract.extract_result import ExtractResult
    from msq.extract.store import FeatureStore
    from msq.extract.train_request import TrainRequest

Progress = Callable[[dict[str, Any]], None]
_SHOWN = 5


@dataclass(frozen=True, eq=False)
class Towers:
    """What the frozen towers give of the clips of a dataset.

    Attributes:
        lost: [clips] bool by reason: which of them cannot be shown.
        image: [clips, D''] float32, zeros where a clip is lost; None without an image tower.
        text: [K, D_text] float32, or None.
        specs: of `image` and `text`.
        prompt: see `Features`.
        degraded: ids of clips whose decoding was not clean.
        failures: what is recorded of clips that could not be decoded.
        notes: what the user should know, one line each.
        stored: see `Features`.
        tower: the image tower itself, where the steps run it.
    """

    lost: Mapping[str, Tensor]
    image: Tensor | None = None
    text: Tensor | None = None
    specs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    prompt: str | tuple[str, ...] | None = None
    degraded: tuple[str, ...] = ()
    failures: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    stored: Mapping[str, str] = field(default_factory=dict)
    tower: ImageEncoder | None = None


def needed(head: HeadConfig) -> tuple[bool, bool]:
    """Whether the head needs image features, and embeddings of the class names."""
    image = head.queries == "multimodal"
    return image, head.queries != "vanilla" or head.classifier == "text"


def asked_prompt(request: TrainRequest, name: str | None) -> tuple[str, str | tuple[str, ...]]:
    """Name and template of the prompt in use."""
    from msq.extract.encoders.prompts import parse_prompts

    prompts = parse_prompts(request.making.prompts)
    if name is None and len(prompts) > 1:
        raise UsageError(
            f"--prompts: expected one, found {', '.join(prompts)}; name one with "
            "features.prompt=NAME"
        )
    name = name or next(iter(prompts))
    if name not in prompts:
        raise UsageError(f"features.prompt={name}: the prompts are {', '.join(prompts)}")
    return name, prompts[name]


def shows_images(config: EndToEndConfig) -> bool:
    """Whether the image tower runs on the frames of the steps."""
    return config.clips.image == "shown" and needed(config.run.head)[0]


def extracted_towers(
    request: TrainRequest,
    config: EndToEndConfig,
    data: Dataset,
    out: Path,
    frames: int,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
) -> Towers:
    """Image features and class texts, made by stage one into the run's directory or found there.

    Args:
        request: which encoders.
        config: of the run.
        data: the clips.
        out: the run directory.
        frames: of a clip, as many as the video encoder sees.
        progress: called with the events of stage one.
        overwrite: replace what is there if it is of another making.
        ranks: the processes that make them together, as workers of stage one.

    Raises:
        UsageError: no image or no text encoder.
        SpecMismatch: what is there is of another making.
        VideoError: no clip can be decoded.
        MsqError: as stage one.
    """
    from msq.extract.store import open_store

    if "none" in (request.image_encoder, request.text_encoder):
        raise UsageError(
            "head.queries=multimodal needs an image and a text encoder, found --image-encoder "
            f"{request.image_encoder or 'embedded'} and --text-encoder "
            f"{request.text_encoder or '(that of the CLIP)'}; name both, or choose --queries "
            "vanilla"
        )
    name, _ = asked_prompt(request, config.run.features.prompt)
    path = out / TOWERS
    result = _fill(request, path, frames, progress, overwrite, ranks)
    ranks.wait()  # another one may still be at its last clips
    if not result.done:
        first = result.failures[0]
        raise VideoError(
            f"{request.what}: none of its {result.clips} clips can be decoded, such as "
            f"{first['clip']}: {first['reason']} ({first['message']})"
        )
    store, tower = open_store(path), None
    image, text = store.encoders("image"), store.encoders("text")
    if shows_images(config) or len(image) > 1 or len(text) > 1:
        tower, words = request.making.load_towers(frames)
        assert tower is not None
        assert words is not None
        image, text = [tower.spec.slug], [words.spec.slug]
    towers = read_towers(data, store, torch.arange(len(data.clips)), image[0], text[0], name)
    return dataclasses.replace(
        towers,
        notes=(*result.warnings, *_unknown_words(result.unknown_words)),
        tower=tower if shows_images(config) else None,
    )


def _fill(
    request: TrainRequest,
    path: Path,
    frames: int,
    progress: Progress | None,
    overwrite: bool,
    ranks: Ranks,
) -> ExtractResult:
    from msq.extract.cluster import place

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = request.extract_towers(path, frames, progress)
    except (SpecMismatch, StoreError):
        # Where several processes share it, none may take it from the others.
        alone = ranks.world == 1
        if not overwrite or not path.exists() or (alone and place() is not None):
            raise
        if not all(ranks.of_all(True)):
            raise
        if ranks.leads:
            shutil.rmtree(path)
        ranks.wait()
        return request.extract_towers(path, frames, progress)
    ranks.of_all(False)
    return result


def class_texts(request: TrainRequest, config: EndToEndConfig, data: Dataset) -> Towers:
    """Embeddings of the class names, where the head needs any; no clip is decoded.

    Raises:
        UsageError: the head needs them, and there is no text encoder.
    """
    towers = Towers(lost={"failed": torch.zeros(len(data.clips), dtype=torch.bool)})
    head = config.run.head
    if not needed(head)[1]:
        return towers
    text = request.load_text()
    if text is None:
        raise UsageError(
            f"head.queries={head.queries} with head.classifier={head.classifier} needs a text "
            "encoder, found --text-encoder none; name one, or choose --queries vanilla"
        )
    _, prompt = asked_prompt(request, config.run.features.prompt)
    unknown = {name: words for name in data.classes if (words := text.unknown_words(name))}
    return dataclasses.replace(
        towers,
        text=text(list(data.classes), prompt=prompt).float().cpu(),
        specs={"text": text.spec.to_dict()},
        prompt=prompt,
        notes=tuple(_unknown_words(unknown)),
    )


def read_towers(
    data: Dataset,
    store: FeatureStore,
    rows: Tensor,
    image: str | None,
    text: str | None,
    prompt: str | None,
    others: Sequence[str] = (),
) -> Towers:
    """Features of some rows of a store.

    Args:
        data: the clips.
        store: made of them.
        rows: [clips] the row of each clip, -1 where the store has none.
        image: name of the image encoder, or None.
        text: name of the text encoder, or None.
        prompt: its name; None where there is one only.
        others: encoders beside `image` whose failures count too: what they could not decode,
            nobody can.
    """
    here = rows >= 0
    failed, missing, degraded = (torch.zeros(len(rows), dtype=torch.bool) for _ in range(3))
    for slug in [*([image] if image is not None else []), *others]:
        status = torch.full((len(rows),), -1)
        status[here] = store.status(slug).long()[rows[here]]
        failed, degraded = failed | (status == FAILED), degraded | (status == DEGRADED)
        if slug == image:
            missing = status == MISSING
    lost = {"failed": failed, "missing": missing & ~failed, f"not in {store.path.name}": ~here}
    usable = ~torch.stack([*lost.values()]).any(0)
    features = None
    if image is not None and bool(usable.any()):
        found = store.image(rows[usable], image).float()
        features = torch.zeros(len(rows), found.shape[1])
        features[usable] = found
    named = {"image": image, "text": text}
    bad = {data.clips[row].id for row in failed.nonzero().flatten().tolist()}
    return Towers(
        lost=lost,
        image=features,
        text=None if text is None else store.text(text, prompt).float(),
        specs={k: store.spec(slug, k).to_dict() for k, slug in named.items() if slug is not None},
        prompt=None if text is None else prompt_template(store, text, prompt),
        degraded=tuple(data.clips[row].id for row in degraded.nonzero().flatten().tolist()),
        failures=tuple(
            entry
            for entry in store.failures()
            if entry["status"] == FAILED and entry["clip"] in bad
        ),
        stored={} if image is None else {"image": store.store_dtype(image)},
    )


def _unknown_words(words: Mapping[str, Sequence[str]]) -> list[str]:
    """At most one line: which words of the classes mean nothing to the text encoder."""
    distinct = sorted({word for found in words.values() for word in found})
    if not distinct:
        return []
    shown = ", ".join(distinct[:_SHOWN]) + (", …" if len(distinct) > _SHOWN else "")
    return [f"the text encoder does not know {len(distinct)} words of the classes: {shown}"]
