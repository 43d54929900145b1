"""The `glm-hf` command.

Results go to stdout, progress and errors to stderr. Exit code 0 on success, 1 if the input cannot be processed, with
the reason in one line, and 2 if the command itself is wrong.
"""

import argparse
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from glm_hf._version import __version__
from glm_hf.cli.training import (
    add_export_3d,
    add_train,
    add_training_plan_options,
    plan_training,
    require_options_of_one_plan,
)

TEXTS_AT_ONCE = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (those of the process by default) and return its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt as error:
        return fail("; ".join(("interrupted", *getattr(error, "__notes__", ()))))
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has left, as `head` does
        return 1
    except expected_errors() as error:
        reason = str(error.__cause__ if is_wrapper(error) else error)
        return fail(" ".join("; ".join((reason, *getattr(error, "__notes__", ()))).split()))
    return 0


def fail(reason: str) -> int:
    """Print the reason in one line on stderr and return exit code 1."""
    print(f"glm-hf: error: {reason}", file=sys.stderr)
    return 1


def expected_errors() -> tuple[type[Exception], ...]:
    """Return the errors that are the input's fault or the machine's; any other is a bug and keeps its traceback."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return ValueError, OSError, StrictDataclassError, SafetensorError, MemoryError


def is_wrapper(error: Exception) -> bool:
    """Tell whether an error only wraps a config's own message in a report of several lines."""
    return type(error).__name__.startswith("StrictDataclass") and error.__cause__ is not None


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="glm-hf", description="GLM-130B in Hugging Face transformers.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "--local_rank", help=argparse.SUPPRESS
    )  # from DeepSpeed's launcher, which sets LOCAL_RANK, too
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_convert(commands)
    add_quantize(commands)
    add_analyze(commands)
    add_export_sat(commands)
    add_reshard(commands)
    add_verify(commands)
    add_fill(commands)
    add_export_hub(commands)
    add_plan(commands)
    add_train(commands)
    add_export_3d(commands)
    return parser


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> Any:
    """Add a subcommand with its one-sentence help."""
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def add_convert(commands: Any) -> None:
    """Add `convert`."""
    command = add_command(commands, "convert", convert, "Convert a checkpoint as its authors released it.")
    command.add_argument("src", help="folder with `latest` and the mp_rank_*_model_states.pt files below it")
    command.add_argument("dst", help="new folder for the Hugging Face model")
    command.add_argument("--tokenizer", metavar="FILE", help="SentencePiece model, such as icetk's ice_text.model")
    command.add_argument(
        "--config", metavar="JSON", help="what weights cannot tell, if not GLM-130B's: special ids, heads"
    )
    command.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="instead of the checkpoint's own")
    command.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest output file (default: 5GB)")
    command.add_argument("--quantization", choices=("int8", "int4"), help="quantize the layers by the released rule")
    command.add_argument("--dry-run", action="store_true", help="check everything, print the plan and write nothing")
    command.add_argument("--no-resume", action="store_true", help="throw away what an interrupted run has left")


def convert(options: argparse.Namespace) -> None:
    """Run `convert`."""
    from glm_hf.conversion import convert_sat_checkpoint
    from glm_hf.conversion.convert import plan_conversion
    from glm_hf.conversion.streaming.segments import bytes_of_interrupted_run
    from glm_hf.folders.atomic import require_space, require_vacant

    settings = {
        name: getattr(options, name) for name in ("config", "tokenizer", "dtype", "max_shard_size", "quantization")
    }
    if options.dry_run:
        dst = Path(options.dst).resolve()
        require_vacant(dst)
        plan = plan_conversion(options.src, **settings)
        print(plan.describe(dst))
        require_space(dst, plan.num_bytes - bytes_of_interrupted_run(dst))
        return
    convert_sat_checkpoint(options.src, options.dst, **settings, resume=not options.no_resume)
    print(options.dst)


def add_quantize(commands: Any) -> None:
    """Add `quantize`."""
    command = add_command(commands, "quantize", quantize, "Quantize a Hugging Face folder without loading the model.")
    command.add_argument("src", help="folder of a model that is not quantized")
    command.add_argument("dst", help="new folder")
    command.add_argument("--bits", type=int, choices=(4, 8), required=True, help="of the weights of the layers")
    command.add_argument("--group-size", type=int, metavar="N", help="input features per scale (default: whole rows)")
    command.add_argument("--quantize-embeddings", action="store_true", help="INT8 embedding and output matrix too")
    command.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest output file (default: 5GB)")
    command.add_argument("--no-resume", action="store_true", help="throw away what an interrupted run has left")


def quantize(options: argparse.Namespace) -> None:
    """Run `quantize`."""
    from glm_hf.conversion import quantize_checkpoint

    names = ("bits", "group_size", "quantize_embeddings", "max_shard_size")
    settings = {name: getattr(options, name) for name in names}
    quantize_checkpoint(options.src, options.dst, **settings, resume=not options.no_resume)
    print(options.dst)


