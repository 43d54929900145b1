"""Evaluation and prediction against sums over tokens, whatever the batches, processes and metrics."""

import numpy as np
import pytest
import torch
from forked import run_ranks, start, wait
from pipeline_runs import SETTINGS, make_3d_trainer, same_on_all
from small_runs import Stream, Texts, make_trainer
from torch.nn.functional import cross_entropy

from glm_hf import GLMForBlankInfilling
from glm_hf.training.data.recipe import OBJECTIVES


class Mixed(Texts):
    """Texts, and instructions with targets of lengths that differ."""

    def __getitem__(self, number: int) -> dict:
        ids = self.texts[number]
        return super().__getitem__(number) if number % 3 else {"inputs": ids[:2], "targets": ids[2:]}


def expected_losses(model, batch: dict, prefix: str = "eval") -> dict[str, float]:
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "segment_ids")}
    labels = batch["shift_labels"]
    with torch.no_grad():
        token_losses = cross_entropy(model.eval()(**inputs).logits.mT, labels, reduction="none")
    found = {f"{prefix}_loss": token_losses[labels != -100].mean().item()}
    for number, name in enumerate(OBJECTIVES):
        is_own = (batch["objectives"] == number)[:, None] & (labels != -100)
        if is_own.any():
            found[f"{prefix}_loss_{name}"] = token_losses[is_own].mean().item()
    return found


def losses_of(metrics: dict, prefix: str = "eval") -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith(f"{prefix}_loss")}


@pytest.fixture(scope="module")
def expected(model_folder, tmp_path_factory) -> dict[str, float]:
    trainer = make_trainer(model_folder, tmp_path_factory.mktemp("whole"))
    data = Mixed(11)
    found = expected_losses(trainer.model, trainer.data_collator([data[number] for number in range(11)]))
    assert found.keys() == {"eval_loss", "eval_loss_mask", "eval_loss_gmask", "eval_loss_instruction"}
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 11])
def test_eval_loss_is_the_mean_over_tokens_whatever_the_batch(model_folder, tmp_path, expected, size):
    trainer = make_trainer(model_folder, tmp_path, per_device_eval_batch_size=size)
    assert losses_of(trainer.evaluate(Mixed(11))) == pytest.approx(expected, rel=1e-5)
    assert losses_of(trainer.predict(Mixed(11)).metrics, "test") == pytest.approx(
        {name.replace("eval", "test"): value for name, value in expected.items()}, rel=1e-5
    )


@pytest.mark.parametrize("size", [1, 2, 4])
def test_eval_loss_is_the_same_on_several_processes(model_folder, tmp_path, expected, size):
    """11 samples, of which accelerate repeats some to fill the last batches."""

    def rank_main(rank: int) -> tuple[dict, tuple, list]:
        trainer = make_trainer(model_folder, tmp_path, per_device_eval_batch_size=size)
        metrics = trainer.evaluate(Mixed(11))
        predicted = trainer.predict(Mixed(11))
        return losses_of(metrics), predicted.predictions.shape[:2], predicted.label_ids.tolist()

    for metrics, shape, label_ids in run_ranks(rank_main, 2, tmp_path):
        assert metrics == pytest.approx(expected, rel=1e-5)
        assert shape == (11, len(label_ids[0]))
        assert len(label_ids) == 11


def test_eval_loss_of_a_stream_is_the_same_on_several_processes(model_folder, tmp_path, expected):
    def rank_main(rank: int) -> dict:
        trainer = make_trainer(model_folder, tmp_path, per_device_eval_batch_size=2)
        return losses_of(trainer.evaluate(Stream(Mixed(11))))

    for metrics in run_ranks(rank_main, 2, tmp_path):
        assert metrics == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("degrees", [{"dp_size": 2}, {"tp_size": 2, "pp_size": 2}])
@pytest.mark.parametrize("size", [1, 4])
def test_eval_loss_is_the_same_under_3d(deep_folder, tmp_path, degrees, size):
    def rank_main(rank: int) -> dict[str, float]:
        trainer = make_3d_trainer(deep_folder, tmp_path / "run", degrees, per_device_eval_batch_size=size)
        return losses_of(trainer.evaluate(Mixed(11)))

    def whole() -> dict[str, float]:
        trainer = make_trainer(deep_folder, tmp_path / "alone", **SETTINGS)
        return losses_of(trainer.evaluate(Mixed(11)))

    found = same_on_all(rank_main, degrees, tmp_path / "ranks")
    assert found == pytest.approx(wait(start(whole, tmp_path / "result"), tmp_path / "result"), rel=1e-5)
    assert len(found) == 4


