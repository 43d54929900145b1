"""Registers and stack of the Triton kernels of a decoding step, compiled for GPUs that need not be here.

Sizes are those of GLM-130B in fp16 with INT4 weights and a scale per row, for programs that multiply 1, 4, 8 or 16
rows of a batch; those of 16 use tensor cores, from compute capability 8.0 on. What does not fit the registers is
spilled to the stack, in memory.
Run: make bench-step-kernels
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from glm_hf.quantization import kernels_triton_attention as attention
from glm_hf.quantization import kernels_triton_step as kernels

POINTERS = {
    **{"weight_pointer": "*u8", "scale_pointer": "*fp16", "sums_pointer": "*fp32", "extremes_pointer": "*fp32"},
    "lengths_pointer": "*i32",
}
FLOATS = ("eps", "alpha", "scaling")
CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"


def variants() -> Iterator[tuple[str, Any, dict[str, Any], int]]:
    """Yield names, kernels, constants and numbers of warps, as GLM-130B has them."""
    weight = torch.empty(2, 12288 // 2, dtype=torch.uint8)
    layer = kernels.Linear(weight, torch.empty(2, 1), 4, torch.empty(2))
    yield "norm", kernels.norm_kernel, {"BLOCK": 16384}, 8
    for tokens in (1, 4, 8, 16):
        rows, _, constants = kernels.tiling(layer, tokens, len(weight))
        tiles = {**constants, "ROWS": rows}
        yield f"query_key_value, {tokens}", kernels.query_key_value_kernel, {"NUM_HEADS": 96, **tiles}, 4
        yield f"linear, {tokens}", kernels.linear_kernel, tiles, 4
        yield f"gated, {tokens}", kernels.gated_kernel, tiles, 4
    yield "attend", attention.attend_kernel, {"BLOCK": 128, "BLOCK_TOKENS": attention.CACHE_BLOCK}, 4
    yield "combine", attention.combine_kernel, {"BLOCK": 128, "PARTS": attention.CACHE_PARTS}, 4


def compile_kernel(kernel: Any, constants: dict[str, Any], num_warps: int, capability: int) -> CompiledKernel:
    """Compile as for sizes and addresses that 16 divides, in fp16."""
    names = kernel.arg_names
    signature = {name: POINTERS.get(name, "*fp16" if name.endswith("_pointer") else "i32") for name in names}
    signature |= {name: "fp32" for name in FLOATS if name in names} | dict.fromkeys(constants, "constexpr")
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name not in (*constants, *FLOATS)
    }
    source = ASTSource(kernel, signature, values, aligned)
    return triton.compile(source, GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes of its stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    [(registers, stack)] = re.findall(r"REG:(\d+) STACK:(\d+)", told)
    return int(registers), int(stack)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", type=int, nargs="+", default=[75, 80, 86, 90])
    options = parser.parse_args()
    print(f"{date.today()}, triton {triton.__version__}: registers / bytes of stack by compute capability")
    print(
        f"{'kernel, rows of the batch':<26}" + "".join(f"{capability / 10:>10}" for capability in options.capabilities)
    )
    for name, kernel, constants, num_warps in variants():
        cells = []
        for capability in options.capabilities:
            if capability < 80 and name.endswith(f" {kernels.TILE_TOKENS}"):
                cells.append("-")
                continue
            compiled = compile_kernel(kernel, constants, num_warps, capability)
            registers, stack = registers_and_stack(compiled.asm["cubin"])
            cells.append(f"{registers} / {stack}")
        print(f"{name:<26}" + "".join(f"{cell:>10}" for cell in cells), flush=True)
