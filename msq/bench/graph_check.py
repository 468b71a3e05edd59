"""Whether a training step recorded in a CUDA graph ends with the bits of the step as it is."""

from __future__ import annotations

from collections.abc import Callable

import torch

from msq.bench.cases import Gate
from msq.bench.head_problem import Problem, Shape
from msq.config import RunConfig, TrainConfig
from msq.head.feeding import Batch
from msq.head.graph import WARM_UP, StepGraph
from msq.head.packed_choice import StepChoice
from msq.head.step import TrainingStep

STEPS = WARM_UP + 5


def graph_is_the_step(
    device: str, dropout: float, *, kernels: bool = False, tiny: bool = False
) -> Gate:
    """Weights, moments, average and losses of some steps, with a graph and without one.

    Args:
        device: `cuda`; on a CPU a call stands for the graph.
        dropout: probability.
        kernels: with every Triton kernel.
        tiny: small sizes.
    """
    shape = Shape(7 if tiny else 157, 4 if tiny else 32, dropout, quick=tiny)
    problem = Problem(shape, device)
    graph, eager = (_taken(problem, kernels, recorded=on) for on in (True, False))
    if isinstance(graph, str) or isinstance(eager, str):
        return Gate(float("inf"), 0.0, f"the step cannot be captured: {graph}")
    different = sum(not torch.equal(a, b) for a, b in zip(graph, eager, strict=True))
    return Gate(float(different), 0.0, f"tensors of {STEPS} steps that differ in a bit")


def _taken(problem: Problem, kernels: bool, *, recorded: bool) -> list[torch.Tensor] | str:
    """All that some steps change, and their losses; why there is no graph."""
    cuda = problem.device == "cuda"
    precision = "bf16" if cuda else "fp32"
    names = ",".join(problem.kernels(precision)) if kernels else ""
    choice = StepChoice("packed", precision, names, graph="on" if cuda else "off")
    config = RunConfig(head=problem.config, train=TrainConfig(batch=problem.shape.clips))
    taking = TrainingStep(problem.head(), choice, config, "bce", STEPS, STEPS, counted=True)
    run: Callable[[Batch], None] = taking.run
    graph = None
    if recorded:
        graph = run = (
            StepGraph(taking.run, problem.shape.clips)
            if cuda
            else StepGraph(taking.run, problem.shape.clips, lambda call: call, lambda call: call())
        )
    losses = []
    for number in range(STEPS):
        rows = torch.arange(problem.shape.clips, device=problem.device).roll(number)
        labels = problem.labels[rows].to(torch.uint8)
        taking.plan(number)
        # Every step has the images of other clips, so that a stale batch would be seen.
        run(Batch(rows, problem.tokens, problem.image[rows], labels, None))
        losses.append(taking.loss.clone())
    if graph is not None and graph.refused:
        return graph.refused
    state = taking.optimiser.state_dict()["state"]
    moments = [value for kept in state.values() for value in kept.values()]
    averages = [] if taking.average is None else taking.average.average
    return [taking.flat.data, *moments, *averages, torch.stack(losses)]
