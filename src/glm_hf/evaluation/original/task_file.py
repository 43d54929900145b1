"""The original's task files: YAML of what is asked, and the JSON lines or texts that it is asked of.

Names of fields may be written with `-` or `_`. Data are found below `path`, in groups by patterns of file names.

Source: the task files released with GLM-130B.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from glob import escape, glob
from os.path import join, relpath
from pathlib import Path
from typing import Any

import yaml

from glm_hf.evaluation.samples import Rule
from glm_hf.folders.validation import read_text

TYPES = {"mul": ["Accuracy"], "gen": ["EM", "F1"], "lm": ["PPL"]}
"""Types of tasks, and their metrics by default."""
MODULES = {
    "LAMBADA": ("gen", ["Accuracy"]),
    "MMLU": ("mul", ["Accuracy"]),
    "CrowsPairTask": ("mul", ["CP"]),
    "StereoSetTask": ("mul", ["SS_ICAT"]),
    "Pile": ("lm", ["BPB"]),
}
"""Classes of tasks with rules of their own, by the last part of `module`: their type and metrics."""
FIXED = ("LAMBADA", "CrowsPairTask", "StereoSetTask", "Pile")
"""Classes whose metrics are not chosen."""
METRICS = {
    "mul": {"Accuracy", "F1_mul", "Precision", "Recall", "CP", "SS_ICAT"},
    "gen": {"EM", "F1", "Accuracy"},
    "lm": {"PPL", "BPB"},
}
MOST_BYTES = 2**34
"""Largest data file that is read."""


@dataclass(frozen=True)
class TaskFile:
    """What a task file says; the names are the original's, but for the last four."""

    name: str
    type: str
    path: str
    module: str | None = None
    metrics: list[str] = field(default_factory=list)
    use_task_mask: bool = False
    use_multitask_encoding: bool = False
    unidirectional: bool = False
    max_seq_length: int = 2048
    file_pattern: str | dict[str, str] = "**/*.json*"
    micro_batch_size: int = 1
    sampling_strategy: str = "BaseStrategy"
    num_beams: int = 4
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 3
    min_gen_length: int = 0
    max_gen_length: int = 128
    generation_length: int = 256
    add_eos: bool = False
    """Whether `</s>` stands behind a text that does not end in its mask. This and what follows is ours."""
    score_eop: bool = False
    """Whether the end of a choice counts."""
    normalize: str = "none"
    """`tokens` for the mean of a choice's log-probabilities instead of their sum."""
    penalize_context: bool = True
    """Whether the length penalty of beams counts the padded context, or new tokens only."""

    @property
    def kind(self) -> str:
        """Name of the class of the task, as the original calls it."""
        plain = {"mul": "MultiChoiceTask", "gen": "GenerationTask", "lm": "LanguageModelTask"}
        return self.module.rpartition(".")[2] if self.module else plain[self.type]

    @property
    def rule(self) -> Rule:
        """How texts become rows."""
        mask = "[gMASK]" if self.use_task_mask else "[MASK]"
        is_unidirectional = self.unidirectional and self.type != "mul"
        return Rule(mask, is_unidirectional, self.max_seq_length, self.add_eos, self.score_eop)


