"""Time and memory of a conversion beside `cp` of the same bytes, on a synthetic checkpoint with GLM-130B's shapes.

Prints a table: every row is the median of some rounds, in which all commands take turns; files written before are
removed, and the disk is waited for, between them. Memory is the peak of resident memory over what a process has that
has only imported the package. Run with `make bench-conversion`; it takes two minutes and 30 GB of disk.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

TP_SIZE = 8
HIDDEN, INNER, VOCAB = 12288, 32768, 150528
# Resident memory now and at its peak so far, as Linux reports them
BEFORE = """
import re, time
from glm_hf.conversion import *
def resident(kind):
    return int(re.search(kind + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024 / 1e6
before, start = resident("VmRSS"), time.time()
"""
AFTER = """
print(time.time() - start, resident("VmHWM") - before)
"""


def write_checkpoint(folder: Path, num_layers: int) -> None:
    """Write random fp16 weights of 130B's shapes as the files of 8 ranks."""
    shapes = {"word_embeddings.weight": (VOCAB // TP_SIZE, HIDDEN)}
    for layer in range(num_layers):
        prefix = f"layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{prefix}{norm}.{kind}": (HIDDEN,) for kind in ("weight", "bias")}
        shapes |= {
            f"{prefix}attention.query_key_value.weight": (3 * HIDDEN // TP_SIZE, HIDDEN),
            f"{prefix}attention.query_key_value.bias": (3 * HIDDEN // TP_SIZE,),
            f"{prefix}attention.dense.weight": (HIDDEN, HIDDEN // TP_SIZE),
            f"{prefix}attention.dense.bias": (HIDDEN,),
            f"{prefix}mlp.dense_h_to_4h.weight": (2 * INNER // TP_SIZE, HIDDEN),
            f"{prefix}mlp.dense_h_to_4h.bias": (2 * INNER // TP_SIZE,),
            f"{prefix}mlp.dense_4h_to_h.weight": (HIDDEN, INNER // TP_SIZE),
            f"{prefix}mlp.dense_4h_to_h.bias": (HIDDEN,),
        }
    shapes |= {f"final_layernorm.{kind}": (HIDDEN,) for kind in ("weight", "bias")}
    (folder / "49300").mkdir(parents=True)
    (folder / "latest").write_text("49300")
    for rank in range(TP_SIZE):
        module = {}
        for number, (name, shape) in enumerate(shapes.items()):
            is_cut = len(shape) == 2 or "query_key_value" in name or "h_to_4h" in name
            generator = torch.Generator().manual_seed(number * TP_SIZE + rank * is_cut)
            module[f"transformer.{name}"] = torch.randn(shape, generator=generator).mul_(0.02).half()
        torch.save({"module": module}, folder / "49300" / f"mp_rank_{rank:02d}_model_states.pt")


def run_python(code: str) -> tuple[float, float]:
    """Run code in a process of its own; return seconds after its imports, and the MB that it peaked at over them."""
    done = subprocess.run([sys.executable, "-c", BEFORE + code + AFTER], check=True, stdout=subprocess.PIPE, text=True)
    seconds, megabytes = done.stdout.split()[-2:]
    return float(seconds), float(megabytes)


def copy(src: Path, dst: Path) -> tuple[float, float]:
    """Copy a folder with `cp` and wait for the disk; return seconds, and no memory."""
    start = time.time()
    subprocess.run(f"cp -r {src} {dst} && find {dst} -type f -exec sync {{}} +", shell=True, check=True)
    return time.time() - start, float("nan")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1, help="layers of 3.6 GB beside the embedding of 3.7 GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        measure(Path(name), options.layers, options.rounds)


def measure(folder: Path, num_layers: int, num_rounds: int) -> None:
    """Run all commands in turns."""
    sat, hf, out = folder / "sat", folder / "hf", folder / "out"
    write_checkpoint(sat, num_layers)
    arguments = "config={'num_attention_heads': 96}"
    run_python(f"convert_sat_checkpoint({str(sat)!r}, {str(hf)!r}, {arguments})")
    size = sum(path.stat().st_size for path in sat.rglob("*") if path.is_file())
    commands: dict[str, Callable[[], tuple[float, float]]] = {
        "cp + fsync": lambda: copy(sat, out),
        "convert": lambda: run_python(f"convert_sat_checkpoint({str(sat)!r}, {str(out)!r}, {arguments})"),
        "convert to int8": lambda: run_python(
            f"convert_sat_checkpoint({str(sat)!r}, {str(out)!r}, {arguments}, quantization='int8')"
        ),
        "convert to int4": lambda: run_python(
            f"convert_sat_checkpoint({str(sat)!r}, {str(out)!r}, {arguments}, quantization='int4')"
        ),
        "export to 8 ranks": lambda: run_python(f"export_sat_checkpoint({str(hf)!r}, {str(out)!r}, tp_size=8)"),
        "reshard 8 to 4": lambda: run_python(f"reshard_sat_checkpoint({str(sat)!r}, {str(out)!r}, tp_size=4)"),
        "verify download": lambda: run_python(f"assert not verify_checkpoint({str(sat)!r}).problems"),
        "verify both": lambda: run_python(f"assert not verify_checkpoint({str(sat)!r}, {str(hf)!r}).problems"),
    }
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(num_rounds):
        for name, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            results[name].append(command())
    shutil.rmtree(out, ignore_errors=True)
    print(
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}: "
        f"{size / 1e9:.2f} GB in {TP_SIZE} ranks, largest tensor {2 * VOCAB * HIDDEN / 1e6:,.0f} MB, "
        f"median of {num_rounds}"
    )
    print(f"{'':18}{'seconds':>9}{'MB/s':>8}{'ratio':>8}{'peak MB':>9}")
    for name, runs in results.items():
        seconds = statistics.median(seconds for seconds, _ in runs)
        ratio = statistics.median(run[0] / cp[0] for run, cp in zip(runs, results["cp + fsync"], strict=True))
        print(f"{name:18}{seconds:9.2f}{size / seconds / 1e6:8.0f}{ratio:8.2f}{max(peak for _, peak in runs):9.0f}")


if __name__ == "__main__":
    main()
