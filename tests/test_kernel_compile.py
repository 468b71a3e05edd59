"""The kernels compiled for GPUs that are not here: registers, spills, shared memory.

What a compiler makes of a kernel decides its speed as much as the kernel does, and a change of
either can be seen without a GPU.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from msq.bench.kernel_builds import (
    ARCHITECTURES,
    SHARED_LIMIT,
    Build,
    builds,
    compile_for,
    key,
    record,
    table,
    types,
)
from msq.kernels.gpu import temporal_attention as gpu_temporal_attention
from msq.kernels.tiles import Tile, find_tile

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


def instructions(compiled) -> list[str]:
    """Names of the machine instructions of the binary, in order."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        shown = subprocess.run(
            [CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", shown)
    return [name for name in found if name != "NOP"]


# All for sm_90; for the others one size of each kernel, the rest stands in the record.
ELSEWHERE = ("mask_bits", " D=512", " F=2048", " K=157", " T=17", "cross_attention K=20",
             "cross_attention_backward K=20")  # fmt: skip
EVERY = [
    (made, architecture)
    for architecture in ARCHITECTURES
    for made in builds()
    if architecture == 90 or made.name.endswith(ELSEWHERE)
]


@pytest.mark.parametrize(("of", "architecture"), EVERY, ids=[key(*each) for each in EVERY])
def test_a_kernel_fits_without_spills_and_is_what_the_record_says(
    of: Build, architecture: int
) -> None:
    made = compile_for(of, architecture)
    assert made.fits(architecture), made
    assert not made.atomics
    assert bool(made.tensor_core) == of.products
    written = record().get(triton.__version__)
    if written is None:
        pytest.skip(f"Triton {triton.__version__} is not recorded: benchmarks/kernel_table.py")
    expected = written[key(of, architecture)]
    assert abs(made.instructions - expected["instructions"]) <= 0.1 * expected["instructions"]
    assert made.registers <= 1.1 * expected["registers"]
    assert made.tensor_core == tuple(expected["tensor_core"])
    assert expected["stack"] == 0


def test_the_record_is_of_these_kernels_and_tiles_and_nothing_in_it_spills() -> None:
    assert {"3.6.0", "3.9.0"} <= record().keys()
    current = {
        key(of, a): find_tile(of.op, (a // 10, a % 10), of.keys)
        for a in ARCHITECTURES
        for of in builds()
    }
    for written in record().values():
        assert written.keys() == current.keys()
        for name, tile in current.items():
            one = written[name]
            expected = {**tile.sizes, "warps": tile.warps, "stages": tile.stages}
            assert one["tile"] == expected, f"{name}: benchmarks/kernel_table.py --write"
            assert one["stack"] == 0, name
            assert one["shared"] <= SHARED_LIMIT[int(name.rpartition("_")[2])], name
            assert not one["atomics"], name


@pytest.mark.parametrize(
    "name", ["self_attention K=157", "self_attention_backward_rows K=157",
             "self_attention_backward_keys K=157", "self_attention, factorised K=157",
             "absorbed_cross T=17", "absorbed_cross_backward T=17",
             "ffn_product F=2048", "ffn_product_backward F=2048"],
)  # fmt: skip
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_large_products_are_those_of_the_architecture(name: str, architecture: int) -> None:
    for written in record().values():
        kinds = written[f"{name} sm_{architecture}"]["tensor_core"]
        if architecture == 90:
            assert kinds == ["HGMMA"]
        assert kinds


def test_the_table_in_the_documents_is_the_record_s() -> None:
    text = (Path(__file__).parents[1] / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert table(record()) in text


@triton.jit
def product_that_draws(
    x, w, out, seed, M, N: tl.constexpr, K: tl.constexpr, DRAWS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """relu(x w^T) with dropout drawn number by number: what the kernels are not to be."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in range(0, K, DEPTH):
        lane = start + tl.arange(0, DEPTH)
        a = tl.load(x + row[:, None] * K + lane[None, :])
        b = tl.load(w + col[:, None] * K + lane[None, :])
        total = tl.dot(a, tl.trans(b), total)
    total = tl.maximum(total, 0.0)
    at = row[:, None] * N + col[None, :]
    if DRAWS:
        total = tl.where(tl.rand(seed, at) > 0.1, total, 0.0)
    tl.store(out + at, total.to(out.dtype.element_ty))


def test_the_guard_sees_a_product_that_draws_its_own_random_numbers() -> None:
    given = types(bf16="x w out", int="seed M")
    tile = Tile("product", "sm_90", 1, {"ROWS": 128, "COLS": 256, "DEPTH": 64}, 8, 3)
    plain, drawing = (
        compile_for(
            Build("product", "product", 1, product_that_draws, given,
                  {"N": 2048, "K": 512, "DRAWS": draws}), 90, tile,
        )
        for draws in (False, True)
    )  # fmt: skip
    assert plain.fits(90)
    assert plain.tensor_core == ("HGMMA",)
    assert not drawing.fits(90)
    assert drawing.stack > 0
    assert drawing.instructions > 3 * plain.instructions


TEMPORAL = {**dict.fromkeys(("qkv", "out", "grad", "dqkv"), "*bf16"), "rows": "i32",
            "scale": "fp32", "scale2": "fp32"}  # fmt: skip
COUNTS = json.loads(Path(__file__).with_name("kernel_instructions.json").read_text())


@pytest.mark.parametrize(
    ("architecture", "frames", "product"),
    [(80, 16, "HMMA"), (90, 8, "HMMA"), (90, 10, "HMMA"), (90, 16, "HMMA"), (90, 32, "HMMA"),
     (90, 96, "HGMMA"), (100, 16, "HMMA"), (100, 96, "UTCHMMA")],
)  # fmt: skip
def test_temporal_attention_fits_without_spills(
    architecture: int, frames: int, product: str
) -> None:
    """Blocks of 16 and 32 rows are products of single warps on every architecture."""
    constants = {"H": 12, "d": 64, "T": frames, "PRECISION": "tf32"}
    for kernel, op in (
        (gpu_temporal_attention.forward, "temporal_attention"),
        (gpu_temporal_attention.backward, "temporal_attention_backward"),
    ):
        compiled = build(kernel, op, frames, architecture, TEMPORAL, **constants)
        found, names = resources(compiled), instructions(compiled)
        assert found["STACK"] == 0, (op, found)
        assert compiled.metadata.shared <= SHARED_LIMIT[architecture]
        assert product in names
        assert not {"RED", "ATOM", "ATOMG"} & set(names)
        recorded = COUNTS.get(triton.__version__, {})
        expected = recorded.get(f"{op} sm_{architecture} T={frames}", len(names))
        assert abs(len(names) - expected) <= 0.1 * expected, (op, len(names), expected)
