"""The kernels compiled for GPUs that are not here: registers, spills, shared memory.

What a compiler makes of a kernel decides its speed as much as the kernel does, and a change of
either can be seen without a GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from msq.kernels.bits import DIGITS, ROUNDS, digits_needed
from msq.kernels.cross_attention import columns, token_pieces
from msq.kernels.gpu import bits as gpu_bits
from msq.kernels.gpu import cross_attention as gpu_cross_attention
from msq.kernels.gpu import cross_attention_short as gpu_cross_attention_short
from msq.kernels.gpu import ffn as gpu_ffn
from msq.kernels.gpu import norm as gpu_norm
from msq.kernels.gpu import self_attention as gpu_self_attention
from msq.kernels.tiles import find_tile

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def build(kernel, op: str, keys: int, architecture: int, types: dict[str, str], **constants):
    """Compiles a kernel with its tile; pointers are aligned to 16 bytes, as torch's are."""
    tile = find_tile(op, (architecture // 10, architecture % 10), keys)
    names = list(kernel.arg_names)
    constants = {**constants, **tile.sizes}
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options=tile.options()
    )


def resources(compiled) -> dict[str, int]:
    """REG, STACK, SHARED of the binary, as the vendor's own tool counts them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        shown = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    return {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", shown)}


ROW = {"x": "*bf16", "y": "*bf16", "grad": "*bf16", "h": "*bf16", "out": "*bf16", "dx": "*bf16",
       "dy": "*bf16", "weight": "*fp32", "bias": "*fp32", "dweight": "*fp32", "dbias": "*fp32",
       "mean": "*fp32", "rstd": "*fp32", "bits": "*i32", "M": "i32", "steps": "i32",
       "scale": "fp32", "eps": "fp32"}  # fmt: skip


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("width", [512, 768])
def test_norm_kernels_fit_without_spills(architecture: int, width: int) -> None:
    constants = {"D": width, "WIDTH": triton.next_power_of_2(width), "HAS_BITS": True}
    for kernel, op, most in (
        (gpu_norm.forward, "drop_add_norm", 80),
        (gpu_norm.backward, "drop_add_norm_backward", 128),
    ):
        compiled = build(kernel, op, width, architecture, ROW, **constants)
        found = resources(compiled)
        assert found["STACK"] == 0, (op, found)
        assert found["REG"] <= most, (op, found)
        assert compiled.metadata.shared <= SHARED_LIMIT[architecture]


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_the_bit_generator_fits_without_spills(architecture: int) -> None:
    needed = digits_needed(410)
    types = {"key": "*i64", "out": "*i32", "words": "i32"}
    compiled = build(
        gpu_bits.make_bits, "mask_bits", 10**6, architecture, types,
        site=3, rate=410, first_digit=DIGITS - needed, needed=needed, rounds=ROUNDS,
    )  # fmt: skip
    found = resources(compiled)
    assert found["STACK"] == 0
    assert found["REG"] <= 64, found


ATTENTION = {**dict.fromkeys(("qkv", "clip", "out", "grad", "dqkv"), "*bf16"),
             **dict.fromkeys(("log_sum", "delta"), "*fp32"), "bits": "*i32", "valid": "*u8",
             **dict.fromkeys(("K", "H", "per_group", "words"), "i32"),
             **dict.fromkeys(("scale", "scale2", "keep_scale"), "fp32")}  # fmt: skip


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("factorised", [False, True])
def test_self_attention_fits_without_spills(architecture: int, factorised: bool) -> None:
    constants = {"D": 512, "d": 64, "HAS_BITS": True, "HAS_VALID": False, "PRECISION": "tf32",
                 "FACTORISED": factorised}  # fmt: skip
    whole_row = {**constants, "FIRST": 128, "SECOND": 32}
    for kernel, op, own in (
        (gpu_self_attention.forward, "self_attention", whole_row),
        (gpu_self_attention.backward_rows, "self_attention_backward_rows", whole_row),
        (gpu_self_attention.backward_keys, "self_attention_backward_keys", constants),
    ):
        compiled = build(kernel, op, 157, architecture, ATTENTION, **own)
        found = resources(compiled)
        assert found["STACK"] == 0, (op, found)
        assert compiled.metadata.shared <= SHARED_LIMIT[architecture]
        if architecture == 90:
            assert "wgmma" in compiled.asm["ptx"]


ABSORBED = {**dict.fromkeys(("x", "keys", "values", "out", "h", "do", "dh", "dx", "dropped", "ds",
                             "beta", "out_bias"), "*bf16"),
            **dict.fromkeys(("weight", "bias", "mean", "rstd"), "*fp32"),
            **dict.fromkeys(("bits", "residual_bits"), "*i32"),
            "K": "i32", "scale": "fp32", "eps": "fp32"}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "tokens"),
    [(80, 17), (80, 20), (80, 24), (80, 32), (90, 16), (90, 17), (90, 20), (90, 32), (100, 17),
     (100, 32)],
)  # fmt: skip
def test_absorbed_cross_attention_fits_without_spills(architecture: int, tokens: int) -> None:
    main, extra = token_pieces(tokens, 8)
    constants = {"T": tokens, "D": 512, "H": 8, "MAIN": main, "EXTRA": extra, "HAS_BITS": True,
                 "PRECISION": "tf32", "CHUNK": gpu_cross_attention.CHUNK}  # fmt: skip
    for kernel, op, own in (
        (gpu_cross_attention.forward, "absorbed_cross", {**constants, "HAS_RESIDUAL_BITS": True}),
        (gpu_cross_attention.backward_rows, "absorbed_cross_backward", constants),
    ):
        compiled = build(kernel, op, columns(tokens, 8), architecture, ABSORBED, **own)
        found = resources(compiled)
        assert found["STACK"] == 0, (op, found)
        assert compiled.metadata.shared <= SHARED_LIMIT[architecture]
        if architecture == 90 and tokens == 17:
            assert "wgmma" in compiled.asm["ptx"]


SHORT = {**dict.fromkeys(("q", "kv", "out", "grad", "dq", "dkv"), "*bf16"), "bits": "*i32",
         **dict.fromkeys(("K", "T", "H", "q_stride", "kv_stride"), "i32"),
         **dict.fromkeys(("scale", "scale2", "keep_scale"), "fp32")}  # fmt: skip


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("keys", [12, 20, 51])
def test_short_cross_attention_fits_without_spills(architecture: int, keys: int) -> None:
    constants = {"D": 512, "d": 64, "TOKENS": 32, "HAS_BITS": True, "PRECISION": "tf32"}
    for kernel, op in (
        (gpu_cross_attention_short.forward, "cross_attention"),
        (gpu_cross_attention_short.backward, "cross_attention_backward"),
    ):
        compiled = build(kernel, op, keys, architecture, SHORT, **constants)
        found = resources(compiled)
        assert found["STACK"] == 0, (op, found)
        assert compiled.metadata.shared <= SHARED_LIMIT[architecture]


HIDDEN = {**dict.fromkeys(("x", "out", "grad", "dx"), "*bf16"), "bias": "*bf16", "parts": "*fp32",
          "bits": "*i32", "M": "i32", "steps": "i32", "scale": "fp32"}  # fmt: skip


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_the_hidden_layer_fits_without_spills(architecture: int) -> None:
    for kernel, op, own in (
        (gpu_ffn.forward, "relu_drop", {"HAS_BITS": True}),
        (gpu_ffn.backward, "relu_drop_backward", {}),
    ):
        found = resources(build(kernel, op, 2048, architecture, HIDDEN, F=2048, **own))
        assert found["STACK"] == 0, (op, found)
        assert found["REG"] <= 96, (op, found)
