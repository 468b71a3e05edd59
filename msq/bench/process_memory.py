"""Memory and processor time of this process and all that it has started (Linux)."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

EVERY = 0.25  # seconds between two looks


def descendants(process: int) -> list[int]:
    """A process and all that descend from it, as far as they can be seen."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        parents[int(folder.name)] = int(fields[1])
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def resident(process: int) -> int:
    """Bytes in memory of a process; what it shares with others is shared out among them."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8")
    except OSError:
        return 0
    lines = (line.split() for line in text.splitlines() if line.startswith("Pss:"))
    return sum(1024 * int(words[1]) for words in lines)


class PeakMemory:
    """The most memory that this process and its descendants held together within a `with`.

    Attributes:
        bytes: of it.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            held = sum(resident(process) for process in descendants(os.getpid()))
            self.bytes = max(self.bytes, held)
            if self._end.wait(EVERY):
                return
