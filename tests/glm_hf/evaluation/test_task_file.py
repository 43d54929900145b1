"""Damaged task files and data: one clear line each."""

import json

import pytest

from glm_hf.evaluation.original.runs import run_task
from glm_hf.evaluation.original.task_file import read_task

TASK = {"name": "t", "type": "mul", "path": "t", "file_pattern": "*.jsonl", "max_seq_length": 64}
ITEM = {
    "inputs_pretokenized": "The capital of France is [MASK].",
    "choices_pretokenized": ["Paris", "Rome"],
    "label": 0,
}
TEXT = {"inputs_pretokenized": "The capital of France is", "targets_pretokenized": ["Paris."]}
GEN = {**TASK, "type": "gen", "max_gen_length": 8}


def write(folder, task, lines, name="data.jsonl"):
    """Write a task and its data, and return the task file."""
    (folder / "task.yaml").write_text(task if isinstance(task, str) else json.dumps(task))
    rows = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    (folder / name).write_text("\n".join(rows))
    return folder / "task.yaml"


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("name: [", "not a YAML file"),
        ("- a", "holds no fields"),
        ("", "holds no fields"),
        ({**TASK, "colour": 1}, "unknown field colour"),
        ({"name": "t", "type": "mul"}, "field path is missing"),
        ({**TASK, "type": "quiz"}, "type must be one of mul, gen, lm"),
        ({**TASK, "module": "tasks.other.Task"}, "module must be a class of"),
        ({**TASK, "module": "tasks.lambada.task.LAMBADA"}, "LAMBADA needs type gen"),
        ({**GEN, "module": "tasks.lambada.task.LAMBADA"}, "LAMBADA needs sampling_strategy"),
        ({**TASK, "use_multitask_encoding": True}, "use_multitask_encoding"),
        ({**TASK, "unidirectional": True}, "unidirectional needs use_task_mask"),
        ({**TASK, "max_seq_length": "long"}, "max_seq_length must be an integer"),
        ({**TASK, "max_seq_length": True}, "max_seq_length must be an integer"),
        ({**TASK, "max_seq_length": 1}, "max_seq_length must be at least 4"),
        ({**TASK, "micro-batch-size": 0}, "micro_batch_size must be at least 1"),
        ({**TASK, "use_task_mask": "yes"}, "use_task_mask must be true or false"),
        ({**TASK, "file-pattern": 3}, "file_pattern must be a pattern"),
        ({**TASK, "metrics": "Accuracy"}, "metrics must be names"),
        ({**TASK, "metrics": ["BLEU"]}, "unknown metric BLEU"),
        ({**TASK, "normalize": "words"}, "normalize must be none or tokens"),
        ({**GEN, "sampling_strategy": "Other"}, "sampling_strategy must be"),
        ({**GEN, "length_penalty": "high"}, "length_penalty must be a number"),
    ],
)
def test_a_damaged_task_file_is_one_clear_line(task, reason, tmp_path, evaluator):
    path = write(tmp_path, task, [ITEM])
    with pytest.raises(ValueError, match=reason) as caught:
        run_task(path, evaluator)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "lines", "reason"),
    [
        (TASK, [], "has no questions"),
        (TASK, ["", "  "], "has no questions"),
        (TASK, ["{"], "line 1: not JSON"),
        (TASK, [ITEM, "[1]"], "line 2: expected an object"),
        (TASK, [{**ITEM, "label": "Paris"}], "item 1: label must be the number of a choice"),
        (TASK, [{"choices_pretokenized": ["a"], "label": 0}], "inputs_pretokenized must be a text"),
        (TASK, [{**ITEM, "choices_pretokenized": "Paris"}], "choices_pretokenized must be a list of texts"),
        (TASK, [{**ITEM, "choices_pretokenized": []}], "choices must be one or more texts"),
        (TASK, [{**ITEM, "choices_pretokenized": ["Paris", ""]}], "choices must be one or more texts"),
        (TASK, [{**ITEM, "choices": [[1], [99999]]}], "choices must be lists of ids of the vocabulary"),
        (TASK, [{**ITEM, "inputs": "text"}], "inputs must be ids of the vocabulary"),
        (
            TASK,
            [ITEM, {**ITEM, "choices": [[7] * 80, [8]]}],
            "item 2: the choices have 81 tokens, which leaves no room",
        ),
        (GEN, [], "has no texts"),
        (GEN, [{"inputs_pretokenized": "a"}], "item 1: targets_pretokenized must be"),
        (GEN, [{**TEXT, "targets": [5, "a"]}], "targets must be lists of ids"),
        ({**GEN, "max_gen_length": 63}, [TEXT], "63 new tokens leave no room"),
        ({**GEN, "use_task_mask": True}, [{**TEXT, "inputs_pretokenized": "a [gMASK] b"}], "must stand at the end"),
        ({**TASK, "type": "lm"}, [], "has no text"),
        ({**TASK, "type": "lm", "generation_length": 99}, ["word " * 66], "leaves a window without tokens"),
    ],
)
def test_damaged_data_are_one_clear_line(task, lines, reason, tmp_path, evaluator):
    path = write(tmp_path, task, lines)
    with pytest.raises(ValueError, match=reason) as caught:
        run_task(path, evaluator)
    assert "data.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("item", [{"text_pretokenized": "a"}, {"text": [1], "meta": {"pile_set_name": "x"}}])
