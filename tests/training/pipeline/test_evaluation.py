"""Metrics and predictions of a pipeline against one process that runs GLMTrainer on the same data."""

from pathlib import Path

import numpy as np
import pytest
from forked import run_ranks, start, wait
from pipeline_runs import SETTINGS, make_3d_trainer
from small_runs import Texts, make_trainer
from transformers import EvalPrediction, TrainerCallback

ALL = {"tp_size": 2, "pp_size": 2, "dp_size": 2}
LAYER_AND_STAGES = {"tp_size": 2, "pp_size": 2, "dp_size": 1}
SAMPLES = 11  # with batches of 2, six, of which the last is not full
CLOSE = 1e-4  # of logits: sums in another order


def share_right(prediction: EvalPrediction) -> dict[str, float]:
    is_target = prediction.label_ids != -100
    guesses = prediction.predictions.argmax(-1) if prediction.predictions.ndim == 3 else prediction.predictions
    right = guesses[is_target] == prediction.label_ids[is_target]
    weights = np.arange(1, len(is_target) + 1)[:, None] * is_target  # another order is another result
    return {"right": right.mean(), "ordered": float((weights * prediction.label_ids).sum())}


class Counter(TrainerCallback):
    """Count batches."""

    steps = 0

    def on_prediction_step(self, args, state, control, **kwargs):
        self.steps += 1


def in_one_process(model: Path, folder: Path, function, objects: dict, **changes):
    def whole():
        settings = SETTINGS | {"per_device_eval_batch_size": 2} | changes
        return function(make_trainer(model, folder / "alone", objects=objects, **settings))

    return wait(start(whole, folder / "result"), folder / "result")


def in_a_pipeline(model: Path, folder: Path, degrees: dict, function, objects: dict, **changes) -> list:
    """Return what all ranks return."""

    def rank_main(rank: int):
        settings = {"per_device_eval_batch_size": 2} | changes
        return function(make_3d_trainer(model, folder / "run", degrees, objects=objects, **settings))

    return run_ranks(rank_main, int(np.prod(list(degrees.values()))), folder)


def without_speed(metrics: dict) -> dict:
    unlike = ("runtime", "per_second", "preparation")
    return {name: value for name, value in metrics.items() if not any(part in name for part in unlike)}


@pytest.mark.parametrize("degrees", [ALL, {"tp_size": 2, "pp_size": 2, "dp_size": 1, "sequence_parallel": True}])
def test_processes_predict_as_one_does(deep_folder, tmp_path, degrees):
    def evaluate(trainer):
        trainer.add_callback(Counter)
        metrics, predicted = trainer.evaluate(Texts(SAMPLES)), trainer.predict(Texts(SAMPLES))
        [counter] = [each for each in trainer.callback_handler.callbacks if isinstance(each, Counter)]
        logged = [entry for entry in trainer.state.log_history if "eval_right" in entry]
        return metrics, predicted, logged, counter.steps

    objects = {"compute_metrics": share_right}
    expected, whole, logged, _ = in_one_process(deep_folder, tmp_path, evaluate, objects)
    is_target = whole.label_ids != -100
    for metrics, predicted, own_log, steps in in_a_pipeline(deep_folder, tmp_path, degrees, evaluate, objects):
        assert without_speed(metrics) == pytest.approx(without_speed(expected), abs=1e-5)
        assert without_speed(predicted.metrics) == pytest.approx(without_speed(whole.metrics), abs=1e-5)
        assert without_speed(own_log[0]) == pytest.approx(without_speed(logged[0]), abs=1e-5)
        assert np.array_equal(predicted.label_ids, whole.label_ids)
        assert predicted.predictions.shape == whole.predictions.shape
        assert predicted.predictions.dtype == whole.predictions.dtype
        np.testing.assert_allclose(predicted.predictions[is_target], whole.predictions[is_target], atol=CLOSE)
        assert steps == 2 * 6 // degrees["dp_size"]  # batches of a replica


