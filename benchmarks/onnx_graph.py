"""Tokens per second of an exported graph in onnxruntime, beside the torch model, eager and compiled.

All ways live in one process and take turns; every figure is a median over the rounds. Columns: `prefill` tokens of a
context of 256 that are read per second, and `decode` tokens per second that are added to it one by one, each by 1 and
by 2 threads. The compiled model decodes over a cache of fixed size, as compilers need it. INT4 has one scale per row
and a plain LM head; `torch int4` is this package's own kernels, with bias, onnxruntime's is MatMulNBits in fp32.
Run: make bench-onnx (some minutes, 3 GB of memory and 1 GB of disk)
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import onnxruntime
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from glm_hf import GLMConfig, GLMForBlankInfilling, GLMQuantizationConfig
from glm_hf.onnx import ORTGLMForBlankInfilling, export_onnx
from glm_hf.versions_glm import CACHE

SIZES = {"hidden_size": 1024, "intermediate_size": 2736, "num_attention_heads": 16, "vocab_size": 16384}
SPECIAL = ("eos", "mask", "gmask", "smask", "eod", "sop", "eop")
PROMPT, NEW = 256, 24
KINDS = ("torch eager", "torch compiled", "onnxruntime", "torch int4", "onnxruntime int4")
BASES = {kind: "torch int4" if kind.endswith("int4") else "torch eager" for kind in KINDS}


def write_models(folder: Path, num_layers: int) -> None:
    """Write a random model and its graphs."""
    special = {f"{name}_token_id": SIZES["vocab_size"] - 16 + index for index, name in enumerate(SPECIAL)}
    model = GLMForBlankInfilling(GLMConfig(num_hidden_layers=num_layers, **SIZES, **special))
    model.save_pretrained(folder / "torch")
    export_onnx(folder / "torch", folder / "onnxruntime")
    export_onnx(folder / "torch", folder / "onnxruntime int4", quantization="int4")


def load(kind: str, folder: Path) -> Callable:
    """Return what computes, with as many threads as torch has now."""
    if kind.startswith("onnxruntime"):
        return ORTGLMForBlankInfilling.from_pretrained(folder / kind)
    options = {"quantization_config": GLMQuantizationConfig(bits=4)} if kind == "torch int4" else {}
    model = GLMForBlankInfilling.from_pretrained(folder / "torch", dtype=torch.float32, **options).eval()
    return torch.compile(model, fullgraph=True) if kind == "torch compiled" else model


def new_cache(kind: str, config: GLMConfig) -> Cache:
    """Return an empty cache with room for all tokens."""
    if kind != "torch compiled":
        return DynamicCache(config=config)
    cache = StaticCache(config=config, max_cache_len=PROMPT + NEW)
    cache.early_initialization(1, config.num_attention_heads, config.head_dim, torch.float32, torch.device("cpu"))
    return cache


@torch.no_grad()
def measure(kind: str, model: Callable, config: GLMConfig) -> tuple[float, float]:
    """Return the tokens per second of prefill and of decoding."""
    ids = torch.randint(1, SIZES["vocab_size"] - 16, (1, PROMPT))
    ids[0, -2:] = torch.tensor([config.gmask_token_id, config.sop_token_id])
    mask = torch.zeros(1, PROMPT + NEW, dtype=torch.long)
    mask[:, :PROMPT] = 1
    cache, times = new_cache(kind, config), []
    start = time.perf_counter()
    outputs = model(ids, attention_mask=mask[:, :PROMPT], logits_to_keep=1, **{CACHE: cache})
    prefill = time.perf_counter() - start
    for index in range(NEW):
        mask[:, PROMPT + index] = 1
        start = time.perf_counter()
        token = outputs.logits[:, -1].argmax(-1, keepdim=True)
        seen = mask if kind == "torch compiled" else mask[:, : PROMPT + index + 1]
        outputs = model(token, attention_mask=seen, **{CACHE: cache})
        times.append(time.perf_counter() - start)
    return PROMPT / prefill, 1 / statistics.median(times)


def results_of(folder: Path, num_threads: int, num_rounds: int) -> Iterator[tuple[str, float, float]]:
    """Yield every kind with its medians of tokens per second."""
    torch.set_num_threads(num_threads)
    torch.compiler.reset()
    models = {kind: load(kind, folder) for kind in KINDS}
    config = models["torch eager"].config
    for kind, model in models.items():
        measure(kind, model, config)  # compiles, and lets libraries allocate
    found = {kind: [] for kind in KINDS}
    for _ in range(num_rounds):
        for kind, model in models.items():
            found[kind].append(measure(kind, model, config))
    for kind, rounds in found.items():
        yield kind, *map(statistics.median, zip(*rounds, strict=True))


def main() -> None:
    """Measure all ways and print a table."""
    parser = argparse.ArgumentParser(description="Time an exported graph beside the torch model.")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), options.layers)
        print(
            f"{options.layers} layers of {SIZES['hidden_size']}, torch {torch.__version__}, onnxruntime "
            f"{onnxruntime.__version__}, {platform.processor() or platform.machine()}, {date.today()}"
        )
        print(f"{'':<18}{'threads':>8}{'prefill':>10}{'ratio':>8}{'decode':>10}{'ratio':>8}")
        for num_threads in (1, 2):
            results = {kind: figures for kind, *figures in results_of(Path(folder), num_threads, options.rounds)}
            for kind, (prefill, decode) in results.items():
                base = results[BASES[kind]]
                ratios = prefill / base[0], decode / base[1]
                print(f"{kind:<18}{num_threads:>8}{prefill:>10.0f}{ratios[0]:>8.2f}{decode:>10.1f}{ratios[1]:>8.2f}")


if __name__ == "__main__":
    main()
