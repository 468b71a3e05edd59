"""The training step of a head: `python benchmarks/bench_step.py [--rounds 9] [--no-compile]`.

Sides, in float32 and in bf16 (autocast, but for the packed head), all with one fused AdamW:
the plain head of msq; the same fusion and classifier around `nn.TransformerDecoder` with the
fastest attention backend of torch; each of them under `torch.compile`; the packed head. Width 512,
6 layers, 17 tokens, K = 157 with 16 clips and K = 20 with 64, dropout 0.1 and 0.

Before any time is taken, the sides must agree: logits and gradients of the packed head with those
of the plain one on the same dropout masks, in float32 to 1e-5 of the maximum of each tensor (q, k
and v together), in bf16 to twice the error that autocast makes (relative, the mean over the
tensors); without dropout the logits of `nn.TransformerDecoder` too. Runs are interleaved; ratios
are taken within rounds.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import warnings
from collections.abc import Callable

os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")

import torch
from timing import interleaved, machine, quartiles, ratio
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from msq.config import HeadConfig
from msq.head.loss import head_loss
from msq.head.masks import Masks, step_masks
from msq.head.model import MSQNet
from msq.head.packed import PackedHead, flat_parameters

Step = Callable[[], None]


class TorchDecoder(nn.Module):
    """The plain head with torch's own decoder in place of its layers."""

    def __init__(self, head: MSQNet) -> None:
        super().__init__()
        c, width = head.config, head.width
        layer = nn.TransformerDecoderLayer(
            width, c.heads, c.ffn or 4 * width, c.dropout, batch_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, c.layers, nn.LayerNorm(width))
        for theirs, mine in zip(self.decoder.layers, head.layers, strict=True):
            pairs = ((mine.self_attention, theirs.self_attn),
                     (mine.cross_attention, theirs.multihead_attn))  # fmt: skip
            for own, other in pairs:
                parts = (own.q, own.k, own.v)
                other.in_proj_weight.data = torch.cat([p.weight.data for p in parts])
                other.in_proj_bias.data = torch.cat([p.bias.data for p in parts])
                other.out_proj.load_state_dict(own.out.state_dict())
            theirs.linear1.load_state_dict(mine.expand.state_dict())
            theirs.linear2.load_state_dict(mine.contract.state_dict())
        self.head = head
        del head.layers

    def forward(self, tokens: Tensor, image: Tensor) -> dict[str, Tensor]:
        """As `MSQNet.forward`, for the trained classes."""
        label, _, weight, bias = self.head.class_parts(None, None)
        x = self.head.fuse_label(label) + self.head.fuse_image(image)[:, None]
        x = self.decoder(x, self.head.memory(tokens))
        return {"logits": (x * weight).sum(-1) + bias}


class Problem:
    """Shapes and data of one comparison."""

    def __init__(self, options: argparse.Namespace, classes: int, clips: int, dropout: float):
        width, layers, tokens = (128, 2, 5) if options.smoke else (512, 6, 17)
        self.classes, self.clips, self.dropout = classes, clips, dropout
        self.device = options.device
        self.config = HeadConfig(width=width, layers=layers, heads=8 if width > 64 else 2,
                                 dropout=dropout, memory_position="none")  # fmt: skip
        g = torch.Generator().manual_seed(0)
        self.text = torch.randn(classes, width, generator=g)
        self.tokens = torch.randn(clips, tokens, 768, generator=g).to(self.device)
        self.image = torch.randn(clips, 512, generator=g).to(self.device)
        self.labels = (torch.rand(clips, classes, generator=g) < 0.05).to(self.device)

    def head(self) -> MSQNet:
        """A head at its start."""
        return MSQNet(self.config, classes=self.classes, token_width=768, image_width=512,
                      text=self.text).to(self.device)  # fmt: skip

    def loss(self, logits: Tensor) -> Tensor:
        """Of all clips, in float32."""
        return head_loss(logits.float(), self.labels, "bce")


def framework_step(problem: Problem, module: nn.Module, low: bool, backend: SDPBackend) -> Step:
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with sdpa_kernel(backend), torch.autocast(problem.device, torch.bfloat16, enabled=low):
            logits = module(problem.tokens, problem.image)["logits"]
            loss = problem.loss(logits)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()

    return step


def packed_step(problem: Problem, precision: str) -> Step:
    model = problem.head()
    flat = flat_parameters(model, precision)
    head = PackedHead(model, precision=precision, flat=flat)
    optimiser = torch.optim.AdamW([flat.matrices, flat.vectors], lr=1e-5, fused=True)
    steps = iter(range(2**31))

    def step() -> None:
        masks = step_masks(0, next(steps), problem.dropout, problem.device)
        flat.begin()
        loss = problem.loss(head(problem.tokens, problem.image, masks=masks)["logits"])
        torch.autograd.backward(loss)
        flat.gather()
        optimiser.step()

    return step