def test_every_option_of_metrics_has_the_effect_of_one_process(deep_folder, tmp_path):
    """Predictions in a nest, kept as batches, beside losses and inputs."""

    def evaluate(trainer):
        seen = []
        trainer.compute_metrics = lambda prediction: seen.append(prediction) or {}
        trainer.evaluate(Texts(SAMPLES))
        [prediction] = seen
        return prediction.predictions, prediction.label_ids, prediction.inputs, prediction.losses

    objects = {
        "preprocess_logits_for_metrics": lambda logits, labels: (
            logits.argmax(-1).where(labels != -100, 0),
            {"length": (labels != -100).sum(1)},
        ),
        "compute_metrics": share_right,
    }
    settings = {"include_for_metrics": ["inputs", "loss"], "eval_accumulation_steps": 1}
    for changes in (settings, settings | {"eval_do_concat_batches": False}):
        whole = in_one_process(deep_folder, tmp_path, evaluate, objects, **changes)
        ranks = in_a_pipeline(deep_folder, tmp_path, LAYER_AND_STAGES, evaluate, objects, **changes)
        for found in ranks:
            for mine, theirs in zip(flat(found), flat(whole), strict=True):
                assert mine.dtype == theirs.dtype
                np.testing.assert_allclose(mine, theirs, atol=1e-5)


def flat(nest) -> list:
    """Return the arrays of a nest."""
    if isinstance(nest, dict):
        nest = list(nest.values())
    return [nest] if isinstance(nest, np.ndarray) else [array for part in nest for array in flat(part)]


def test_metrics_by_batch_see_the_batches_of_one_process(deep_folder, tmp_path):
    """In a pipeline as well, in the order of the dataset, and the last is announced."""

    def evaluate(trainer):
        seen = []

        def compute(prediction, compute_result: bool) -> dict:
            seen.append((prediction.label_ids.tolist(), prediction.inputs["objectives"].tolist(), compute_result))
            right = prediction.predictions.argmax(-1) == prediction.label_ids
            return {"right": right.float().mean()}

        trainer.compute_metrics = compute
        metrics = trainer.evaluate(Texts(SAMPLES))
        return seen, metrics["eval_right"], trainer.predict(Texts(3)).predictions.shape

    objects = {"compute_metrics": lambda prediction, compute_result: {}}
    settings = {"batch_eval_metrics": True, "include_for_metrics": ["inputs"]}
    batches, right, shape = in_one_process(deep_folder, tmp_path, evaluate, objects, **settings)
    assert [is_last for *_, is_last in batches[:6]] == [False] * 5 + [True]
    degrees = {"tp_size": 1, "pp_size": 2, "dp_size": 2}
    for found in in_a_pipeline(deep_folder, tmp_path, degrees, evaluate, objects, **settings):
        assert found[0] == batches
        assert found[1:] == (pytest.approx(right), shape)


def test_losses_alone_need_no_logits_of_all_tokens(deep_folder, tmp_path):
    def evaluate(trainer):
        shapes = []
        if trainer.model.is_last:
            head = trainer.model.forward_funcs[-1]
            of_head = head.logits
            head.logits = lambda hidden: shapes.append(hidden.ndim) or of_head(hidden)
        predicted = trainer.predict(Texts(3))
        trainer.evaluate(Texts(3))
        return predicted.predictions, predicted.label_ids, set(shapes)

    objects, settings = {"compute_metrics": share_right}, {"prediction_loss_only": True}
    found = in_a_pipeline(deep_folder, tmp_path, {"pp_size": 2}, evaluate, objects, **settings)
    assert found == [(None, None, set()), (None, None, {2})]


def test_a_batch_that_is_not_full_can_be_dropped(deep_folder, tmp_path):
    degrees, settings = {"pp_size": 1, "dp_size": 2}, {"dataloader_drop_last": True}

    def evaluate(trainer):
        return trainer.predict(Texts(SAMPLES)).label_ids.tolist()

    whole = in_one_process(deep_folder, tmp_path, evaluate, {}, **settings)
    assert len(whole) == SAMPLES - 1
    assert in_a_pipeline(deep_folder, tmp_path, degrees, evaluate, {}, **settings) == [whole] * 2


def test_a_function_that_fails_ends_all_ranks(deep_folder, tmp_path):
    """Not only the one that has the logits, for which the others would wait."""

    def evaluate(trainer) -> str:
        with pytest.raises(ValueError, match="preprocess_logits_for_metrics has failed: ZeroDivisionError") as caught:
            trainer.predict(Texts(3))
        return str(caught.value)

    objects = {"preprocess_logits_for_metrics": lambda logits, labels: 1 // 0}
    first, *others = in_a_pipeline(deep_folder, tmp_path, LAYER_AND_STAGES, evaluate, objects)
    assert set(others) == {first}
