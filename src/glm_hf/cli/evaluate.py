"""Subcommand `evaluate`."""

import argparse
import json
from pathlib import Path
from typing import Any

from glm_hf.cli.commands import add_command, positive


def add_evaluate(commands: Any) -> None:
    """Add `evaluate`."""
    command = add_command(
        commands,
        "evaluate",
        evaluate,
        "Evaluate a model on tasks of lm-evaluation-harness, or on the task files released with GLM-130B.",
        take_words=take_words,
    )
    command.add_argument("model", nargs="?", metavar="MODEL", help="folder or Hub name of a model")
    command.add_argument("tasks", nargs="*", metavar="TASK", help="names of tasks, or with --tasks-dir of task files")
    add_task_files(command)
    add_results(command)
    add_loading(command)
    add_layout(command)
    add_harness(command)


def take_words(options: argparse.Namespace, words: list[str]) -> None:
    """Take the model and names of tasks that stand behind options."""
    if options.model is None:
        options.model, *words = words
    options.tasks += words


def add_task_files(command: Any) -> None:
    """Add the options that find the original's tasks."""
    group = command.add_argument_group("task files of the original")
    group.add_argument(
        "--task-file", type=Path, action="append", default=[], metavar="FILE", help="a task file (YAML)"
    )
    group.add_argument("--tasks-dir", type=Path, metavar="DIR", help="folder of task files")
    group.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder of their data (default: that of each task file), or of a data set that is not on the Hub",
    )


def add_results(command: Any) -> None:
    """Add the options of what becomes of results."""
    group = command.add_argument_group("results")
    group.add_argument("--output", type=Path, metavar="FILE", help="JSON file; an interrupted run is resumed")
    group.add_argument("--plot", type=Path, metavar="FILE", help="PNG with the shares of all groups")
    group.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A", "B"), help="two JSON files to set side by side, without a model"
    )
    group.add_argument("--no-resume", action="store_true", help="discard what an interrupted run has found")


def add_loading(command: Any) -> None:
    """Add the options of how the model is loaded."""
    group = command.add_argument_group("model")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float16", "bfloat16", "float32", "float64"),
        help="(default: auto)",
    )
    group.add_argument("--bits", type=int, choices=(4, 8), help="quantize the weights while loading")
    group.add_argument("--device", help="device of the whole model (default: all GPUs, else the CPU)")
    group.add_argument(
        "--batch-size", "--batch_size", type=positive, metavar="N", help="most rows at once (default: by their length)"
    )


def add_layout(command: Any) -> None:
    """Add the options of how texts are laid out."""
    group = command.add_argument_group("layout (by default as the original's, or as a task file says)")
    group.add_argument("--mask", choices=("[MASK]", "[gMASK]"), help="mask of texts that hold none")
    group.add_argument(
        "--unidirectional", action="store_true", default=None, help="read texts before [gMASK] from left to right"
    )
    group.add_argument("--add-eos", action="store_true", default=None, help="put </s> behind texts")
    group.add_argument("--score-eop", action="store_true", default=None, help="count the end of a choice")
    group.add_argument(
        "--normalize", choices=("none", "tokens"), help="compare sums of log-probabilities, or their means"
    )
    group.add_argument("--max-length", type=int, metavar="N", help="most tokens of a row")
    group.add_argument("--generation-length", type=int, metavar="N", help="tokens from one window to the next")


def add_harness(command: Any) -> None:
    """Add the options of lm-evaluation-harness, by its names for them."""
    group = command.add_argument_group("lm-evaluation-harness (see its own documentation)")
    numbers = (("num_fewshot", int), ("limit", float), ("bootstrap_iters", int))
    texts = (*("gen_kwargs", "system_instruction", "include_path", "use_cache", "samples", "metadata", "seed"),)
    flags = ("log_samples", "predict_only", "write_out", "check_integrity", "cache_requests", "fewshot_as_multiturn")
    for name, kind in numbers:
        group.add_argument(*spellings(name), type=kind, dest=name, metavar="N")
    for name in texts:
        group.add_argument(*spellings(name), dest=name, metavar="TEXT")
    for name in flags:
        group.add_argument(*spellings(name), dest=name, action="store_true", default=None)
    group.add_argument(
        *spellings("apply_chat_template"), dest="apply_chat_template", nargs="?", const=True, metavar="NAME"
    )


def spellings(name: str) -> list[str]:
    """Return an option as this command and as the harness spells it."""
    return list(dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}")))


