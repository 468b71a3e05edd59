"""Many workers on one store: who of them prepares it, and who makes which shard.

A worker is a member of the store's crew: it has joined with the same request as all others. The
first to come prepares the store (metadata, class embeddings) while the others wait. Shards are then
taken one after the other, by whoever is free.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msq.errors import StoreError
from msq.extract.atomic import remove_temporaries
from msq.extract.claim_files import Owner
from msq.extract.claims import MEMBER, WRITER, Holder, claims_folder, held

_SHARE = "share-"
_REDO = "redo.json"


class Member:
    """A worker that fills a store together with others; see `join_store`.

    Args:
        store: which.
        holder: this process in the folder of claims.
        making: the request, as far as all workers must agree on it.
        alone: refuse to work where others already do.
    """

    def __init__(
        self, store: Path, holder: Holder, making: Mapping[str, Any], *, alone: bool
    ) -> None:
        self._store = store
        self._holder = holder
        self._making = making
        self._alone = alone

    @contextmanager
    def preparing(self) -> Iterator[bool]:
        """The only right to change the store as a whole; True for the first of the crew.

        Raises:
            StoreError: a process writes the whole store, others are at work and this one wants
                to be alone, or they work on another request.
        """
        self._wait_for_store()
        try:
            others = self._holder.others(MEMBER)
            if others:
                self._check(others)
            else:
                self._holder.clear()
            yield not others
            self._holder.claim(f"{MEMBER}-{self._holder.token}")
        finally:
            self._holder.release(WRITER)

    def _wait_for_store(self) -> None:
        while not self._holder.claim(WRITER):
            owner = self._holder.owner(WRITER)
            if owner is not None and owner.purpose == "write":
                raise StoreError(held(self._store, owner))
            time.sleep(0.02)

    def _check(self, others: list[Owner]) -> None:
        first = others[0]
        lines = [
            f"  {key}: expected {first.making.get(key)}, found {value}"
            for key, value in self._making.items()
            if first.making.get(key) != value
        ]
        if lines:
            raise StoreError(
                f"{self._store}: process {first.pid} is writing this store (on {first.host}) for "
                "another request:\n" + "\n".join(lines) + "\nwait for it to end, or give the same "
                "options"
            )
        if self._alone:
            more = f"; {len(others) - 1} others help it" if len(others) > 1 else ""
            raise StoreError(f"{held(self._store, others[0])}; to help it, add --join{more}")

    def leave(self) -> None:
        """Leave the crew; the last to leave removes what killed workers left half-written.

        Who is asked has left already, so that of two who leave at once one sees that it is the
        last.
        """
        self._holder.release(f"{MEMBER}-{self._holder.token}")
        while not self._holder.claim(WRITER):
            owner = self._holder.owner(WRITER)
            if owner is not None and owner.purpose == "write":
                return
            time.sleep(0.02)
        try:
            if self._is_last():
                remove_temporaries(self._store)
        finally:
            self._holder.release(WRITER)

    def _is_last(self) -> bool:
        if self._holder.others(MEMBER):
            # A dead worker's file looks alive while another process clears it away, locked.
            time.sleep(0.02)
            return not self._holder.others(MEMBER)
        return True

    def others(self) -> int:
        """How many other workers are in the crew."""
        return len(self._holder.others(MEMBER))

    def is_free(self, shard: int) -> bool:
        """Whether nobody else makes a shard right now."""
        return self._holder.owner(_making(shard)) is None

    def reserve(self, shard: int) -> bool:
        """Say that this worker would go on with a shard; who has nothing else may still take it."""
        return self._holder.claim(_ahead(shard))

    def take(self, shard: int) -> bool:
        """Take the right to make a shard; False where another worker makes it."""
        return self._holder.claim(_making(shard))

    def keeps(self, shard: int) -> bool:
        """Whether this worker still has that right."""
        return self._holder.keeps(_making(shard))

    def release(self, shard: int) -> None:
        """Give a shard up, done or not."""
        self._holder.release(_making(shard))
        self._holder.release(_ahead(shard))

    def share(self, done: Mapping[str, Any]) -> None:
        """Tell the others what this worker has done since it came."""
        self._note(f"{_SHARE}{self._holder.token}.json", done)

    def shares(self) -> dict[str, dict[str, Any]]:
        """Worker -> what it has done; those that left or died included, this one left out."""
        found = {}
        for path in self._holder.folder.glob(f"{_SHARE}*"):
            token = path.stem.removeprefix(_SHARE)
            if token != self._holder.token and (text := _text(path)):
                found[token] = json.loads(text)
        return found

    def plan_again(self, shards: Mapping[int, list[list[str]]]) -> None:
        """Tell the crew which done shards are to be made again: shard -> (encoder, view)."""
        self._note(_REDO, {str(shard): parts for shard, parts in shards.items()})

    def planned_again(self) -> dict[int, list[list[str]]]:
        """The same, as the first of the crew found it."""
        text = _text(self._holder.folder / _REDO)
        return {int(shard): parts for shard, parts in json.loads(text or "{}").items()}

    def made_again(self, shard: int) -> None:
        """Note that such a shard was made again."""
        self._note(f"again-{shard:08d}", {})

    def is_made_again(self, shard: int) -> bool:
        """Whether it was."""
        return (self._holder.folder / f"again-{shard:08d}").exists()

    def _note(self, name: str, content: Mapping[str, Any]) -> None:
        path = self._holder.folder / name
        half = path.with_name(f".{name}.{self._holder.token}")
        try:
            half.write_text(json.dumps(content), encoding="utf-8")
            half.replace(path)  # not flushed: it says nothing that the store does not
        except OSError as error:  # a full disk's names no file
            raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def join_store(store: Path, making: Mapping[str, Any], *, alone: bool = False) -> Iterator[Member]:
    """Work on a store together with others that make the same; one that dies is replaced.

    Args:
        store: which; a folder, since claims need a file system.
        making: what is made: option -> value as text or number.
        alone: refuse where others already work on it.
    """
    with Holder(claims_folder(store), "join", making) as holder:
        yield Member(store, holder, making, alone=alone)


def _making(shard: int) -> str:
    return f"shard-{shard:08d}"


def _ahead(shard: int) -> str:
    return f"ahead-{shard:08d}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
