"""A task from its file to its figures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from glm_hf.conversion.loading import rank
from glm_hf.evaluation.evaluator import Evaluator
from glm_hf.evaluation.original.generation import GenerationFile
from glm_hf.evaluation.original.items import FileResult
from glm_hf.evaluation.original.language_modelling import DocumentFile
from glm_hf.evaluation.original.metrics import group_metrics
from glm_hf.evaluation.original.multi_choice import MultiChoiceFile
from glm_hf.evaluation.original.task_file import TaskFile, find_files, read_task

FILES: dict[str, Callable[..., MultiChoiceFile | GenerationFile | DocumentFile]] = {
    "mul": MultiChoiceFile,
    "gen": GenerationFile,
    "lm": DocumentFile,
}


def run_task(
    path: str | Path, evaluator: Evaluator, data_dir: str | Path | None = None, overrides: dict[str, Any] | None = None
) -> dict[str, Any]:
    """
    Evaluate a model on one of the original's task files.

    All data are read and laid out before the model is asked anything.

    Args:
        path: Task file.
        evaluator: Model, tokenizer and what is known from before.
        data_dir: Folder that the task's `path` is below; by default that of the task file, or the one above.
        overrides: Fields of the task that have other values.

    Returns:
        `task`, the fields; `files` by group; `metrics` by group and file with `length`; `group_metrics` by group and
        metric with `max`, `median` and `average`; `items` by file; and `is_single_token` or `documents` by file.

    Raises:
        FileNotFoundError: If the task file, or a group's data, are not there.
        ValueError: If one of them is damaged.
    """
    task = read_task(path, overrides)
    folder, groups = find_files(task, Path(path), None if data_dir is None else Path(data_dir))
    names = list(dict.fromkeys(name for found in groups.values() for name in found))
    files = {name: FILES[task.type](task, folder / name, evaluator) for name in names}
    results: dict[str, FileResult] = {}
    total = sum(file.num_rows for file in files.values())
    with tqdm(total=total, desc=task.name, unit="rows", mininterval=0.5, disable=rank() > 0) as bar:
        for name, file in files.items():
            results[name] = file.run(bar.update)
    return report(task, groups, results)


def report(task: TaskFile, groups: dict[str, list[str]], results: dict[str, FileResult]) -> dict[str, Any]:
    """Return the figures of a task; MMLU's files are one more group together."""
    if task.kind == "MMLU":
        groups = {**groups, "Overall": list(results)}
    metrics = {
        group: {name: {"metrics": results[name].metrics, "length": results[name].length} for name in names}
        for group, names in groups.items()
    }
    more: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        for key, value in result.more.items():
            more.setdefault(key, {})[name] = value
    return {
        "task": vars(task),
        "files": groups,
        "metrics": metrics,
        "group_metrics": {group: group_metrics(files) for group, files in metrics.items()},
        **more,
        "items": {name: result.items for name, result in results.items()},
    }
