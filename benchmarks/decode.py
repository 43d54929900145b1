"""Tokens per second of whole models with INT4, INT8 and bf16 weights, beside llama.cpp and a plain read of weights.

Every model lives in a process of its own, loaded from a folder; all take turns, so that the rest of the machine
disturbs them alike, and every figure is a median over the rounds. Columns: `decode 1, 8, 32` tokens that `generate`
adds to as many texts at once, per second; `prefill` tokens of a text of 512 that are read per second; each by 1 and 2
threads. `read` adds up as many bytes as the last model has, once for every token: the limit of `decode 1`. `int4` has
a bf16 LM head, `int4+head` one of INT8, as llama.cpp's Q4_0 model has here; all linears have biases.
Run: make bench-decode LLAMA=folder of llama-bench (some minutes, 12 GB of memory and 7 GB of disk)
"""

import argparse
import multiprocessing
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from forward import Stopwatch
from llama_peer import tokens_per_second, write_gguf

from glm_hf import GLMConfig, GLMForBlankInfilling, GLMQuantizationConfig
from glm_hf.quantization.kernels_cpu import kernel_library

HIDDEN, INNER, HEADS, VOCAB = 2048, 5504, 16, 32768
SPECIAL = ("eos", "mask", "gmask", "smask", "eod", "sop", "eop")
KINDS = {
    "bf16": None,
    "int8": GLMQuantizationConfig(bits=8),
    "int4": GLMQuantizationConfig(bits=4),
    "int4+head": GLMQuantizationConfig(bits=4, quantize_embeddings=True),
}
MEASURES = {"decode 1": (1, 64, 16), "decode 8": (8, 16, 8), "decode 32": (32, 16, 8), "prefill": (1, 512, 0)}
"""Rows of the batch, tokens of each text, tokens to generate."""

PEER = "llama.cpp"


def write_models(folder: Path, num_layers: int) -> None:
    """Write a random model in bf16, and quantized."""
    special = {f"{name}_token_id": VOCAB - 16 + index for index, name in enumerate(SPECIAL)}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS, "vocab_size": VOCAB}
    torch.set_default_dtype(torch.bfloat16)
    model = GLMForBlankInfilling(GLMConfig(num_hidden_layers=num_layers, **sizes, **special))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "bf16")
    for kind, config in KINDS.items():
        if config:
            model = GLMForBlankInfilling.from_pretrained(folder / "bf16", quantization_config=config)
            model.save_pretrained(folder / kind)


def measure(model: GLMForBlankInfilling, batch: int, prompt: int, new: int) -> float:
    """Return the tokens per second of one run."""
    input_ids = torch.arange(1, prompt + 1).repeat(batch, 1)
    input_ids[:, -2:] = torch.tensor([model.config.gmask_token_id, model.config.sop_token_id])
    if not new:
        start = time.perf_counter()
        with torch.no_grad():
            model(input_ids, logits_to_keep=1, use_cache=True)
        return prompt / (time.perf_counter() - start)
    watch = Stopwatch()
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    model.generate(**inputs, max_new_tokens=new + 1, do_sample=False, stopping_criteria=[watch])
    return batch / statistics.median(b - a for a, b in zip(watch.times, watch.times[1:], strict=False))


