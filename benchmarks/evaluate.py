"""
Time multiple-choice evaluation: all choices of a question in one row, and what is spent besides the forward passes.

    python benchmarks/evaluate.py [--questions N] [--rounds N] [--model FOLDER]

Questions are the held-out ones that come with the package, alone and behind others as examples, each with four
choices. Prints ratios of medians of rounds in which all ways take turns.

    one row    all choices of a question in one row, as `glm-hf evaluate` has them
    four rows  a row for each choice, the question read again
    bare       the forward passes of `one row` alone, with their arguments made before
    evaluate   a task file from reading to figures, with the same rows
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from glm_hf.conversion.loading import Loaded, load
from glm_hf.evaluation.evaluator import Evaluator
from glm_hf.evaluation.original.runs import run_task
from glm_hf.evaluation.samples import Rule, Sample, choice_sample, stack

DATA = files("glm_hf") / "evaluation" / "tasks" / "world_facts"
EXAMPLES = (0, 8)


def read_questions(count: int, num_examples: int) -> list[dict[str, Any]]:
    """Return questions with four choices, each behind some others with their answers."""
    rows = [
        json.loads(line)
        for language in ("en", "zh")
        for line in (DATA / f"heldout.{language}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    rows = [row for row in rows if len(row["choices"]) == 4]
    shown = [row["text"].replace("[MASK]", row["answer"]) for row in rows]
    return [
        {
            "inputs_pretokenized": "\n".join([*shown[number + 1 : number + 1 + num_examples], row["text"]]),
            "choices_pretokenized": row["choices"],
            "label": row["label"],
        }
        for number, row in enumerate((rows * (count // len(rows) + 1))[:count])
    ]


def alone(sample: Sample) -> list[Sample]:
    """Return a row for each choice of a question."""
    rows = []
    for start, end in sample.blocks:
        kept = [*range(sample.num_context), *range(start, end)]
        places = range(sample.num_context, len(kept))
        targets = sample.targets[sample.rows.index(start) :][: end - start]
        rows.append(
            replace(
                sample,
                input_ids=[sample.input_ids[place] for place in kept],
                position_ids=[sample.position_ids[place] for place in kept],
                blocks=[(sample.num_context, len(kept))],
                rows=list(places),
                targets=targets,
                splits=[len(targets)],
            )
        )
    return rows


def seconds(function: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@torch.no_grad()
def run_bare(evaluator: Evaluator, batches: list[dict[str, Any]]) -> None:
    """Run the model on arguments that are ready."""
    for arguments in batches:
        evaluator.model(**arguments)


def make_batches(evaluator: Evaluator, samples: list[Sample]) -> list[dict[str, Any]]:
    """Return the arguments of all forward passes."""
    batches = []
    for numbers in evaluator.scorer.batches(samples):
        chosen = [samples[number] for number in numbers]
        arguments = stack(chosen, evaluator.config.pad_token_id)
        kept = torch.zeros(arguments["input_ids"].shape, dtype=torch.bool)
        for index, sample in enumerate(chosen):
            kept[index, sample.rows] = True
        batches.append({**arguments, "use_cache": False, "logits_to_keep": kept})
    return batches


def main() -> None:
    """Time all ways and print their ratios."""
    parser = argparse.ArgumentParser(description="Time multiple-choice evaluation.")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default=str(files("glm_hf") / "world_facts"))
    options = parser.parse_args()
    loaded = load(options.model, dtype="float32")
    size = loaded.model.num_parameters() / 1e6
    print(f"{size:.1f} M parameters, {torch.get_num_threads()} threads, {options.questions} questions of 4 choices")
    print(f"{'examples':>8}{'tokens':>8}{'four rows / one row':>22}{'evaluate / bare':>18}{'questions/s':>13}")
    for num_examples in EXAMPLES:
        questions = read_questions(options.questions, num_examples)
        length, of = time_ways(loaded, questions, options.rounds)
        print(
            f"{num_examples:>8}{length:>8.0f}{of['four'] / of['one']:>22.2f}{of['evaluate'] / of['bare']:>18.2f}"
            f"{len(questions) / of['evaluate']:>13.0f}"
        )


def time_ways(loaded: Loaded, questions: list[dict[str, Any]], num_rounds: int) -> tuple[float, dict[str, float]]:
    """Return the mean length of a row, and the median time of every way, in seconds."""
    evaluator, config = Evaluator(loaded.model, loaded.tokenizer), loaded.model.config
    rule = Rule(max_length=config.max_position_embeddings)
    together = [
        choice_sample(
            evaluator.tokenize(item["inputs_pretokenized"]),
            [evaluator.tokenize(choice) for choice in item["choices_pretokenized"]],
            rule,
            config,
        )
        for item in questions
    ]
    apart = [row for sample in together for row in alone(sample)]
    batches = make_batches(evaluator, together)
    with TemporaryDirectory() as folder:
        path = Path(folder, "task.yaml")
        task = {"name": "questions", "type": "mul", "path": ".", "max_seq_length": rule.max_length}
        path.write_text(json.dumps({**task, "file_pattern": "*.jsonl"}))
        Path(folder, "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
        ways: dict[str, Callable[[], Any]] = {
            "one": lambda: evaluator.scorer.score(together),
            "four": lambda: evaluator.scorer.score(apart),
            "bare": lambda: run_bare(evaluator, batches),
            "evaluate": lambda: run_task(path, Evaluator(loaded.model, loaded.tokenizer)),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(num_rounds):
            for name, way in ways.items():
                times[name].append(seconds(way))
    length = sum(len(sample.input_ids) for sample in together) / len(together)
    return length, {name: median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
