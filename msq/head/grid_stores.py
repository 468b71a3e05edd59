"""Stage one for sweeps: one feature store for each distinct making, found again by its identity.

A store's file name ends in a hash of the settings that decide what is in it, so that two grids with
a row in common share it. Class texts are no part of the name: a store takes further text encoders
and prompts beside those it has, and no video is encoded again for them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msq.errors import MsqError, UsageError
from msq.head.json_file import write_json
from msq.head.sweep_plan import Plan, Source

if TYPE_CHECKING:
    from msq.extract.datasets.dataset import Dataset
    from msq.extract.request import ExtractRequest

TEXT = ("text_encoder", "text_pooling", "prompts")
# Where and how fast, not what.
CIRCUMSTANCES = ("root", "out", "device", "devices", "scheduler", "shard", "batch", "workers",
                 "retry_failed", "policy")  # fmt: skip
# What is kept of the result of stage one.
KEPT = ("clips", "done", "failed", "skipped", "left_out", "failures", "degraded", "skipped_items",
        "left_out_items", "kept_items", "warnings")  # fmt: skip


def build_request(settings: Mapping[str, Any], out: Path | None = None) -> ExtractRequest:
    """The request of stage one that plain values mean.

    Raises:
        UsageError: values of another type, or that contradict each other.
    """
    from msq.extract.request_values import request_of

    return request_of({**settings, "out": out}, "extract")


def extraction_source(settings: Mapping[str, Any], stores: Path) -> Source:
    """Where the features of an extraction will be, and their identity; nothing is read but lists.

    Args:
        settings: fields of `ExtractRequest`.
        stores: folder of the stores.
    """
    from msq.extract.datasets.options import find_class_file

    request = build_request(settings)
    decides = {
        key: value
        for key, value in dataclasses.asdict(request).items()
        if key not in CIRCUMSTANCES and value is not None
    }
    if not decides["image_frames"]:
        del decides["image_frames"]  # stores had names before there was this choice
    if request.policy == "keep":
        decides["policy"] = "keep"  # other clips than the two others, which give the same
    decides["join"] = False  # a circumstance too, with a place in the names of stores all the same
    decides.setdefault("task", "multilabel")  # which stood there when it was the default
    for key in ("manifest", "classes"):
        if decides.get(key) is not None:
            path = Path(decides[key])
            in_root = key == "classes" and request.dataset is not None
            decides[key] = _content(find_class_file(path, request.root) if in_root else path)
    plain = json.loads(json.dumps(decides, sort_keys=True, default=str))
    making = {key: value for key, value in plain.items() if key not in TEXT}
    name = request.dataset or (request.manifest.stem if request.manifest else "clips")
    path = stores.resolve() / f"{name}-{_hash(making)[:12]}.zarr"
    return Source(str(path), {"extract": plain}, dict(settings))


def _content(path: Path) -> str:
    """A hash of a manifest, or of the names in a folder."""
    try:
        if path.is_dir():
            return _hash(sorted(_names(path)))
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"{path}: expected a manifest; {error}") from None


def _names(top: Path) -> Iterator[str]:
    """Folders and files below one, behind links to folders too, as stage one finds them."""
    from msq.extract.datasets.folder import leads_back

    for folder, folders, files in os.walk(top, followlinks=True):
        here = Path(folder)
        yield from (str((here / name).relative_to(top)) for name in (*folders, *files))
        folders[:] = [name for name in folders if not leads_back(here / name)]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_classes(settings: Mapping[str, Any]) -> Dataset:
    """The dataset of an extraction: its classes, before anything is encoded."""
    return build_request(settings).read_dataset()


def splits_of(settings: Mapping[str, Any], partition: str | None) -> set[str]:
    """The splits that the clips of an extraction are in, before anything is encoded.

    Args:
        settings: fields of `ExtractRequest`.
        partition: which official split counts, where there are several; None for the first.

    Raises:
        UsageError: there is no such partition.
    """
    dataset = read_classes(settings)
    if not dataset.partitions:
        return {clip.split for clip in dataset.clips}
    name = partition or next(iter(dataset.partitions))
    if name not in dataset.partitions:
        raise UsageError(f"features.partition: expected one of {', '.join(dataset.partitions)}, "
                         f"found {name!r}")  # fmt: skip
    return set(dataset.partitions[name])


def make_stores(
    plan: Plan,
    wanted: Collection[str],
    progress: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, Exception]:
    """Extract what is not there yet, one store after another; each resumes.

    Args:
        plan: of the sweep.
        wanted: keys of the sources that are needed.
        progress: called with the path of the store and the events of stage one.

    Returns:
        Source key -> what went wrong, for those that could not be made.
    """
    problems: dict[str, Exception] = {}
    for key, source in plan.sources.items():
        if source.extract is None or key not in wanted:
            continue
        path = Path(source.store)
        made = bool(text_names(path, source.extract))
        if made and _record(path):
            continue
        try:
            _make(path, source.extract, progress)
        except Exception as error:
            if not made:  # else its record alone is missing, as of stores of earlier versions
                problems[key] = error
    return problems


def _make(
    path: Path,
    settings: Mapping[str, Any],
    progress: Callable[[str, dict[str, Any]], None] | None,
) -> None:
    from msq.extract.encoders.prompts import parse_prompts
    from msq.extract.store import open_store

    path.parent.mkdir(parents=True, exist_ok=True)
    # Another command may be at the same store: then both make it, and both go on with it.
    request = dataclasses.replace(build_request(settings, path), join=True)
    result = request.run(None if progress is None else lambda event: progress(str(path), event))
    write_json(_record_path(path), {key: getattr(result, key) for key in KEPT})
    if not result.done:
        raise MsqError(f"{path}: none of its {result.clips} clips could be encoded")
    texts = list(open_store(path).encoders("text"))
    text = texts[0] if len(texts) == 1 else None
    if len(texts) > 1:
        encoder = request.load_encoders()[2]
        text = None if encoder is None else encoder.spec.slug
    prompts = list(parse_prompts(request.prompts))
    made = _read_made(path)
    made[_hash(_text_settings(settings))] = {
        "text": text, "prompt": prompts[0] if text is not None and len(prompts) == 1 else None
    }  # fmt: skip
    write_json(_made_path(path), made)


def extraction_records(plan: Plan) -> dict[str, dict[str, Any]]:
    """What stage one said of each store that a plan has it make; kept beside the stores.

    Returns:
        Store -> `clips, done, failed, skipped, left_out` (counts), `failures, degraded,
        skipped_items, left_out_items, kept_items, warnings`, as in `ExtractResult`. Stores that
        are not there are left out.
    """
    paths = {one.store: Path(one.store) for one in plan.sources.values() if one.extract is not None}
    return {store: record for store, path in paths.items() if (record := _record(path))}


def text_names(path: Path, settings: Mapping[str, Any]) -> dict[str, str | None]:
    """What the store calls an extraction's text encoder and prompt; {} before it is made."""
    if not path.exists():
        return {}
    return _read_made(path).get(_hash(_text_settings(settings)), {})


def _text_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: settings.get(key) for key in TEXT}


def _made_path(path: Path) -> Path:
    return path.with_name(path.name + ".made.json")


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".extracted.json")


def _read_made(path: Path) -> dict[str, dict[str, str | None]]:
    return _read(_made_path(path))


def _record(path: Path) -> dict[str, Any]:
    """What stage one said of a store; {} before it is made."""
    return _read(_record_path(path)) if path.exists() else {}


def _read(file: Path) -> dict[str, Any]:
    """A file beside a store; {} where there is none, or a damaged one: it is written again."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
