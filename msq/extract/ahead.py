"""What comes next is made in a thread, while what came last is worked on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_END: Any = object()


class Stopped(Exception):
    """Nobody waits for what is being made any more."""


def made_ahead(
    make: Callable[[Callable[[], None]], Generator[T, None, None]], room: int
) -> Generator[T, None, None]:
    """The items of a generator that runs in a thread of its own, a few items ahead.

    However it ends, by an error on either side, by Ctrl-C or because nobody asks any more, the
    thread has ended and the generator is closed before this does. An error in the thread is raised
    here, in its turn.

    Args:
        make: gives the generator; what it is given is to be called over and over by the work in
            between, and raises `Stopped` once nobody waits.
        room: items that may wait, the one that is being made among them.
    """
    stopped = threading.Event()

    def watch() -> None:
        if stopped.is_set():
            raise Stopped

    items = make(watch)
    with ThreadPoolExecutor(1, "ahead") as pool:
        coming = deque(pool.submit(next, items, _END) for _ in range(room))
        try:
            while (item := coming.popleft().result()) is not _END:
                coming.append(pool.submit(next, items, _END))
                yield item
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            items.close()
