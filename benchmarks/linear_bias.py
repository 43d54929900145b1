"""What a bias costs a quantized linear layer on the CPU, for each instruction set that this CPU has: time with it over
time without, which take turns; medians over the rounds.

Columns: numbers of tokens and threads. Rows: bits, dtype of activations and bias, shape.
Run: make bench-bias
"""

import argparse
import statistics
import time
from datetime import date

import torch
from decode import processor

from glm_hf.quantization.kernels_cpu import KernelLibrary, kernel_library

SHAPES = [(36864, 12288), (12288, 12288), (6144, 2048), (512, 256)]
TOKENS = (1, 16, 256)
MOST_PRODUCTS = 2**31
"""Weights times tokens, beyond which fewer rows of a weight stand for all."""

LEVELS = {1: "AVX2", 2: "AVX-512", 3: "AVX-512 VNNI"}


def ratio(library: KernelLibrary, level: int, bits: int, x: torch.Tensor, num_rows: int, rounds: int) -> float:
    """Return the median of time with a bias over time without."""
    dtype = torch.uint8 if bits == 4 else torch.int8
    weight = torch.randint(0, 100, (num_rows, x.shape[1] * bits // 8), dtype=dtype)
    scale, bias = torch.full((num_rows, 1), 0.01).half(), torch.ones(num_rows, dtype=x.dtype)
    repeats = max(1, 2**22 // (num_rows * x.shape[1]))
    pairs = []
    for _ in range(rounds + 1):
        seconds = []
        for added in (bias, None):
            start = time.perf_counter()
            for _ in range(repeats):
                library.linear(x, weight, scale, bits, added, level)
            seconds.append(time.perf_counter() - start)
        pairs.append(seconds[0] / seconds[1])
    return statistics.median(pairs[1:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    library = kernel_library()
    assert library is not None, "the C kernels were not built"
    print(
        f"{date.today()}, {processor()}, torch {torch.__version__}: with a bias / without, median of {options.rounds}"
    )
    columns = [(tokens, threads) for tokens in TOKENS for threads in options.threads]
    largest = 0.0
    for level in range(1, library.level + 1):
        print(f"{LEVELS[level]:<38}" + "".join(f" {f'M={m} x{threads}':>9}" for m, threads in columns))
        for bits in (4, 8):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                for num_rows, num_columns in SHAPES:
                    found = []
                    for num_tokens, threads in columns:
                        torch.set_num_threads(threads)
                        rows = min(num_rows, max(512, MOST_PRODUCTS // (num_columns * num_tokens)))
                        x = torch.randn(num_tokens, num_columns).to(dtype)
                        found.append(ratio(library, level, bits, x, rows, options.rounds))
                    largest = max(largest, *found)
                    name = f"INT{bits} {str(dtype).removeprefix('torch.')} {num_rows} x {num_columns}"
                    print(f"  {name:<36}" + "".join(f" {value:>9.3f}" for value in found), flush=True)
    print(f"largest: {largest:.3f}")