def evaluate(options: argparse.Namespace) -> None:
    """Run `evaluate`."""
    if options.compare:
        return show_comparison(options)
    if options.model is None:
        raise ValueError("give a model, and tasks or task files; or two results to --compare")
    from glm_hf.conversion.loading import rank
    from glm_hf.evaluation.evaluate import Settings, find_task_files
    from glm_hf.evaluation.evaluate import evaluate as run

    files = list(options.task_file)
    names = list(options.tasks)
    if options.tasks_dir is not None:
        files += find_task_files(options.tasks_dir, names)
        names = []
    if not files and not names:
        raise ValueError("give names of tasks, --task-file or --tasks-dir")
    for path in (options.output, options.plot):
        require_place(path)
    journal = None
    if options.output is not None:
        journal = options.output.with_name(f".{options.output.name}.partial")
        if options.no_resume:
            journal.unlink(missing_ok=True)
    settings = Settings(
        options.dtype,
        options.bits,
        options.device,
        options.batch_size,
        overrides=task_fields(options),
        of_model=model_arguments(options),
        of_harness=harness_arguments(options),
    )
    result = run(options.model, names, files, options.data_dir, settings, journal)
    if rank() == 0:
        show(result, options)
        if journal is not None:
            journal.unlink(missing_ok=True)


def show(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Write and print a result."""
    from glm_hf.evaluation.report.plots import plot_results
    from glm_hf.evaluation.report.table import result_table

    if options.output is not None:
        write_result(result, options.output)
    print("\n".join(result_table(result)))
    if options.plot is not None:
        plot_results([result], [result["model"]["name"]], options.plot)


def show_comparison(options: argparse.Namespace) -> None:
    """Print two results side by side."""
    from glm_hf.evaluation.evaluate import read_result
    from glm_hf.evaluation.report.compare import compare
    from glm_hf.evaluation.report.plots import plot_results

    results = [read_result(path) for path in options.compare]
    require_place(options.plot)
    print("\n".join(compare(*results)))
    if options.plot is not None:
        plot_results(results, [path.stem for path in options.compare], options.plot)


def require_place(path: Path | None) -> None:
    """Raise ValueError if a file cannot be written at a path, before any work."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ValueError(f"{path} must be a file in a folder that exists")


def write_result(result: dict[str, Any], path: Path) -> None:
    """Write a result, whole or not at all."""
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text(json.dumps(result, ensure_ascii=False) + "\n", encoding="utf-8")
    scratch.replace(path)


def task_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of task files that options overrule."""
    fields = {
        "use_task_mask": None if options.mask is None else options.mask == "[gMASK]",
        "unidirectional": options.unidirectional,
        "add_eos": options.add_eos,
        "score_eop": options.score_eop,
        "normalize": options.normalize,
        "max_seq_length": options.max_length,
        "generation_length": options.generation_length,
    }
    return {name: value for name, value in fields.items() if value is not None}


def model_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the harness' model that options give."""
    names = ("mask", "unidirectional", "add_eos", "score_eop", "normalize", "max_length", "generation_length")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def harness_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `lm_eval.simple_evaluate` that options give."""
    names = (
        *("num_fewshot", "limit", "bootstrap_iters", "gen_kwargs", "system_instruction", "include_path", "use_cache"),
        *("predict_only", "write_out", "check_integrity", "cache_requests", "apply_chat_template"),
        "fewshot_as_multiturn",
    )
    found = {name: value for name in names if (value := getattr(options, name)) is not None}
    found["log_samples"] = bool(options.log_samples) or options.output is not None
    for name in ("samples", "metadata"):
        if (text := getattr(options, name)) is not None:
            found[name] = parse_json(name, text)
    if options.data_dir is not None:
        found["metadata"] = {**found.get("metadata", {}), "data_dir": str(options.data_dir)}
    if options.seed is not None:
        found |= seeds(options.seed)
    return found


def parse_json(name: str, text: str) -> Any:
    """Return what an option holds as JSON."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"--{name} must be JSON: {error}") from error


def seeds(text: str) -> dict[str, int | None]:
    """Return the harness' seeds: one number for all, or one each for python, numpy, torch and examples, or None."""
    names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    parts = text.split(",")
    try:
        numbers = [None if part == "None" else int(part) for part in parts]
    except ValueError as error:
        raise ValueError(f"--seed must be integers or None, got {text}") from error
    if len(numbers) not in (1, len(names)):
        raise ValueError(f"--seed must be one number or four, got {text}")
    return dict(zip(names, numbers * (4 if len(numbers) == 1 else 1), strict=True))
