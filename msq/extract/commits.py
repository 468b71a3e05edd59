"""Commits of finished shards in a thread of their own, in order, while the next one is made."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Commits:
    """One commit under way at a time, so that at most two shards are in memory.

    What is to follow a commit (to count it, to give the shard's claim back) happens in the thread
    that calls, in the same order. A commit that fails is raised there, and what would follow it
    does not happen.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._running: Future[None] | None = None
        self._after: list[Callable[[], None]] = []

    def submit(self, commit: Callable[[], None]) -> None:
        """Begin a commit, when the one before is at its end.

        Raises:
            Exception: that of the one before.
        """
        self.settle()
        self._running = self._executor.submit(commit)

    def then(self, work: Callable[[], None]) -> None:
        """Do this when the commit that was begun last is at its end; at once where it is."""
        self._after.append(work)
        if self._running is None:
            self.settle()

    def poll(self) -> None:
        """What `settle` does, without waiting.

        Raises:
            Exception: that of the commit.
        """
        if self._running is not None and self._running.done():
            self.settle()

    def settle(self) -> None:
        """Wait for the commit under way, and do what is to follow it.

        Raises:
            Exception: that of the commit.
        """
        if self._running is not None:
            self._running.result()
            self._running = None
        after, self._after = self._after, []
        for work in after:
            work()

    def close(self) -> None:
        """Wait for the commit under way, whatever comes of it: its shard is whole or not done."""
        self._after = []
        self._executor.shutdown(wait=True)
