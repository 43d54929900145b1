"""Two results side by side: how far their figures are apart, whether by more than chance, and on which items.

Items are compared in pairs, so that what is hard for both counts for neither. Intervals are two-sided at 95%: of items
that are right or wrong those of Bonett and Price (2012), which hold for few changes, too; of other scores those of the
mean of the pairs' differences.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from glm_hf.evaluation.report.figures import Figure, figures_of, tasks_of
from glm_hf.evaluation.report.table import align, number

Z = 1.959964
"""Quantile of the normal distribution for 95%."""
MOST_CHANGED = 20
"""Number of changed items that are listed of a task."""


@dataclass(frozen=True)
class Change:
    """An item that is right in one result and wrong in the other, with what each says."""

    task: str
    item: str
    before: str
    after: str
    is_better: bool


@dataclass(frozen=True)
class Pairs:
    """The scores of the same items in two results."""

    scores: list[tuple[float, float]]
    changes: list[Change]

    @property
    def interval(self) -> tuple[float, float]:
        """Return the mean difference of the second to the first, and how far its interval reaches to either side."""
        differences = [after - before for before, after in self.scores]
        if set(differences) <= {-1.0, 0.0, 1.0}:
            count = len(differences) + 2
            better, worse = ((differences.count(sign) + 1) / count for sign in (1.0, -1.0))
            return fmean(differences), Z * math.sqrt((better + worse - (better - worse) ** 2) / count)
        return fmean(differences), Z * stdev(differences) / math.sqrt(len(differences))


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """
    Return the lines that set two results side by side.

    Raises:
        ValueError: If they have no task in common, or items of a task are not the same.
    """
    figures = {(each.task, each.group, each.metric): each for each in figures_of(before)}
    others = {(each.task, each.group, each.metric): each for each in figures_of(after)}
    shared = [key for key in figures if key in others]
    if not shared:
        raise ValueError("the results have no figure in common")
    pairs = pairs_of(before, after)
    rows = [["task", "group", "metric", "A", "B", "difference", "95% interval"]]
    for key in shared:
        rows.append([*key, *cells(figures[key], others[key], pairs)])
    changes = [change for each in pairs.values() for change in each.changes]
    return [*align(rows, names=3), *listed(changes)]


def cells(before: Figure, after: Figure, pairs: Mapping[tuple[str, str], Pairs]) -> list[str]:
    """Return both values, their difference and its interval, where items tell it."""
    found = pairs.get((before.task, before.group))
    difference = after.value - before.value
    interval = ""
    if found is not None and before.is_share:
        _, reach = found.interval
        interval = f"± {100 * reach:.2f}" + (" *" if abs(difference) > 100 * reach else "")
    return [number(before.value), number(after.value), f"{difference:+.3f}", interval]


def pairs_of(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[tuple[str, str], Pairs]:
    """Return the pairs of items by task and group."""
    found: dict[tuple[str, str], Pairs] = {}
    others = tasks_of(after)
    for name, task in tasks_of(before).items():
        if name in others:
            for group, files in task["metrics"].items():
                names = [file for file in files if file in others[name]["items"]]
                items = [(file, pair) for file in names for pair in zipped(name, file, task, others[name])]
                found[name, group] = paired(name, items)
    first, second = before.get("samples") or {}, after.get("samples") or {}
    for name in first.keys() & second.keys():
        items = [(str(a["doc_id"]), (a, b)) for a, b in zip(first[name], second[name], strict=False)]
        found[name, ""] = paired(name, items)
    return {key: pairs for key, pairs in found.items() if pairs.scores}


def zipped(
    name: str, file: str, task: Mapping[str, Any], other: Mapping[str, Any]
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Yield the items of a file in both results; ValueError if they are not the same."""
    first, second = task["items"][file], other["items"][file]
    if [item["token"] for item in first] != [item["token"] for item in second]:
        raise ValueError(f"the items of {name}, {file} are not the same in both results")
    yield from zip(first, second, strict=True)


def paired(name: str, items: list[tuple[str, tuple[Mapping[str, Any], Mapping[str, Any]]]]) -> Pairs:
    """Return scores and changes of items, of which those without a score are left out."""
    scores, changes = [], []
    for number_, (place, (before, after)) in enumerate(items):
        pair = score_of(before), score_of(after)
        if pair[0] is None or pair[1] is None:
            continue
        scores.append((pair[0], pair[1]))
        if pair[0] != pair[1]:
            changes.append(Change(name, f"{place}:{number_}", answer_of(before), answer_of(after), pair[1] > pair[0]))
    return Pairs(scores, changes)


def score_of(item: Mapping[str, Any]) -> float | None:
    """Return the share of an item that is right, None if there is none."""
    if "doc_id" in item:
        value = next((item[name] for name in ("acc", "exact_match", "em", "f1") if name in item), None)
        return None if value is None else float(value)
    if "EM" in item:
        return float(item["EM"])
    if "target_texts" in item:
        return float(item["prediction_text"] in item["target_texts"])
    if "prediction" in item and "label" in item:
        return float(item["prediction"] == item["label"])
    return None


def answer_of(item: Mapping[str, Any]) -> str:
    """Return what an item was answered by."""
    if "doc_id" in item:
        found = item["filtered_resps"]
        if found and isinstance(found[0], list):  # log-probabilities of choices
            found = item["arguments"][max(range(len(found)), key=lambda place: found[place][0])][1:]
        return str(found[0]).strip() if found else ""
    return str(item.get("prediction_text", item.get("prediction", "")))


def listed(changes: list[Change]) -> list[str]:
    """Return the lines that list changed items, some of each task."""
    lines: list[str] = []
    for name in dict.fromkeys(change.task for change in changes):
        of_task = [change for change in changes if change.task == name]
        better = sum(change.is_better for change in of_task)
        lines.append(f"{name}: {better} items right in B only, {len(of_task) - better} in A only")
        for change in of_task[:MOST_CHANGED]:
            lines.append(f"    {change.item}  A: {change.before}  B: {change.after}")
        if len(of_task) > MOST_CHANGED:
            lines.append(f"    and {len(of_task) - MOST_CHANGED} more")
    return lines
