"""Tokens per second and peak memory of generation with INT4, INT8 and bf16 weights, on a model too big for the caches.

Every model lives in a process of its own, loaded from a folder; the processes take turns to generate, so that the rest
of the machine disturbs all alike. Memory is the peak of resident memory, the interpreter's own included.
Run: make bench-decode (some minutes, 12 GB of memory and 6 GB of disk)
"""

import argparse
import multiprocessing
import platform
import re
import statistics
import tempfile
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from forward import Stopwatch

from glm_hf import GLMConfig, GLMForBlankInfilling, GLMQuantizationConfig

HIDDEN, INNER, HEADS, VOCAB = 2048, 5504, 16, 32768
SPECIAL = ("eos", "mask", "gmask", "smask", "eod", "sop", "eop")
PROMPT, NEW_TOKENS = 64, 17
KINDS = {"bf16": None, "int8": 8, "int4": 4}


def write_models(folder: Path, num_layers: int) -> None:
    """Write a random model in bf16, and quantized."""
    special = {f"{name}_token_id": VOCAB - 16 + index for index, name in enumerate(SPECIAL)}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS, "vocab_size": VOCAB}
    torch.set_default_dtype(torch.bfloat16)
    model = GLMForBlankInfilling(GLMConfig(num_hidden_layers=num_layers, **sizes, **special))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "bf16")
    for kind, bits in KINDS.items():
        if bits:
            config = GLMQuantizationConfig(bits=bits)
            model = GLMForBlankInfilling.from_pretrained(folder / "bf16", quantization_config=config)
            model.save_pretrained(folder / kind)


def serve(folder: Path, threads: int, pipe: Connection) -> None:
    """Answer each request with the median seconds per generated token, and the last with the peak of memory."""
    torch.set_num_threads(threads)
    model = GLMForBlankInfilling.from_pretrained(folder, dtype=torch.bfloat16)
    input_ids = torch.arange(1, PROMPT + 1)[None]
    input_ids[0, -2:] = torch.tensor([model.config.gmask_token_id, model.config.sop_token_id])
    pipe.send(sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()))
    while pipe.recv():
        watch = Stopwatch()
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, stopping_criteria=[watch])
        pipe.send(statistics.median(b - a for a, b in zip(watch.times, watch.times[1:], strict=False)))
    [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    pipe.send(int(peak) * 1024)


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Print one row per kind of weights."""
    context = multiprocessing.get_context("spawn")
    pipes, weights = {}, {}
    for kind in KINDS:
        pipes[kind], other = context.Pipe()
        context.Process(target=serve, args=(folder / kind, options.threads, other)).start()
        weights[kind] = pipes[kind].recv()
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(options.rounds + 1):
        for kind, pipe in pipes.items():
            pipe.send(True)
            times[kind].append(pipe.recv())
    print(f"{'':<6} {'tokens/s':>9} {'to bf16':>8} {'weights GB':>11} {'peak GB':>8}")
    for kind, pipe in pipes.items():
        pipe.send(False)
        ratio = statistics.median(dense / own for dense, own in zip(times["bf16"][1:], times[kind][1:], strict=True))
        rate = 1 / statistics.median(times[kind][1:])
        print(f"{kind:<6} {rate:>9.2f} {ratio:>8.2f} {weights[kind] / 1e9:>11.2f} {pipe.recv() / 1e9:>8.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        writer = multiprocessing.get_context("spawn").Process(target=write_models, args=(Path(folder), options.layers))
        writer.start()
        writer.join()
        num_parameters = options.layers * (4 * HIDDEN**2 + 3 * HIDDEN * INNER) + VOCAB * HIDDEN
        about = f"{num_parameters / 1e9:.2f} B parameters, {options.threads} threads, median of {options.rounds}"
        print(f"{date.today()}, {platform.machine()}, torch {torch.__version__}: {about}")
        compare(Path(folder), options)