def test_a_damaged_document_of_the_pile_is_one_clear_line(item, tmp_path, evaluator):
    task = {**TASK, "type": "lm", "module": "tasks.language-modeling.pile.Pile"}
    with pytest.raises(ValueError, match="item 1: "):
        run_task(write(tmp_path, task, [item]), evaluator)


def test_missing_files_are_named(tmp_path, evaluator):
    with pytest.raises(FileNotFoundError):
        run_task(tmp_path / "none.yaml", evaluator)
    path = write(tmp_path, {**TASK, "file_pattern": "*.json"}, [ITEM])
    with pytest.raises(FileNotFoundError, match=r"matches \*\.json; --data-dir"):
        run_task(path, evaluator)
    path = write(tmp_path, {**TASK, "file_pattern": {"a": "*.jsonl", "b": "*.txt"}}, [ITEM])
    with pytest.raises(FileNotFoundError, match=r"matches \*\.txt of group b"):
        run_task(path, evaluator)


def test_lines_may_end_in_any_way(tmp_path, evaluator):
    found = []
    for end in ("\n", "\r\n", "\r"):
        path = write(tmp_path, TASK, [])
        (tmp_path / "data.jsonl").write_bytes((json.dumps(ITEM) + end + json.dumps(ITEM) + end).encode())
        found.append(run_task(path, evaluator))
        (tmp_path / "data.jsonl").write_bytes(f"The capital of France{end}is Paris.{end}".encode())
        found.append(run_task(write(tmp_path, {**TASK, "type": "lm"}, [f"a b{end}c d"]), evaluator))
    questions, texts = found[::2], found[1::2]
    assert all(each["items"] == questions[0]["items"] for each in questions)
    assert len(questions[0]["items"]["data.jsonl"]) == 2
    assert all(each["metrics"] == texts[0]["metrics"] for each in texts)


def test_names_of_fields_have_either_kind_of_dash(tmp_path):
    one, other = ({f"micro{dash}batch{dash}size": 7, **TASK} for dash in "-_")
    assert read_task(write(tmp_path, one, [])) == read_task(write(tmp_path, other, []))


def test_an_item_without_targets_counts_as_wrong(tmp_path, evaluator):
    path = write(tmp_path, GEN, [TEXT, {**TEXT, "targets_pretokenized": []}])
    found = run_task(path, evaluator)
    assert found["metrics"]["all"]["data.jsonl"]["metrics"]["EM"] in (0.0, 50.0)


@pytest.mark.parametrize("changes", [{"normalize": "tokens"}, {"score_eop": True}, {"add_eos": True}])
def test_options_of_ours_change_the_scores(changes, tmp_path, evaluator):
    items = [{**ITEM, "choices_pretokenized": ["Paris", "the city of Paris"]}]
    plain = run_task(write(tmp_path, TASK, items), evaluator)["items"]["data.jsonl"][0]
    other = run_task(write(tmp_path, {**TASK, **changes}, items), evaluator)["items"]["data.jsonl"][0]
    changed = plain["log_probs"] != other["log_probs"]
    assert changed is (changes != {"normalize": "tokens"})
    if "normalize" in changes:
        means = [value / len(choice) for value, choice in zip(plain["log_probs"], plain["choices"], strict=True)]
        assert other["prediction"] == means.index(max(means))


def test_beams_need_not_count_the_padding(tmp_path, evaluator):
    beams = {**GEN, "sampling_strategy": "BeamSearchStrategy"}
    found = [
        run_task(write(tmp_path, {**beams, "penalize_context": counts}, [TEXT]), evaluator)["items"]["data.jsonl"][0]
        for counts in (True, False)
    ]
    padded, plain = ([beam["length_scored"] - len(beam["ids"]) for beam in item["beams"]] for item in found)
    assert set(padded) == {32}
    assert set(plain) == {0}
