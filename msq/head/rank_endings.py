"""How the processes of a run end when one of them has to: all of them, with one message.

The first that says why it ends speaks for all. The others learn of it in one of two ways: what
they exchange fails because it is gone, or, where they are at something else, by a look every half
second.
"""

from __future__ import annotations

import _thread
import json
import os
import threading
import time
from typing import Any

from msq.errors import MsqError, PeerError

KEY, HEARD = "msq/ended", "msq/heard"
LOOK = 0.5  # seconds between two looks at whether another one has ended
PATIENCE = 3.0  # seconds for it to say why, and then for this process to notice by itself
LAST = 5.0  # seconds until a process that does not is ended
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "process group")


class Endings:
    """Who of the processes ended first, and why.

    Args:
        store: that all are connected to.
        rank: of this process; the first one holds the store.
        world: how many there are.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self._store, self._rank, self._world = store, rank, world
        self._watched = store.clone()  # a connection of the thread's own
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="endings")
        self._thread.start()

    def explained(self, error: BaseException) -> BaseException:
        """What to raise in place of an error that ends this process.

        Returns:
            The error itself where this is the first process that ends; a `PeerError` where another
            one has said why; an `MsqError` where another one is gone without a word.
        """
        self._over.set()
        if isinstance(error, PeerError):
            self._linger()
            return error
        lost = is_lost_connection(error)
        end = time.monotonic() + PATIENCE
        while lost and time.monotonic() < end and not self._told(self._store):
            time.sleep(0.05)
        if lost:
            error = MsqError(
                "another process of this run ended without a word (killed, or out of memory?); "
                "the last checkpoint is kept, run all of them again to go on"
            )
        said = self._say(error)
        self._linger()
        return error if said is None or said["rank"] == self._rank else _peer_error(said)

    def close(self) -> None:
        """End the watching."""
        self._over.set()
        self._thread.join(2 * LOOK)

    def _say(self, error: BaseException) -> dict[str, Any] | None:
        """Say why, unless one has before; what was said first, None where nobody can be asked."""
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        words = str(error) or ("interrupted" if code == 130 else type(error).__name__)
        mine = json.dumps({"rank": self._rank, "message": words, "code": code})
        try:
            said: dict[str, Any] = json.loads(self._store.compare_set(KEY, "", mine))
        except (RuntimeError, ValueError):  # the store went with the process that held it
            return None
        return said

    def _linger(self) -> None:
        """The first process waits a little for the others, which may be about to ask its store."""
        try:
            self._store.set(f"{HEARD}/{self._rank}", "yes")
            every = [f"{HEARD}/{rank}" for rank in range(self._world)]
            end = time.monotonic() + PATIENCE
            while self._rank == 0 and time.monotonic() < end and not self._store.check(every):
                time.sleep(0.05)
        except RuntimeError:
            return  # the store went with the process that held it

    @staticmethod
    def _told(store: Any) -> bool:
        try:
            return bool(store.check([KEY]))
        except RuntimeError:
            return False

    def _watch(self) -> None:
        """Ends this process where another one has ended, and it does not notice."""
        while not self._told(self._watched):
            if self._over.wait(LOOK):
                return
        if self._over.wait(PATIENCE):
            return
        _thread.interrupt_main()
        if not self._over.wait(LAST):  # it waits for something that nobody will send any more
            os._exit(json.loads(self._watched.get(KEY))["code"])


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exchange failed because another process is gone."""
    from torch.distributed import DistError

    if isinstance(error, DistError):
        return True
    text = str(error).lower()
    return type(error) is RuntimeError and any(word in text for word in _LOST)


def _peer_error(said: dict[str, Any]) -> PeerError:
    return PeerError(f"process {said['rank']}: {said['message']}", said["code"])
