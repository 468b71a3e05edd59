"""What a checkpoint holds of a training run, and how the run goes on from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from msq.errors import MsqError

if TYPE_CHECKING:
    from msq.head.training import Training

STATE_FORMAT = 2  # of state.pt; 1 drew its dropout from a generator


def state_of(training: Training) -> dict[str, Any]:
    """Everything that going on exactly here needs; plain values and tensors."""
    on_cuda = training.loss_sum.is_cuda
    return {
        "format": STATE_FORMAT,
        "step": training.step,
        "model": training.model.state_dict(),
        "optimiser": training.taking.optimiser_state(),
        "average": None if training.average is None else training.average.average,
        "best": training.best,
        "best_by": training.validation.ranked_by,
        "history": training.history,
        "loss_sum": training.loss_sum,
        "seconds": training.seconds,
        "random_cpu": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state(training.loss_sum.device) if on_cuda else None,
    }


def load_state(training: Training, state: dict[str, Any]) -> None:
    """Go on from a `state`.

    Raises:
        MsqError: another version of msq wrote it, and trained otherwise.
    """
    if state.get("format") != STATE_FORMAT:
        raise MsqError(
            f"state.pt: expected format {STATE_FORMAT}, found {state.get('format', 1)}: the "
            "unfinished run is of another version of msq; finish it with that one, or start "
            "it anew with --overwrite"
        )
    training.step, training.seconds = state["step"], state["seconds"]
    training.saved = training.step
    training.history, training.best = state["history"], state["best"]
    # States of before 2026-11-21 do not say it: their `map` ranked by logits in both tasks.
    now = training.validation.ranked_by
    before = state.get("best_by", "official" if now == "official" else "logits")
    if training.best is not None and before != now:
        training.lost = (
            f"its best epoch, {training.best['epoch']}, was found by ranking clips by {before}; "
            f"from here on it is {now}, and that epoch counts no more"
        )
        training.best = None
    training.model.load_state_dict(state["model"])
    training.taking.load_optimiser(state["optimiser"])
    if training.graph is not None:
        training.graph.forget()
    if training.average is not None:
        training.average.load(state["average"])
    training.loss_sum.copy_(state["loss_sum"])
    torch.set_rng_state(state["random_cpu"])
    if training.loss_sum.is_cuda and state["random_cuda"] is not None:
        torch.cuda.set_rng_state(state["random_cuda"], training.loss_sum.device)
