"""Who writes a store: claims beside it, in `NAME.zarr.claims/`, that outlive no one.

Each process that writes has one file in that folder (see `claim_files`). All its claims (of the
whole store, of a shard) are hard links to that file: the link is made or not made in one step, and
all of them live and die with the process.

Who takes over a dead claim links the next generation of it (`shard-00000007.1` after `.0`): only
one can. Who finds a later generation than its own has lost the claim. Should two ever make the
same shard (a machine that slept, say), both write the same bytes, whole files by rename: no harm
is done.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from msq.errors import StoreError
from msq.extract.claim_files import AGE, Owner, ProcessFile, machine
from msq.extract.location import is_local

WRITER = "writer"
MEMBER = "member"


def claims_folder(store: Path) -> Path:
    """Where the claims of a store are; a link to the store is the same store."""
    store = store.resolve()
    return store.with_name(store.name + ".claims")


class Holder:
    """This process in a claims folder.

    Args:
        folder: of the claims; made where missing, and gone when the last process leaves.
        purpose: `write` for the whole store, `join` for shards.
        making: what the process makes, for others to compare.
    """

    def __init__(self, folder: Path, purpose: str, making: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self._own = ProcessFile(folder, purpose, making or {})
        self.token = self._own.token
        self._claims: dict[str, int] = {}  # name -> generation

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def claim(self, name: str) -> bool:
        """Take the only right to something; False where a process that is alive has it."""
        found = self._generations(name)
        if any(self._is_alive(path) for path in found.values()):
            return False
        generation = max(found, default=-1) + 1
        path = self.folder / f"{name}.{generation}"
        if not self._own.link(path):
            return False
        # Whoever looked before the last owner left may have linked another generation.
        others = self._generations(name)
        if any(self._is_alive(other) for number, other in others.items() if number != generation):
            self._own.unlink(path)
            return False
        self._claims[name] = generation
        return True

    def keeps(self, name: str) -> bool:
        """Whether a claim is still this process's: nobody believed it dead and took it over."""
        generation = self._claims.get(name)
        found = self._generations(name)
        return (
            generation in found and max(found) == generation and self._own.is_own(found[generation])
        )

    def release(self, name: str) -> None:
        """Give a claim up, and what dead processes left of it."""
        generation = self._claims.pop(name, -1)
        for number, path in self._generations(name).items():
            if number <= generation:
                self._own.unlink(path)

    def owner(self, name: str) -> Owner | None:
        """The living process, other than this one, that has a claim."""
        owners = [self._own.living(path) for path in self._generations(name).values()]
        return next((owner for owner in owners if owner is not None), None)

    def others(self, prefix: str) -> list[Owner]:
        """Living processes, other than this one, with a claim whose name starts so."""
        owners = [
            self._own.living(path) for path in self._entries() if path.name.startswith(prefix)
        ]
        return [owner for owner in owners if owner is not None]

    def clear(self) -> None:
        """Remove what dead processes left; whoever calls it knows that nobody is at work."""
        for path in self._entries():
            if not self._own.is_own(path):
                self._own.discard(path)

    def leave(self) -> None:
        """Give everything up; the last one takes the folder along."""
        self._own.stop()
        for name in list(self._claims):
            self.release(name)
        self._own.remove()
        entries = self._entries()
        processes = [path for path in entries if path.name.startswith("process-")]
        for path in processes:
            self._own.discard(path)
        if not any(path.exists() for path in processes):
            for path in set(entries).difference(processes):
                path.unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()
        self._own.close()

    def _entries(self) -> list[Path]:
        try:
            return sorted(self.folder.iterdir())
        except FileNotFoundError:
            return []

    def _generations(self, name: str) -> dict[int, Path]:
        found = [path for path in self._entries() if path.name.startswith(f"{name}.")]
        return {int(path.suffix[1:]): path for path in found if path.suffix[1:].isdecimal()}

    def _is_alive(self, path: Path) -> bool:
        return self._own.is_own(path) or self._own.living(path) is not None


@contextmanager
def claim_store(store: Path) -> Iterator[None]:
    """Hold the only right to write `store`; the claim's folder is gone afterwards.

    A store behind a URL has no claims: there must be one writer.

    Raises:
        StoreError: another process that is alive writes the store; the message names it.
    """
    if not is_local(store):
        yield
        return
    with Holder(claims_folder(store), "write") as holder:
        while not holder.claim(WRITER):
            if (owner := holder.owner(WRITER)) is not None:
                raise StoreError(held(store, owner))
            time.sleep(0.01)
        if members := holder.others(MEMBER):
            raise StoreError(held(store, members[0]))
        yield


def held(store: Path, owner: Owner) -> str:
    """Who holds a store, and what to do about it."""
    age = f"; if that machine is gone, the store is free after {AGE:.0f} seconds"
    elsewhere = age if owner.machine != machine() else ""
    return (
        f"{store}: process {owner.pid} is writing this store (on {owner.host}); wait for it to "
        f"end, or choose another store{elsewhere}"
    )
