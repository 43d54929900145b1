"""Subcommands `tokenize`, `train` and `report`."""

import argparse
import os
from typing import Any

from glm_hf.cli.commands import add_command, add_no_resume, positive, rerun_settings


def add_tokenize(commands: Any) -> None:
    """Add `tokenize`."""
    text = "Tokenize texts or instructions, once for all runs, into a folder that `path` of a corpus may name."
    command = add_command(commands, "tokenize", tokenize, text)
    command.add_argument(
        "sources",
        nargs="+",
        help="files, folders and patterns: .jsonl and .json (a record per line), .txt (a document per file), "
        "these also with .gz or .zst behind, and .parquet",
    )
    command.add_argument("dst", help="new folder")
    command.add_argument(
        "--tokenizer", required=True, metavar="MODEL", help="folder or Hub name of the model; weights are not needed"
    )
    command.add_argument("--num-proc", type=positive, metavar="N", help="number of processes (default: all cores)")
    command.add_argument("--text-field", default="text", metavar="NAME", help="field of a text (default: text)")
    command.add_argument(
        "--inputs-field", default="inputs", metavar="NAME", help="field of an instruction (default: inputs)"
    )
    command.add_argument(
        "--targets-field", default="targets", metavar="NAME", help="field of its answer (default: targets)"
    )
    command.add_argument(
        "--row-length", type=positive, default=2048, metavar="N", help="tokens that an instruction has to fit"
    )
    command.add_argument(
        "--truncate-inputs", action="store_true", help="leave out the beginning of instructions that do not fit"
    )
    add_no_resume(command)


def tokenize(options: argparse.Namespace) -> None:
    """Run `tokenize`."""
    from glm_hf.training import tokenize_corpus

    tokenize_corpus(
        options.sources,
        options.dst,
        tokenizer=options.tokenizer,
        num_proc=options.num_proc,
        text=options.text_field,
        inputs=options.inputs_field,
        targets=options.targets_field,
        row_length=options.row_length,
        truncate_inputs=options.truncate_inputs,
        **rerun_settings(options),
    )
    print(options.dst)


def add_train(commands: Any) -> None:
    """Add `train`."""
    command = add_command(commands, "train", train, "Train a model as a configuration file says.")
    command.add_argument("config", help="YAML file; examples/training holds some to start from")
    command.add_argument("--resume", action="store_true", help="resume from the last checkpoint, if there is one")
    command.add_argument("--overwrite", action="store_true", help="begin anew, and remove earlier checkpoints")
    command.add_argument("--output-dir", metavar="FOLDER", help="output folder, instead of the one in the file")


def train(options: argparse.Namespace) -> None:
    """Run `train`."""
    from glm_hf.training.launch import train_run
    from glm_hf.training.run_config import RunConfig

    settings = {name: getattr(options, name) for name in ("resume", "output_dir", "overwrite")}
    folder = train_run(RunConfig.read(options.config), **settings)
    if os.environ.get("RANK", "0") == "0":
        print(folder)


def add_report(commands: Any) -> None:
    """Add `report`."""
    text = "Draw the curves of a training run, finished or not: losses, norms of gradients, throughput, MFU and HFU."
    command = add_command(commands, "report", report, text, registers=False)
    command.add_argument("folder", metavar="RUN", help="output folder of the run, or its log.jsonl")
    command.add_argument("--output", metavar="FILE", help="file .html or .png (default: report.html in the folder)")


def report(options: argparse.Namespace) -> None:
    """Run `report`."""
    from glm_hf.training.logs.curves import write_report

    is_folder = os.path.isdir(options.folder)
    default = os.path.join(options.folder, "report.html") if is_folder else f"{options.folder}.html"
    path = default if options.output is None else options.output
    write_report(options.folder, path)
    print(path)
