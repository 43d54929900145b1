"""The trainer against plain loops, and everything that it may meet on the way."""

import copy
import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import Texts, make_arguments, make_trainer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, TrainerCallback

from glm_hf import GLMForBlankInfilling
from glm_hf.training import GLMTrainer
from glm_hf.training.data.sampler import ShuffledEpochs, StepSampler
from glm_hf.training.logs import measured_trainer


def test_a_run_equals_a_plain_loop(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, embedding_gradient_shrink=0.3, batch_ramp_share=0.0)
    start = copy.deepcopy(trainer.model)
    loader = list(trainer.get_train_dataloader())
    trainer.train()

    model = start.train()
    model.config.embedding_gradient_shrink = 0.3
    decayed = [p for n, p in model.named_parameters() if "norm" not in n and not n.endswith("bias")]
    kept = [p for n, p in model.named_parameters() if "norm" in n or n.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    total, warmup = 48, 0.2 * 48
    for step, batch in enumerate(loader):
        done = 8 * step
        line = 1e-7 + (1e-2 - 1e-7) * done / warmup
        cosine = 8e-6 + (1e-2 - 8e-6) * (1 + np.cos(np.pi * (done - warmup) / (total - warmup))) / 2
        for group in optimizer.param_groups:
            group["lr"] = line if done < warmup else cosine
        labels = batch["shift_labels"]
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "segment_ids")}
        loss = cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        logged = trainer.state.log_history[step]
        assert logged["loss"] == pytest.approx(loss.item(), abs=2e-5)
        assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert logged["learning_rate"] == pytest.approx(optimizer.param_groups[0]["lr"])
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), rtol=1e-3, atol=1e-5)


def test_logs_tell_losses_by_objective_and_throughput(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, max_steps=2, peak_tflops=0.001, embedding_gradient_shrink=0.5)
    [first, *_] = list(trainer.get_train_dataloader())
    trainer.train()
    logged = trainer.state.log_history[0]
    model = GLMForBlankInfilling.from_pretrained(model_folder, dtype="float32")
    labels = first["shift_labels"]
    inputs = {name: first[name] for name in ("input_ids", "position_ids", "segment_ids")}
    token_losses = cross_entropy(model(**inputs).logits.mT, labels, reduction="none")
    for number, name in ((0, "mask"), (2, "gmask")):
        rows = first["objectives"] == number
        expected = token_losses[rows][labels[rows] != -100].mean().item()
        assert logged[f"loss_{name}"] == pytest.approx(expected, abs=1e-5)
    assert "loss_instruction" not in logged
    assert logged["samples"] == 8
    assert logged["epoch"] == pytest.approx(8 / 24)
    assert logged["embedding_gradient_shrink"] == 0.5
    assert logged["embedding_grad_norm"] > 0
    flops = trainer.flops_per_token * logged["tokens_per_second"]
    assert logged["mfu"] == pytest.approx(flops / 1e9)
    assert trainer.flops_per_token == 6 * model.num_parameters() + 12 * 2 * 32 * 48


def test_frozen_weights_take_no_gradients(model_folder, tmp_path):
    """Of 6 operations per weight, 2 are of its own gradient."""
    trainer = make_trainer(model_folder, tmp_path / "run")
    every = trainer.model.num_parameters()
    trainer.model.get_input_embeddings().requires_grad_(False)
    frozen = trainer.model.get_input_embeddings().weight.numel()
    assert trainer.flops_per_token == 6 * every - 2 * frozen + 12 * 2 * 32 * 48


def test_batches_grow_and_come_in_pieces(model_folder, tmp_path):
    sizes = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            sizes.append(len(trainer.meter.rows))

    settings = {"max_steps": -1, "train_samples": 48, "global_batch_size": 16, "batch_ramp_start": 4}
    trainer = make_trainer(model_folder, tmp_path, callbacks=[Count], batch_ramp_share=0.5, **settings)
    trainer.train()
    samples = [entry["samples"] for entry in trainer.state.log_history if "samples" in entry]
    assert samples == [4, 8, 16, 28, 44, 48]
    assert [4 * size for size in sizes] == [b - a for a, b in pairwise([0, *samples])]


