"""The video encoder over several processes: whole in each of them (DDP), or divided (FSDP2).

Either way gradients are summed, not averaged: the losses of a step's parts have weights that add up
to one over all processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from msq.head.ranks import Ranks


def whole_in_each(module: nn.Module, ranks: Ranks) -> nn.Module:
    """DistributedDataParallel around a module; the weights are those of the first process.

    The sum replaces DDP's mean by a hook of its own: dividing and multiplying again would round.
    """
    from torch.nn.parallel import DistributedDataParallel

    on_gpu = ranks.device.type == "cuda"
    made = DistributedDataParallel(
        module,
        device_ids=[ranks.device] if on_gpu else None,
        gradient_as_bucket_view=True,
    )
    made.register_comm_hook(None, lambda state, bucket: _summed(bucket))  # no annotations
    return made


def _summed(bucket: Any) -> Any:
    handle = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
    return handle.get_future().then(lambda done: done.value()[0])


def divide(model: nn.Module, ranks: Ranks) -> None:
    """Divide the parameters among the processes, in place, block by block and then the rest.

    Each of them becomes a DTensor that is cut along its first dimension. Blocks are put together
    for their own forward and backward pass only.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    blocks: Any = getattr(model, "blocks", ())
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def adding(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Around a part of a step: gradients are exchanged in the last one alone.

    A divided encoder exchanges them in each, and never holds whole ones of all blocks.
    """
    from torch.nn.parallel import DistributedDataParallel

    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()


def is_divided(tensor: Tensor) -> bool:
    """Whether this process has a part of the tensor only."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def gathered(value: Any) -> Any:
    """Plain values and tensors with every divided tensor put together, on the CPU.

    All processes call it together, with values of the same build.
    """
    if isinstance(value, Tensor):
        whole: Any = value.detach()
        return whole.full_tensor().cpu() if is_divided(whole) else whole
    if isinstance(value, Mapping):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, list):
        return [gathered(item) for item in value]
    return value


def placed_as(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which each process has, as `like` lies: on its device, divided as it is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    there = whole.to(like.device)
    if not isinstance(like, DTensor):
        return there
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


def placed_list(whole: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """`placed_as` of each."""
    return [placed_as(w, t) for w, t in zip(whole, like, strict=True)]


def placed_moments(state: Mapping[str, Any], optimiser: torch.optim.Optimizer) -> Mapping[str, Any]:
    """A gathered state of an optimiser, its moments as its parameters lie."""
    parameters = list(_parameters(optimiser))
    moments = {
        number: {
            key: placed_as(value, parameters[number])
            if isinstance(value, Tensor) and value.shape == parameters[number].shape
            else value
            for key, value in found.items()
        }
        for number, found in state["state"].items()
    }
    return {**state, "state": moments}


def _parameters(optimiser: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimiser.param_groups:
        yield from group["params"]


def clip_together(plain: Sequence[Tensor], divided: Sequence[Tensor], largest: float) -> None:
    """Scale gradients so that the norm of all of them is at most `largest`.

    Args:
        plain: parameters that each process has whole, with the same gradients.
        divided: parameters that are divided, likewise their gradients.
        largest: norm.
    """
    norms = []
    for parameters in (plain, divided):
        found: Any = torch.nn.utils.get_total_norm(
            [p.grad for p in parameters if p.grad is not None]
        )
        norms.append(found.full_tensor() if is_divided(found) else found)
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))
    for parameters in (plain, divided):
        torch.nn.utils.clip_grads_with_norm_(list(parameters), largest, total)
