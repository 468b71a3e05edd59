"""The kernels compiled for GPUs that need not be here: registers, spills, shared memory, opcodes.

What a compiler makes of a kernel decides its speed as much as the kernel does. `builds` lists every
kernel with the constants that a head of width 512 with 8 heads launches it with, and
`kernel_builds.json` holds what versions of Triton made of them (`benchmarks/kernel_table.py`).
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from msq.kernels.tiles import Tile, find_tile

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of a program
# Of products by single warps, by groups of four (sm_90), and by the unit of sm_100.
PRODUCTS = {"HMMA": r"\bmma\.sync", "HGMMA": r"\bwgmma\.mma", "UTCHMMA": r"\btcgen05\.mma\b"}
NOP = 0x918  # lowest 12 bits of the instruction that does nothing
RECORD = Path(__file__).with_name("kernel_builds.json")
WIDTH, HEADS, HEAD_WIDTH, HIDDEN, RATE = 512, 8, 64, 2048, 410


@dataclass(frozen=True)
class Build:
    """One kernel at one size.

    Attributes:
        name: of kernel and size, as the record has it.
        op: as the table of tiles names it.
        keys: likewise.
        kernel: the function that Triton compiles.
        types: of its arguments by name, such as `*bf16`.
        constants: of the kernel but for those of the tile.
        products: whether it multiplies matrices.
    """

    name: str
    op: str
    keys: int
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    products: bool = True


@dataclass(frozen=True, slots=True)
class Made:
    """What a compiler made of a kernel.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread; spilled registers are there.
        shared: bytes of a program.
        instructions: of the binary, without padding.
        tensor_core: kinds of tensor-core instructions, sorted.
        atomics: kinds of atomic instructions on global memory, sorted.
    """

    registers: int
    stack: int
    shared: int
    instructions: int
    tensor_core: tuple[str, ...] = ()
    atomics: tuple[str, ...] = ()

    def fits(self, architecture: int) -> bool:
        """Nothing is spilled and shared memory suffices."""
        return self.stack == 0 and self.shared <= SHARED_LIMIT[architecture]


def types(**names: str) -> dict[str, str]:
    """`types(bf16="x y")`: x and y are pointers; `int` and `float` are numbers."""
    numbers = {"int": "i32", "float": "fp32"}
    return {
        name: numbers.get(kind, f"*{kind}") for kind, many in names.items() for name in many.split()
    }


def builds() -> Iterator[Build]:
    """All of them; sizes are those of the datasets in the paper."""
    from msq.kernels.bits import DIGITS, ROUNDS, digits_needed
    from msq.kernels.gpu import bits

    needed = digits_needed(RATE)
    constants = {"rate": RATE, "first_digit": DIGITS - needed, "needed": needed, "rounds": ROUNDS}
    yield Build("mask_bits", "mask_bits", 10**6, bits.make_bits,
                types(i64="key", i32="out", int="words site"), constants, False)  # fmt: skip
    for width in (512, 768):
        yield from norm(width)
    yield from hidden(HIDDEN)
    yield from ffn_product(HIDDEN)
    for queries in (157, 51, 20):
        yield from self_attention(queries)
    for tokens in (16, 17, 20, 24, 32):
        yield from absorbed_cross(tokens)
    for queries in (12, 20, 51):
        yield from short_cross(queries)


def norm(width: int) -> Iterator[Build]:
    """Dropout, residual and LayerNorm over rows of D."""
    from msq.kernels.gpu import norm as gpu

    row = types(bf16="x y grad h out dx dy", fp32="weight bias dweight dbias mean rstd", i32="bits",
                int="M steps", float="scale eps")  # fmt: skip
    constants = {"D": width, "WIDTH": 1 << (width - 1).bit_length(), "HAS_BITS": True}
    for op, kernel in (("drop_add_norm", gpu.forward), ("drop_add_norm_backward", gpu.backward)):
        yield Build(f"{op} D={width}", op, width, kernel, row, constants, False)


def hidden(width: int) -> Iterator[Build]:
    """Bias, ReLU and dropout over rows of F."""
    from msq.kernels.gpu import ffn as gpu

    given = types(bf16="x out grad dx bias", fp32="parts", i32="bits", int="M steps", float="scale")
    for op, kernel in (("relu_drop", gpu.forward), ("relu_drop_backward", gpu.backward)):
        constants: dict[str, Any] = {"F": width}
        if kernel is gpu.forward:
            constants["HAS_BITS"] = True
        yield Build(f"{op} F={width}", op, width, kernel, given, constants, False)


def ffn_product(width: int) -> Iterator[Build]:
    """The products next to the ReLU, from D to F and back, with what follows them."""
    from msq.kernels.gpu import ffn_product as gpu

    given = types(bf16="x weight bias out grad hidden dx", fp32="parts", i32="bits", int="M",
                  float="scale")  # fmt: skip
    constants = {"F": width, "D": WIDTH, "PRECISION": "tf32"}
    for op, kernel, own in (
        ("ffn_product", gpu.forward, {**constants, "HAS_BITS": True}),
        ("ffn_product_backward", gpu.backward, constants),
    ):
        yield Build(f"{op} F={width}", op, width, kernel, given, own)


def self_attention(queries: int) -> Iterator[Build]:
    """K queries among each other, with dropout; the first layer in its factors too."""
    from msq.kernels.gpu import self_attention as gpu

    first, second = gpu.key_pieces(queries)
    given = types(bf16="qkv clip out grad dqkv", fp32="log_sum delta", i32="bits", u8="valid",
                  int="K H per_group words", float="scale scale2 keep_scale")  # fmt: skip
    for factorised in (False, True) if queries == 157 else (False,):
        constants = {"D": WIDTH, "d": HEAD_WIDTH, "HAS_BITS": True, "HAS_VALID": False,
                     "PRECISION": "tf32", "FACTORISED": factorised}  # fmt: skip
        whole = {**constants, "FIRST": first, "SECOND": second}
        for op, kernel, own in (
            ("self_attention", gpu.forward, whole),
            ("self_attention_backward_rows", gpu.backward_rows, whole),
            ("self_attention_backward_keys", gpu.backward_keys, constants),
        ):
            name = f"{op}{', factorised' if factorised else ''} K={queries}"
            yield Build(name, op, queries, kernel, given, own)


def absorbed_cross(tokens: int) -> Iterator[Build]:
    """Absorbed cross-attention to T tokens."""
    from msq.kernels.cross_attention import CHUNK, columns, token_pieces
    from msq.kernels.gpu import cross_attention as gpu

    main, extra = token_pieces(tokens, HEADS)
    constants = {"T": tokens, "D": WIDTH, "H": HEADS, "MAIN": main, "EXTRA": extra,
                 "HAS_BITS": True, "PRECISION": "tf32", "CHUNK": CHUNK}  # fmt: skip
    given = types(bf16="x keys values out h do dh dx dropped ds beta out_bias",
                  fp32="weight bias mean rstd", i32="bits residual_bits", int="K",
                  float="scale eps")  # fmt: skip
    for op, kernel, own in (
        ("absorbed_cross", gpu.forward, {**constants, "HAS_RESIDUAL_BITS": True}),
        ("absorbed_cross_backward", gpu.backward_rows, constants),
    ):
        yield Build(f"{op} T={tokens}", op, columns(tokens, HEADS), kernel, given, own)


def short_cross(queries: int) -> Iterator[Build]:
    """K queries to at most 32 tokens, projections apart."""
    from msq.kernels.gpu import cross_attention_short as gpu

    constants = {"D": WIDTH, "d": HEAD_WIDTH, "TOKENS": 32, "HAS_BITS": True, "PRECISION": "tf32"}
    given = types(bf16="q kv out grad dq dkv", i32="bits", int="K T H q_stride kv_stride",
                  float="scale scale2 keep_scale")  # fmt: skip
    for op, kernel in (
        ("cross_attention", gpu.forward),
        ("cross_attention_backward", gpu.backward),
    ):
        yield Build(f"{op} K={queries}", op, queries, kernel, given, constants)


def compile_for(build: Build, architecture: int, tile: Tile | None = None) -> Made:
    """Compiles a kernel; pointers are aligned to 16 bytes, as torch's are.

    Args:
        build: which.
        architecture: such as 90.
        tile: how it is launched; None takes the table's.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tile = tile or find_tile(build.op, (architecture // 10, architecture % 10), build.keys)
    names = list(build.kernel.arg_names)
    constants = {**build.constants, **tile.sizes}
    signature = {n: "constexpr" if n in constants else build.types[n] for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")
    }
    compiled = triton.compile(
        ASTSource(build.kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", architecture, 32), options=tile.options(),
    )  # fmt: skip
    asm = compiled.asm
    return examined(asm["cubin"], compiled.metadata.shared, asm["ptx"])


def examined(binary: bytes, shared: int, virtual: str) -> Made:
    """A compiled kernel, its resources as the vendor's own tool, which comes with Triton, says.

    Disassembling it would take a second or more: instructions are counted from the binary's code,
    where each takes 16 bytes, and their kinds are read from the virtual assembly.

    Args:
        binary: the cubin.
        shared: bytes that a launch asks for.
        virtual: PTX.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        shown = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = {k: int(v) for k, v in re.findall(r"\b(REG|STACK):(\d+)", shown)}
    products = {kind for kind, name in PRODUCTS.items() if re.search(name, virtual)}
    atomics = set(re.findall(r"\b(?:atom|red)\.(?!shared|async)\S+", virtual))
    return Made(
        used["REG"], used["STACK"], shared, instructions(binary),
        tuple(sorted(products)), tuple(sorted(atomics)),
    )  # fmt: skip


def instructions(binary: bytes) -> int:
    """Instructions in the code sections of an ELF file for a GPU, padding left out."""
    (sections,) = struct.unpack_from("<Q", binary, 40)
    size, count, names = struct.unpack_from("<HHH", binary, 58)
    headers = [struct.unpack_from("<IIQQQQ", binary, sections + size * i) for i in range(count)]
    strings, total = headers[names][4], 0
    for name, _, _, _, offset, length in headers:
        if binary[strings + name :].startswith(b".text."):
            code = struct.iter_unpack("<QQ", binary[offset : offset + length])
            total += sum(low & 0xFFF != NOP for low, _ in code)
    return total


def record() -> dict[str, dict[str, dict[str, Any]]]:
    """Version of Triton -> `NAME sm_90` -> fields of `Made`, and `tile`."""
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def key(build: Build, architecture: int) -> str:
    """Of a line of the record."""
    return f"{build.name} sm_{architecture}"


def line(made: Made, tile: Tile) -> dict[str, Any]:
    """One line of the record."""
    return {**asdict(made), "tile": {**tile.sizes, "warps": tile.warps, "stages": tile.stages}}


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]], architecture: int = 90) -> str:
    """The record of one architecture as a table for people; versions between slashes."""
    versions = sorted(found)
    head = " / ".join(versions)
    lines = [
        f"| kernel, sm_{architecture} | tile | warps, stages | registers, {head} | shared KiB | "
        f"instructions, {head} | tensor cores |",
        "|---|---|---|---|---|---|---|",
    ]
    end = f" sm_{architecture}"
    for name in (name for name in found[versions[-1]] if name.endswith(end)):
        of = [found[version].get(name, {}) for version in versions]
        tile = dict(of[-1]["tile"])
        launch = f"{tile.pop('warps')}, {tile.pop('stages')}"
        sizes = " x ".join(str(size) for size in tile.values())
        registers, counts = (
            " / ".join(str(one.get(field, "-")) for one in of)
            for field in ("registers", "instructions")
        )
        shared = f"{of[-1]['shared'] / 1024:.1f}".removesuffix(".0")
        kinds = ", ".join(of[-1]["tensor_core"]) or "none"
        lines.append(f"| {name.removesuffix(end)} | {sizes} | {launch} | {registers} | {shared} | "
                     f"{counts} | {kinds} |")  # fmt: skip
    return "\n".join(lines)