def test_alpha_follows_its_schedule(model_folder, tmp_path):
    points = [[0, 0.2], [2, 1.0], [4, 1.0], [4, 0.5]]
    trainer = make_trainer(model_folder, tmp_path, embedding_gradient_shrink=points)
    trainer.train()
    alphas = [e["embedding_gradient_shrink"] for e in trainer.state.log_history if "loss" in e]
    assert alphas == pytest.approx([0.2, 0.6, 1.0, 1.0, 0.5, 0.5])


def test_skipped_data_is_not_trained_on(model_folder, tmp_path):
    plain = make_trainer(model_folder, tmp_path)
    skipping = make_trainer(model_folder, tmp_path, skip_data_ranges=["2-3"])
    ids = [[batch["sample_ids"].tolist() for batch in t.get_train_dataloader()] for t in (plain, skipping)]
    assert ids[0] == np.arange(48).reshape(6, 8).tolist()
    assert ids[1] == [*ids[0][:1], *ids[0][3:], np.arange(48, 56).tolist(), np.arange(56, 64).tolist()]


def test_processes_share_every_batch():
    sizes = np.array([4, 8])
    parts = [list(map(list, StepSampler(sizes, [], rank, 2))) for rank in (0, 1)]
    assert parts == [[[0, 1], [4, 5, 6, 7]], [[2, 3], [8, 9, 10, 11]]]
    with pytest.raises(ValueError, match="3 processes cannot share a batch of 4"):
        StepSampler(sizes, [], 0, 3)


def test_steps_leave_out_what_is_skipped():
    sizes = np.array([4, 8, 8, 4, 8])
    skipped = [(2, 3), (5, 11), (14, 16), (30, 31)]
    kept = [number for number in range(64) if not any(first <= number < end for first, end in skipped)]
    parts = [list(map(list, StepSampler(sizes, skipped, rank, 2))) for rank in (0, 1)]
    steps = [[*first, *second] for first, second in zip(*parts, strict=True)]
    assert steps == [kept[end - size : end] for size, end in zip(sizes, sizes.cumsum(), strict=True)]


def test_every_item_comes_once_an_epoch():
    data = ShuffledEpochs(Texts(10), seed=1)
    epochs = [[tuple(data[n + 10 * epoch]["input_ids"]) for n in range(10)] for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(map(tuple, Texts(10).texts))
    assert epochs[0] != epochs[1]
    assert data[13]["sample_id"] == 13


def test_evaluation_gives_the_mean_loss(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, per_device_eval_batch_size=4)
    texts = Texts(4)
    found = trainer.evaluate(texts)["eval_loss"]
    batch = trainer.data_collator([texts[n] for n in range(4)])
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "segment_ids")}
        expected = cross_entropy(trainer.model.eval()(**inputs).logits.mT, batch["shift_labels"])
    assert found == pytest.approx(expected.item(), abs=1e-5)


def test_a_saved_model_loads_as_any_other(model_folder, tmp_path, tokenizer):
    trainer = make_trainer(model_folder, tmp_path, max_steps=2)
    trainer.processing_class = tokenizer
    trainer.train()
    trainer.save_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(model.lm_head.weight, trainer.model.lm_head.weight)
    assert set(model.generation_config.eos_token_id) == {model.config.eop_token_id, model.config.eos_token_id}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


