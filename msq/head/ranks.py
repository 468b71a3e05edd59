"""The processes that take each step together, as torchrun starts them.

    with joined("auto") as ranks:
        train_end_to_end(material, config, out, device=ranks.device, ranks=ranks)

Gradients go over NCCL between GPUs and over gloo between CPUs; words and decisions always go over
gloo, so that none waits for a GPU. Whatever decides something is the same in all of them: sums are
of all, logits are gathered in one order, and where a clock has a say the first process has it.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from msq.errors import MsqError, SpecMismatch, UsageError

if TYPE_CHECKING:
    from msq.extract.cluster import Place
    from msq.head.rank_endings import Endings

T = TypeVar("T")

TO_COME = datetime.timedelta(minutes=5)  # that all processes have to find each other
TO_ANSWER = datetime.timedelta(minutes=30)  # that one may be at something else, such as a file
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of a run.

    Attributes:
        rank: of this one, from 0.
        world: how many there are.
        local: how many of them share this machine.
        device: that this one trains on.
        words: process group of what is not on a GPU; None for the one of all.
        endings: by which they tell each other why they end.
    """

    rank: int = 0
    world: int = 1
    local: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    words: Any = None
    endings: Endings | None = None

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and speaks."""
        return self.rank == 0

    def add_up(self, *tensors: Tensor) -> None:
        """Replace each by its sum over all processes, in place; the same bits in each of them."""
        if self.world > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of rows [n], n at least 1.

        Equally many in each process, for they may have to take the same number of passes together:
        where that does not come out even, the last row is there more than once.
        """
        each = -(-len(rows) // self.world)
        places = torch.arange(self.rank * each, (self.rank + 1) * each, device=rows.device)
        return rows[places.clamp(max=len(rows) - 1)]

    def together(self, mine: Tensor, count: int) -> Tensor:
        """What all processes made of their `share` of `count` rows, in the order of the rows."""
        if self.world == 1:
            return mine
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        torch.distributed.all_gather(parts, mine.contiguous())
        return torch.cat(parts)[:count]

    def of_first(self, value: T) -> T:
        """What the first process gave; the others wait for it."""
        if self.world == 1:
            return value
        box = [value if self.leads else None]
        cpu = torch.device("cpu")
        torch.distributed.broadcast_object_list(box, 0, group=self.words, device=cpu)
        found: Any = box[0]
        return found  # type: ignore[no-any-return]

    def of_all(self, value: T) -> list[T]:
        """What each process gave, by rank."""
        if self.world == 1:
            return [value]
        box: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(box, value, group=self.words)
        return box

    def agreed(self, wish: bool) -> bool:
        """Whether the first process wishes it."""
        if self.world == 1:
            return wish
        flag = torch.tensor([wish], dtype=torch.uint8)
        torch.distributed.broadcast(flag, 0, group=self.words)
        return bool(flag)

    def wait(self) -> None:
        """Wait until all processes have come so far."""
        if self.world > 1:
            torch.distributed.barrier(group=self.words)

    def require_same(self, what: str, values: Mapping[str, Any]) -> None:
        """Refuse to go on where a process has found something else than the first one.

        Raises:
            SpecMismatch: with the difference.
        """
        from msq.config import difference

        every = self.of_all(dict(values))
        for rank, found in enumerate(every):
            if lines := difference(every[0], found):
                raise SpecMismatch(
                    f"process {rank} of {self.world} has another {what} than the first "
                    "(expected: that of the first, found: its own); all need the same files\n  "
                    + "\n  ".join(lines)
                )

    def explained(self, error: BaseException) -> BaseException:
        """Tell the others of an error, and what to raise: see `Endings.explained`."""
        return error if self.endings is None else self.endings.explained(error)


ALONE = Ranks()


@contextmanager
def joined(device: str = "auto", environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """Join the processes that a launcher started; alone where there is none.

    An error in the body ends all processes within seconds, and one of them says why.

    Args:
        device: `auto` and `cuda` are the GPU of this process's place on its machine.
        environment: with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun
            sets them, or Slurm's own variables and the latter two.

    Raises:
        UsageError: variables that are missing, or fewer GPUs than processes.
        MsqError: not all processes came, or one ended without a word.
        PeerError: another process ended with an error.
    """
    from msq.extract.devices import resolve_device

    spot = _place(environment)
    if spot is None:
        yield Ranks(device=torch.device(resolve_device(device)))
        return
    own = own_device(resolve_device(device), spot, environment)
    ranks = _connected(spot, own, environment)
    assert ranks.endings is not None
    try:
        yield ranks
        ranks.wait()  # the first may be the one that all others are connected through
    except BaseException as error:
        told = ranks.explained(error)
        _disconnect(own, failed=True)
        if told is error:
            raise
        raise told from error
    finally:
        ranks.endings.close()
    _disconnect(own)


def _place(environment: Mapping[str, str]) -> Place | None:
    """This process's place; None where it is alone."""
    from msq.extract.cluster import place

    missing = [name for name in _NEEDED if not environment.get(name)]
    if ("RANK" in environment) != ("WORLD_SIZE" in environment):
        raise UsageError(
            f"launcher: expected {', '.join(_NEEDED)} as torchrun sets them, found no "
            f"{' and no '.join(missing)}; start with torchrun --nproc-per-node N -m msq train …, "
            "or without any of them for one process"
        )
    spot = place(environment)
    if spot is not None and any(name in missing for name in _NEEDED[2:]):
        raise UsageError(
            f"launcher: expected MASTER_ADDR and MASTER_PORT, where {spot.world} processes meet, "
            f"found no {' and no '.join(n for n in missing if n in _NEEDED[2:])}; start with "
            "torchrun, or set them to the first machine and a free port"
        )
    return spot


def own_device(device: str, spot: Place, environment: Mapping[str, str]) -> torch.device:
    """The device of a process by its place on its machine.

    Raises:
        UsageError: there are fewer GPUs than processes, or one was named for all of them.
    """
    found = torch.device(device)
    if found.type != "cuda":
        return found
    named = ":" in device
    if named and spot.local_world > 1:
        raise UsageError(
            f"--device {device}: expected auto, cuda or cpu, since each of {spot.local_world} "
            "processes takes the GPU of its own place"
        )
    count, place = torch.cuda.device_count(), spot.local_rank
    if named:
        place = found.index
    elif count == 1 and "SLURM_PROCID" in environment:
        place = 0  # Slurm shows each of its tasks one GPU
    if place >= count:
        raise UsageError(
            f"launcher: expected at most as many processes on a machine as it has GPUs, found "
            f"{count} GPUs and local rank {spot.local_rank}; start fewer, or use --device cpu"
        )
    return torch.device("cuda", place)


def _connected(spot: Place, device: torch.device, environment: Mapping[str, str]) -> Ranks:
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    from msq.head.rank_endings import Endings

    words = None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store, _, _ = next(rendezvous("env://", spot.rank, spot.world, timeout=TO_COME))
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=spot.rank,
            world_size=spot.world,
            timeout=TO_ANSWER,
        )
        if device.type == "cuda":
            words = distributed.new_group(backend="gloo", timeout=TO_ANSWER)
    except (RuntimeError, ValueError) as error:
        meeting = ":".join(environment.get(name, "") for name in _NEEDED[2:])
        raise MsqError(
            f"launcher: the {spot.world} processes did not find each other at {meeting}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    endings = Endings(store, spot.rank, spot.world)
    return Ranks(spot.rank, spot.world, spot.local_world, device, words, endings)


def _disconnect(device: torch.device, failed: bool = False) -> None:
    from torch import distributed

    # After an error the others may be waiting in an exchange, which on a GPU has to be given up.
    with suppress(RuntimeError, ValueError):
        if failed and device.type == "cuda":
            group: Any = distributed.group.WORLD
            group.abort()
        else:
            distributed.destroy_process_group()
