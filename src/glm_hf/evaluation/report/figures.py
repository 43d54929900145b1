"""The figures in a result, of the original's tasks and of the harness' alike."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PERCENT = ("acc", "acc_norm", "acc_bytes", "exact_match", "em", "f1")
"""Metrics of the harness that are shares, and shown in percent as the original's."""
STEREOSET = ("LMS", "SS", "ICAT")


@dataclass(frozen=True)
class Figure:
    """One number of a task; the others are those of the files that it is the average of."""

    task: str
    group: str
    metric: str
    value: float
    """In percent for shares."""
    greatest: float | None = None
    median: float | None = None
    error: float | None = None
    """Standard error, where the harness tells it."""

    @property
    def is_share(self) -> bool:
        """Whether it is in percent."""
        return self.metric in ("Accuracy", "EM", "F1", "F1_mul", "Precision", "Recall", "CP", *STEREOSET, *PERCENT)


def figures_of(result: Mapping[str, Any]) -> list[Figure]:
    """Return all figures of a result, as `evaluate` writes it."""
    found = [figure for name, task in tasks_of(result).items() for figure in original_figures(name, task)]
    return [*found, *harness_figures(result.get("harness") or {})]


def tasks_of(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the original's tasks in a result, by name; a result of one task file is the task itself."""
    if "group_metrics" in result:
        return {str(result["task"]["name"]): result}
    return dict(result.get("tasks") or {})


def original_figures(name: str, task: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield the figures of one of the original's tasks."""
    for group, metrics in task["group_metrics"].items():
        for metric, values in (metrics or {}).items():
            yield Figure(name, group, metric, values["average"], values["max"], values["median"])
        if metrics is None:
            for file in task["metrics"][group].values():
                yield from particular_figures(name, file["metrics"])


def particular_figures(name: str, metrics: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield figures by category: of CrowS-Pairs, StereoSet and the Pile."""
    for category, share in metrics.get("CP", {}).items():
        yield Figure(name, category, "CP", 100 * share)
    for metric, scores in zip(STEREOSET, metrics.get("SS_ICAT", ()), strict=False):
        for category, score in scores.items():
            yield Figure(name, category, metric, score)
    for category, bits in metrics.get("BPB", {}).items():
        yield Figure(name, category, "BPB", bits)


def harness_figures(harness: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield the figures of the harness, of tasks and then of groups."""
    groups = harness.get("groups") or {}
    tasks = {name: found for name, found in (harness.get("results") or {}).items() if name not in groups}
    for found, is_group in ((tasks, False), (groups, True)):
        for name, metrics in found.items():
            for key, value in metrics.items():
                metric, _, kind = key.partition(",")
                if metric.endswith("_stderr") or not kind or not isinstance(value, (int, float)):
                    continue
                error = metrics.get(f"{metric}_stderr,{kind}")
                scale = 100 if metric in PERCENT else 1
                error = scale * error if isinstance(error, float) and math.isfinite(error) else None
                yield Figure(name, "(group)" if is_group else "", metric, scale * value, error=error)
