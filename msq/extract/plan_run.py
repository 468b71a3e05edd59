"""What a run of stage one would do, found out without writing anything: `msq extract --dry-run`.

`require_space` is what a real run asks before it begins a store.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from msq.errors import StoreError, UsageError
from msq.extract import store_schema as schema
from msq.extract.atomic import TEMPORARY_SUFFIX
from msq.extract.datasets.dataset import Dataset
from msq.extract.datasets.survey import kept_items
from msq.extract.encoders import TextEncoder
from msq.extract.encoders.prompts import Prompt, described, parse_prompts
from msq.extract.encoders.spec import EncoderSpec
from msq.extract.expected_time import expected_time
from msq.extract.location import is_local, locate
from msq.extract.request import ExtractRequest, slug
from msq.extract.shard import CRC_BYTES
from msq.extract.store_writer import StoreWriter
from msq.extract.views import View

_FAILED = schema.UNDECODABLE
_INDEX_ENTRY = 16  # per row of a shard: offset and length, uint64 each


def dry_run(request: ExtractRequest) -> dict[str, Any]:
    """Read the annotations, load the encoders, look at the store, time a few clips; write nothing.

    What the run itself would refuse (an unknown dataset, weights that do not fit, a store of
    another making, …) is refused here with the same error. A store that another process is
    writing is looked at as it is.

    Returns:
        JSON-able: `store, exists, dataset, task, clips, splits{NAME: clips}, classes, missing`
        (clips without a file), `skipped, skipped_items[{item, reason}]`, `left_out,
        left_out_items` (likewise, by the dataset's own rules), `kept, kept_items[{item, change}]`
        (what the policy `keep` changed),
        `encoders{NAME: {kind, spec, stored, bytes, views, frames{total, pending},
        shards{total, done, pending}}}` (`views` the names of those asked for; frames to be
        encoded; shards count once for each view, and views of earlier runs count as done),
        `text{NAME: {spec, prompts{NAME: template}, unknown_words{CLASS: words}}}`,
        `bytes{features, image_frames, times, status, other, total, pending}` (files of the
        finished store; `image_frames` are image features of each frame, 0 where it has none,
        `other` is metadata, clips, labels and text; failed clips take none of theirs; `pending` is
        what this run would write), `shards{total, done, pending}` (done: for every encoder),
        `failed` (clips that earlier runs recorded as failed), `free_bytes` where the store lies or
        would lie, `enough` (free for what is pending); both None for a store behind a URL;
        `expected` (time of what is pending, see `expected_time`).

    Raises:
        MsqError: as `ExtractRequest.run` before its first clip.
    """
    data, views = request.read_dataset(), request.asked_views()
    video, image, text = request.load_encoders()
    specs = {e.spec.slug: e.spec for e in (video, image) if e is not None}
    if video is not None and image is not None and len(specs) == 1:
        raise UsageError(f"the video and the image encoder are both named {video.spec.slug!r}")
    out = locate(request.out or Path(f"{slug(data.name)}.zarr"))
    look = _Look(out, data, store_dtype=request.store_dtype, shard=request.shard)
    for spec in specs.values():
        look.add_encoder(spec, views, request.image_frames and spec.kind == "image")
    prompts = parse_prompts(request.prompts)
    texts = {} if text is None else {text.spec.slug: _text(look, text, prompts)}
    todo = {name: _todo(look, name, views) for name in specs}
    sizes = {name: _Sizes(look, spec) for name, spec in specs.items()}
    unfinished = {shard for shards in todo.values() for shard, _ in shards}
    look.complete_frames()
    pending = sum(sizes[name].of(todo[name]) for name in specs) + look.absent_bytes
    free = _free_bytes(out)
    expected = expected_time(
        look,
        {e.spec.slug: e for e in (video, image) if e is not None},
        [(shard, (name, view)) for name in specs for shard, view in todo[name]],
        batch=request.batch,
        workers=request.workers,
    )
    total = {part: sum(s.whole[part] for s in sizes.values()) for part in _Sizes.PARTS}
    return {
        "store": str(out),
        "exists": out.exists(),
        "dataset": data.name,
        "task": data.task,
        "clips": len(data.clips),
        "splits": _counts([clip.split for clip in data.clips]),
        "classes": len(data.classes),
        "missing": sum(not clip.path.exists() for clip in data.clips),
        "skipped": len(data.unusable),
        "skipped_items": [{"item": item, "reason": reason} for item, reason in data.unusable],
        "left_out": len(data.left_out),
        "left_out_items": [{"item": item, "reason": reason} for item, reason in data.left_out],
        "kept": len(data.kept),
        "kept_items": [*kept_items(data)],
        "encoders": {
            name: {
                "kind": spec.kind,
                "spec": spec.line(data.name),
                "stored": request.store_dtype,
                "bytes": sum(sizes[name].whole.values()),
                "views": [str(view) for view in views],
                "frames": _frames(look, spec, todo[name]),
                "shards": _shards(
                    look.shards * len(look.views[name]),
                    look.shards * len(look.views[name]) - len(todo[name]),
                ),
            }
            for name, spec in specs.items()
        },
        "text": texts,
        "bytes": {
            **total,
            "other": look.other_bytes,
            "total": sum(total.values()) + look.other_bytes,
            "pending": pending,
        },
        "shards": _shards(look.shards, look.shards - len(unfinished)),
        "failed": _failed(look),
        "free_bytes": free,
        "enough": None if free is None else free >= pending,
        "expected": expected,
    }


def require_space(
    data: Dataset,
    out: Path,
    specs: Sequence[EncoderSpec],
    *,
    views: int,
    store_dtype: schema.StoreDtype,
    image_frames: bool = False,
) -> None:
    """Refuse to begin a store that cannot fit on its disk, before any clip is decoded.

    Only the features are counted, of clips that have a file: the least that is written if all of
    them can be decoded. A store that is already there, or behind a URL, is not looked at.

    Args:
        data: its clips.
        out: the store.
        specs: of the encoders.
        views: of each clip.
        store_dtype: of the features.
        image_frames: whether those of each frame are stored, too.

    Raises:
        StoreError: less space is free than the features take.
    """
    if not is_local(out) or out.exists():
        return
    arrays = [schema.feature_arrays(spec, store_dtype)[0] for spec in specs]
    if image_frames:
        arrays += [schema.frame_array(s, store_dtype) for s in specs if s.kind == "image"]
    row = views * sum(array.row_bytes + CRC_BYTES for array in arrays)
    free = _free_bytes(out)
    if free is None or free >= row * len(data.clips):
        return  # seen without asking for each file
    needed = row * sum(clip.path.exists() for clip in data.clips)
    if free < needed:
        raise StoreError(
            f"{out}: expected room for {needed / 1e9:.1f} GB of features ({row / 1e6:.3g} MB a "
            f"clip), found {free / 1e9:.1f} GB free; free some, choose another disk, fewer clips "
            "(--limit) or another --pooling (--dry-run says what each takes). Nothing was written"
        )


class _Look(StoreWriter):
    """A writer that checks all that a writer checks and publishes nothing."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._keys: dict[str, int] = {}  # all but features, times and status, and their bytes
        self._replaced: dict[str, int] = {}  # metadata that grows
        super().__init__(*arguments, **options)

    @property
    def other_bytes(self) -> int:
        """Of everything but features, times and status."""
        return sum(self._keys.values())

    @property
    def absent_bytes(self) -> int:
        """Of these, what is not in the store yet, or is written anew when views are added."""
        absent = {key: n for key, n in self._keys.items() if not (self.path / key).exists()}
        return sum((absent | self._replaced).values())

    def _prepare_directory(self) -> None:
        # A writer would clear away here what killed writers left.
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path}: expected a folder for the feature store, found a file")
        if self.path.is_dir() and not (self.path / "zarr.json").exists():
            found = [f for f in self.path.iterdir() if not f.name.endswith(TEMPORARY_SUFFIX)]
            if found:
                raise StoreError(
                    f"{self.path}: expected a feature store of msq or an empty folder, found "
                    f"{found[0].name}; choose another place for the store"
                )

    def _publish(self, content: Mapping[str, bytes]) -> list[str]:
        self._keys |= {key: len(value) for key, value in content.items()}
        return [key for key in content if (self.path / key).exists()]

    def _replace(self, key: str, content: bytes) -> None:
        self._replaced[key] = len(content)

    def _has_frames(self, slug: str, shard: int, view: View) -> bool:
        return True  # by the end of the run