def serve(folder: Path, only_avx2: bool, pipe: Connection) -> None:
    """Tell the bytes of the weights, answer requests with tokens per second, and the last with the peak of memory."""
    library = kernel_library()
    if only_avx2 and library is not None:
        library.level, library.multiplies_bfloat16 = 1, False
    model = GLMForBlankInfilling.from_pretrained(folder, dtype=torch.bfloat16)
    pipe.send(sum(parameter.nelement() * parameter.element_size() for parameter in model.parameters()))
    while request := pipe.recv():
        name, threads = request
        torch.set_num_threads(threads)
        pipe.send(measure(model, *MEASURES[name]))
    [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    pipe.send(int(peak) * 1024)


def reads_per_second(data: torch.Tensor, threads: int) -> float:
    """Return how often per second all of `data` can be added up."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    data.sum()
    return 1 / (time.perf_counter() - start)


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Print a table with one row per kind of weights, and what it says of INT4."""
    context = multiprocessing.get_context("spawn")
    pipes, weights = {}, {}
    for kind in options.kinds:
        pipes[kind], other = context.Pipe()
        context.Process(target=serve, args=(folder / kind, options.avx2, other)).start()
        weights[kind] = pipes[kind].recv()
    data = torch.ones(weights[options.kinds[-1]] // 8, dtype=torch.int64)

    def ask(kind: str) -> Callable[[str, int], float]:
        def answer(name: str, threads: int) -> float:
            pipes[kind].send((name, threads))
            return pipes[kind].recv()

        return answer

    run: dict[str, Callable[[str, int], float]] = {kind: ask(kind) for kind in options.kinds}
    if options.llama:
        run[PEER] = lambda name, threads: tokens_per_second(
            options.llama, folder / "model.gguf", *MEASURES[name], threads
        )
    columns = [(name, threads) for name in options.measures for threads in options.threads]
    rates: dict[tuple, dict[str, list[float]]] = {}
    for name, threads in columns:
        found: dict[str, list[float]] = {kind: [] for kind in (*run, "read")}
        for _ in range(options.rounds + 1):
            for kind, function in run.items():
                found[kind].append(function(name, threads))
            if name == "decode 1":
                found["read"].append(reads_per_second(data, threads))
        rates[name, threads] = {kind: values[1:] for kind, values in found.items()}
    print(f"{'':<10}" + "".join(f" {f'{name} x{threads}':>13}" for name, threads in columns) + "  weights   peak GB")
    for kind in (*run, "read"):
        cells = [f"{statistics.median(found[kind]):.1f}" if found[kind] else "" for found in rates.values()]
        sizes = ""
        if kind in pipes:
            pipes[kind].send(None)
            sizes = f"{weights[kind] / 1e9:>9.2f} {pipes[kind].recv() / 1e9:>9.2f}"
        print(f"{kind:<10}" + "".join(f" {cell:>13}" for cell in cells) + sizes)
    ours = options.kinds[-1]
    for peer in (PEER, "read"):
        if peer == "read" or options.llama:
            cells = [quotient(found[ours], found[peer]) for found in rates.values()]
            print(f"{ours} / {peer}:".ljust(10) + "".join(f" {cell:>13}" for cell in cells))


def quotient(ours: list[float], theirs: list[float]) -> str:
    """Return the median quotient of figures of the same rounds."""
    return f"{statistics.median(own / other for own, other in zip(ours, theirs, strict=True)):.2f}" if theirs else ""


def processor() -> str:
    """Return the name of the processor and its instruction sets that matter here."""
    text = Path("/proc/cpuinfo").read_text()
    [name, *_] = re.findall(r"model name\s*: (.*)", text) or [platform.machine()]
    sets = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16") if f" {name}" in text]
    return f"{name} ({', '.join(sets)})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="the last is compared")
    parser.add_argument("--llama", type=Path, help="folder of llama-bench, llama-batched-bench and their libraries")
    parser.add_argument(
        "--avx2", action="store_true", help="use no wider instructions; llama.cpp must be built so, too"
    )
    options = parser.parse_args()
    if options.avx2:
        os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}  # for the processes to come
    with tempfile.TemporaryDirectory() as folder:
        writer = multiprocessing.get_context("spawn").Process(target=write_models, args=(Path(folder), options.layers))
        writer.start()
        writer.join()
        if options.llama:
            write_gguf(Path(folder, "model.gguf"), HIDDEN, INNER, HEADS, VOCAB, options.layers)
        num_parameters = options.layers * (4 * HIDDEN**2 + 3 * HIDDEN * INNER) + VOCAB * HIDDEN
        print(f"{date.today()}, {processor()}{', AVX2 only' * options.avx2}, torch {torch.__version__}: ", end="")
        print(f"{num_parameters / 1e9:.2f} B parameters, tokens/s, median of {options.rounds}")
        compare(Path(folder), options)
