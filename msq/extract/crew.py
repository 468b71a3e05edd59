"""Who works on one store, and what they tell each other."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from msq.extract.shard_claims import Member


@dataclass(frozen=True)
class Team:
    """A worker's place among those that were started together.

    Attributes:
        rank: its number; 0 speaks for all, None came by itself to help.
        world: how many there are.
        local: how many of them share this machine's cores.
    """

    rank: int | None = None
    world: int = 1
    local: int = 1

    @property
    def start(self) -> float:
        """Where in the store to begin, from 0 to 1, so that workers seldom meet."""
        if self.rank is None:
            return os.getpid() * 0.618034 % 1
        return self.rank / self.world


LOOK = 2.0  # seconds between two looks at what others have done


class Crew:
    """A run over shards as one of many workers, or alone where there is no `member`.

    Args:
        member: this worker among others.
        report: what else to tell of this worker, as JSON: `failed`, `stages`, `warnings`.
    """

    def __init__(self, member: Member | None, report: Callable[[], dict[str, Any]]) -> None:
        self._member = member
        self._report = report
        self._before = self._shares()  # of earlier runs on the same store
        self._seen = 0, 0
        self._looked = 0.0
        self._started = time.perf_counter()

    def keeps(self, shard: int) -> bool:
        """Whether a shard that was taken is still this worker's to write."""
        return self._member is None or self._member.keeps(shard)

    def made_again(self, shard: int) -> None:
        """A done shard was made again, which nothing in the store tells."""
        if self._member is not None:
            self._member.made_again(shard)

    def is_made_again(self, shard: int) -> bool:
        """Whether another worker did that."""
        return self._member is not None and self._member.is_made_again(shard)

    def tell(self, made: int) -> None:
        """Tell the others how many rows this worker has made, and how fast."""
        if self._member is None:
            return
        who = {"host": platform.node(), "pid": os.getpid()}
        seconds = time.perf_counter() - self._started
        rates = {"seconds": seconds, "clips_per_second": made / seconds if seconds > 0 else 0.0}
        self._member.share({**who, "clips": made, **rates, **self._report()})

    def others(self) -> tuple[int, int]:
        """Rows made by other workers since this one came, and how many of them failed."""
        now = time.perf_counter()
        if self._member is not None and now - self._looked >= LOOK:
            self._looked = now
            shares = self.shares()
            self._seen = sum(s["clips"] for s in shares), sum(s["failed"] for s in shares)
        return self._seen

    def shares(self) -> list[dict[str, Any]]:
        """What each other worker has made since this one came."""
        found = []
        for token, share in sorted(self._shares().items()):
            before = self._before.get(token, {"clips": 0, "failed": 0})
            counts = {key: share[key] - before[key] for key in ("clips", "failed")}
            if counts["clips"]:
                found.append({**share, **counts})
        return found

    def _shares(self) -> dict[str, dict[str, Any]]:
        return {} if self._member is None else self._member.shares()
