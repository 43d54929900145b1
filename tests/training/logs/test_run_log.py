"""The log of a run against the history that transformers keeps, however the run ended."""

import json
import re
from pathlib import Path

import pytest
from small_runs import make_trainer
from transformers import TrainerCallback, TrainerState

from glm_hf.cli import main
from glm_hf.training.logs.curves import MOST_POINTS, PANELS, plot_history, points_of, thinned
from glm_hf.training.logs.run_log import RunLog, read_history

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


class Dying(TrainerCallback):
    """End the run after a step, as a kill does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, args, state, control, **kwargs):
        if state.global_step > self.step:
            raise InterruptedError


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_times(history: list[dict]) -> list[dict]:
    return [{name: value for name, value in entry.items() if "second" not in name} for entry in history]


@pytest.fixture(scope="module")
def interrupted(model_folder, tmp_path_factory) -> Path:
    """A run of 6 steps that died while step 6 was logged, after a checkpoint at step 4."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(InterruptedError):
        make_trainer(model_folder, folder, callbacks=[Dying(5)], **SAVING).train()
    return folder


def test_a_run_that_died_has_logged_until_then(interrupted):
    assert [entry["step"] for entry in lines_of(interrupted)] == [1, 2, 3, 4, 5]
    saved = TrainerState.load_from_json(str(interrupted / "checkpoint-4" / "trainer_state.json")).log_history
    assert read_history(interrupted)[:4] == read_history(interrupted / "checkpoint-4") == saved


def test_a_resumed_run_tells_of_every_step_once(model_folder, tmp_path, interrupted):
    trainer = make_trainer(model_folder, tmp_path, **SAVING)
    (tmp_path / "log.jsonl").write_text((interrupted / "log.jsonl").read_text())
    trainer.train(resume_from_checkpoint=str(interrupted / "checkpoint-4"))
    history = read_history(tmp_path)
    assert [entry["step"] for entry in history] == [1, 2, 3, 4, 5, 6, 6]  # the last entry sums up the run
    assert history == trainer.state.log_history
    assert without_times(history)[:5] == without_times(read_history(interrupted))


def test_a_run_without_a_log_is_read_from_its_newest_checkpoint(tmp_path):
    for step in (2, 10, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        entry = {"loss": float(step), "step": step}
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": [entry]}))
    assert read_history(tmp_path) == [{"loss": 10.0, "step": 10}]


def test_values_that_are_not_finite_are_gaps(tmp_path):
    log = RunLog(tmp_path)
    log.begin([])
    for step, loss in enumerate((1.0, float("nan"), float("inf"), 2.0), 1):
        log.append({"loss": loss, "step": step})
    assert [entry["loss"] for entry in read_history(tmp_path)] == [1.0, None, None, 2.0]
    assert str(points_of(read_history(tmp_path), "loss")[1]) == "[ 1. nan nan  2.]"


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"loss": 1.0, "step": 1}\n{"loss": 2.0, "st')
    assert read_history(tmp_path) == [{"loss": 1.0, "step": 1}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"loss": 1.0, "step": 1}\n{"loss\n{}\n', r"log.jsonl is damaged in line 2"),
        ("[]\n", r"every entry must be an object with its step"),
        ('{"loss": 1.0}\n', r"every entry must be an object with its step"),
        ("", r"holds no loss yet; wait until the run has logged one"),
    ],
)
def test_a_damaged_or_empty_log_is_one_line(tmp_path, capsys, content, reason):
    (tmp_path / "log.jsonl").write_text(content)
    assert main(["report", str(tmp_path)]) == 1
    assert re.fullmatch(rf"glm-hf: error: .*{reason}.*\n", capsys.readouterr().err)


def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys):
    for folder, reason in ((tmp_path, "has neither"), (tmp_path / "none", "is no folder")):
        assert main(["report", str(folder)]) == 1
        said = capsys.readouterr().err
        assert re.fullmatch(rf"glm-hf: error: {folder} {reason}.* give the output_dir of a run\n", said)
    assert not list(tmp_path.iterdir())


def test_the_report_needs_nothing_else(interrupted, capsys):
    pytest.importorskip("matplotlib")
    assert main(["report", str(interrupted)]) == 0
    file = interrupted / "report.html"
    assert capsys.readouterr().out == f"{file}\n"
    page = file.read_text()
    assert page.count("<svg") == 1
    assert not re.search(r"<script|<link|<img|src=|url\(http|href=\"(?!#)", page)
    for title in ("loss by kind of blank", "norm of the gradient by layers", "tokens per second", "learning rate"):
        assert f">{title}</text>" in page
    assert "loss by corpus" not in page  # the data has none


def test_a_report_of_one_point_is_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "log.jsonl").write_text('{"loss": 1.5, "step": 0}\n')
    assert main(["report", str(tmp_path / "log.jsonl"), "--output", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    [line] = plot_history(read_history(tmp_path)).axes[0].lines
    assert (line.get_xdata().tolist(), line.get_ydata().tolist(), line.get_marker()) == ([0], [1.5], "o")


def test_curves_are_those_of_the_log():
    pytest.importorskip("matplotlib")
    logged = {
        **{"loss": 1.0, "loss_mask": 2.0, "loss/en": 3.0, "grad_norm": 4.0, "embedding_grad_norm": 5.0},
        **{"grad_norm/layers_0": 6.0, "tokens_per_second": 7.0, "mfu": 0.08, "hfu": 0.09, "learning_rate": 10.0},
    }
    evaluated = {"eval_loss": 1.5, "eval_loss_mask": 2.5, "eval_loss/en": 3.5, "eval_wiki_loss": 1.7}
    figure = plot_history([logged | {"step": 1}, evaluated | {"step": 1}])
    drawn = {
        axes.get_title(): {line.get_label(): line.get_ydata().tolist() for line in axes.lines} for axes in figure.axes
    }
    assert list(drawn) == [panel.title for panel in PANELS]
    assert list(drawn.values()) == [
        {"loss": [1.0], "eval_loss": [1.5], "eval_wiki_loss": [1.7]},
        {"mask": [2.0], "eval_mask": [2.5]},
        {"en": [3.0], "eval_en": [3.5]},
        {"grad_norm": [4.0], "embedding_grad_norm": [5.0]},
        {"layers_0": [6.0]},
        {"tokens_per_second": [7.0]},
        {"mfu": [8.0], "hfu": [9.0]},
        {"learning_rate": [10.0]},
    ]


def test_spikes_and_gaps_of_long_runs_are_drawn():
    values = [1.0] * 50_000
    values[12_345], values[23_456], values[34_567] = 100.0, float("nan"), -5.0
    history = [{"loss": value, "step": step} for step, value in enumerate(values)]
    steps, drawn = points_of(history, "loss")
    assert len(steps) <= 1.5 * MOST_POINTS
    assert {12_345, 23_456, 34_567} <= set(steps.tolist())
    assert (drawn[steps == 12_345][0], drawn[steps == 34_567][0]) == (100.0, -5.0)
    assert thinned(drawn[:10]).tolist() == list(range(10))


def test_a_report_of_another_kind_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path), "--output", "curves.pdf"]) == 1
    assert "must be a file .html or .png, got curves.pdf" in capsys.readouterr().err