@pytest.mark.parametrize("has_metrics", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_predictions_and_label_ids_belong_together(model_folder, tmp_path, size, has_metrics):
    seen = []
    objects = {"compute_metrics": lambda prediction: seen.append(prediction) or {}} if has_metrics else {}
    trainer = make_trainer(model_folder, tmp_path, per_device_eval_batch_size=size, objects=objects)
    data = Mixed(5)
    found = trainer.predict(data)
    batch = trainer.data_collator([data[number] for number in range(5)])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "segment_ids")}
    with torch.no_grad():
        logits = trainer.model.eval()(**inputs).logits.numpy()
    assert found.label_ids.tolist() == batch["shift_labels"].tolist()
    is_target = found.label_ids != -100
    np.testing.assert_allclose(found.predictions[is_target], logits[is_target], rtol=1e-4, atol=1e-4)
    if has_metrics:
        assert np.array_equal(seen[0].predictions, found.predictions)
        assert np.array_equal(seen[0].label_ids, found.label_ids)


def test_predictions_are_what_logits_were_made_to(model_folder, tmp_path):
    objects = {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}
    settings = {"per_device_eval_batch_size": 2, "eval_accumulation_steps": 1}
    plain = make_trainer(model_folder, tmp_path, **settings).predict(Mixed(5))
    found = make_trainer(model_folder, tmp_path, objects=objects, **settings).predict(Mixed(5))
    is_target = found.label_ids != -100
    assert np.array_equal(found.predictions[is_target], plain.predictions.argmax(-1)[is_target])


def test_metrics_by_batch_see_every_row(model_folder, tmp_path):
    rows, inputs = [], []

    def count(prediction, compute_result: bool = False) -> dict:
        rows.append(len(prediction.predictions))
        inputs.append(len(prediction.inputs["input_ids"]))
        return {"rows": sum(rows)} if compute_result else {}

    settings = {"batch_eval_metrics": True, "include_for_metrics": ["inputs"], "per_device_eval_batch_size": 2}
    trainer = make_trainer(model_folder, tmp_path, objects={"compute_metrics": count}, **settings)
    assert trainer.evaluate(Mixed(5))["eval_rows"] == sum(inputs) == 5


def test_no_logits_of_all_tokens_are_made_for_a_loss_alone(model_folder, tmp_path):
    shapes = []
    trainer = make_trainer(model_folder, tmp_path, prediction_loss_only=True)
    trainer.model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.ndim))
    assert trainer.predict(Mixed(5)).predictions is None
    trainer.evaluate(Mixed(5))
    assert set(shapes) == {2}


def test_losses_that_are_not_finite_are_left_out_of_an_evaluation_if_asked_for(model_folder, tmp_path):
    def with_one_spoiled(**changes) -> float:
        trainer = make_trainer(model_folder, tmp_path, per_device_eval_batch_size=1, **changes)
        factors = iter([torch.nan, *[1.0] * 4])
        trainer.model.lm_head.register_forward_hook(lambda module, args, output: output * next(factors))
        return trainer.evaluate(Mixed(5))["eval_loss"]

    whole = make_trainer(model_folder, tmp_path).evaluate(torch.utils.data.Subset(Mixed(5), range(1, 5)))["eval_loss"]
    assert np.isnan(with_one_spoiled())
    assert with_one_spoiled(logging_nan_inf_filter=True) == pytest.approx(whole, rel=1e-5)


def test_label_ids_are_the_labels_of_that_name(model_folder, tmp_path):
    """Also of a collator that knows no `shift_labels`, whose loss is that of transformers."""

    def collate(features: list[dict]) -> dict:
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(f["input_ids"]) for f in features], batch_first=True)
        return {"input_ids": ids, "labels": ids.masked_fill(ids == 0, -100)}

    texts = [Texts(7)[number] for number in range(7)]
    objects = {"data_collator": collate}
    model = GLMForBlankInfilling.from_pretrained(model_folder, dtype="float32").eval()
    batch = collate(texts)
    with torch.no_grad():
        logits = model(batch["input_ids"]).logits
    expected = cross_entropy(logits[:, :-1].mT, batch["labels"][:, 1:]).item()
    for size in (1, 3, 7):
        trainer = make_trainer(model_folder, tmp_path, objects=objects, per_device_eval_batch_size=size)
        found = trainer.predict(texts)
        assert found.label_ids.tolist() == batch["labels"].tolist()
        assert found.metrics["test_loss"] == pytest.approx(expected, rel=1e-5)
    both = make_trainer(model_folder, tmp_path, label_names=["shift_labels", "segment_ids"]).predict(texts)
    assert [ids.shape for ids in both.label_ids] == [both.label_ids[0].shape] * 2
