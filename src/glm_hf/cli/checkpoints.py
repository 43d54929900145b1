"""Subcommands for checkpoints of the original code, and of 3D training, as they become model folders and back."""

import argparse
from pathlib import Path
from typing import Any

from glm_hf.cli.commands import (
    add_command,
    add_folders,
    add_max_shard_size,
    add_no_resume,
    add_strict,
    add_tp_size,
    rerun_settings,
)

SAT_FOLDER = "folder with `latest` and the mp_rank_*_model_states.pt files below it"


def add_convert(commands: Any) -> None:
    """Add `convert`."""
    command = add_command(commands, "convert", convert, "Convert a checkpoint as its authors released it.")
    add_folders(command, SAT_FOLDER)
    command.add_argument("--tokenizer", metavar="FILE", help="SentencePiece model, such as icetk's ice_text.model")
    command.add_argument(
        "--config", metavar="JSON", help="what weights cannot tell, where it differs from GLM-130B: special ids, heads"
    )
    command.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="instead of the checkpoint's own")
    add_max_shard_size(command)
    command.add_argument("--quantization", choices=("int8", "int4"), help="quantize the layers by the released rule")
    command.add_argument("--dry-run", action="store_true", help="check everything, print the plan and write nothing")
    add_no_resume(command)
    add_strict(command)


def convert(options: argparse.Namespace) -> None:
    """Run `convert`."""
    from glm_hf.conversion import convert_sat_checkpoint
    from glm_hf.conversion.convert import plan_conversion
    from glm_hf.conversion.streaming.segments import bytes_of_interrupted_run
    from glm_hf.folders.atomic import destination, require_space, require_vacant

    settings = {
        name: getattr(options, name) for name in ("config", "tokenizer", "dtype", "max_shard_size", "quantization")
    }
    if options.dry_run:
        dst = destination(options.dst)
        if not options.overwrite:
            require_vacant(dst)
        plan = plan_conversion(options.src, **settings)
        print(plan.describe(dst))
        require_space(dst, plan.num_bytes - bytes_of_interrupted_run(dst))
        return
    convert_sat_checkpoint(options.src, options.dst, **settings, **rerun_settings(options), strict=options.strict)
    print(options.dst)


def add_verify(commands: Any) -> None:
    """Add `verify`."""
    command = add_command(commands, "verify", verify, "Check a folder, or that a conversion holds the same weights.")
    command.add_argument(
        "src", help="checkpoint as its authors released it, Hugging Face folder, training checkpoint or token cache"
    )
    command.add_argument("dst", nargs="?", help="what was made from a model, to be compared tensor by tensor")
    add_strict(command)


def verify(options: argparse.Namespace) -> None:
    """Run `verify`."""
    problems = _verify_by_checksums(Path(options.src)) if options.dst is None else None
    if problems is None:
        from glm_hf.conversion import verify_checkpoint

        report = verify_checkpoint(options.src, options.dst, strict=options.strict)
        problems = report.problems
        print(f"{report.num_tensors:,} tensors, {report.num_bytes:,} bytes checked, {len(problems)} problems")
    for problem in problems:
        print(problem)
    if problems:
        raise ValueError(f"{len(problems)} problems, the first: {problems[0]}")


def _verify_by_checksums(src: Path) -> list[str] | None:
    """Return what is wrong with a training checkpoint or a token cache; None for a folder of another kind."""
    if (src / "corpus.json").is_file():
        from glm_hf.training.data.token_file import find_damage, open_token_file

        corpus = open_token_file(src)
        problems = find_damage(corpus)
        print(f"{corpus.facts['num_tokens']:,} tokens checked, {len(problems)} problems")
        return problems
    if (src / "checksums.json").is_file() or (src / "trainer_state.json").is_file():
        from glm_hf.training.checkpoints import find_problems

        problems = find_problems(src)
        print(f"{sum(path.is_file() for path in src.rglob('*')):,} files checked, {len(problems)} problems")
        return problems
    return None


def add_export_sat(commands: Any) -> None:
    """Add `export-sat`."""
    command = add_command(commands, "export-sat", export_sat, "Write a model as a checkpoint of the original code.")
    add_folders(command, "folder of the Hugging Face model")
    add_tp_size(command)
    add_no_resume(command)
    add_strict(command)


def export_sat(options: argparse.Namespace) -> None:
    """Run `export-sat`."""
    from glm_hf.conversion import export_sat_checkpoint

    export_sat_checkpoint(
        options.src, options.dst, tp_size=options.tp_size, **rerun_settings(options), strict=options.strict
    )
    print(options.dst)


def add_reshard(commands: Any) -> None:
    """Add `reshard`."""
    command = add_command(commands, "reshard", reshard, "Reshard an original checkpoint for another number of ranks.")
    add_folders(command, SAT_FOLDER)
    add_tp_size(command)
    add_no_resume(command)
    add_strict(command)


def reshard(options: argparse.Namespace) -> None:
    """Run `reshard`."""
    from glm_hf.conversion import reshard_sat_checkpoint

    reshard_sat_checkpoint(
        options.src, options.dst, tp_size=options.tp_size, **rerun_settings(options), strict=options.strict
    )
    print(options.dst)


def add_export_3d(commands: Any) -> None:
    """Add `export-3d`."""
    command = add_command(commands, "export-3d", export_3d, "Write a checkpoint of 3D training as a model folder.")
    add_folders(command, "checkpoint of a run with a `parallel` section")
    add_max_shard_size(command)
    add_no_resume(command)
    add_strict(command)


def export_3d(options: argparse.Namespace) -> None:
    """Run `export-3d`."""
    from glm_hf.conversion.export_3d import export_3d_checkpoint

    export_3d_checkpoint(
        options.src,
        options.dst,
        max_shard_size=options.max_shard_size,
        **rerun_settings(options),
        strict=options.strict,
    )
    print(options.dst)