def add_analyze(commands: Any) -> None:
    """Add `analyze`."""
    command = add_command(commands, "analyze", analyze, "Write how weights spread and what INT8 and INT4 lose.")
    command.add_argument("src", help="folder of a model that is not quantized")
    command.add_argument("--output", default="analysis", metavar="FOLDER", help="new folder (default: analysis)")
    command.add_argument(
        "--group-size", type=int, action="append", metavar="N", help="of INT4; may be repeated (default: 128)"
    )


def analyze(options: argparse.Namespace) -> None:
    """Run `analyze`."""
    from glm_hf.conversion.analysis.report import describe_analysis, write_analysis

    print(describe_analysis(write_analysis(options.src, options.output, group_sizes=options.group_size or (128,))))
    print(options.output)


def add_export_sat(commands: Any) -> None:
    """Add `export-sat`."""
    command = add_command(commands, "export-sat", export_sat, "Write a model as a checkpoint of the original code.")
    command.add_argument("src", help="folder of the Hugging Face model")
    command.add_argument("dst", help="new folder")
    command.add_argument("--tp-size", type=int, required=True, metavar="N", help="number of tensor-parallel ranks")
    command.add_argument("--no-resume", action="store_true", help="throw away what an interrupted run has left")


def export_sat(options: argparse.Namespace) -> None:
    """Run `export-sat`."""
    from glm_hf.conversion import export_sat_checkpoint

    export_sat_checkpoint(options.src, options.dst, tp_size=options.tp_size, resume=not options.no_resume)
    print(options.dst)


def add_reshard(commands: Any) -> None:
    """Add `reshard`."""
    command = add_command(commands, "reshard", reshard, "Cut a checkpoint for another number of ranks.")
    command.add_argument("src", help="folder with `latest` and the mp_rank_*_model_states.pt files below it")
    command.add_argument("dst", help="new folder")
    command.add_argument("--tp-size", type=int, required=True, metavar="N", help="number of tensor-parallel ranks")
    command.add_argument("--no-resume", action="store_true", help="throw away what an interrupted run has left")


def reshard(options: argparse.Namespace) -> None:
    """Run `reshard`."""
    from glm_hf.conversion import reshard_sat_checkpoint

    reshard_sat_checkpoint(options.src, options.dst, tp_size=options.tp_size, resume=not options.no_resume)
    print(options.dst)


def add_verify(commands: Any) -> None:
    """Add `verify`."""
    command = add_command(commands, "verify", verify, "Check a download, or that a conversion holds the same weights.")
    command.add_argument("src", help="checkpoint as its authors released it, or Hugging Face folder")
    command.add_argument("dst", nargs="?", help="what was made from it, to be compared tensor by tensor")


def verify(options: argparse.Namespace) -> None:
    """Run `verify`."""
    from glm_hf.conversion import verify_checkpoint

    report = verify_checkpoint(options.src, options.dst)
    print(f"{report.num_tensors:,} tensors, {report.num_bytes:,} bytes checked, {len(report.problems)} problems")
    for problem in report.problems:
        print(problem)
    if report.problems:
        raise ValueError(f"{len(report.problems)} problems, the first: {report.problems[0]}")


def add_fill(commands: Any) -> None:
    """Add `fill`."""
    command = add_command(commands, "fill", fill, "Fill the blanks of texts, or continue texts without a blank.")
    command.add_argument("text", nargs="*", help="text with [MASK] or [gMASK]; without any, lines are read from stdin")
    command.add_argument(
        "--model", metavar="FOLDER", help="folder or Hub name of a model (default: a small one that comes with glm_hf)"
    )
    command.add_argument("--top-k", type=positive, default=1, metavar="K", help="proposals per blank (default: 1)")
    command.add_argument("--num-beams", type=positive, default=1, metavar="N", help="beams, at least K (default: 1)")
    command.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="per blank (default: 64)")
    command.add_argument("--json", action="store_true", help="print one JSON object per text, with scores")


def positive(text: str) -> int:
    """Parse an integer from 1 to 2048."""
    number = int(text)
    if not 1 <= number <= 2048:
        raise argparse.ArgumentTypeError(f"must be from 1 to 2048, got {text}")
    return number


