"""The `glm-hf` command.

Results go to stdout, progress and errors to stderr. Exit code 0 on success, 1 if the input cannot be processed, with
the reason in one line, and 2 if the command itself is wrong.
"""

import io
import os
import sys
from collections.abc import Sequence

import glm_hf
from glm_hf.cli import signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (those of the process by default) and return its exit code."""
    from glm_hf.cli.parser import build_parser

    parser = build_parser()
    options, words = parser.parse_known_args(arguments)
    if words and (options.take_words is None or any(word.startswith("-") for word in words)):
        first = next((place for place, word in enumerate(words) if word.startswith("-")), 0)
        parser.error(f"unrecognized arguments: {' '.join(words[first:])}")
    try:
        use_utf8()
        if options.registers:
            glm_hf.register()
            quiet_bars()
        if words:
            options.take_words(options, words)
        options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a full disk is an error
    except KeyboardInterrupt as error:
        fail("; ".join((signals.reason(), *getattr(error, "__notes__", ()))))
        return signals.exit_code()
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has left, as `head` does
        return 1
    except expected_errors() as error:
        if signals.received:  # which the exception that stands for it has met on its way
            fail(signals.reason())
            return signals.exit_code()
        reason = str(error.__cause__ if is_wrapper(error) else error)
        return fail(" ".join("; ".join((reason, *getattr(error, "__notes__", ()))).split()))
    return 0


def run() -> int:
    """Run the command as a process of its own, which knows what to do when it is told to end."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # whichever library loads
    try:
        signals.listen()
        code = main()
    except SystemExit as error:  # of wrong usage
        code = int(error.code or 0)
    except BaseException as error:
        if not (isinstance(error, KeyboardInterrupt) or signals.received):  # which libraries turn into other errors
            raise
        fail(signals.reason())
        code = signals.exit_code()
    signals.ending.append(code)
    return code


def use_utf8() -> None:
    """Write UTF-8 whatever the locale, as texts are read and models write Chinese."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def quiet_bars() -> None:
    """Keep transformers from drawing progress bars where nobody sees them, as ours do."""
    if sys.stderr is None or not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def fail(reason: str) -> int:
    """Print the reason in one line on stderr, behind all progress bars, and return exit code 1."""
    for bar in list(sys.modules["tqdm"].tqdm._instances) if "tqdm" in sys.modules else ():
        bar.close()
    if sys.stderr is not None:
        print(f"glm-hf: error: {reason}", file=sys.stderr, flush=True)
    return 1


def expected_errors() -> tuple[type[Exception], ...]:
    """Return the errors that are the input's fault or the machine's; any other is a bug and keeps its traceback."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return ValueError, OSError, StrictDataclassError, SafetensorError, MemoryError, ModuleNotFoundError


def is_wrapper(error: Exception) -> bool:
    """Tell whether an error only wraps a config's own message in a report of several lines."""
    return type(error).__name__.startswith("StrictDataclass") and error.__cause__ is not None
