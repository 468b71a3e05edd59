"""Features that others computed: which keys a folder or file has, and one video's array at a time.

A key names one video's features as their maker did: a file's path below the folder without its
suffix, an array's name in a file, or a string in a list of ids that lies beside one large array.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msq.errors import UsageError
from msq.extract.array_file import SUFFIXES, ArrayFile, FeatureError, open_arrays

# Looked for in this order, capitals or not.
ID_NAMES = (
    *("ids", "id", "video_ids", "video_id", "vids", "names", "name", "clips", "clip"),
    *("keys", "files", "filenames", "paths", "videos"),
)
FEATURE_NAMES = (
    *("features", "feature", "feats", "feat", "c3d_features", "i3d_features"),
    *("embeddings", "embedding", "data", "x"),
)
_SHOWN = 5


class FeatureSource(ABC):
    """Where features lie.

    Attributes:
        path: the folder or file.
        keys: every name by which an item can be asked for -> the item's own key, which is among
            the names. `len({*keys.values()})` items.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys: dict[str, str] = {}

    @property
    def name(self) -> str:
        """Readable, no path of this machine."""
        return self.path.resolve().name

    @abstractmethod
    def read(self, key: str) -> NDArray[np.generic]:
        """The array of one item.

        Raises:
            DamagedFile: this one cannot be read.
            FeatureError: none can be read, or several arrays and none chosen.
        """

    @abstractmethod
    def place(self, key: str) -> str:
        """Where an item lies, for messages."""

    def close(self) -> None:  # noqa: B027 (most have nothing open)
        """Close what is open."""


def open_features(path: Path, array: str | None = None) -> FeatureSource:
    """A folder with a file per video, or one file with the features of all.

    Args:
        path: a folder of `.npy`, `.npz`, `.pt`, `.safetensors` or `.h5` files, or one such file.
        array: which array, where there are several for each video.

    Raises:
        UsageError: there is no such path, or it holds no file of features.
        FeatureError: a file that cannot be read, or whose arrays cannot be told apart.
    """
    if not path.exists():
        raise UsageError(f"{path}: expected a folder or file of features, there is none")
    if path.is_dir():
        return _Folder(path, array)
    if path.suffix.lower() not in SUFFIXES:
        more = "; msq store convert takes a zip file of a store" if path.suffix == ".zip" else ""
        raise UsageError(
            f"{path}: expected a folder, or a file with one of {', '.join(SUFFIXES)}{more}"
        )
    return _SingleFile(path, array)


class _Folder(FeatureSource):
    def __init__(self, path: Path, array: str | None) -> None:
        super().__init__(path)
        self._array = array
        self._files: dict[str, Path] = {}
        for file in sorted(path.rglob("*")):
            inside = file.relative_to(path)
            hidden = any(part.startswith(".") for part in inside.parts)
            if file.suffix.lower() not in SUFFIXES or hidden or not file.is_file():
                continue
            key = inside.as_posix().removesuffix(file.suffix)
            if key in self._files:
                raise FeatureError(
                    f"{path}: expected one file for {key!r}, found {self._files[key].name} and "
                    f"{file.name}; keep one of them"
                )
            self._files[key] = file
        if not self._files:
            raise UsageError(
                f"{path}: expected files with one of {', '.join(SUFFIXES)}, found none"
            )
        self.keys = {key: key for key in self._files}

    def read(self, key: str) -> NDArray[np.generic]:
        file = open_arrays(self._files[key])
        try:
            name = choose(file.shapes, self._array)
            if name is None:
                raise _undecided(file, self._array)
            return file.read(name)
        finally:
            file.close()

    def place(self, key: str) -> str:
        return str(self._files[key])


class _SingleFile(FeatureSource):
    """An array per id (perhaps in a group of its own), or one array with a list of ids."""

    def __init__(self, path: Path, array: str | None) -> None:
        super().__init__(path)
        self._file = open_arrays(path)
        self._items: dict[str, tuple[str, int | None]] = {}
        if "" in self._file.shapes:
            raise FeatureError(
                f"{path}: one array of shape {self._file.shapes['']} and no list of ids; expected "
                "a folder with a file per video, or an npz or HDF5 file with an array of ids "
                f"(named {', '.join(ID_NAMES[:4])}, …) beside the features"
            )
        if (ids := self._ids()) is not None:
            self._read_table(ids, array)
        else:
            self._read_groups(array)
        if not self._items:
            raise FeatureError(f"{path}: expected arrays of numbers, found none")

    def _ids(self) -> str | None:
        """The list of ids: of a known name, or the only list that has as many as there are rows."""
        texts = {name: n for name, n in self._file.texts.items() if "/" not in name}
        known = {name.lower(): name for name in texts}
        named = next((known[name] for name in ID_NAMES if name in known), None)
        rows = {shape[0] for shape in self._file.shapes.values() if len(shape) >= 2}
        others = [name for name, n in texts.items() if n in rows]
        return named or (others[0] if len(others) == 1 else None)

    def _read_table(self, ids: str, array: str | None) -> None:
        file = self._file
        count = file.texts[ids]
        fits = {k: v for k, v in file.shapes.items() if len(v) >= 2 and v[0] == count}
        name = choose(fits, array)
        if name is None:
            raise FeatureError(
                f"{file.path}: found a list of {count} ids ({ids!r}); expected one array of "
                f"{count} rows beside it, found {_listed(file.shapes)}"
                + (f" and none called {array!r}" if array else "; --array NAME chooses")
            )
        keys = file.strings(ids)
        if twice := [key for key, n in Counter(keys).items() if n > 1][:_SHOWN]:
            raise FeatureError(f"{file.path}: {ids!r} repeats {', '.join(map(repr, twice))}")
        self._items = {key: (name, row) for row, key in enumerate(keys)}
        self.keys = {key: key for key in keys}

    def _read_groups(self, array: str | None) -> None:
        groups: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, shape in self._file.shapes.items():
            groups.setdefault(name.rpartition("/")[0], {})[name] = shape
        for group, members in groups.items():
            chosen = choose(members, array) if group else None
            for name in members:
                key = group if name == chosen else name
                self._items[key] = (name, None)
                self.keys[name] = self.keys[key] = key

    def read(self, key: str) -> NDArray[np.generic]:
        return self._file.read(*self._items[key])

    def place(self, key: str) -> str:
        return f"{self.path}, {key!r}"

    def close(self) -> None:
        self._file.close()


def choose(
    shapes: Mapping[str, tuple[int, ...]],
    wanted: str | None,
    known: Iterable[str] = FEATURE_NAMES,
) -> str | None:
    """Which of several arrays is meant: the one asked for, the only one, or one of a known name.

    Names are compared by their last part, capitals or not.
    """
    names = {name.rpartition("/")[2].lower(): name for name in shapes}
    if wanted is not None:
        return names.get(wanted.lower())
    if len(shapes) == 1:
        return next(iter(shapes))
    return next((names[name] for name in known if name in names), None)


def _undecided(file: ArrayFile, wanted: str | None) -> FeatureError:
    what = "one array of numbers" if wanted is None else f"an array {wanted!r}"
    return FeatureError(
        f"{file.path}: expected {what}, found {_listed(file.shapes)}; --array NAME chooses"
    )


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    shown = [f"{name!r} {shape}" for name, shape in list(shapes.items())[:_SHOWN]]
    return ", ".join(shown + (["…"] if len(shapes) > _SHOWN else [])) or "none"
