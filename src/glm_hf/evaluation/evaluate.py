"""A model on tasks, of both kinds, from names to a result."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from glm_hf import __version__
from glm_hf.conversion.loading import Loaded, load, rank
from glm_hf.evaluation.evaluator import Evaluator, dtype_on
from glm_hf.evaluation.journal import Journal
from glm_hf.evaluation.original.runs import run_task
from glm_hf.folders.validation import read_json

TASKS = Path(__file__).parent / "tasks"
"""Tasks of the harness that come with this package."""


@dataclass(frozen=True)
class Settings:
    """How a model is evaluated."""

    dtype: str = "auto"
    bits: int | None = None
    device: str | None = None
    batch_size: int | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the original's task files that have other values."""
    of_model: dict[str, Any] = field(default_factory=dict)
    """Arguments of the harness' model, such as its mask."""
    of_harness: dict[str, Any] = field(default_factory=dict)
    """Arguments of `lm_eval.simple_evaluate`."""


def evaluate(
    model: str,
    tasks: Sequence[str],
    task_files: Sequence[Path],
    data_dir: Path | None,
    settings: Settings,
    journal: Path | None,
) -> dict[str, Any]:
    """
    Evaluate a model.

    Args:
        model: Folder or Hub name.
        tasks: Names of tasks of the harness.
        task_files: Task files of the original.
        data_dir: Folder of their data.
        settings: How.
        journal: File that keeps what is known of rows, from which an interrupted run resumes.

    Returns:
        The result: what was evaluated and how, `tasks` by name (or the fields of the task where there is one file and
        nothing else), `harness` and `samples`.

    Raises:
        FileNotFoundError: If the model, a task or its data are not there.
        ValueError: If one of them is damaged.
    """
    manager = harness_tasks(tasks, settings.of_harness) if tasks else None
    loaded = load(model, dtype=dtype_on(settings.device, settings.dtype), bits=settings.bits, device=settings.device)
    kept = Journal(journal, loaded.origin, writes=rank() == 0)
    evaluator = Evaluator(loaded.model, loaded.tokenizer, kept, settings.batch_size)
    start = time.perf_counter()
    result = describe(model, loaded, settings)
    try:
        found = [run_task(path, evaluator, data_dir, settings.overrides) for path in task_files]
        if len(found) == 1 and manager is None:
            result |= found[0]
        elif found:
            result["tasks"] = by_name(found)
        if manager is not None:
            result |= run_harness(manager, tasks, evaluator, settings)
    except torch.OutOfMemoryError as error:
        raise MemoryError("the rows that are read at once do not fit the memory; lower --batch-size") from error
    finally:
        kept.close()
    return {**result, "seconds": round(time.perf_counter() - start, 3)}


def by_name(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return results by the names of their tasks; those of a name that comes again get a number."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        name, number = result["task"]["name"], 2
        while name in found:
            name, number = f"{result['task']['name']} ({number})", number + 1
        found[name] = result
    return found


def describe(model: str, loaded: Loaded, settings: Settings) -> dict[str, Any]:
    """Return what is needed to repeat a run."""
    stored = getattr(loaded.model.config, "quantization_config", None)
    versions = {"glm_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "model": {
            "name": model,
            "bits": settings.bits or getattr(stored, "bits", None),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "device": str(loaded.model.device),
            "num_parameters": loaded.model.num_parameters(),
        },
        "settings": {**settings.overrides, **settings.of_model, **settings.of_harness},
        "versions": versions,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def find_task_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """
    Return the task files below a folder, or those of some names, which are stems or paths below it.

    Raises:
        FileNotFoundError: If there is none, or a name has none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} of task files")
    found = sorted(path for path in folder.rglob("*.y*ml") if path.is_file())
    if not found:
        raise FileNotFoundError(f"{folder} has no task files (*.yaml)")
    if not names:
        return found
    chosen = []
    for name in names:
        of_name = [path for path in found if name in (path.stem, str(path.relative_to(folder).with_suffix("")))]
        if not of_name:
            raise FileNotFoundError(f"{folder} has no task file {name}.yaml")
        chosen += of_name
    return chosen


def harness_tasks(names: Sequence[str], options: Mapping[str, Any]) -> Any:
    """
    Return the harness' task manager with the tasks of these names, whose data are there.

    Raises:
        ModuleNotFoundError: If the harness is not installed.
        ValueError: If a task is not known, or its data cannot be had.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'tasks of lm-evaluation-harness need {error.name}: pip install "glm_hf[evaluate]"'
        ) from error

    class Kept(TaskManager):
        """Loads tasks once."""

        def load(self, *_: Any, **__: Any) -> Any:
            return self.kept

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    given, metadata = options.get("include_path"), options.get("metadata")
    manager = Kept(include_path=[str(TASKS)], include_defaults=False, metadata=metadata)
    if given or not set(names) <= set(manager.all_tasks):  # the harness reads its thousands of files for seconds
        manager = Kept(include_path=[str(TASKS), *([given] if given else [])], metadata=metadata)
    for name in names:
        if name not in manager.all_tasks:
            raise ValueError(f"there is no task {name}; `lm-eval ls tasks` and docs/evaluate.md list those there are")
    try:
        manager.kept = TaskManager.load(manager, list(names))
    except Exception as error:  # of whatever library has the data
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"the data of {', '.join(names)} cannot be had: {(reason or [type(error).__name__])[0]}"
        ) from error
    return manager


def run_harness(manager: Any, tasks: Sequence[str], evaluator: Evaluator, settings: Settings) -> dict[str, Any]:
    """Return what the harness finds, and its samples."""
    import lm_eval
    from lm_eval.utils import handle_non_serializable

    from glm_hf.evaluation.harness import GLMHarness

    options = {key: value for key, value in settings.of_harness.items() if key not in ("include_path", "metadata")}
    model = GLMHarness(evaluator=evaluator, **settings.of_model)
    found = lm_eval.simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, **options)
    if found is None:  # on other ranks than the first
        return {}
    plain = json.loads(json.dumps(dict(found), default=handle_non_serializable))
    samples = plain.pop("samples", None)
    plain.pop("config", None)
    return {"harness": plain, **({"samples": samples} if samples else {})}


def read_result(path: Path) -> dict[str, Any]:
    """Return a result that was written; ValueError if it is none."""
    result = read_json(path)
    if not {"group_metrics", "tasks", "harness"} & result.keys():
        raise ValueError(f"{path} holds no result of glm-hf evaluate")
    return result