def test_epochs_evaluate_and_save(model_folder, tmp_path):
    settings = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch", "eval_strategy": "epoch"}
    trainer = make_trainer(model_folder, tmp_path, eval_dataset=Texts(4), **settings)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert [e["step"] for e in trainer.state.log_history if "eval_loss" in e] == [3, 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence_action": "hope"}, "divergence_action must be one of none, skip, lower_alpha, stop"),
        ({"spike_threshold": 1.0}, "spike_threshold must be above 1"),
        ({"warmup_share": 1.5}, r"warmup_share must lie in \[0, 1\]"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_arguments(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": -1, "train_samples": 7}, "7 samples do not fill one batch of 8"),
        ({"batch_ramp_start": 4}, "give train_samples instead of max_steps"),
        ({"max_steps": -1, "train_samples": 48, "batch_ramp_start": 16}, "batches must grow"),
        ({"min_learning_rate": 1.0}, "min_learning_rate"),
        ({"skip_data_ranges": ["5-9"]}, "skipped range must be steps FIRST-LAST of the 6"),
        ({"embedding_gradient_shrink": [[5, 0.1], [2, 1.0]]}, "growing places"),
        ({"embedding_gradient_shrink": 0.0}, "alpha must lie in"),
    ],
)
def test_impossible_schedules_are_refused(model_folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(model_folder, tmp_path, **changes).train()


def test_streams_are_refused(model_folder, tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield {"input_ids": [30, 31]}

    with pytest.raises(ValueError, match="train_dataset needs a length"):
        make_trainer(model_folder, tmp_path, data=Stream()).train()


def test_metrics_see_the_logits_of_all_tokens(model_folder, tmp_path):
    seen = []

    def keep(prediction) -> dict:
        seen.append(prediction)
        return {"found": 1.0}

    trainer = make_trainer(model_folder, tmp_path, per_device_eval_batch_size=4)
    trainer.compute_metrics = keep
    texts = Texts(4)
    found = trainer.evaluate(texts)
    batch = trainer.data_collator([texts[n] for n in range(4)])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "segment_ids")}
    with torch.no_grad():
        logits = trainer.model.eval()(**inputs).logits
    assert found["eval_found"] == 1.0
    np.testing.assert_allclose(seen[0].predictions, logits.numpy(), rtol=1e-4, atol=1e-4)
    assert seen[0].label_ids.tolist() == batch["shift_labels"].tolist()
    expected = cross_entropy(logits.mT, batch["shift_labels"])
    assert found["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)


def test_evaluation_leaves_no_trace_in_the_losses_by_objective(model_folder, tmp_path):
    settings = {"max_steps": 4, "eval_steps": 1, "per_device_eval_batch_size": 4}
    plain = make_trainer(model_folder, tmp_path, max_steps=4)
    evaluating = make_trainer(model_folder, tmp_path, eval_dataset=Texts(12), eval_strategy="steps", **settings)
    names = {"loss_mask", "loss_gmask"}
    logs = []
    for trainer in (plain, evaluating):
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        logs.append([{name: entry[name] for name in names & entry.keys()} for entry in history])
    assert logs[0] == logs[1]


def test_the_seed_orders_the_data(model_folder, tmp_path):
    def order(seed: int) -> list[list[int]]:
        loader = make_trainer(model_folder, tmp_path, seed=seed, max_steps=2).get_train_dataloader()
        return [batch["input_ids"].tolist() for batch in loader]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_the_seed_draws_the_blanks_of_the_default_collator(model_folder, tmp_path):
    model = GLMForBlankInfilling.from_pretrained(model_folder, dtype="float32")
    trainer = GLMTrainer(model, make_arguments(tmp_path, seed=5), train_dataset=Texts())
    assert trainer.data_collator.seed == 5


def test_the_operations_of_a_run_are_counted(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, max_steps=2)
    tokens = sum(batch["input_ids"].numel() for batch in trainer.get_train_dataloader())
    trainer.train()
    assert trainer.state.total_flos == pytest.approx(trainer.flops_per_token * tokens)


def test_epochs_log(model_folder, tmp_path):
    settings = {"max_steps": -1, "num_train_epochs": 3, "logging_strategy": "epoch"}
    trainer = make_trainer(model_folder, tmp_path, **settings)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [3, 6, 9]


def test_an_epoch_ends_once(model_folder, tmp_path):
    evaluations = []

    class Count(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            evaluations.append(state.global_step)

    settings = {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch"}
    make_trainer(model_folder, tmp_path, eval_dataset=Texts(4), callbacks=[Count], **settings).train()
    assert evaluations == [3, 6]


def test_a_run_of_steps_is_longer_than_its_samples(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, max_steps=2, train_samples=48)
    assert trainer.get_train_dataloader() is not None
    assert trainer.samples_before.tolist() == [0, 8, 16]


def test_throughput_is_of_the_time_since_the_last_log(model_folder, tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(measured_trainer, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    trainer = make_trainer(model_folder, tmp_path, max_steps=3)
    tokens = [int((batch["segment_ids"] > 0).sum()) for batch in trainer.get_train_dataloader()]
    trainer.train()
    rates = [entry["tokens_per_second"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([number / 10 for number in tokens])
