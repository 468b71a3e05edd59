"""Decoded and resized frames of clips that are shown again and again, in memory or on disk.

Only clean and test views are worth it: an augmented one is another each time. On disk they lie in
a file without a name, which the system takes back with the process, however it ends: nothing is
left behind, and nothing that another run wrote is ever read.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from msq.errors import UsageError
from msq.extract.decode_task import Picture

CacheChoice = Literal["auto", "off", "memory", "disk"]

SHARE_OF_MEMORY = 0.5  # that `auto` takes at most of what can be had
SHARE_OF_DISK = 0.8
_MOUNTS = Path("/proc/mounts")
_IN_MEMORY = ("tmpfs", "ramfs")  # file systems


class FrameCache:
    """Frames by clip id: written once, read as often as wanted, bit by bit the same.

    Args:
        pictures: what is kept of each clip.
        clips: how many there may be.
        choice: `memory`; `disk`; `auto` for memory where they take at most half of it, else for
            the disk where there is room, else for none; `off`.
        memory: bytes that can still be had of it.
        folder: in which the file lies; such as the run's own, since that of temporary files is in
            memory on many machines. `auto` does not take one that is. None for the system's.

    Attributes:
        where: `memory`, `disk` or `off`.
        line: says so, with the size and, where there is none, the reason.
        hits: clips that were read.

    Raises:
        UsageError: an augmented picture, or `memory` or `disk` that is too small.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        clips: int,
        choice: CacheChoice = "auto",
        *,
        memory: int,
        folder: Path | None = None,
    ) -> None:
        if any(picture.view.kind in ("augmented", "official") for picture in pictures):
            raise UsageError("cache of decoded clips: augmented clips are other ones each time")
        self.pictures = tuple(pictures)
        self.hits = 0
        self._each = sum(picture.bytes for picture in pictures)
        self._places: dict[str, int] = {}
        self._clips = clips
        self._memory: NDArray[np.uint8] | None = None
        self._file: BinaryIO | None = None
        folder = Path(tempfile.gettempdir()) if folder is None else folder
        self.where, self.line = _decide(choice, clips * self._each, memory, folder)
        if self.where == "memory":
            self._memory = np.empty(self.bytes, np.uint8)  # takes what has been written only
        elif self.where == "disk":
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    @property
    def bytes(self) -> int:
        """Bytes that it takes when all clips are in it."""
        return 0 if self.where == "off" else self._clips * self._each

    def __enter__(self) -> FrameCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, clip: str) -> bool:
        """Whether the frames of the clip with this id are there."""
        return clip in self._places

    def __len__(self) -> int:
        """Clips that are there."""
        return len(self._places)

    def write(self, clip: str, frames: Sequence[NDArray[np.uint8]]) -> None:
        """Keep the frames of a clip, per picture uint8 `[T, 3, size, size]`, if there is room."""
        if self.where == "off" or clip in self._places or len(self._places) >= self._clips:
            return
        place = len(self._places) * self._each
        try:
            for array in frames:
                self._put(place, np.ascontiguousarray(array).reshape(-1))
                place += array.nbytes
        except OSError as error:
            # What is there stays of use: it was written whole.
            self._clips = len(self._places)
            self.line += f"; no more than {self._clips} clips fit: {error.strerror or error}"
            return
        self._places[clip] = len(self._places)

    def read(self, clip: str, into: Sequence[NDArray[np.uint8]]) -> bool:
        """Copy the frames of a clip into contiguous arrays, one per picture.

        Returns:
            Whether they were there. A disk that fails while it is read ends the cache.
        """
        number = self._places.get(clip)
        if number is None:
            return False
        place = number * self._each
        try:
            for array in into:
                self._get(place, array.reshape(-1))
                place += array.nbytes
        except OSError as error:
            self.line += f"; given up: {error.strerror or error}"
            self.close()
            return False
        self.hits += 1
        return True

    def close(self) -> None:
        """Give the memory or the file back; nothing is there any more."""
        self._places = {}
        self.where = "off"
        if self._file is not None:
            self._file.close()
        self._file = self._memory = None

    def _put(self, place: int, data: NDArray[np.uint8]) -> None:
        if self._memory is not None:
            self._memory[place : place + len(data)] = data
        if self._file is not None:
            self._file.seek(place)
            while len(data):
                data = data[self._file.write(data.data) :]

    def _get(self, place: int, into: NDArray[np.uint8]) -> None:
        if self._memory is not None:
            into[:] = self._memory[place : place + len(into)]
        if self._file is not None:
            self._file.seek(place)
            while len(into):
                count: int = self._file.readinto(into.data)  # type: ignore[attr-defined]
                if count == 0:
                    raise OSError("the file of the cache is shorter than it was")
                into = into[count:]


def _decide(
    choice: CacheChoice, size: int, memory: int, folder: Path
) -> tuple[Literal["memory", "disk", "off"], str]:
    """Where frames of so many bytes go, and the line that says so."""
    if choice == "off":
        return "off", "decoded clips are not kept (clips.cache=off)"
    wanted = f"{_gigabytes(size)} of decoded clips"
    short = f"{wanted} do not fit in memory ({_gigabytes(memory)} can be had"
    if choice == "memory" and size > memory:
        raise UsageError(f"{short}): take clips.cache=auto, disk or off")
    if choice == "memory" or (choice == "auto" and size <= SHARE_OF_MEMORY * memory):
        return "memory", f"{wanted} are kept in memory"
    room = int(SHARE_OF_DISK * shutil.disk_usage(folder).free)
    if choice == "disk" and size > room:
        raise UsageError(
            f"{wanted} do not fit on the disk of {folder} (at most {_gigabytes(room)} are taken): "
            "take clips.cache=auto or off, or a folder on a larger disk"
        )
    if choice == "disk" or (size <= room and not _in_memory(folder)):
        return "disk", f"{wanted} are kept on disk, in a file that goes with the run"
    disk = "in memory itself" if _in_memory(folder) else f"{_gigabytes(room)} may be taken"
    return "off", f"{short}, half of it at most) nor on the disk of {folder} ({disk}): not kept"


def _in_memory(folder: Path) -> bool:
    """Whether the folder's file system lies in memory; False where nobody knows."""
    try:
        mounts = [line.split() for line in _MOUNTS.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return False
    place = folder.resolve()
    kinds = {Path(words[1]): words[2] for words in mounts if len(words) > 2}
    return next((kinds[p] in _IN_MEMORY for p in (place, *place.parents) if p in kinds), False)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
