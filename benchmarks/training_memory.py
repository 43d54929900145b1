"""Memory of 3D-parallel training: what `glm-hf plan --train` tells against the peak of real runs, on CPU processes.

    python benchmarks/training_memory.py

Every run trains two steps of a new model on 1 to 4 processes. Each process trains a tiny model first, so that what
libraries take is there before it begins to count; then the highest resident memory is read from the kernel. glibc
returns freed blocks at once, as the planner has it.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from glm_hf import GLMConfig
from glm_hf.sharding.degrees import ParallelDegrees
from glm_hf.training import DataCollatorForBlankInfilling, GLM3DTrainer, GLMTrainingArguments, InfillingRecipe

SPECIAL = ("pad", "eos", "mask", "gmask", "smask", "eod", "sop", "eop")
TINY = {"hidden": 64, "inner": 128, "layers": 4, "sequence": 64}
MEDIUM = {"hidden": 1024, "inner": 2736, "layers": 8, "sequence": 254}
WIDE = {"hidden": 1024, "inner": 2736, "layers": 6, "sequence": 510}
SLICED = {"tp_size": 2, "sequence_parallel": True}
RUNS: list[dict[str, Any]] = [
    {"parallel": {"pp_size": 2}, "micro_batch": 2, "rounds": 4, **MEDIUM},
    {"parallel": {"pp_size": 2}, "micro_batch": 2, "rounds": 4, "recompute": "full", **MEDIUM},
    {"parallel": {"tp_size": 2}, "micro_batch": 2, "rounds": 4, **MEDIUM},
    {"parallel": SLICED, "micro_batch": 2, "rounds": 4, **MEDIUM},
    {"parallel": SLICED, "micro_batch": 2, "rounds": 4, "recompute": "selective", **MEDIUM},
    {"parallel": SLICED, "micro_batch": 2, "rounds": 4, "recompute": "full", **MEDIUM},
    {"parallel": {"dp_size": 2}, "micro_batch": 2, "rounds": 4, **MEDIUM},
    {"parallel": {"pp_size": 2}, "micro_batch": 4, "rounds": 4, **WIDE},
    {"parallel": {"tp_size": 2, "pp_size": 2}, "micro_batch": 4, "rounds": 3, **WIDE},
    {"parallel": {"pp_size": 2}, "micro_batch": 2, "rounds": 4, "precision": "bf16", **MEDIUM},
    {"parallel": {"tp_size": 2}, "micro_batch": 2, "rounds": 4, "precision": "bf16", **MEDIUM},
    {"parallel": {"dp_size": 2}, "micro_batch": 2, "rounds": 4, "precision": "bf16", **MEDIUM},
    {"parallel": {"pp_size": 2}, "micro_batch": 4, "rounds": 4, "precision": "bf16", **WIDE},
]


class Texts(Dataset):
    """Random texts, each of which fills a row."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        """Return the number of texts."""
        return 64

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        """Return the tokens of a text."""
        rng = np.random.default_rng(number)
        return {"input_ids": rng.integers(30, 15000, self.length - 2).tolist()}  # sop and eop come to it


def config_of(run: dict[str, Any]) -> GLMConfig:
    """Return the model of a run."""
    return GLMConfig(
        vocab_size=16000,
        hidden_size=run["hidden"],
        intermediate_size=run["inner"],
        num_hidden_layers=run["layers"],
        num_attention_heads=16,
        **{f"{name}_token_id": number for number, name in enumerate(SPECIAL)},
    )


def train(run: dict[str, Any], folder: str) -> float:
    """Train two steps, and return the share of the tokens that were predicted."""
    config, parallel = config_of(run), ParallelDegrees.of(run["parallel"])
    args = GLMTrainingArguments(
        output_dir=folder,
        parallel=run["parallel"],
        max_steps=2,
        per_device_train_batch_size=run["micro_batch"],
        global_batch_size=run["micro_batch"] * run["rounds"] * parallel.dp_size,
        activation_checkpointing="recompute" in run,
        activation_checkpointing_kwargs={"recompute_granularity": run["recompute"]} if "recompute" in run else None,
        bf16=run.get("precision") == "bf16",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    recipe = InfillingRecipe(row_length=run["sequence"], window_length=run["sequence"], mask_probability=0.0)
    collator = DataCollatorForBlankInfilling(config, recipe, seed=3)
    trainer = GLM3DTrainer(config, args, collator, train_dataset=Texts(run["sequence"]))
    shares = []
    step = trainer.training_step

    def counted(model: Any, inputs: Any, num_items: Any = None) -> Any:
        shares.append(float(num_items) / (inputs["input_ids"].numel() * parallel.dp_size))
        return step(model, inputs, num_items)

    trainer.training_step = counted  # type: ignore[method-assign]
    trainer.train()
    return max(shares)


def resident(kind: str) -> int:
    """Return a line of the kernel's account of this process, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[kind].split()[0]) * 1024


def work(run: dict[str, Any]) -> None:
    """Measure a run in one of its processes, and print what was seen."""
    with tempfile.TemporaryDirectory() as folder:
        train(run | TINY, folder)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before = resident("VmRSS")
        share = train(run, folder)
    seen = {"rank": int(os.environ["RANK"]), "bytes": resident("VmHWM") - before, "share": share}
    print(f"\nSEEN {json.dumps(seen)}", flush=True)


def measure(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what every process of a run has seen."""
    size = ParallelDegrees.of(run["parallel"]).world_size
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), __file__]
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    settings |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, "--worker", json.dumps(run)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | settings,
    )
    seen = [json.loads(line.removeprefix("SEEN ")) for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    assert len(seen) == size, done.stderr[-2000:]
    return sorted(seen, key=lambda one: one["rank"])


def planned(run: dict[str, Any], share: float) -> list[int]:
    """Return the bytes of a GPU of every stage that the planner tells."""
    with tempfile.TemporaryDirectory() as folder:
        config_of(run).save_pretrained(folder)
        parallel = ParallelDegrees.of(run["parallel"])
        options = {
            "tensor": parallel.tp_size,
            "pipeline": parallel.pp_size,
            "data": parallel.dp_size,
            "micro-batch": run["micro_batch"],
            "global-batch": run["micro_batch"] * run["rounds"] * parallel.dp_size,
            "sequence": run["sequence"],
            "precision": run.get("precision", "fp32"),
            "target-share": share,
            "reserve": "0GiB",
        }
        command = [sys.executable, "-m", "glm_hf.cli", "plan", "--train", folder, "--json"]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        command += ["--recompute", run.get("recompute", "none")]
        command += ["--sequence-parallel"] if parallel.sequence_parallel else []
        plan = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return [stage["total"] for stage in plan["stages"]]


def main() -> None:
    """Print a table of planned and measured bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(json.loads(options.worker))
        return
    print(f"{'parallel':36}layers  micro x length  precision  recompute   stage  planned  measured  ratio")
    for run in RUNS:
        seen, parallel = measure(run), ParallelDegrees.of(run["parallel"])
        plan = planned(run, max(one["share"] for one in seen))
        for stage, total in enumerate(plan):
            peak = max(one["bytes"] for one in seen if parallel.coordinates(one["rank"])[0] == stage)
            sliced = ", slices" if parallel.sequence_parallel else ""
            print(
                f"{parallel.describe() + sliced:38}{run['layers']:>4}  {run['micro_batch']:>3} x {run['sequence']:<6}"
                f"{run.get('precision', 'fp32'):>6}  {run.get('recompute', 'none'):10}  {stage:>3}  "
                f"{total / 2**20:6.0f} MiB {peak / 2**20:6.0f} MiB  {total / peak:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
