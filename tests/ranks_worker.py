"""What each of two processes does in `test_ranks`, or one that they are compared with.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=… python tests/ranks_worker.py FOLDER PORT

FOLDER has `world.pickle`, the clips and their features, and `broken.pickle`, the same with a clip
that cannot be decoded any more; what is found goes there as well. Scenarios meet at ports of their
own, from PORT on. Load it by its path, as `fakes.py`, for a run of one process.
"""

from __future__ import annotations

import importlib
import os
import pickle
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msq.errors import MsqError, UsageError
from msq.extract.cluster import terminated_as_interrupted
from msq.head.batches import Batches
from msq.head.end_to_end import train_end_to_end
from msq.head.end_to_end_clips import RunClips
from msq.head.end_to_end_training import EndToEndTraining
from msq.head.model import MSQNet
from msq.head.packed_choice import choose_step
from msq.head.ranks import Ranks, joined

_made = runpy.run_path(str(Path(__file__).with_name("end_to_end_material.py")))
settings, encoder, material = _made["settings"], _made["encoder"], _made["material"]
CPU = torch.device("cpu")
SAME = ("head.dropout=0", "train.batch=8", "train.epochs=10", "optim.clip_grad=0.05")
SHORT = ("head.dropout=0", "train.epochs=4", "backbone.checkpointing=on")
DROPOUT = ("train.ema=0.9", "clips.augment=consistent")
FSDP = (*DROPOUT, "backbone.shard=fsdp", "backbone.checkpointing=on")


class Short(Batches):
    """Batches that are not all as long as the processes have parts."""

    def of(self, step: int) -> Tensor:
        return super().of(step)[: (4, 3, 1, 2)[step % 4]]


class Doubled(EndToEndTraining):
    """Head and encoder in float64."""

    def _head(self) -> MSQNet:
        return super()._head().double()

    def _feed_and_step(self) -> Any:
        feed, step = super()._feed_and_step()
        logits = step.logits

        def wide(tokens: Tensor, image: Tensor | None) -> Tensor:
            return logits(tokens, None if image is None else image.double())

        step.logits = wide  # type: ignore[method-assign]
        step.loss, step.loss_sum = step.loss.double(), step.loss_sum.double()
        return feed, step


class Shortened(Doubled):
    """Takes batches that are cut short."""

    def _feed_and_step(self) -> Any:
        self.batches = Short(self.train_rows, 4, 0, 0)
        return super()._feed_and_step()


def stepped(folder: Path, ranks: Ranks, kind: type[Doubled], *assignments: str) -> dict[str, Any]:
    """All steps of a run in float64: their losses, and all weights after the last."""
    data, features = pickle.loads((folder / "world.pickle").read_bytes())
    config = settings(*assignments)
    given = material(data, features, encoder())
    given.video.model.double()
    clips = RunClips(given, config, 0, ranks=ranks)
    run = kind(given, config, choose_step(config.run.train, CPU), clips, ranks=ranks)
    losses, norms = [], []
    for _ in range(run.steps):
        run._step()
        losses.append(float(run.taking.loss.double()))
        norms.append(float(run.flat.grad.norm()))
    weights = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    weights |= {f"encoder.{n}": p for n, p in run.backbone.state().items()}
    return {"losses": losses, "norms": norms, "weights": weights}


def trained(folder: Path, ranks: Ranks, name: str, *assignments: str, **options: Any) -> Any:
    """A whole run with files; one of its clips cannot be decoded."""
    data, features = pickle.loads((folder / "broken.pickle").read_bytes())
    given = material(data, features, encoder())
    config = settings(*assignments)
    return train_end_to_end(given, config, folder / name, workers=0, ranks=ranks, **options).result


def failing(folder: Path, ranks: Ranks, how: str) -> None:
    """A run in which something happens to the second process after an epoch, or to both."""

    def told(event: dict[str, Any]) -> None:
        if ranks.rank == 1 and event["event"] == "epoch":
            if how == "error":
                raise UsageError("the second process cannot go on")
            os.kill(os.getpid(), signal.SIGTERM if how == "interrupt" else signal.SIGKILL)
            time.sleep(600)  # until the signal is there

    wrong = ("optim.clip_grad=0", "backbone.lr=1e30", "optim.warmup=0") if how == "nan" else ()
    trained(folder, ranks, how, *wrong, progress=told, checkpoint_seconds=0)


def ended(work: Callable[[], None]) -> dict[str, Any]:
    """How a piece of work ended."""
    error, code = "", 0
    try:
        work()
    except KeyboardInterrupt:
        error, code = "KeyboardInterrupt", 130
    except MsqError as found:
        error, code = f"{type(found).__name__}: {found}", found.exit_code
    return {"error": error, "code": code}


def peers(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Whatever two processes find out without an error."""
    found: dict[str, Any] = {
        "same": stepped(folder, ranks, Doubled, *SAME),
        "short": stepped(folder, ranks, Shortened, *SHORT, "backbone.accumulate=2"),
        "dropout": trained(folder, ranks, "dropout", *DROPOUT),
        "fsdp": trained(folder, ranks, "fsdp", *FSDP),
    }
    for steps in (2, 5):
        trained(folder, ranks, "fsdp-parts", *FSDP, stop_after=steps)
    found["fsdp-parts"] = trained(folder, ranks, "fsdp-parts", *FSDP)
    return found


def main(folder: Path, port: int) -> None:
    """All scenarios, each in a process of its own, which is a copy of this one."""
    for name in ("torch._dynamo", "torch.distributed.fsdp", "msq.extract.clip_feed"):
        importlib.import_module(name)  # once for all of them
    for number, how in enumerate(("peers", "error", "nan", "interrupt", "kill")):
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        os.environ["MASTER_PORT"] = str(port + number)
        found: dict[str, Any] = {}

        def work(how: str = how, found: dict[str, Any] = found) -> None:
            with terminated_as_interrupted(), joined("cpu") as ranks:
                if how == "peers":
                    found |= peers(folder, ranks)
                else:
                    failing(folder, ranks, how)

        end = ended(work)
        torch.save({**found, **end}, folder / f"{how}-{os.environ['RANK']}.pt")
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
