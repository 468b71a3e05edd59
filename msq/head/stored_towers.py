"""Features of the frozen towers for `msq train` from a store that was made of the same clips."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from msq.errors import SpecMismatch, UsageError
from msq.head.end_to_end_config import EndToEndConfig
from msq.head.store_rows import chosen_encoder
from msq.head.train_towers import Towers, asked_prompt, read_towers, shows_images

if TYPE_CHECKING:
    from msq.extract.datasets import Dataset
    from msq.extract.encoders import EncoderSpec, ImageEncoder
    from msq.extract.store import FeatureStore
    from msq.extract.train_request import TrainRequest


def video_record(
    request: TrainRequest, config: EndToEndConfig, store: FeatureStore
) -> EncoderSpec | None:
    """The store's video encoder, where it is the one to train."""
    if request.video_encoder is not None:
        return None
    slug = chosen_encoder(store, "video", config.run.features.video)
    if slug is None:
        raise UsageError(
            f"{store.path}: expected a video encoder to begin with, found none in the store; name "
            "one with --video-encoder"
        )
    return store.spec(slug, "video")


def stored_towers(
    request: TrainRequest,
    config: EndToEndConfig,
    data: Dataset,
    store: FeatureStore,
    splits: Sequence[str],
    partition: str | None,
) -> Towers:
    """What a store has of these clips: features of their clean views, class texts.

    Args:
        request: which towers it must be of, where they were named.
        config: of the run.
        data: the clips.
        store: made of them, or of some of them, or of more.
        splits: of the clips in the partition in use.
        partition: its name, where there are several.

    Raises:
        SpecMismatch: it was made of other clips or by other towers; the message holds the
            difference.
        UsageError: it has several encoders of a kind, and none is named.
    """
    from msq.extract.dataset_match import match_clips

    match = match_clips(data, splits, store, partition)
    chosen = config.run.features.video
    image, tower = _stored_image(request, config, store)
    text, prompt = _stored_text(request, config, store)
    videos = store.encoders("video") if chosen is None else [chosen]
    towers = read_towers(data, store, torch.from_numpy(match.rows), image, text, prompt, videos)
    notes = match.notes(data.name, str(store.path))
    return dataclasses.replace(towers, notes=tuple(notes), tower=tower)


def _stored_image(
    request: TrainRequest, config: EndToEndConfig, store: FeatureStore
) -> tuple[str | None, ImageEncoder | None]:
    """Name of the image encoder in the store, and the tower itself where steps run it.

    Raises:
        SpecMismatch: the one asked for is not the store's.
    """
    if request.image_encoder == "none":
        return None, None
    wanted, shown = config.run.features.image, shows_images(config)
    if request.image_encoder is None:
        slug = chosen_encoder(store, "image", wanted)
        spec = None if slug is None else store.spec(slug, "image")
        return slug, request.load_image(spec) if shown and spec is not None else None
    differences = {}
    for slug in store.encoders("image") if wanted is None else [wanted]:
        record = store.spec(slug, "image")
        tower = request.load_image(record)
        if not (lines := _difference(record, tower.spec)):
            return slug, tower if shown else None
        differences[slug] = lines
    raise SpecMismatch(_unlike(store, "image", request.image_encoder, differences))


def _stored_text(
    request: TrainRequest, config: EndToEndConfig, store: FeatureStore
) -> tuple[str | None, str | None]:
    """Names of the text encoder and the prompt in the store.

    Raises:
        SpecMismatch: what was asked for is not in the store.
    """
    chosen = config.run.features
    if request.text_encoder == "none":
        return None, None
    slug = None
    if request.text_encoder is None:
        slug = chosen_encoder(store, "text", chosen.text)
    elif (text := request.load_text()) is not None:
        differences = {}
        for name in store.encoders("text") if chosen.text is None else [chosen.text]:
            differences[name] = _difference(store.spec(name, "text"), text.spec)
        slug = next((name for name, lines in differences.items() if not lines), None)
        if slug is None:
            raise SpecMismatch(_unlike(store, "text", request.text_encoder, differences))
    if slug is None or request.prompts is None:
        return slug, chosen.prompt
    _, asked = asked_prompt(request, chosen.prompt)
    for name in store.prompts(slug):
        if store.templates(slug, name) == ((asked,) if isinstance(asked, str) else asked):
            return slug, name
    raise SpecMismatch(
        f"{store.path}: --prompts: expected one of {store.prompts(slug)}, found {asked!r}"
    )


def _difference(record: EncoderSpec, spec: EncoderSpec) -> list[str]:
    """What tells an encoder from a recorded one; it may have another name."""
    from msq.extract.encoders import difference

    return difference({**record.to_dict(), "slug": ""}, {**spec.to_dict(), "slug": ""})


def _unlike(
    store: FeatureStore, kind: str, asked: str, differences: Mapping[str, Sequence[str]]
) -> str:
    said = [f"{slug}: {line}" for slug, lines in differences.items() for line in lines]
    return (
        f"{store.path}: its {kind} features were not made by --{kind}-encoder {asked} (expected: "
        "the store's, found: the one asked for); leave the option out, or extract with it\n  "
        + "\n  ".join(said or [f"found no {kind} encoder in the store"])
    )