def best_backend(problem: Problem, low: bool) -> SDPBackend:
    """The fastest of torch's attention backends that takes this problem, for torch's decoder."""
    known = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
    if problem.device == "cuda":
        known += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    usable: dict[str, Step] = {}
    for backend in known:
        step = framework_step(problem, TorchDecoder(problem.head()).train(), low, backend)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                step()
        except RuntimeError:  # "No available kernel"
            continue
        usable[backend.name] = step
    seconds = interleaved(usable, 3)
    return SDPBackend.__members__[min(seconds, key=lambda name: sorted(seconds[name])[1])]


def named_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(loss)
    found = {}
    for name, p in model.named_parameters():
        # q, k and v count as one tensor: the bias of the keys alone has no gradient.
        owner, _, leaf = name.rpartition(".")
        if owner.endswith((".q", ".k", ".v")):
            found.setdefault(f"{owner[:-1]}qkv.{leaf}", []).append(p.grad.clone())
        else:
            found[name] = [p.grad.clone()]
    return {name: torch.cat(parts).double() for name, parts in found.items()}


def gate(problem: Problem) -> None:
    """End the program unless the sides agree."""
    masks = Masks(0, 0, problem.dropout, problem.device) if problem.dropout else None
    model = problem.head().eval()
    sides: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}

    def run(name: str, forward: Callable[[], Tensor]) -> None:
        logits = forward()
        sides[name] = logits.detach().double(), named_gradients(model, problem.loss(logits))

    tokens, image = problem.tokens, problem.image
    run("plain", lambda: model(tokens, image, masks=masks)["logits"])
    run("packed", lambda: PackedHead(model)(tokens, image, masks=masks)["logits"])
    with torch.autocast(problem.device, torch.bfloat16):
        run("autocast", lambda: model(tokens, image, masks=masks)["logits"])
    low = PackedHead(model, precision="bf16")
    run("packed bf16", lambda: low(tokens, image, masks=masks)["logits"])

    reference_logits, reference = sides["plain"]
    errors: dict[str, list[float]] = {"autocast": [], "packed bf16": []}
    for name, expected in {"logits": reference_logits, **reference}.items():
        found = {side: (logits if name == "logits" else grads[name]) - expected
                 for side, (logits, grads) in sides.items()}  # fmt: skip
        if float(found["packed"].abs().max()) > 1e-5 * float(expected.abs().max()):
            sys.exit(f"{name}: the packed head differs from the plain one; no times")
        for side, values in errors.items():
            values.append(float(found[side].norm() / expected.norm()))
    if sum(errors["packed bf16"]) > 2 * sum(errors["autocast"]):
        sys.exit("the packed head in bf16 errs more than twice as much as autocast; no times")
    if not problem.dropout:
        theirs = TorchDecoder(problem.head()).eval()(tokens, image)["logits"]
        error = float((theirs - reference_logits).detach().abs().max())
        if error > 1e-4 * float(reference_logits.abs().max()):
            sys.exit("torch's decoder differs from the plain head; no times")


def compare(problem: Problem, options: argparse.Namespace) -> None:
    gate(problem)
    cases: dict[str, Step] = {}
    for precision in ("fp32", "bf16"):
        low, backend = precision == "bf16", best_backend(problem, precision == "bf16")
        modules = {
            f"plain, {precision}": problem.head().train(),
            f"nn.TransformerDecoder ({backend.name.lower()}), {precision}":
                TorchDecoder(problem.head()).train(),
        }  # fmt: skip
        for name, module in modules.items():
            cases[name] = framework_step(problem, module, low, backend)
        if options.compile:
            for name, module in [*modules.items()][:2]:
                compiled = torch.compile(module)
                step = framework_step(problem, compiled, low, backend)
                try:
                    step()
                except Exception as error:  # whatever the compiler of the machine says
                    print(f"compiled {name}: left out: {str(error).splitlines()[0]}",
                          file=sys.stderr)  # fmt: skip
                    continue
                cases[f"compiled {name}"] = step
        cases[f"packed, {precision}"] = packed_step(problem, precision)
    seconds = interleaved(cases, options.rounds, warm_up=2, clock=options.clock)
    print(f"\nK = {problem.classes}, B = {problem.clips}, dropout {problem.dropout}\n")
    print("| step | ms, median (quartiles) | over packed fp32 | over packed bf16 |")
    print("|---|---|---|---|")
    for name, times in seconds.items():
        cells = [ratio(times, seconds[f"packed, {p}"]) for p in ("fp32", "bf16")]
        print("| " + " | ".join([name, quartiles(times, 1e3), *cells]) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that it runs")
    options = parser.parse_args()
    random.seed(0)
    print(f"{machine(options.device)}; {options.rounds} rounds, {options.clock} time")
    shapes = [(20, 8), (7, 16)] if options.smoke else [(157, 16), (20, 64)]
    for classes, clips in shapes:
        for dropout in (0.1, 0.0):
            torch.manual_seed(0)
            torch.compiler.reset()
            compare(Problem(options, classes, clips, dropout), options)


if __name__ == "__main__":
    main()