class _Sizes:
    """Bytes of one encoder's files, by part: what the shard writer makes of full rows."""

    PARTS = ("features", "image_frames", "times", "status")

    def __init__(self, look: StoreWriter, spec: EncoderSpec) -> None:
        self._look, self._slug = look, spec.slug
        groups = {schema.IMAGE_FRAMES: "image_frames", "time": "times"}
        self._arrays = {
            groups.get(array.name.partition("/")[0], "features"): array
            for array in look.arrays(spec.slug)
        }
        self.whole = self._parts([*range(look.shards)] * len(look.views[spec.slug]))

    def of(self, todo: Sequence[tuple[int, View]]) -> int:
        """Bytes that these shards of one view each lack: of done ones the image frames alone."""
        added = [s for s, view in todo if self._look.lacks_frames(self._slug, s, view)]
        made = [s for s, view in todo if not self._look.lacks_frames(self._slug, s, view)]
        return sum(self._parts(made).values()) + self._parts(added)["image_frames"]

    def _parts(self, shards: list[int]) -> dict[str, int]:
        rows = sum(len(self._look.rows(shard)) for shard in shards)
        parts = dict.fromkeys(self.PARTS, 0)
        for part, array in self._arrays.items():
            parts[part] = rows * (array.row_bytes + CRC_BYTES)
            if array.sharded:
                parts[part] += len(shards) * (self._look.shard * _INDEX_ENTRY + CRC_BYTES)
        parts["status"] = len(shards) * (self._look.shard + CRC_BYTES)
        return parts


