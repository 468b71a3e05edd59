"""Shapes, data and weights of one comparison of heads, and the check that all compute the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from msq.bench.cases import Gate, worst_of
from msq.bench.torch_sides import AuthorsHead, TorchDecoder
from msq.config import HeadConfig
from msq.head.flops import step_flops
from msq.head.loss import head_loss
from msq.head.masks import CountedMasks, Masks, drop_rate, step_masks
from msq.head.model import MSQNet
from msq.head.packed import PackedHead
from msq.head.packed_parameters import flat_parameters

GATE_CLIPS = 4
FLOAT64_TOLERANCE = 1e-10
FP32_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-2  # one hidden number on the other side of ReLU moves a tensor by 1e-3
TORCH_TOLERANCE = 1e-4
BF16_TOLERANCE = 2.0


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a head and of a batch.

    Attributes:
        classes: K.
        clips: B.
        dropout: probability.
        official: 6 + 6 layers as the authors have them, else the decoder alone.
        quick: tiny otherwise.
    """

    classes: int
    clips: int
    dropout: float
    official: bool = False
    quick: bool = False

    @property
    def tokens(self) -> int:
        """S: 16 frames, with a global token unless it is the authors' procedure."""
        return (4 if self.quick else 16) + (not self.official)

    @property
    def config(self) -> HeadConfig:
        """D 512, L 6, H 8, FFN 2048, multi-modal queries; tiny when quick."""
        width, layers, heads = (32, 2, 2) if self.quick else (512, 6, 8)
        if self.official:
            return HeadConfig(width=width, layers=layers, heads=heads, dropout=self.dropout,
                              encoder_layers=layers, memory_position="sincos-input",
                              label_projection="fused", start="torch")  # fmt: skip
        return HeadConfig(width=width, layers=layers, heads=heads, dropout=self.dropout,
                          memory_position="none")  # fmt: skip

    @property
    def flops(self) -> int:
        """Of a training step."""
        c = self.config
        width = c.width or 0
        return step_flops(self.clips, self.classes, self.tokens, width=width, ffn=4 * width,
                          layers=c.layers, encoder_layers=c.encoder_layers)  # fmt: skip