def read_task(path: str | Path, overrides: Mapping[str, Any] | None = None) -> TaskFile:
    """
    Return what a task file says.

    Args:
        path: YAML file.
        overrides: Fields that have other values.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no YAML, or a field is missing, unknown or out of range.
    """
    text = read_text(Path(path))
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not a YAML file: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no fields; expected those of a task")
    given = {str(name).replace("-", "_"): value for name, value in content.items()}
    try:
        return parse_task({**given, **(overrides or {})})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_task(given: Mapping[str, Any]) -> TaskFile:
    """Return a task of its fields; ValueError if one is missing, unknown or out of range."""
    known = {each.name: each.type for each in fields(TaskFile)}
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"unknown field {unknown[0]}; known are {', '.join(known)}")
    if missing := sorted({"name", "type", "path"} - set(given)):
        raise ValueError(f"field {missing[0]} is missing")
    for name, value in given.items():
        require_kind(name, value, getattr(TaskFile, name, None))
    task = TaskFile(**given)
    if task.type not in TYPES:
        raise ValueError(f"type must be one of {', '.join(TYPES)}, got {task.type}")
    if task.module is not None and task.kind not in MODULES:
        raise ValueError(f"module must be a class of {', '.join(MODULES)}, got {task.module}")
    expected, metrics = MODULES.get(task.kind, (task.type, TYPES[task.type]))
    if expected != task.type:
        raise ValueError(f"{task.kind} needs type {expected}, got {task.type}")
    if task.use_multitask_encoding:
        raise ValueError("use_multitask_encoding is supported neither here nor in the original")
    if task.sampling_strategy not in ("BaseStrategy", "BeamSearchStrategy"):
        raise ValueError(f"sampling_strategy must be BaseStrategy or BeamSearchStrategy, got {task.sampling_strategy}")
    if task.normalize not in ("none", "tokens"):
        raise ValueError(f"normalize must be none or tokens, got {task.normalize}")
    if task.unidirectional and not task.use_task_mask:
        raise ValueError("unidirectional needs use_task_mask: true")
    if task.kind == "LAMBADA" and task.sampling_strategy != "BeamSearchStrategy":
        raise ValueError("LAMBADA needs sampling_strategy: BeamSearchStrategy")
    least = {"micro_batch_size": 1, "num_beams": 1, "max_gen_length": 1, "generation_length": 1}
    least |= {"no_repeat_ngram_size": 0, "min_gen_length": 0, "max_seq_length": 4}
    for name, number in least.items():
        if getattr(task, name) < number:
            raise ValueError(f"{name} must be at least {number}, got {getattr(task, name)}")
    chosen = task.metrics if task.metrics and task.kind not in FIXED else metrics
    if unknown := [name for name in chosen if name not in METRICS[task.type]]:
        raise ValueError(f"unknown metric {unknown[0]}; {task.type} has {', '.join(sorted(METRICS[task.type]))}")
    return TaskFile(**{**vars(task), "metrics": list(chosen)})


def require_kind(name: str, value: Any, default: Any) -> None:
    """Raise ValueError unless a field is of the kind of its default."""
    if name == "file_pattern":
        parts = [*value, *value.values()] if isinstance(value, dict) and value else [value]
        is_right, wanted = all(isinstance(part, str) for part in parts), "a pattern, or patterns by name of group"
    elif name == "metrics":
        is_right, wanted = isinstance(value, list) and all(isinstance(each, str) for each in value), "names"
    elif isinstance(default, bool):
        is_right, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        is_right, wanted = type(value) is int, "an integer"
    elif isinstance(default, float):
        is_right, wanted = type(value) in (int, float), "a number"
    else:
        is_right, wanted = isinstance(value, str) or (name == "module" and value is None), "text"
    if not is_right:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def find_files(task: TaskFile, task_path: Path, data_dir: Path | None) -> tuple[Path, dict[str, list[str]]]:
    """
    Return the folder of a task's data, and the files of every group in it, in order.

    Args:
        task: The task.
        task_path: Where its file is.
        data_dir: Folder that `path` is below, or the data's own; by default that of the task file, or the one above.

    Raises:
        FileNotFoundError: If a group has no file.
    """
    homes = [data_dir] if data_dir is not None else [task_path.parent, task_path.parent.parent]
    folders = [*(home / task.path for home in homes), homes[0]]
    patterns = {"all": task.file_pattern} if isinstance(task.file_pattern, str) else task.file_pattern
    for folder in folders:
        groups = {
            name: [relpath(path, folder) for path in sorted(glob(join(escape(str(folder)), pattern), recursive=True))]
            for name, pattern in patterns.items()
        }
        if any(groups.values()):
            if empty := [name for name, found in groups.items() if not found]:
                raise FileNotFoundError(f"no file in {folder} matches {patterns[empty[0]]} of group {empty[0]}")
            return folder, groups
    pattern = next(iter(patterns.values()))
    raise FileNotFoundError(f"no file in {folders[0]} matches {pattern}; --data-dir says where the data are")


def read_lines(path: Path) -> str:
    """Return the text of a data file, whose lines end in a line feed whatever they end in there."""
    return read_text(path, MOST_BYTES).replace("\r\n", "\n").replace("\r", "\n")


def read_items(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines; ValueError if a line is none."""
    for number, line in enumerate(read_lines(path).split("\n"), start=1):
        if line.strip() == "":
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(item, dict):
            raise ValueError(f"{path}, line {number}: expected an object, got {type(item).__name__}")
        yield item
