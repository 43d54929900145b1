"""Training data at the scale of a cluster: opening, resuming and reading a plan of 200 million rows.

`plan` makes 20 corpora whose files have the size of 200 million rows in all, without taking the room of them on the
disk, with weights, a ramp of the instructions, a ramp of the batch and skipped ranges. Some are joined, some stay
apart, some are instructions. `open` opens the corpora, as `glm-hf train` does; `plan` makes the data set; `resume`
goes to a step and reads its samples. Memory is what the process has taken beyond what it had after its imports.

Run: make bench-data-scale
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import xxhash

from glm_hf.training import BlankInfillingDataset, InfillingRecipe
from glm_hf.training.data.sampler import StepSampler
from glm_hf.training.data.token_file import BLOCK_BYTES, BOUNDARIES_FILE, FACTS_FILE, TOKENS_FILE, open_token_file
from glm_hf.training.schedules import BatchSchedule, PiecewiseLinear, parse_ranges

RECIPE = InfillingRecipe()
VOCAB_SIZE = 150_528
RESUME_GOAL, MEMORY_GOAL = 10, 200  # seconds, MB
DOCUMENT = 1000  # tokens


def write_corpus(folder: Path, num_tokens: int, kind: str) -> None:
    """Write a corpus of zeros, of which a file system stores that there is nothing."""
    folder.mkdir(parents=True)
    num_parts = num_tokens // DOCUMENT
    with (folder / TOKENS_FILE).open("wb") as file:
        file.truncate(4 * num_parts * DOCUMENT)
    boundaries = np.lib.format.open_memmap(folder / BOUNDARIES_FILE, "w+", np.int64, (num_parts // 2 * 2 + 1,))
    for first in range(0, len(boundaries), 1 << 20):
        boundaries[first : first + (1 << 20)] = np.arange(first, min(first + (1 << 20), len(boundaries))) * DOCUMENT
    boundaries.flush()
    num_tokens = int(boundaries[-1])
    with (folder / TOKENS_FILE).open("r+b") as file:
        file.truncate(4 * num_tokens)
    content = (folder / BOUNDARIES_FILE).read_bytes()
    blocks = [content[first : first + BLOCK_BYTES] for first in range(0, len(content), BLOCK_BYTES)]
    full, rest = divmod(4 * num_tokens, BLOCK_BYTES)
    zeros = [xxhash.xxh3_64_hexdigest(bytes(BLOCK_BYTES))] * full
    zeros += [xxhash.xxh3_64_hexdigest(bytes(rest))] * (rest > 0)
    facts = {"format": 2, "kind": kind, "source": folder.name, "dtype": "<i4", "num_tokens": num_tokens}
    facts |= {"vocab_size": VOCAB_SIZE, "block_bytes": BLOCK_BYTES}
    facts["xxh3_64"] = {TOKENS_FILE: zeros, BOUNDARIES_FILE: [xxhash.xxh3_64_hexdigest(block) for block in blocks]}
    (folder / FACTS_FILE).write_text(json.dumps(facts))


def taken() -> float:
    """Return the most memory that the process has had, in MB; `ru_maxrss` begins with that of the process before."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1000


def measure_plan(folder: Path, rows: int, joined: bool, batch: int) -> dict[str, float]:
    """Open all corpora and resume at three steps, in a process of its own; return seconds and MB."""
    base, begin = taken(), time.perf_counter()
    corpora = [open_token_file(path) for path in sorted(folder.iterdir())]
    found = {"open": time.perf_counter() - begin}
    begin = time.perf_counter()
    ramp = PiecewiseLinear(((0, 0.0), (rows // 2, 0.05), (rows // 2, 0.1), (rows, 0.2)))
    dataset = BlankInfillingDataset(
        corpora,
        RECIPE,
        weights=[1 + number % 7 for number in range(len(corpora))],
        join_documents=[joined or number % 2 == 0 for number in range(len(corpora))],
        instruction_share=ramp,
    )
    sizes = BatchSchedule(rows, batch, batch // 16, 0.025 * rows).batch_sizes()
    skipped = parse_ranges([f"{n}-{n + 5}" for n in range(1, len(sizes) // 2, len(sizes) // 40)], sizes.cumsum())
    dataset[0]
    found["plan"] = time.perf_counter() - begin
    for share in (0.1, 0.5, 0.999):
        begin = time.perf_counter()
        step = int(share * len(sizes))
        samples = next(islice(StepSampler(sizes, skipped, 3, 4), step, None))
        assert [dataset[number].sample_id for number in samples] == list(samples)
        found[f"resume at {share:.1%}"] = time.perf_counter() - begin
    return found | {"steps": len(sizes), "MB": taken() - base}


def compare_plans(rows: int, rounds: int) -> None:
    """Print seconds and memory of processes that begin or resume in the middle of a run."""
    with tempfile.TemporaryDirectory() as name:
        per_corpus = rows * RECIPE.row_length // 20
        for number in range(20):
            kind = "instructions" if number >= 16 else "text"
            write_corpus(Path(name) / f"{number:02}", per_corpus // (100 if kind == "instructions" else 1), kind)
        print(f"\nplan: {rows / 1e6:.0f} M rows of 20 corpora, 4 of them instructions; seconds, goal {RESUME_GOAL}")
        print(f"{'documents':<34}{'open':>8}{'plan':>8}{'10%':>8}{'50%':>8}{'99.9%':>8}{'steps':>12}{'MB':>6}")
        for joined in (True, False):
            for batch in (4224, 192):
                command = [sys.executable, __file__, "--plan-of", name, "--batch", str(batch), "--rows", str(rows)]
                command += ["--joined"] if joined else []
                results = [json.loads(subprocess.check_output(command, text=True)) for _ in range(rounds)]
                found = {key: statistics.median(result[key] for result in results) for key in results[0]}
                *seconds, steps, memory = found.values()
                label = "all joined" if joined else "8 of 20 corpora apart"
                print(
                    f"{label + f', batch {batch}':<34}"
                    + "".join(f"{each:8.2f}" for each in seconds)
                    + f"{steps:12,.0f}{memory:6.0f}"
                )


def main() -> None:
    """Measure all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=200_000_000)
    parser.add_argument("--plan-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--joined", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan_of:
        print(json.dumps(measure_plan(options.plan_of, options.rows, options.joined, options.batch)))
        return
    print(f"{date.today()}, {platform.machine()}, torch {torch.__version__}, median of {options.rounds}")
    compare_plans(options.rows, options.rounds)


if __name__ == "__main__":
    main()
