"""Checkpoints of 3D-parallel training: DeepSpeed's, from which a run resumes with any degrees of parallelism.

Layout of a checkpoint, besides what the trainer adds:
    config.json        the model
    adapter_*          the adapter that was trained, if one was, as PEFT saves it; then layer_* hold nothing else
    parallel.json      the degrees it was saved with
    latest             the name of the folder of DeepSpeed's files:
    global_stepN/      layer_*: weights, a file per part of the model and tensor-parallel rank, in the training's dtype
                       mp_rank_*: the engine's state; *_optim_states.pt: fp32 weights and moments, sharded by ZeRO
    global_stepN_universal/   the same unsharded, made when a run with other degrees resumes from here

Files are read as tensors and a short list of plain types; a file that would run code is refused.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from glm_hf.configuration_glm import GLMConfig
from glm_hf.folders.atomic import AtomicFolder
from glm_hf.folders.checksums import find_damage, write_checksums
from glm_hf.folders.plain_types import only_plain_types
from glm_hf.folders.validation import read_json, require_files
from glm_hf.sharding.degrees import ParallelDegrees
from glm_hf.sharding.rules import GATED, REPLICATED, ROW, SHARD_RULES, ShardRule, shard_rule
from glm_hf.training.pipeline.lora import CONFIG_FILE, LoRAPlan, layer_of, save_adapter

PARALLEL_FILE = "parallel.json"
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
LONGEST_CONVERSION = timedelta(days=2)


def save_engine(engine: Any, folder: Path, step: int) -> None:
    """Write a checkpoint to a folder that all processes share; all of them call this."""
    pipeline = engine.module
    pipeline.universal_checkpoint_info = universal_info(pipeline)
    has_adapter = pipeline.adapter is not None
    engine.save_checkpoint(str(folder), tag=f"global_step{step}", exclude_frozen_parameters=has_adapter)
    if has_adapter:
        save_adapter(pipeline, folder)
    if dist.get_rank() == 0:
        pipeline.config.dtype = pipeline.dtype
        pipeline.config.save_pretrained(folder)
        (folder / PARALLEL_FILE).write_text(json.dumps(asdict(pipeline.parallel)) + "\n")
        for script in folder.glob("zero_to_*.py"):
            script.unlink()  # which DeepSpeed adds, and which knows nothing of pipelines


def require_own(folder: Path, config: GLMConfig, adapter: LoRAPlan | None = None) -> None:
    """
    Check that a folder holds a checkpoint of 3D-parallel training of a model, or of an adapter of it.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it holds something else, or the checkpoint of another model or adapter.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {folder}")
    if not (folder / PARALLEL_FILE).is_file():
        raise ValueError(
            f"{folder} is no checkpoint of 3D-parallel training; to begin with its weights, give it as the model"
        )
    require_files(folder, ("config.json", "latest"))
    saved = GLMConfig.from_dict(read_json(folder / "config.json"))
    for name in (*SIZES, "tie_word_embeddings"):
        there, here = getattr(saved, name), getattr(config, name)
        if there != here:
            raise ValueError(f"{folder} is of another model: its {name} is {there}, but here it is {here}")
    has_adapter = (folder / CONFIG_FILE).is_file()
    if has_adapter != (adapter is not None):
        trained, here = ("an adapter", "all weights") if has_adapter else ("all weights", "an adapter")
        raise ValueError(f"{folder} has trained {trained}, but here it would be {here}; give the same peft")
    if adapter is not None:
        adapter.require_same(folder)


