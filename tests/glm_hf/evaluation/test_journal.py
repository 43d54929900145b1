"""What an interrupted run has found is not computed again."""

import json

import pytest

from glm_hf.evaluation.evaluator import Evaluator
from glm_hf.evaluation.journal import Journal
from glm_hf.evaluation.original.runs import run_task

ORIGIN = {"model": "a"}


def counted(monkeypatch, evaluator):
    """Rows that the model is asked about, one after another."""
    asked = []
    forward = evaluator.scorer.base.forward

    def count(input_ids=None, *arguments, **keywords):
        asked.append(input_ids.shape[0])
        return forward(input_ids, *arguments, **keywords)

    monkeypatch.setattr(evaluator.scorer.base, "forward", count)
    return asked


@pytest.mark.parametrize("name", ["mul_mask_multi", "gen_greedy_batched", "gen_beam_mask", "lm_bidirectional_short"])
def test_a_run_goes_on_where_another_ended(name, loaded, golden, tmp_path, monkeypatch):
    path, task = tmp_path / "journal", golden / name / "task.yaml"
    journal = Journal(path, ORIGIN)
    expected = run_task(task, Evaluator(*loaded, journal))
    journal.close()
    lines = path.read_text().splitlines(keepends=True)
    half = len(lines) // 2
    path.write_text("".join(lines[:half]) + lines[half][: len(lines[half]) // 2])  # ended in the middle of a line

    journal = Journal(path, ORIGIN)
    evaluator = Evaluator(*loaded, journal)
    asked = counted(monkeypatch, evaluator)
    again = run_task(task, evaluator)
    assert again["metrics"] == expected["metrics"]
    journal.close()
    assert asked
    assert len(path.read_text().splitlines()) == len(lines)

    asked.clear()
    third = run_task(task, Evaluator(*loaded, Journal(path, ORIGIN)))
    assert asked == []
    assert third["metrics"] == expected["metrics"]


def test_another_model_begins_anew(tmp_path):
    journal = Journal(tmp_path / "journal", ORIGIN)
    key, value = journal.find("a", 1)
    assert value is None
    journal.record(key, [1.5])
    journal.close()
    assert Journal(tmp_path / "journal", ORIGIN).find("a", 1) == (key, [1.5])
    assert Journal(tmp_path / "journal", ORIGIN).find("a", 2)[1] is None
    other = Journal(tmp_path / "journal", {"model": "b"})
    assert other.find("a", 1) == (key, None)
    other.record(key, [2.5])
    other.close()
    assert Journal(tmp_path / "journal", ORIGIN).find("a", 1)[1] is None


def test_other_ranks_read_and_do_not_write(tmp_path):
    journal = Journal(tmp_path / "journal", ORIGIN, writes=False)
    journal.record(journal.find("a")[0], 1)
    assert not (tmp_path / "journal").exists()
    assert journal.find("a")[1] == 1


@pytest.mark.parametrize("content", ["hello\nworld\n", "[1]\n[2]\n", '{"other": 1}\n\n'])
def test_a_file_of_another_kind_is_left_alone(content, tmp_path):
    (tmp_path / "journal").write_text(content)
    with pytest.raises(ValueError, match="is not a journal"):
        Journal(tmp_path / "journal", ORIGIN)
    assert (tmp_path / "journal").read_text() == content


@pytest.mark.parametrize("content", ["", '{"ori'])
def test_a_run_that_ended_in_its_first_line_left_nothing(content, tmp_path):
    (tmp_path / "journal").write_text(content)
    journal = Journal(tmp_path / "journal", ORIGIN)
    journal.record(journal.find("a")[0], 1)
    journal.close()
    head, line = (tmp_path / "journal").read_text().splitlines()
    assert json.loads(head) == {"origin": ORIGIN}
    assert json.loads(line)[1] == 1


def test_equal_rows_are_asked_once(evaluator, monkeypatch):
    asked = counted(monkeypatch, evaluator)
    row = evaluator.tokenize("The capital of France is [MASK].")
    from glm_hf.evaluation.samples import Rule, choice_sample

    sample = choice_sample(row, [[100], [200, 300]], Rule(), evaluator.config)
    rows_done = []
    scores = evaluator.score([sample] * 5, lambda: rows_done.append(1))
    assert sum(asked) == 1
    assert len(rows_done) == 5
    assert all(each == scores[0] for each in scores)
