"""The Triton kernels of `msq.kernels.cross_attention`: one program per tile of queries of a clip.

The scores of all heads are one product, x with the H T rows of K'. T is no power of two; the tokens
are cut into two pieces that are (17 = 16 + 2 with one masked), each H pieces side by side and a
product of its own. D is taken in chunks: no program holds a whole row of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msq.kernels.cross_attention import CHUNK, columns, token_pieces
from msq.kernels.gpu.launch import capability, given, on_its_device
from msq.kernels.tiles import find_tile

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tokens(
    memory, b, first: tl.constexpr, chunk, T: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    PIECE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """[H PIECE, CHUNK] of K' or V': some tokens of every head, some columns; zeros beyond T."""
    col = tl.arange(0, H * PIECE)
    token = first + col % PIECE
    at = (col // PIECE * T + token)[:, None] * D + (chunk + tl.arange(0, CHUNK))[None, :]
    of_clip = memory + b.to(tl.int64) * (H * T * D)
    return tl.load(of_clip + at, mask=(token < T)[:, None], other=0.0)


@triton.jit
def add_beta(
    s, beta, b, first: tl.constexpr, T: tl.constexpr, H: tl.constexpr, PIECE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Scores by head [ROWS, H, PIECE] in units of log2, -inf for tokens that are none."""
    col = tl.arange(0, H * PIECE)
    token = first + col % PIECE
    added = tl.load(beta + (b * H + col // PIECE) * T + token, mask=token < T, other=0.0)
    s = (s + added.to(tl.float32)[None, :]) * LOG2E
    return tl.reshape(tl.where((token < T)[None, :], s, float("-inf")), (ROWS, H, PIECE))


@triton.jit
def load_words(bits, b, idx, K, H: tl.constexpr):
    """The decisions of one row of probabilities of each query and head [ROWS, H]."""
    head = tl.arange(0, H)
    at = head[None, :] * K + idx[:, None]
    return tl.load(bits + b.to(tl.int64) * H * K + at, mask=(idx < K)[:, None], other=0)


@triton.jit
def unpack(words, first: tl.constexpr, PIECE: tl.constexpr):
    """[ROWS, H, PIECE] of 1 for kept and 0 for dropped."""
    place = first + tl.arange(0, PIECE)
    return (1 - ((words[:, :, None] >> place[None, None, :]) & 1)).to(tl.float32)


@triton.jit
def store_columns(
    to, values, b, idx, K, first: tl.constexpr, T: tl.constexpr, H: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """Into [B K, H T], without the columns that are no tokens."""
    col = tl.arange(0, H * PIECE)
    token = first + col % PIECE
    at = idx[:, None] * (H * T) + (col // PIECE * T + token)[None, :]
    tl.store(
        to + b.to(tl.int64) * K * (H * T) + at,
        values,
        mask=(idx < K)[:, None] & (token < T)[None, :],
    )


@triton.jit
def load_kept(bits, idx, inside, words: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """[ROWS, CHUNK] of 1 for kept and 0 for dropped, of columns that begin with a word."""
    at = idx[:, None] * words + tl.arange(0, CHUNK // 32)[None, :]
    packed = tl.load(bits + at, mask=inside, other=0)
    single = (packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return (1 - tl.reshape(single, (ROWS, CHUNK))).to(tl.float32)


@triton.jit
def normalise(
    h, out, weight, bias, mu, inverse, first, idx, inside, D: tl.constexpr, CHUNK: tl.constexpr
):
    """LayerNorm of rows that were stored just now."""
    for chunk in range(0, D, CHUNK):
        lane = chunk + tl.arange(0, CHUNK)
        at = idx[:, None] * D + lane[None, :]
        seen = tl.load(h + first * D + at, mask=inside, other=0.0).to(tl.float32)
        normed = (seen - mu[:, None]) * inverse[:, None] * tl.load(weight + lane)[None, :]
        normed += tl.load(bias + lane)[None, :]
        tl.store(out + first * D + at, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def forward(
    x, keys, beta, values, out_bias, weight, bias, bits, residual_bits, out, h, mean, rstd, K,
    scale, eps, T: tl.constexpr, D: tl.constexpr, H: tl.constexpr, MAIN: tl.constexpr,
    EXTRA: tl.constexpr, HAS_BITS: tl.constexpr, HAS_RESIDUAL_BITS: tl.constexpr,
    PRECISION: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Scores, softmax, mixed values with residual by chunks of D, LayerNorm."""
    b = tl.program_id(1)
    idx = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (idx < K)[:, None]
    first = b.to(tl.int64) * K
    lane = tl.arange(0, CHUNK)
    s1 = tl.zeros((ROWS, H * MAIN), dtype=tl.float32)
    if EXTRA > 0:
        s2 = tl.zeros((ROWS, H * EXTRA), dtype=tl.float32)
    for chunk in range(0, D, CHUNK):
        q = tl.load(
            x + first * D + idx[:, None] * D + (chunk + lane)[None, :], mask=inside, other=0.0
        )
        k1 = load_tokens(keys, b, 0, chunk, T, D, H, MAIN, CHUNK)
        s1 = tl.dot(q, tl.trans(k1), s1, input_precision=PRECISION)
        if EXTRA > 0:
            k2 = load_tokens(keys, b, MAIN, chunk, T, D, H, EXTRA, CHUNK)
            s2 = tl.dot(q, tl.trans(k2), s2, input_precision=PRECISION)
    t1 = add_beta(s1, beta, b, 0, T, H, MAIN, ROWS)
    top = tl.max(t1, axis=2)
    if EXTRA > 0:
        t2 = add_beta(s2, beta, b, MAIN, T, H, EXTRA, ROWS)
        top = tl.maximum(top, tl.max(t2, axis=2))
    e1 = tl.exp2(t1 - top[:, :, None])
    total = tl.sum(e1, axis=2)
    if EXTRA > 0:
        e2 = tl.exp2(t2 - top[:, :, None])
        total += tl.sum(e2, axis=2)
    share = 1.0 / total
    if HAS_BITS:
        share = share * scale
        words = load_words(bits, b, idx, K, H)
        e1 = e1 * unpack(words, 0, MAIN)
    p1 = tl.reshape(e1 * share[:, :, None], (ROWS, H * MAIN)).to(x.dtype.element_ty)
    if EXTRA > 0:
        if HAS_BITS:
            e2 = e2 * unpack(words, MAIN, EXTRA)
        p2 = tl.reshape(e2 * share[:, :, None], (ROWS, H * EXTRA)).to(x.dtype.element_ty)

    # Mean and sum of squared deviations, chunk by chunk (Chan, Golub and LeVeque, 1983).
    mu = tl.zeros((ROWS,), dtype=tl.float32)
    squares = tl.zeros((ROWS,), dtype=tl.float32)
    for chunk in range(0, D, CHUNK):
        v1 = load_tokens(values, b, 0, chunk, T, D, H, MAIN, CHUNK)
        o = tl.dot(p1, v1, input_precision=PRECISION)
        if EXTRA > 0:
            v2 = load_tokens(values, b, MAIN, chunk, T, D, H, EXTRA, CHUNK)
            o = tl.dot(p2, v2, o, input_precision=PRECISION)
        o += tl.load(out_bias + chunk + lane).to(tl.float32)[None, :]
        if HAS_RESIDUAL_BITS:
            line = residual_bits + first * (D // 32) + chunk // 32
            o = o * load_kept(line, idx, inside, D // 32, ROWS, CHUNK) * scale
        at = idx[:, None] * D + (chunk + lane)[None, :]
        o += tl.load(x + first * D + at, mask=inside, other=0.0).to(tl.float32)
        rounded = o.to(h.dtype.element_ty)
        tl.store(h + first * D + at, rounded, mask=inside)
        seen = rounded.to(tl.float32)
        local = tl.sum(seen, axis=1) / CHUNK
        apart = local - mu
        centred = seen - local[:, None]
        of_new = CHUNK / (chunk + CHUNK)
        squares += tl.sum(centred * centred, axis=1) + apart * apart * (chunk * of_new)
        mu += apart * of_new
    inverse = 1.0 / tl.sqrt(squares / D + eps)
    tl.store(mean + first + idx, mu, mask=idx < K)
    tl.store(rstd + first + idx, inverse, mask=idx < K)
    tl.debug_barrier()  # other threads of the program wrote what is read now
    normalise(h, out, weight, bias, mu, inverse, first, idx, inside, D, CHUNK)


@triton.jit
def backward_rows(
    do, dh, x, keys, beta, values, bits, dx, dropped, ds, K, scale,
    T: tl.constexpr, D: tl.constexpr, H: tl.constexpr, MAIN: tl.constexpr, EXTRA: tl.constexpr,
    HAS_BITS: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of x; probabilities after dropout and gradients of the scores [B K, H T]."""
    b = tl.program_id(1)
    idx = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (idx < K)[:, None]
    first = b.to(tl.int64) * K
    lane = tl.arange(0, CHUNK)
    kind = x.dtype.element_ty
    s1 = tl.zeros((ROWS, H * MAIN), dtype=tl.float32)
    if EXTRA > 0:
        s2 = tl.zeros((ROWS, H * EXTRA), dtype=tl.float32)
    for chunk in range(0, D, CHUNK):
        q = tl.load(
            x + first * D + idx[:, None] * D + (chunk + lane)[None, :], mask=inside, other=0.0
        )
        k1 = load_tokens(keys, b, 0, chunk, T, D, H, MAIN, CHUNK)
        s1 = tl.dot(q, tl.trans(k1), s1, input_precision=PRECISION)
        if EXTRA > 0:
            k2 = load_tokens(keys, b, MAIN, chunk, T, D, H, EXTRA, CHUNK)
            s2 = tl.dot(q, tl.trans(k2), s2, input_precision=PRECISION)
    t1 = add_beta(s1, beta, b, 0, T, H, MAIN, ROWS)
    top = tl.max(t1, axis=2)
    if EXTRA > 0:
        t2 = add_beta(s2, beta, b, MAIN, T, H, EXTRA, ROWS)
        top = tl.maximum(top, tl.max(t2, axis=2))
    p1 = tl.exp2(t1 - top[:, :, None])
    total = tl.sum(p1, axis=2)
    if EXTRA > 0:
        p2 = tl.exp2(t2 - top[:, :, None])
        total += tl.sum(p2, axis=2)
    p1 = p1 / total[:, :, None]
    if EXTRA > 0:
        p2 = p2 / total[:, :, None]

    g1 = tl.zeros((ROWS, H * MAIN), dtype=tl.float32)
    if EXTRA > 0:
        g2 = tl.zeros((ROWS, H * EXTRA), dtype=tl.float32)
    for chunk in range(0, D, CHUNK):
        g = tl.load(
            do + first * D + idx[:, None] * D + (chunk + lane)[None, :], mask=inside, other=0.0
        )
        v1 = load_tokens(values, b, 0, chunk, T, D, H, MAIN, CHUNK)
        g1 = tl.dot(g, tl.trans(v1), g1, input_precision=PRECISION)
        if EXTRA > 0:
            v2 = load_tokens(values, b, MAIN, chunk, T, D, H, EXTRA, CHUNK)
            g2 = tl.dot(g, tl.trans(v2), g2, input_precision=PRECISION)
    dp1 = tl.reshape(g1, (ROWS, H, MAIN))
    kept1 = p1
    if HAS_BITS:
        words = load_words(bits, b, idx, K, H)
        keep1 = unpack(words, 0, MAIN) * scale
        dp1 = dp1 * keep1
        kept1 = p1 * keep1
    row_sum = tl.sum(p1 * dp1, axis=2)
    flat1 = tl.reshape(kept1, (ROWS, H * MAIN)).to(kind)
    store_columns(dropped, flat1, b, idx, K, 0, T, H, MAIN)
    if EXTRA > 0:
        dp2 = tl.reshape(g2, (ROWS, H, EXTRA))
        kept2 = p2
        if HAS_BITS:
            keep2 = unpack(words, MAIN, EXTRA) * scale
            dp2 = dp2 * keep2
            kept2 = p2 * keep2
        row_sum += tl.sum(p2 * dp2, axis=2)
        flat2 = tl.reshape(kept2, (ROWS, H * EXTRA)).to(kind)
        store_columns(dropped, flat2, b, idx, K, MAIN, T, H, EXTRA)
        ds2 = tl.reshape(p2 * (dp2 - row_sum[:, :, None]), (ROWS, H * EXTRA)).to(kind)
        store_columns(ds, ds2, b, idx, K, MAIN, T, H, EXTRA)
    ds1 = tl.reshape(p1 * (dp1 - row_sum[:, :, None]), (ROWS, H * MAIN)).to(kind)
    store_columns(ds, ds1, b, idx, K, 0, T, H, MAIN)
    for chunk in range(0, D, CHUNK):
        at = idx[:, None] * D + (chunk + lane)[None, :]
        k1 = load_tokens(keys, b, 0, chunk, T, D, H, MAIN, CHUNK)
        of_x = tl.dot(ds1, k1, input_precision=PRECISION)
        if EXTRA > 0:
            k2 = load_tokens(keys, b, MAIN, chunk, T, D, H, EXTRA, CHUNK)
            of_x = tl.dot(ds2, k2, of_x, input_precision=PRECISION)
        of_x += tl.load(dh + first * D + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + first * D + at, of_x.to(dx.dtype.element_ty), mask=inside)


@on_its_device
def launch_forward(
    x: Tensor, keys: Tensor, beta: Tensor, values: Tensor, out_bias: Tensor, weight: Tensor,
    bias: Tensor, bits: Tensor | None, residual_bits: Tensor | None, scale: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The result and h [B K, D]; mean and inverse deviation of h [B K] float32."""
    per_clip, constants = _shared(x, keys)
    tile = find_tile("absorbed_cross", capability(x), columns(*keys.shape[2:0:-1]))
    out, h = torch.empty_like(x), torch.empty_like(x)
    mean = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    forward[(triton.cdiv(per_clip, tile.sizes["ROWS"]), keys.shape[0])](
        x, keys.contiguous(), beta.contiguous(), values.contiguous(), out_bias.contiguous(),
        weight.contiguous(), bias.contiguous(), given(bits, x), given(residual_bits, x),
        out, h, mean, rstd, per_clip, scale, eps, HAS_BITS=bits is not None,
        HAS_RESIDUAL_BITS=residual_bits is not None, **constants, **tile.launch(),
    )  # fmt: skip
    return out, h, mean, rstd


@on_its_device
def launch_backward(
    do: Tensor, dh: Tensor, x: Tensor, keys: Tensor, beta: Tensor, values: Tensor,
    bits: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient of x [B K, D]; p after dropout and the gradient of s [B, K, H T]."""
    per_clip, constants = _shared(x, keys)
    clips, heads, tokens, _ = keys.shape
    tile = find_tile("absorbed_cross_backward", capability(x), columns(*keys.shape[2:0:-1]))
    dx = torch.empty_like(x)
    dropped = torch.empty(clips, per_clip, heads * tokens, dtype=x.dtype, device=x.device)
    ds = torch.empty_like(dropped)
    backward_rows[(triton.cdiv(per_clip, tile.sizes["ROWS"]), clips)](
        do, dh, x, keys.contiguous(), beta.contiguous(), values.contiguous(), given(bits, x),
        dx, dropped, ds, per_clip, scale, HAS_BITS=bits is not None, **constants,
        **tile.launch(),
    )  # fmt: skip
    return dx, dropped, ds


def _shared(x: Tensor, keys: Tensor) -> tuple[int, dict[str, int | str]]:
    """K, and the constants that both kernels have."""
    clips, heads, tokens, width = keys.shape
    main, extra = token_pieces(tokens, heads)
    constants: dict[str, int | str] = {
        "T": tokens, "D": width, "H": heads, "MAIN": main, "EXTRA": extra, "CHUNK": CHUNK,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    return x.shape[0] // clips, constants
