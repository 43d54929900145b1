"""Files of multiple-choice questions: the choice that is most likely is the model's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm_hf.evaluation.evaluator import Evaluator, OnRow
from glm_hf.evaluation.original import metrics
from glm_hf.evaluation.original.items import FileResult, lay_out, padded_lengths, read_ids, visible_rows
from glm_hf.evaluation.original.task_file import TaskFile, read_items
from glm_hf.evaluation.samples import choice_sample, single_token_sample


class MultiChoiceFile:
    """
    Questions of one file, laid out.

    Where every choice of the whole file has one token, one `sop` serves all choices of a question.

    Args:
        task: What is asked.
        path: File of JSON lines with `inputs`, `choices` and `label`.
        evaluator: Tokenizes and scores.

    Raises:
        ValueError: If a line is damaged, choices do not fit the window, or there is none.
    """

    def __init__(self, task: TaskFile, path: Path, evaluator: Evaluator) -> None:
        self.task, self.evaluator = task, evaluator
        self.items = list(read_items(path))
        questions = [read_question(item, evaluator, path, number) for number, item in enumerate(self.items, start=1)]
        if not questions:
            raise ValueError(f"{path} has no questions")
        self.choices = [choices for _, choices in questions]
        is_single = all(len(choice) == 1 for choices in self.choices for choice in choices)
        self.is_single_token = is_single and not task.score_eop
        sample = single_token_sample if self.is_single_token else choice_sample
        self.samples = [
            lay_out(path, number, sample, text, choices, task.rule, evaluator.config)
            for number, (text, choices) in enumerate(questions, start=1)
        ]

    @property
    def num_rows(self) -> int:
        """Number of questions."""
        return len(self.samples)

    def run(self, on_row: OnRow) -> FileResult:
        """Score the questions."""
        scores = [known.log_probs for known in self.evaluator.score(self.samples, on_row)]
        log_probs = [[sum(choice) for choice in choices] for choices in scores]
        compared = log_probs
        if self.task.kind == "StereoSetTask" or self.task.normalize == "tokens":
            compared = [[sum(choice) / len(choice) for choice in choices] for choices in scores]
        predictions = [best(values) for values in compared]
        report = self._report(log_probs, predictions)
        more = {"is_single_token": self.is_single_token}
        return FileResult(self._metrics(log_probs, predictions), len(self.items), report, more)

    def _metrics(self, log_probs: list[list[float]], predictions: list[int]) -> dict[str, Any]:
        """Return what the task asks for."""
        if self.task.kind == "CrowsPairTask":
            return {"CP": metrics.crows_pairs(self.items, [values[0] for values in log_probs])}
        if self.task.kind == "StereoSetTask":
            return {"SS_ICAT": metrics.stereoset(self.items, predictions)}
        share = metrics.accuracy(predictions, [item["label"] for item in self.items])
        return dict.fromkeys(self.task.metrics, share)  # micro averages of F1, precision and recall are the accuracy

    def _report(self, log_probs: list[list[float]], predictions: list[int]) -> list[dict[str, Any]]:
        """Return what is to be told of every question."""
        padded = padded_lengths([len(sample.input_ids) for sample in self.samples], self.task.micro_batch_size)
        report = []
        for number, sample in enumerate(self.samples):
            item = {
                "token": sample.input_ids,
                "position_id": sample.position_ids,
                "num_context": sample.num_context,
                "blocks": [list(block) for block in sample.blocks],
                "choices": self.choices[number],
                "choice_target_ids": [list(range(*block)) for block in sample.blocks],
                "padded_length": padded[number],
                "log_probs": log_probs[number],
                "label": self.items[number]["label"],
            }
            if self.is_single_token:
                item["choices"] = [choice[0] for choice in self.choices[number]]
                item["choice_target_ids"] = [sample.blocks[0][0]]
            if self.task.kind != "CrowsPairTask":
                item["prediction"] = predictions[number]
            if (visible := visible_rows(number, sample.num_context, len(sample.input_ids), sample.blocks)) is not None:
                item["visible_rows"] = visible
            report.append(item)
        return report


def read_question(
    item: dict[str, Any], evaluator: Evaluator, path: Path, number: int
) -> tuple[list[int], list[list[int]]]:
    """Return ids of a question and of its choices; ValueError if there is something wrong with them."""
    where = f"{path}, item {number}"
    text = read_ids(item, "inputs", evaluator, where)
    choices = read_ids(item, "choices", evaluator, where, is_list=True)
    if not choices or not all(choices):
        raise ValueError(f"{where}: choices must be one or more texts that are not empty")
    if type(item.get("label")) is not int:
        raise ValueError(f"{where}: label must be the number of a choice, got {item.get('label')!r}")
    return text, choices


def best(values: Sequence[float]) -> int:
    """Return the number of the greatest value, the first if there are several."""
    return max(range(len(values)), key=lambda number: values[number])
