"""Files that hold arrays by name: npy, npz, pt, safetensors, HDF5. Nothing in them is ever run.

An array is read when it is asked for, and alone; shapes are known from the file's headers. In a
`.npy`, and in a `.pt` that holds one tensor, the array has no name and is called "".
"""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from msq.errors import MsqError

_NPY_MAGIC, _PICKLE_MAGIC = b"\x93NUMPY", b"\x80"


class FeatureError(MsqError):
    """Features made elsewhere that cannot be taken as they are."""


class DamagedFile(FeatureError):
    """One file or array that cannot be read; others of the same source may be sound."""


class PickledFile(FeatureError):
    """A file that holds Python objects. Reading them would run code of whoever made it."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path}: holds pickled Python objects, which are never read; expected an array of "
            "numbers (np.save of a numeric array, torch.save of a tensor, or safetensors)"
        )


class ArrayFile(ABC):
    """One open file.

    Attributes:
        path: where it lies.
        shapes: name -> shape of each array of numbers.
        texts: name -> number of strings, of each list of strings.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.texts: dict[str, int] = {}

    @abstractmethod
    def read(self, name: str, row: int | None = None) -> NDArray[np.generic]:
        """One array, or one row of it.

        Raises:
            DamagedFile: its bytes cannot be read.
            PickledFile: it holds objects.
        """

    def strings(self, name: str) -> list[str]:
        """One list of strings."""
        values = self.read(name).tolist()
        return [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values]

    def close(self) -> None:  # noqa: B027 (some have nothing open)
        """Close the file."""

    def damaged(self, error: BaseException | str) -> DamagedFile:
        """What to raise where the file's bytes cannot be read."""
        words = " ".join(str(error).split())[:200]
        return DamagedFile(f"{self.path}: damaged, or not what its suffix says ({words})")

    def _add(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        if dtype.kind in "US":
            if len(shape) == 1:
                self.texts[name] = shape[0]
        else:
            self.shapes[name] = tuple(int(n) for n in shape)


class _Npy(ArrayFile):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with path.open("rb") as file:
            head = file.read(len(_NPY_MAGIC))
        if head[:1] == _PICKLE_MAGIC:
            raise PickledFile(path)
        if head != _NPY_MAGIC:
            raise self.damaged("no npy header")
        try:
            with path.open("rb") as file:
                shape, dtype = _header(file)
        except (ValueError, EOFError, OSError) as error:
            raise self.damaged(error) from None
        if dtype.hasobject:
            raise PickledFile(path)
        self._add("", shape, dtype)

    def read(self, name: str, row: int | None = None) -> NDArray[np.generic]:
        try:
            values = np.load(self.path, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise self.damaged(error) from None
        return cast("NDArray[np.generic]", values if row is None else values[row])


class _Npz(ArrayFile):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._last: tuple[str, NDArray[np.generic]] | None = None
        try:
            self._zip = zipfile.ZipFile(path)
            for member in self._zip.namelist():
                if member.endswith(".npy"):
                    with self._zip.open(member) as file:
                        self._add(member.removesuffix(".npy"), *_header(file))
        except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise self.damaged(error) from None

    def read(self, name: str, row: int | None = None) -> NDArray[np.generic]:
        if self._last is None or self._last[0] != name:
            try:
                with self._zip.open(f"{name}.npy") as file:
                    values = np.lib.format.read_array(file, allow_pickle=False)
            except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
                if "allow_pickle" in str(error):
                    raise PickledFile(self.path) from None
                raise self.damaged(f"array {name!r}: {error}") from None
            self._last = name, values
        return self._last[1] if row is None else self._last[1][row]

    def close(self) -> None:
        self._zip.close()


class _Torch(ArrayFile):
    def __init__(self, path: Path) -> None:
        import pickle

        import torch

        super().__init__(path)
        try:
            found = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
        except pickle.UnpicklingError:
            raise PickledFile(path) from None
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            raise self.damaged(error) from None
        named = found if isinstance(found, Mapping) else {"": found}
        self._tensors = {str(k): v for k, v in named.items() if isinstance(v, torch.Tensor)}
        if not self._tensors:
            raise self.damaged(f"expected a tensor or a dict of tensors, found {type(found)}")
        for name, tensor in self._tensors.items():
            self._add(name, tuple(tensor.shape), np.dtype("f4"))

    def read(self, name: str, row: int | None = None) -> NDArray[np.generic]:
        tensor = self._tensors[name]
        return _from_torch(tensor if row is None else tensor[row])


class _Safetensors(ArrayFile):
    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        super().__init__(path)
        try:
            opened: Any = safe_open(path, framework="pt")
            self._file = opened.__enter__()
            for name in self._file.keys():  # noqa: SIM118 (no mapping)
                shape = tuple(self._file.get_slice(name).get_shape())
                self._add(name, shape, np.dtype("f4"))
        except (SafetensorError, OSError) as error:
            raise self.damaged(error) from None

    def read(self, name: str, row: int | None = None) -> NDArray[np.generic]:
        return _from_torch(
            self._file.get_tensor(name) if row is None else self._file.get_slice(name)[row]
        )

    def close(self) -> None:
        self._file.__exit__(None, None, None)


class _Hdf5(ArrayFile):
    def __init__(self, path: Path) -> None:
        import h5py

        super().__init__(path)
        try:
            self._file: Any = h5py.File(path, "r")
            self._file.visititems(self._visit)
        except (OSError, RuntimeError) as error:
            raise self.damaged(error) from None

    def _visit(self, name: str, item: Any) -> None:
        import h5py

        if not isinstance(item, h5py.Dataset) or item.shape is None:
            return
        if h5py.check_string_dtype(item.dtype) is not None:
            self._add(name, item.shape, np.dtype("U1"))
        elif item.dtype.kind in "fiu":
            self._add(name, item.shape, item.dtype)

    def read(self, name: str, row: int | None = None) -> NDArray[np.generic]:
        try:
            values = self._file[name][...] if row is None else self._file[name][row]
        except (OSError, RuntimeError) as error:
            raise self.damaged(f"dataset {name!r}: {error}") from None
        return cast("NDArray[np.generic]", np.asarray(values))

    def close(self) -> None:
        self._file.close()


_FORMATS: dict[str, type[ArrayFile]] = {
    ".npy": _Npy,
    ".npz": _Npz,
    ".pt": _Torch,
    ".pth": _Torch,
    ".safetensors": _Safetensors,
    ".h5": _Hdf5,
    ".hdf5": _Hdf5,
}
SUFFIXES = tuple(_FORMATS)


def open_arrays(path: Path) -> ArrayFile:
    """Open a file of arrays; `close` it afterwards.

    Raises:
        DamagedFile: it cannot be read.
        PickledFile: it holds objects.
        FeatureError: its suffix is none of `SUFFIXES`.
    """
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise FeatureError(f"{path}: expected a file with one of {', '.join(SUFFIXES)}")
    return kind(path)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an npy file, from its first bytes."""
    first = np.lib.format.read_magic(file) == (1, 0)
    read: Any = getattr(np.lib.format, f"read_array_header_{1 if first else 2}_0")
    shape, _, dtype = read(file)
    return shape, dtype


def _from_torch(tensor: Any) -> NDArray[np.generic]:
    """As numpy; bfloat16, which numpy lacks, as float32, which holds it exactly."""
    import torch

    plain = tensor.detach()
    plain = plain.float() if plain.dtype == torch.bfloat16 else plain
    return cast("NDArray[np.generic]", plain.contiguous().numpy())
