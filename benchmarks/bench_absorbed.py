"""When the absorbed cross-attention pays: `python benchmarks/bench_absorbed.py [--write]`.

Forward and backward of one cross-attention (query and output projections included, keys and values
given, dropout 0.1) in both forms, interleaved, for numbers of queries K and tokens S. Where the
results differ, no time is taken. `--write` puts the ratios into msq/head/absorbed.json, which the
packed head asks; entries of other devices and precisions stay.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import machine
from torch import Tensor
from torch.nn import functional as F

from msq.bench.cases import Side
from msq.bench.runner import interleaved
from msq.head import absorbed
from msq.head.absorbed import absorbed_attention
from msq.head.masks import LayerMasks, Masks, Part
from msq.head.packed_blocks import CrossAttend, split_heads

TABLE = Path(absorbed.__file__).with_name("absorbed.json")
WIDTH, HEADS = 512, 8


def usual(x: Tensor, k: Tensor, v: Tensor, w: list[Tensor], masks: LayerMasks) -> Tensor:
    q = split_heads(F.linear(x.flatten(0, 1), w[0], w[1]), len(x), 1, HEADS)[0]
    mixed = CrossAttend.apply(q, k.transpose(1, 2), v.transpose(1, 2), masks)
    return F.linear(mixed, w[2], w[3]).view(x.shape)


def absorbing(x: Tensor, k: Tensor, v: Tensor, w: list[Tensor], masks: LayerMasks) -> Tensor:
    return absorbed_attention(x, k, v, (w[0], w[1]), (w[2], w[3]), masks)


def measure(clips: int, queries: int, tokens: int, dtype: torch.dtype, options: argparse.Namespace
            ) -> float:  # fmt: skip
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        made = torch.randn(*shape, generator=g) * size
        return made.to(options.device, dtype).requires_grad_()

    x = draw(clips, queries, WIDTH)
    k, v = (draw(clips, tokens, HEADS, WIDTH // HEADS) for _ in range(2))
    w = [draw(*s, size=WIDTH**-0.5) for s in [(WIDTH, WIDTH), (WIDTH,)] * 2]
    masks = Masks(0, 0, 0.1, options.device).at(Part.decoder)
    inputs, weight = [x, k, v, *w], draw(clips, queries, WIDTH).detach()

    def case(form: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: [y := form(x, k, v, w, masks), *torch.autograd.grad(y, inputs, weight)]

    cases = {"usual": case(usual), "absorbed": case(absorbing)}
    for a, b in zip(cases["usual"](), cases["absorbed"](), strict=True):
        bound = (1e-4 if dtype == torch.float32 else 5e-2) * float(a.detach().abs().max())
        if float((a - b).detach().abs().max()) > bound:
            sys.exit(f"K={queries}, S={tokens}, {dtype}: the two forms differ; no times")
    runs = {name: Side(run) for name, run in cases.items()}
    taken = interleaved(runs, options.rounds)
    seconds = {name: [getattr(t, options.clock) for t in times] for name, times in taken.items()}
    pairs = zip(seconds["usual"], seconds["absorbed"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=2512, help="about B K, as of one step")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that it runs")
    options = parser.parse_args()
    queries = [12, 20, 35, 51, 75, 100, 140, 157, 256]
    tokens = [9, 17, 33]
    if options.smoke:
        queries, tokens, options.rows, options.rounds = [12, 51], [9], 102, 2
    print(machine(options.device))
    stored = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        ratios = {
            str(s): {str(k): round(measure(max(1, options.rows // k), k, s, dtype, options), 3)
                     for k in queries}
            for s in tokens
        }  # fmt: skip
        stored[f"{options.device} {precision}"] = {
            "machine": machine(options.device),
            "measured": f"time of the usual form / of the absorbed one, forward and backward, "
            f"D={WIDTH}, H={HEADS}, about {options.rows} rows, by S and K",
            "ratios": ratios,
        }
        print(precision, json.dumps(ratios))
    if options.write and not options.smoke:
        TABLE.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