def fill(options: argparse.Namespace) -> None:
    """Run `fill`."""
    from transformers import pipeline

    import glm_hf  # noqa: F401, registers model and pipeline

    model = str(files("glm_hf") / "world_facts") if options.model is None else options.model
    if not Path(model).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        raise FileNotFoundError(f"there is no folder {model}, and it is not a Hub name (owner/name)")
    fill_mask = pipeline("fill-mask", model=model, dtype="auto", device_map="auto")
    settings = {"top_k": options.top_k, "num_beams": options.num_beams, "max_new_tokens": options.max_new_tokens}
    group_size = 1 if not options.text and sys.stdin.isatty() else TEXTS_AT_ONCE

    def fill_group(texts: list[str]) -> None:
        results = fill_mask(texts, batch_size=len(texts), **settings) if texts else []
        for text, blanks in zip(texts, [results] if len(texts) == 1 else results, strict=True):
            print(describe(text, blanks if isinstance(blanks[0], list) else [blanks], options), flush=True)

    group: list[str] = []
    for number, text in enumerate(options.text or read_lines(), 1):
        try:
            fill_mask.preprocess(text)
        except ValueError as error:
            fill_group(group)  # what came before is not lost
            raise ValueError(f"text {number}: {error}") from error
        group.append(text)
        if len(group) == group_size:
            fill_group(group)
            group = []
    fill_group(group)


def read_lines() -> Iterator[str]:
    """Yield the lines of stdin; UnicodeDecodeError if it is not UTF-8."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    for line in sys.stdin:
        yield line.rstrip("\r\n")


def describe(text: str, blanks: list[list[dict[str, Any]]], options: argparse.Namespace) -> str:
    """Return what `fill` prints for one text: JSON, the filled text, or the proposals for every blank."""
    filled = blanks[-1][0]["sequence"]
    if options.json:
        return json.dumps({"text": text, "filled": filled, "blanks": blanks}, ensure_ascii=False)
    if options.top_k == 1:
        return filled
    rows = [f"{proposal['score']:.4f}  {proposal['sequence']}" for proposals in blanks for proposal in proposals]
    return "\n".join(rows)


def add_export_hub(commands: Any) -> None:
    """Add `export-hub`."""
    command = add_command(
        commands, "export-hub", export_hub, "Make a folder that loads without glm_hf being installed."
    )
    command.add_argument("src", help="folder of a model with its tokenizer")
    command.add_argument("dst", help="new folder")
    command.add_argument("--push-to", metavar="REPO", help="upload it to this Hub repository, owner/name")


def export_hub(options: argparse.Namespace) -> None:
    """Run `export-hub`."""
    from glm_hf.hub.export import export_hub_folder

    export_hub_folder(options.src, options.dst, push_to=options.push_to)
    print(options.dst)


def add_plan(commands: Any) -> None:
    """Add `plan`."""
    command = add_command(commands, "plan", plan, "Tell whether a model fits devices, and where its layers go.")
    model = command.add_mutually_exclusive_group(required=True)
    model.add_argument("model", nargs="?", help="folder of a model; its config.json is enough")
    model.add_argument("--preset", choices=("130b",), help="instead of a folder: GLM-130B")
    purpose = command.add_mutually_exclusive_group(required=True)
    purpose.add_argument(
        "--devices", metavar="LIST", help="such as 24GiB*4, or 24GiB,cpu=64GiB,disk; auto: GPUs of torch"
    )
    purpose.add_argument("--train", action="store_true", help="plan 3D training instead: memory, bubble and time")
    command.add_argument("--bits", type=int, choices=(4, 8, 16), help="of the layers' weights (default: as stored)")
    command.add_argument("--group-size", type=int, metavar="N", help="input features per scale (default: a row)")
    command.add_argument("--quantize-embeddings", action="store_true", help="INT8 rows, besides --bits 4 or 8")
    command.add_argument("--context", type=int, metavar="N", help="prompt and answer (default: the model's longest)")
    command.add_argument("--batch", type=int, default=1, metavar="N", help="sequences times beams (default: 1)")
    command.add_argument("--tp", type=int, metavar="N", help="cut every layer over N devices: tensor parallelism")
    command.add_argument("--reserve", default="0.5GiB", metavar="SIZE", help="left free per device (default: 0.5GiB)")
    command.add_argument("--json", action="store_true", help="print the plan as JSON, sizes in bytes")
    add_training_plan_options(command)


def plan(options: argparse.Namespace) -> None:
    """Run `plan`."""
    from glm_hf.configuration_glm import GLMConfig
    from glm_hf.folders.model_folder import read_config
    from glm_hf.planning.devices import parse_devices, parse_size
    from glm_hf.planning.inference import plan_devices

    require_options_of_one_plan(options)
    config = GLMConfig() if options.model is None else read_config(options.model)
    if options.train:
        plan_training(options, config)
        return
    settings = {
        name: getattr(options, name) for name in ("bits", "group_size", "quantize_embeddings", "context", "batch")
    }
    planned = plan_devices(
        config, parse_devices(options.devices), **settings, tp_size=options.tp, reserve=parse_size(options.reserve)
    )
    if options.json:
        print(json.dumps(planned.to_dict()))
    else:
        print(planned.describe())
    if not planned.fits:
        raise ValueError(f"does not fit: {planned.advice()}")
    if not options.json:
        print(f"\n{planned.usage(options.model or 'FOLDER')}")