def _text(look: StoreWriter, text: TextEncoder, prompts: Mapping[str, Prompt]) -> dict[str, Any]:
    """What the store will say of the class names; their vectors are sized, not computed."""
    classes = look.dataset.classes
    unknown = {name: words for name in classes if (words := text.unknown_words(name))}
    for prompt, template in prompts.items():
        look.has_text(text.spec, prompt, template)  # refuses one of another making
        values = np.zeros((len(classes), text.spec.channels), dtype=np.float32)
        look.add_text(text.spec, prompt, template, unknown, values)
    return {
        "spec": text.spec.line(look.dataset.name),
        "prompts": {name: described(prompt) for name, prompt in prompts.items()},
        "unknown_words": unknown,
    }


def _todo(look: StoreWriter, encoder: str, views: Sequence[View]) -> list[tuple[int, View]]:
    """What this run would make: shards of one view each."""
    found = [
        (shard, view)
        for view in views
        for shard in range(look.shards)
        if not look.is_done(encoder, shard, view)
    ]
    # Features of each frame come to all views.
    owed = [v for v in look.views[encoder] if v not in views] if encoder in look.adding else []
    return found + [
        (shard, view)
        for view in owed
        for shard in range(look.shards)
        if look.lacks_frames(encoder, shard, view)
    ]


def _frames(
    look: StoreWriter, spec: EncoderSpec, todo: Sequence[tuple[int, View]]
) -> dict[str, int]:
    """Frames that go through an encoder: of all views of all clips, and of what is to be made."""
    views = len(look.views[spec.slug])
    return {
        "total": len(look.dataset.clips) * views * spec.frames,
        "pending": sum(len(look.rows(shard)) for shard, _ in todo) * spec.frames,
    }


def _failed(look: StoreWriter) -> int:
    recorded = [f for shard in range(look.shards) for f in look.failures(shard)]
    return len({f.row for f in recorded if f.encoder in look.specs and f.status == _FAILED})


def _shards(total: int, done: int) -> dict[str, int]:
    return {"total": total, "done": done, "pending": total - done}


def _counts(names: list[str]) -> dict[str, int]:
    return {name: names.count(name) for name in dict.fromkeys(names)}


def _free_bytes(path: Path) -> int | None:
    """Free bytes for this user on the disk that holds `path`, or will; None for a URL."""
    if not is_local(path):
        return None
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
