"""The `glm-hf` command.

Results go to stdout, progress and errors to stderr. Exit code 0 on success, 1 if the input cannot be processed, with
the reason in one line, and 2 if the command itself is wrong.
"""

import argparse
import sys
from collections.abc import Sequence

import glm_hf
from glm_hf.cli.checkpoints import add_convert, add_export_3d, add_export_sat, add_reshard, add_verify
from glm_hf.cli.fill import add_fill
from glm_hf.cli.hub import add_export_hub
from glm_hf.cli.plan import add_plan
from glm_hf.cli.quantization import add_analyze, add_quantize
from glm_hf.cli.train import add_train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (those of the process by default) and return its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        if options.registers:
            glm_hf.register()
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
    parser.add_argument("--version", action="version", version=f"%(prog)s {glm_hf.__version__}")
    parser.add_argument(
        "--local_rank", help=argparse.SUPPRESS
    )  # from DeepSpeed's launcher, which sets LOCAL_RANK, too
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        *(add_convert, add_quantize, add_analyze, add_export_sat, add_reshard, add_verify),
        *(add_fill, add_export_hub, add_plan, add_train, add_export_3d),
    ):
        add(commands)
    return parser
