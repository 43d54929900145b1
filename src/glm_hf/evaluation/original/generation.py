"""Files of texts to be continued or filled, greedily or by beams; LAMBADA's last words among them."""

import string
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glm_hf.evaluation.beams import Beam, BeamSettings
from glm_hf.evaluation.evaluator import Evaluator, OnRow
from glm_hf.evaluation.original import metrics
from glm_hf.evaluation.original.items import FileResult, lay_out, padded_lengths, read_ids, visible_rows
from glm_hf.evaluation.original.task_file import TaskFile, read_items
from glm_hf.evaluation.samples import generation_row

UNWANTED = (20068, 146010, 146337)
"""Pieces of GLM-130B's vocabulary that the original never lets an answer of LAMBADA have."""
UNWANTED_FIRST = (46010, 146337)
"""Those that it never lets one begin with."""


class GenerationFile:
    """
    Texts of one file, laid out.

    Args:
        task: What is asked.
        path: File of JSON lines with `inputs` and `targets`.
        evaluator: Tokenizes and continues.

    Raises:
        ValueError: If a line is damaged, there is no room for an answer, or there is no line.
    """

    def __init__(self, task: TaskFile, path: Path, evaluator: Evaluator) -> None:
        self.task, self.evaluator = task, evaluator
        self.rows, self.targets = [], []
        for number, item in enumerate(read_items(path), start=1):
            where = f"{path}, item {number}"
            text = read_ids(item, "inputs", evaluator, where)
            self.targets.append(read_targets(item, evaluator, where))
            row = lay_out(path, number, generation_row, text, task.max_gen_length, task.rule, evaluator.config)
            self.rows.append(row)
        if not self.rows:
            raise ValueError(f"{path} has no texts")
        lengths = [len(row) for row, _ in self.rows]
        self.padded = padded_lengths(lengths, task.micro_batch_size) if task.penalize_context else lengths

    @property
    def num_rows(self) -> int:
        """Number of texts."""
        return len(self.rows)

    def run(self, on_row: OnRow) -> FileResult:
        """Continue the texts."""
        if self.task.sampling_strategy == "BeamSearchStrategy":
            settings = beam_settings(self.task, self.evaluator)
            found = self.evaluator.search_beams(self.rows, self.padded, settings, on_row)
            how: list[dict[str, Any]] = [{"beams": [beam_report(beam) for beam in beams]} for beams in found]
            answers = [self._choose(beams) for beams in found]
        else:
            continued = self.evaluator.generate(self.rows, self.task.max_gen_length, on_row=on_row)
            how = [{"token_log_probs": known.log_probs, "min_margin": known.margin} for known in continued]
            answers = [known.ids for known in continued]
        report = [self._report(number, answers[number], how[number]) for number in range(len(self.rows))]
        scores = {name: [item[name] for item in report] for name in self.task.metrics}
        found_metrics = {name: 100 * sum(values) / len(values) for name, values in scores.items()}
        if self.task.kind == "LAMBADA":
            for item in report:
                del item["Accuracy"]
        return FileResult(found_metrics, len(report), report)

    def _choose(self, beams: Sequence[Beam]) -> list[int]:
        """Return the ids of the beam that answers, without its end token."""
        return (
            choose_word(beams, self.evaluator) if self.task.kind == "LAMBADA" else best_answer(beams, self.evaluator)
        )

    def _report(self, number: int, answer: list[int], how: dict[str, Any]) -> dict[str, Any]:
        """Return what is to be told of a text."""
        (row, layout), targets = self.rows[number], self.targets[number]
        steps = range(self.task.max_gen_length)
        target_texts = [self.evaluator.decode(target) for target in targets]
        text = self.evaluator.decode(answer)
        item: dict[str, Any] = {
            "token": row,
            "position_id": list(layout.position_ids),
            "target_position_id": [layout.next_position + step * layout.increment for step in steps],
            "context_length": len(row),
            "num_mutually_visible": layout.num_context,
            "padded_length": self.padded[number],
            **how,
            "generated": answer,
            "targets": targets,
            "target_texts": target_texts,
        }
        blocks = [(layout.num_context, len(row))]
        if (visible := visible_rows(number, layout.num_context, len(row), blocks)) is not None:
            item["visible_rows"] = visible
        if self.task.kind == "LAMBADA":
            word = metrics.first_word(text)
            item |= {"prediction": self.evaluator.tokenize(word) if word else [], "prediction_text": word}
            return item | {"Accuracy": float(word in target_texts)}
        scores = {"EM": metrics.exact_match(text, target_texts), "F1": metrics.f1(text, target_texts)}
        if "Accuracy" in self.task.metrics:
            scores["Accuracy"] = float(answer in targets)
        return item | {"prediction_text": text, **scores}


def read_targets(item: dict[str, Any], evaluator: Evaluator, where: str) -> list[list[int]]:
    """Return the ids of every target; one target may stand without a list around it."""
    key = "targets" if "targets" in item else "targets_pretokenized"
    value = item.get(key)
    is_ids = key == "targets" and isinstance(value, list) and value != [] and type(value[0]) is int
    is_one = isinstance(value, str) or is_ids
    if value is None:
        raise ValueError(f"{where}: targets_pretokenized must be a list of texts, or targets lists of ids")
    return read_ids({key: [value]} if is_one else item, "targets", evaluator, where, is_list=True)


def beam_settings(task: TaskFile, evaluator: Evaluator) -> BeamSettings:
    """Return how beams are searched."""
    settings = BeamSettings(
        task.num_beams,
        task.length_penalty,
        task.no_repeat_ngram_size,
        task.min_gen_length,
        task.max_gen_length,
        task.penalize_context,
    )
    return with_bans(settings, evaluator) if task.kind == "LAMBADA" else settings


def with_bans(settings: BeamSettings, evaluator: Evaluator) -> BeamSettings:
    """Return settings by which answers are words: no punctuation at the beginning, nor on its own."""
    marks = [tuple(evaluator.tokenize(mark)) for mark in string.punctuation]
    vocab_size = evaluator.config.vocab_size
    never = {*(mark[0] for mark in marks if len(mark) == 1), *(piece for piece in UNWANTED if piece < vocab_size)}
    prefixes = {*marks, *((piece,) for piece in UNWANTED_FIRST if piece < vocab_size)}
    return replace(settings, banned_tokens=tuple(sorted(never)), banned_prefixes=tuple(sorted(prefixes)))


def best_answer(beams: Sequence[Beam], evaluator: Evaluator) -> list[int]:
    """Return the ids of the best beam, without its end token."""
    return without_end(beams[0].ids, evaluator.end_ids)


def choose_word(beams: Sequence[Beam], evaluator: Evaluator) -> list[int]:
    """Return the ids of the first beam whose first word has a punctuation mark behind, else of the best one."""
    answers = [without_end(beam.ids, evaluator.end_ids) for beam in beams]
    texts = [evaluator.decode(answer) for answer in answers]
    return answers[next((place for place, text in enumerate(texts) if metrics.ends_in_punctuation(text)), 0)]


def beam_report(beam: Beam) -> dict[str, Any]:
    """Return what is to be told of a beam."""
    return {"ids": beam.ids, "length_scored": beam.length, "penalized_score": beam.score}


def without_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """Return ids without an end token behind."""
    return ids[:-1] if ids and ids[-1] in end_ids else ids
