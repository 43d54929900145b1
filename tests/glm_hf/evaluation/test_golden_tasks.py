"""Tasks as the code released with GLM-130B ran them: every id, position, mask, score, prediction and metric."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from glm_hf.evaluation.original.runs import run_task
from glm_hf.evaluation.original.task_file import find_files, read_task

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "evaluation"
TASKS = sorted(path.parent.name for path in GOLDEN.glob("*/task.yaml"))
OF_THE_MAKER = {
    *("printed", "max_difference_to_fp64", "items_other_in_fp64"),
    *("same_in_fp64", "best_same_in_fp64"),
}
TOLERANCES = {"log_probs": 5e-4, "token_log_probs": 5e-4, "min_margin": 1e-3, "penalized_score": 1e-4}
EXACT = 1e-9


def tolerance(name: str, expected: float, item: dict) -> float:
    if name == "loss":
        return 1e-3 + 1e-5 * item["num_loss_tokens"]
    return TOLERANCES.get(name, EXACT * max(1.0, abs(expected)))


def differences(expected, found, where="", name="", item=None):
    """Yield what is other than expected, by path."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            if key not in OF_THE_MAKER:
                inner = key if isinstance(value, float) or key in TOLERANCES else name
                inner = "BPB" if key == "BPB" else "PPL" if key == "PPL" else inner
                missing = not isinstance(found, dict) or key not in found
                yield from (
                    [f"{where}/{key} is missing"]
                    if missing
                    else differences(value, found[key], f"{where}/{key}", inner, expected)
                )
    elif isinstance(expected, list):
        if not isinstance(found, list) or len(found) != len(expected):
            yield f"{where}: {found} instead of {expected}"
            return
        for index, (value, other) in enumerate(zip(expected, found, strict=True)):
            yield from differences(value, other, f"{where}[{index}]", name, item)
    elif isinstance(expected, float) and isinstance(found, (int, float)):
        limit = tolerance(name, expected, item or {})
        limit = 1e-3 * abs(expected) if "/PPL" in where else 1e-4 if "/BPB" in where else limit
        if abs(found - expected) > limit:
            yield f"{where}: {found} instead of {expected}"
    elif found != expected:
        yield f"{where}: {found} instead of {expected}"


@pytest.mark.parametrize("name", TASKS)
def test_a_task_gives_what_the_original_gives(name, evaluator):
    expected = json.loads((GOLDEN / name / "expected.json").read_text())
    found = json.loads(json.dumps(run_task(GOLDEN / name / "task.yaml", evaluator)))
    assert list(differences(expected, found)) == []


@pytest.mark.parametrize("name", TASKS)
def test_fields_and_files_of_a_task_are_the_originals(name):
    config = json.loads((GOLDEN / name / "config.json").read_text())
    task = read_task(GOLDEN / name / "task.yaml")
    assert {key: value for key, value in config["config"].items() if vars(task)[key] != value} == {}
    assert task.kind == config["task_class"]
    for data_dir in (None, GOLDEN, GOLDEN / name):
        folder, groups = find_files(task, GOLDEN / name / "task.yaml", data_dir)
        assert folder == GOLDEN / name
        assert groups == config["file_groups"]


def test_all_tasks_are_there():
    assert len(TASKS) == 26


def test_two_ranks_give_what_the_original_gives(tmp_path):
    names = ("mul_mask_multi", "gen_beam_mask", "gen_greedy_batched", "lm_bidirectional_short")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    tasks = [f"{name}/task" for name in names]
    command = ["-m", "glm_hf.cli", "evaluate", GOLDEN / "model", *tasks, "--tasks-dir", GOLDEN, "--data-dir", GOLDEN]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, *command, "--output", tmp_path / "result.json"], check=True, env=environment)
    result = json.loads((tmp_path / "result.json").read_text())
    for name, found in zip(names, result["tasks"].values(), strict=True):
        expected = json.loads((GOLDEN / name / "expected.json").read_text())
        assert list(differences(expected, found)) == [], name
