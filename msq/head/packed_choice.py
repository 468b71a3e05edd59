"""How the training steps are taken: version of the head, precision, threads; decided once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from msq.config import TrainConfig
from msq.errors import UsageError
from msq.head.attention_backend import choose_attention
from msq.head.kernel_choice import HeadShape, choose_kernels, cross_form
from msq.head.masks import drop_rate
from msq.kernels.dispatch import OLDEST


@dataclass(frozen=True, slots=True)
class StepChoice:
    """What `train.path` and `train.precision` come to on a device.

    Attributes:
        path: `plain` (`msq.head.model`) or `packed` (`msq.head.packed`).
        precision: `fp32` or `bf16`.
        kernels: names of the operations that run a Triton kernel, sorted, between commas.
        cross: form of the cross-attention, `absorbed` or `standard`; empty asks the table anew
            at each step.
        graph: `on` where the whole step is a CUDA graph, else `off`.
        attention: backend of torch's attention (`msq.head.attention_backend`); empty where none
            runs.
        reasons: operation -> what runs and why.
        threads: of torch in the process that chose; 0 in runs begun before this was recorded.
        device: kind of the device that it was chosen for, `cpu` or `cuda`; "" likewise.
    """

    path: str
    precision: str
    kernels: str = ""
    cross: str = ""
    graph: str = "off"
    attention: str = ""
    reasons: Mapping[str, str] = field(default_factory=dict)
    threads: int = 0
    device: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For `config.toml`, from which a resumed run takes it again."""
        return asdict(self)

    @property
    def ops(self) -> tuple[str, ...]:
        """Names of the operations that run a Triton kernel."""
        return tuple(name for name in self.kernels.split(",") if name)

    @property
    def absorb(self) -> bool | None:
        """Whether cross-attention is absorbed; None asks the table."""
        return self.cross == "absorbed" if self.cross else None

    def lines(self) -> str:
        """All reasons in one line, for the log."""
        return "; ".join(f"{op}: {reason}" for op, reason in self.reasons.items())

    def missing(self, device: torch.device) -> list[str]:
        """What the steps were chosen with that a device has not; empty where they can go on.

        Args:
            device: to go on with.
        """
        if self.device != "cuda" or device.type == "cuda":
            return []
        needs = ["a CUDA graph (data.step.graph = on)"] if self.graph == "on" else []
        return needs + [f"Triton kernels (data.step.kernels = {self.kernels})"] * bool(self.kernels)

    def require_device(self, device: torch.device) -> None:
        """Refuse to go on where the steps cannot run.

        Args:
            device: to go on with.

        Raises:
            UsageError: they were chosen on a GPU with kernels or a graph, and this is none.
        """
        needs = self.missing(device)
        if needs:
            raise UsageError(
                f"the steps of this run were chosen on a GPU, with {' and '.join(needs)}: expected "
                f"a CUDA device, found {device.type}; go on with it on one, or start it anew "
                "(--overwrite)"
            )

    def surroundings(self, device: torch.device) -> str:
        """A line on what is other now than when the steps were chosen; empty where nothing is.

        Args:
            device: to go on with.
        """
        notes = [note] if (note := self.other_threads()) else []
        if self.device not in ("", device.type):
            notes.append(
                f"begun on {self.device}, goes on on {device.type}: its bits will not be those of "
                "a run on one of them"
            )
            if self.precision == "bf16" and not bf16_is_native(device):
                notes.append(f"bf16, as the run began, is emulated on this {device.type}: slow")
        return "; ".join(notes)

    def other_threads(self) -> str:
        """What the run goes on with in place of the threads of this process; empty for the same."""
        threads = torch.get_num_threads()
        if self.threads in (0, threads):
            return ""
        return (
            f"{self.threads} threads, as the run began, in place of the {threads} of this process: "
            f"its bits depend on their number; with threads = {threads} under [data.step] in its "
            "config.toml it takes those of this process, and ends in other bits"
        )

    @contextmanager
    def in_threads(self) -> Iterator[None]:
        """Torch's number of threads is the recorded one in here, and then what it was before."""
        before = torch.get_num_threads()
        if self.threads:
            torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def bf16_is_native(device: str | torch.device) -> bool:
    """Whether a device multiplies bf16 matrices itself: GPUs of 8.0 on, AVX512-BF16, AMX.

    Elsewhere it is emulated, and a product takes many times as long as in float32.
    """
    device = torch.device(device)
    if device.type == "cuda":  # torch tells of the current one
        with nullcontext() if device.index is None else torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    asked = (
        getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")
    )
    return any(ask is not None and ask() for ask in asked)


def choose_step(
    config: TrainConfig,
    device: str | torch.device,
    shape: HeadShape | None = None,
    dropout: float | None = None,
) -> StepChoice:
    """`auto` is the packed head, in bf16 on a GPU that has it and in float32 elsewhere.

    Args:
        config: with `path`, `precision`, `kernels` and `graph`, each `auto` or what it is to be.
        device: to train on.
        shape: of the head; without it no kernels are chosen.
        dropout: of the head; without it no attention backend is chosen.

    Raises:
        UsageError: `kernels = triton` or `graph = on` where they cannot run, or for the plain head.
    """
    device = torch.device(device)
    chosen = _chosen(config, device, shape, dropout)
    return dataclasses.replace(chosen, threads=torch.get_num_threads(), device=device.type)


def _chosen(
    config: TrainConfig, device: torch.device, shape: HeadShape | None, dropout: float | None
) -> StepChoice:
    """The same without what is around it."""
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and bf16_is_native(device) else "fp32"
    path = "packed" if config.path == "auto" else config.path
    if path == "plain" and config.kernels == "triton":
        raise UsageError("train.kernels = triton: the plain head has no kernels; use path = packed")
    graph = _graph(config, device, path)
    if path == "plain" and shape is not None and dropout is not None and not drop_rate(dropout):
        attention = choose_attention(
            device, precision, clips=config.batch, queries=shape.queries, tokens=shape.tokens,
            heads=shape.heads, width=shape.width,
        )  # fmt: skip
        return StepChoice(
            path, precision, attention=attention.name, reasons={"attention": str(attention)}
        )
    if path == "plain" or shape is None:
        return StepChoice(path, precision, graph=graph)
    chosen = choose_kernels(config.kernels, device, precision, shape)
    names = sorted(choice.op for choice in chosen if choice.path == "triton")
    cross = cross_form(chosen, device.type, precision, shape)
    reasons = {choice.op: f"{choice.path} ({choice.reason})" for choice in chosen}
    return StepChoice(path, precision, ",".join(names), cross, graph, reasons=reasons)


def _graph(config: TrainConfig, device: torch.device, path: str) -> str:
    """`on` or `off`: whether the whole step is a CUDA graph."""
    kernels = config.kernels
    if kernels == "auto" and os.environ.get("MSQ_KERNELS") == "reference":
        kernels = "reference"
    if device.type != "cuda":
        obstacle = f"it needs a CUDA device, found {device.type}"
    elif torch.cuda.get_device_capability(device) < OLDEST:
        obstacle = "it needs compute capability 8.0, found an older GPU"
    elif path == "plain":
        obstacle = "it is for the packed head, found train.path = plain"
    elif kernels == "reference":
        obstacle = "its masks come from a Triton kernel, found train.kernels = reference"
    else:  # `auto` waits for a first measurement on a GPU: what never ran is nobody's default
        return "on" if config.graph == "on" else "off"
    if config.graph == "on":
        raise UsageError(f"train.graph = on: {obstacle}; use train.graph = auto")
    return "off"