def load_engine(engine: Any, folder: Path, parallel: ParallelDegrees) -> None:
    """
    Read weights and optimizer from a checkpoint, with the degrees of parallelism it was saved with or others.

    Args:
        engine: Engine whose weights and optimizer are filled.
        folder: Checkpoint, on a file system that all processes share.
        parallel: Degrees of parallelism of this run.

    Raises:
        ValueError: If a file is damaged, or holds more than tensors and plain types.
    """
    tag = (folder / "latest").read_text().strip()
    if Path(tag).name != tag:
        raise ValueError(f"{folder / 'latest'} names {tag!r}, which is no folder beside it")
    saved = ParallelDegrees.of(read_json(folder / PARALLEL_FILE))
    is_same = replace(saved, sequence_parallel=parallel.sequence_parallel) == parallel  # which shards no weight
    if not is_same:
        tag = _make_universal(folder, tag)
    engine._config.load_universal_checkpoint = not is_same
    with only_plain_types(), torch.no_grad():
        engine.load_checkpoint(
            str(folder),
            tag=tag,
            load_module_strict=engine.module.adapter is None,  # or weights that are not trained are missing
            load_lr_scheduler_states=False,
        )


def _make_universal(folder: Path, tag: str) -> str:
    """Let the first process write a checkpoint unsharded, unless it is there whole, and return the result's name."""
    universal = f"{tag}_universal"
    store = dist.PrefixStore(f"glm_hf.{universal}", dist.distributed_c10d._get_default_store())
    if dist.get_rank() == 0:
        if not _is_whole(folder / universal):
            convert_to_universal(folder / tag, folder / universal)
        store.set("done", "")
    store.wait(["done"], LONGEST_CONVERSION)
    return universal


def _is_whole(folder: Path) -> bool:
    try:
        return not find_damage(folder)
    except (OSError, ValueError):
        return False


def convert_to_universal(src: Path, dst: Path) -> None:
    """Write DeepSpeed's files unsharded, in a process of its own; the folder appears when it is complete."""
    dst = dst.absolute()
    home = dst.with_name(f".{dst.name}.partial")  # to which DeepSpeed adds a file
    with AtomicFolder(dst, replaces=True, home=home).writing() as folder:
        command = [sys.executable, "-m", "glm_hf.training.pipeline.checkpoint", str(src), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
            raise ValueError(f"{src} cannot be resharded for other degrees of parallelism: {reason}")
        write_checksums(folder)
    (dst.parent / "latest_universal").write_text(dst.name)  # which had the other name


def universal_info(pipeline: Any) -> dict[str, Any]:
    """Return what DeepSpeed has to know of a pipeline's trained parameters to merge shards, from the shard rules."""
    adapter, norm = pipeline.adapter, pipeline.config.num_hidden_layers + 1
    names = [name for name in SHARD_RULES if not name.startswith("model.")]
    whole, tied = [rf"{norm}\.(weight|bias)$"], [r"tied_modules\."]
    if adapter is not None:
        linears = dict.fromkeys(layer_of(name)[1] for name in adapter.ranks)
        names, whole, tied = [f"{linear}.lora_{part}.weight" for linear in linears for part in "AB"], [], []

    def patterns(wanted: ShardRule) -> list[str]:
        return [rf"\d+\.{name.replace('.', '[.]')}$" for name in names if shard_rule(name) == wanted]

    return {
        "universal_checkpoint_version": 0.2,
        "parameter_with_row_parallelism_patterns": patterns(ROW),
        "parameter_with_2_sub_params_cat_dim_0": patterns(GATED),
        "tp_replicated_parameter_patterns": [*patterns(REPLICATED), *whole],
        "pipeline_replicated_parameter_patterns": tied,
    }


def main() -> None:
    """Write the files of one folder unsharded to another."""
    from deepspeed.checkpoint import ds_to_universal

    src, dst = sys.argv[1:]
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    settings = ["--num_extract_workers", str(workers), "--num_merge_workers", str(workers)]
    sys.argv[1:] = ["--input_folder", src, "--output_folder", dst, *settings]
    multiprocessing.set_start_method("fork")  # so that workers know the plain types
    with only_plain_types():
        ds_to_universal.main(ds_to_universal.parse_arguments())


if __name__ == "__main__":
    main()
