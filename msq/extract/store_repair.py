"""Making a damaged store one that `msq extract` completes: what is bad is marked for re-doing.

Nothing is guessed. A shard with a bad file loses its commit record, so that the next `msq extract`
makes just this shard. Metadata of an encoder comes back from its sister arrays, which say the same
of it; metadata and small arrays of the dataset are removed, and the next run writes them again,
after it has compared all that is left of them with the dataset.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from msq.errors import MsqError, UsageError
from msq.extract import store_schema as schema
from msq.extract.atomic import remove_file, remove_temporaries, write_file
from msq.extract.claims import claim_store
from msq.extract.encoders.spec import EncoderSpec
from msq.extract.image_frames import frames_in
from msq.extract.location import is_archive, is_local
from msq.extract.store_folder import read_root
from msq.extract.store_keys import StoreKeys, encoder_keys
from msq.extract.store_problems import Problem
from msq.extract.store_seal import layout_is_changed, read_metadata, recorded_digests, sealed
from msq.extract.store_verify import verify_store
from msq.extract.store_views import views_in

_ARRAYS = ("tokens", "image", schema.IMAGE_FRAMES, "time", "status")
_GROUPS = (*_ARRAYS, "text", "partition")
_ROWS = ("status", "data", "values", "contradiction", "uncommitted", "sample")


@dataclass
class Repair:
    """What was, or would be, done.

    Attributes:
        store: path of the store.
        dry_run: whether nothing was touched.
        problems: what `verify` found, one line each.
        actions: what was done, one line each.
        redo: `encoder, view, shard` of what the next `msq extract` makes again.
        left: problems that nothing can be done about here, one line each.
    """

    store: str
    dry_run: bool
    problems: list[str] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    redo: list[dict[str, Any]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return asdict(self)


def repair_store(path: Path, *, dry_run: bool = False, extra: Iterable[Problem] = ()) -> Repair:
    """Mark what is bad for re-doing; `msq extract` with the same request then completes the store.

    Args:
        path: the store.
        dry_run: say what would be done, and touch nothing.
        extra: problems to act on beside those that `verify_store` finds.

    Raises:
        StoreError: another process writes the store.
        StoreNotFound: there is no store.
        UsageError: it is a zip file, which is only read.
    """
    if is_archive(path) and not dry_run:
        raise UsageError(f"{path}: a zip file is only read; expected a folder or a URL")
    with nullcontext() if dry_run or not is_local(path) else claim_store(path):
        found = verify_store(path)
        problems = [*found.problems, *extra]
        done = Repair(str(path), dry_run, [str(problem) for problem in problems])
        work = _Work(path, done)
        for problem in problems:
            work.metadata(problem)
        for problem in problems:
            work.rest(problem)
        if not dry_run and (removed := remove_temporaries(path)):
            done.actions.append(f"removed {removed} files that killed writers left")
    return done


class _Work:
    def __init__(self, path: Path, done: Repair) -> None:
        self._path = path
        self._done = done
        self._gone: set[str] = set()

    def metadata(self, problem: Problem) -> None:
        """Bring back a `zarr.json`, or remove it for the next run to write."""
        if problem.kind in ("dataset", "text"):
            file = f"{problem.file}/zarr.json"
            if self._has_other_layout(file):
                self._remove(file, "the next msq extract writes it again")
            return
        if problem.kind != "metadata":
            self._layout(problem)
            return
        group, _, rest = problem.file.removesuffix("/zarr.json").partition("/")
        slug = rest.partition("/")[0]
        if group in _ARRAYS and rest:
            self._encoder(problem, group, slug)
        elif group in _GROUPS and rest.count("/") == 0 and (group == "text" or not rest):
            self._group(problem.file)
        elif group == "text":
            self._remove(f"text/{rest}/c/0/0", "the class embeddings are written again")
            self._remove(problem.file, "")
        elif problem.file == "zarr.json" or problem.file.endswith("/zarr.json"):
            self._remove(problem.file, "the next msq extract writes it again")

    def rest(self, problem: Problem) -> None:
        """Act on what is not metadata."""
        if problem.kind in _ROWS and problem.encoder and problem.shard >= 0:
            name = f"status/{problem.encoder}/c/{problem.shard}/{problem.view}"
            redo = {"encoder": problem.encoder, "view": problem.view, "shard": problem.shard}
            if redo not in self._done.redo:
                self._done.redo.append(redo)
                self._remove(name, f"shard {problem.shard} of {problem.encoder} is made again")
        elif problem.kind == "failures":
            self._remove(problem.file, "its shards are made again")
            redo = {"encoder": problem.encoder, "view": problem.view, "shard": problem.shard}
            self._remove(
                f"status/{problem.encoder}/c/{problem.shard}/{problem.view}",
                f"shard {problem.shard} of {problem.encoder} is made again",
            )
            if redo not in self._done.redo:
                self._done.redo.append(redo)
        elif problem.kind in ("dataset", "text"):
            folder = self._path / problem.file / "c"
            for file in sorted(f for f in folder.rglob("*") if f.is_file()):
                inside = str(file.relative_to(self._path))
                self._remove(inside, "the next msq extract writes it again")
        elif problem.kind == "stray" and _is_chunk(problem.file):
            array = "no clip or view of the store is in it" if problem.encoder else ""
            self._remove(problem.file, array or "no metadata says what it is")
        elif problem.kind == "stray":
            self._done.left.append(f"{problem} (msq did not write it and does not touch it)")
        elif problem.kind != "metadata":
            self._done.left.append(str(problem))

    def _layout(self, problem: Problem) -> None:
        """Rows that cannot be read since the metadata has other chunks than msq wrote."""
        if problem.kind not in ("data", "status") or not problem.encoder:
            return
        file = f"{problem.file.split('/c/')[0]}/zarr.json"
        if file not in self._gone and self._has_other_layout(file):
            self._encoder(problem, file.partition("/")[0], problem.encoder, file)

    def _has_other_layout(self, file: str) -> bool:
        try:
            return layout_is_changed(read_metadata(self._path / file))
        except (FileNotFoundError, MsqError):
            return False

    def _group(self, file: str) -> None:
        """A group says nothing but that it is one."""
        keys = StoreKeys()
        keys.group(file.removesuffix("/zarr.json"))
        self._done.actions.append(f"{file}: written again")
        if not self._done.dry_run:
            write_file(self._path / file, [keys.keys()[file]])

    def _encoder(self, problem: Problem, group: str, slug: str, file: str = "") -> None:
        """Write an encoder's metadata from what its other arrays say; else drop the encoder."""
        file = file or problem.file
        if file in self._gone:
            return
        content = self._rebuilt(group, slug).get(file)
        if content is not None:
            self._gone.add(file)
            self._done.actions.append(f"{file}: written again from the other arrays of {slug}")
            if not self._done.dry_run:
                write_file(self._path / file, [content])
            return
        why = f"no array of {slug} says any more how its features were made: all are made again"
        for found in sorted((self._path / "status" / slug / "c").rglob("*")):
            if found.is_file():
                self._remove(str(found.relative_to(self._path)), why)
        self._remove(file, why)

    def _rebuilt(self, group: str, slug: str) -> dict[str, bytes]:
        """The metadata of the arrays of an encoder, from the first of them that is whole."""
        try:
            clips = int(read_root(self._path)["clips"])
            name = str(read_root(self._path)["dataset"])
        except MsqError:
            return {}
        kinds = ("video", "image")
        frames = frames_in(self._path, slug)
        has = frames == "stored"
        names = dict.fromkeys(n for kind in kinds for n in schema.array_names(kind, slug, has))
        for sister in reversed(names):
            try:
                document = read_metadata(self._path / sister / "zarr.json")
                attributes = document["attributes"]["msq"]
                spec = EncoderSpec.from_dict(attributes["encoder"])
                views = views_in(attributes)
                if layout_is_changed(document) or spec.fingerprint(name) != attributes["spec_hash"]:
                    continue
                content = encoder_keys(
                    spec,
                    name,
                    clips,
                    attributes["store_dtype"],
                    int(attributes["shard"]),
                    views,
                    frames,
                )
            except (MsqError, FileNotFoundError, KeyError, TypeError, ValueError):
                continue
            sealing = bool(recorded_digests(document))
            return {key: _with(value, attributes, sealing) for key, value in content.items()}
        return {}

    def _remove(self, file: str, why: str) -> None:
        if file in self._gone:
            return
        self._gone.add(file)
        if not (self._path / file).exists():
            return
        self._done.actions.append(f"{file}: removed{f'; {why}' if why else ''}")
        if not self._done.dry_run:
            remove_file(self._path / file)


def _is_chunk(file: str) -> bool:
    """Whether a file is called as msq calls a chunk: by numbers below the `c/` of an array."""
    names = file.partition("/c/")[2].split("/")
    return file.partition("/")[0] in _GROUPS and all(name.isdecimal() for name in names)


def _with(content: bytes, attributes: dict[str, Any], sealing: bool) -> bytes:
    """Metadata with the attributes of a sister array, sealed where that is."""
    document = json.loads(content)
    document["attributes"]["msq"] = attributes
    text = json.dumps(document, indent=2).encode()
    return sealed(text) if sealing else text