class Problem:
    """A shape with data on a device.

    Args:
        shape: sizes.
        device: `cpu` or `cuda`.
        dtype: of data and parameters.
        counted: dropout from a key on the device, as a step needs it that is recorded in a CUDA
            graph; None does so on a GPU.

    Attributes:
        tokens: [B, S, D'].
        image: [B, D''].
        labels: [B, K].
    """

    def __init__(
        self,
        shape: Shape,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        counted: bool | None = None,
    ) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self.counted = device == "cuda" if counted is None else counted
        self.config = shape.config
        self.token_width, self.image_width = (48, 24) if shape.quick else (768, 512)
        g = torch.Generator().manual_seed(0)
        width = self.config.width or 0
        self.text = torch.randn(shape.classes, width, generator=g)
        tokens = torch.randn(shape.clips, shape.tokens, self.token_width, generator=g)
        image = torch.randn(shape.clips, self.image_width, generator=g)
        self.tokens, self.image = tokens.to(device, dtype), image.to(device, dtype)
        self.labels = (torch.rand(shape.clips, shape.classes, generator=g) < 0.05).to(device)

    def head(self) -> MSQNet:
        """A head at its start, always the same."""
        made = MSQNet(self.config, classes=self.shape.classes, token_width=self.token_width,
                      image_width=self.image_width, text=self.text)  # fmt: skip
        return made.to(self.device, self.dtype)

    def loss(self, logits: Tensor) -> Tensor:
        """Of all clips, not below float32."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        return head_loss(logits.to(wide), self.labels, "bce")

    def key(self) -> Tensor:
        """Seed and step of the dropout, at step 0: int64 [2] on the device."""
        return torch.zeros(2, dtype=torch.int64, device=self.device)

    def masks(self) -> Masks | None:
        """The dropout of step 0."""
        return self._masks(self.key(), 0)

    def _masks(self, key: Tensor, step: int) -> Masks | None:
        """The dropout of a step, which a key says on the device and a number beside it."""
        if not self.counted:
            return step_masks(0, step, self.shape.dropout, self.device)
        return CountedMasks(key, self.shape.dropout) if drop_rate(self.shape.dropout) else None

    def kernels(self, precision: str) -> tuple[str, ...]:
        """All operations of the packed head that have a kernel here; none on a CPU."""
        from msq.head.kernel_choice import HeadShape, choose_kernels

        if self.device == "cpu" or precision != "bf16":
            return ()
        width = self.config.width or 0
        shape = HeadShape(
            self.shape.classes, self.tokens.shape[1], width, self.config.heads,
            self.config.ffn or 4 * width, self.config.encoder_layers > 0,
        )  # fmt: skip
        chosen = choose_kernels("triton", torch.device(self.device), precision, shape)
        return tuple(choice.op for choice in chosen if choice.path == "triton")

    def packed_step(
        self, precision: str, kernels: tuple[str, ...] = (), rate: float = 1e-5
    ) -> Callable[[], Tensor]:
        """A training step of the packed head, with the masks that `msq.head.step` has; its loss.

        As its opponents it has forward pass, loss, backward pass and optimiser; neither clipping
        nor the average of the weights, and the batch stays where it is. Where the dropout is
        counted nothing in it depends on the processor's numbers, and it can be recorded.
        """
        model = self.head()
        flat = flat_parameters(model, precision)
        head = PackedHead(model, precision=precision, flat=flat, kernels=kernels)
        optimiser = torch.optim.AdamW([flat.matrices, flat.vectors], lr=rate, fused=True,
                                      capturable=self.device == "cuda")  # fmt: skip
        steps, key = iter(range(2**31)), self.key()

        def step() -> Tensor:
            masks = self._masks(key, next(steps))
            flat.begin()
            loss = self.loss(head(self.tokens, self.image, masks=masks)["logits"])
            torch.autograd.backward(loss)
            flat.gather()
            optimiser.step()
            if self.counted:
                key[1:] += 1
            return loss.detach()

        return step


def agreement(shape: Shape, device: str, precision: str, kernels: tuple[str, ...] = ()) -> Gate:
    """Logits and all gradients of the packed head against the plain one, on the same masks.

    Of a few clips. In float64 the two are the same to rounding. In fp32 a hidden number at zero may
    fall on either side of ReLU, so that single gradients may differ: there the logits are held to a
    bound of their own. In bf16 the error is compared with that of torch's autocast. Torch's own
    modules have their logits without dropout compared, in fp32.

    Args:
        shape: sizes.
        device: `cpu` or `cuda`.
        precision: of the packed head, `fp32` or `bf16`.
        kernels: operations of it that run a kernel.
    """
    shape = replace(shape, clips=min(shape.clips, GATE_CLIPS))
    exact, problem = Problem(shape, device, torch.float64), Problem(shape, device)
    wide, model = exact.head().eval(), problem.head().eval()
    right = _outcome(exact, wide, wide)
    algebra = _outcome(exact, wide, PackedHead(wide))
    worst = max(_far(algebra[name], value) for name, value in right.items())
    gates = [Gate(worst, FLOAT64_TOLERANCE, "packed and plain in float64: logits and gradients, "
                  "largest difference over the largest number of a tensor")]  # fmt: skip
    low = PackedHead(model, precision=precision, kernels=kernels)
    ours = _outcome(problem, model, low)
    error = _mean_error(ours, right)
    if precision == "fp32":
        logits = _far(ours["logits"], right["logits"])
        gates.append(Gate(logits, FP32_TOLERANCE, "packed in fp32 and plain in float64: logits"))
        gates.append(Gate(error, GRADIENT_TOLERANCE, "packed in fp32 and plain in float64: error "
                          "of logits and gradients, mean over the tensors"))  # fmt: skip
    else:
        with torch.autocast(device, torch.bfloat16):
            autocast = _outcome(problem, model, model)
        gates.append(Gate(error / _mean_error(autocast, right), BF16_TOLERANCE, "packed in bf16: "
                          "error of logits and gradients over that of autocast"))  # fmt: skip
    with torch.no_grad():
        expected = model(problem.tokens, problem.image)["logits"]
        theirs = authors_or_torch(problem).eval()(problem.tokens, problem.image)
    gates.append(Gate(_far(theirs, expected), TORCH_TOLERANCE, "torch's modules and plain: logits "
                      "without dropout, largest difference over the largest"))  # fmt: skip
    return worst_of(gates)


def _outcome(problem: Problem, model: MSQNet, head: MSQNet | PackedHead) -> dict[str, Tensor]:
    """Logits of a head and the gradients of the model that it has its parameters from."""
    logits = head(problem.tokens, problem.image, masks=problem.masks())["logits"]
    found = _gradients(model, problem.loss(logits))
    return {"logits": logits.detach().double(), **found}


def authors_or_torch(problem: Problem) -> nn.Module:
    """Torch's modules for this shape, with the weights of `problem.head()`."""
    head = problem.head()
    return AuthorsHead(head) if problem.shape.official else TorchDecoder(head)


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(loss)
    found: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        # q, k and v count as one tensor: the bias of the keys alone has no gradient.
        owner, _, leaf = name.rpartition(".")
        joined = f"{owner[:-1]}qkv.{leaf}" if owner.endswith((".q", ".k", ".v")) else name
        assert p.grad is not None
        found.setdefault(joined, []).append(p.grad.clone())
    return {name: torch.cat(parts).double() for name, parts in found.items()}


def _far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _mean_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    errors = [float((found[n] - value).norm() / value.norm()) for n, value in expected.items()]
    return sum(errors) / len(errors)
