"""transformers' own Trainer with our collator, against GLMTrainer, torch's cross-entropy and plain loops."""

import copy

import pytest
import torch
from forked import run_ranks
from plain_runs import InOrder, logged, make_plain
from small_runs import Stream, Texts, make_trainer
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from glm_hf import GLMForBlankInfilling
from glm_hf.training import mean_token_loss, token_losses

STEPS = {"max_steps": 3, "lr_scheduler_type": "constant", "warmup_share": 0.005}
BOTH = ("loss", "grad_norm")


def inputs_of(batch: dict) -> dict:
    return {name: batch[name] for name in ("input_ids", "position_ids", "segment_ids")}


@pytest.fixture(scope="module")
def by_glm_trainer(model_folder, tmp_path_factory) -> list[list[float]]:
    trainer = make_trainer(model_folder, tmp_path_factory.mktemp("glm"), **STEPS)
    trainer.train()
    return logged(trainer, *BOTH)


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_it_trains_as_glm_trainer_does_whatever_is_accumulated(model_folder, tmp_path, by_glm_trainer, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 // accumulation}
    trainer = make_plain(model_folder, tmp_path, **settings)
    trainer.train()
    for found, expected in zip(logged(trainer, *BOTH), by_glm_trainer, strict=True):
        assert found == pytest.approx(expected, rel=1e-6)


def test_default_arguments_train_evaluate_and_return_to_the_best(model_folder, tmp_path):
    """Also with the columns that models do not take removed, and label names as found in the model."""
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings = saving | {"remove_unused_columns": True, "load_best_model_at_end": True}
    trainer = make_plain(model_folder, tmp_path, objects={"eval_dataset": Texts(8)}, **settings)
    trainer.train()
    batch = trainer.data_collator([Texts(8)[number] for number in range(8)])
    found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == min(found)
    with torch.no_grad():
        logits = trainer.model.eval()(**inputs_of(batch)).logits
    expected = cross_entropy(logits.mT, batch["shift_labels"]).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_columns_that_were_removed_are_asked_for(model_folder, tmp_path):
    trainer = make_plain(model_folder, tmp_path, data=[{"inputs": [30], "targets": [31]}], remove_unused_columns=True)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        trainer.train()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_label_smoothing_is_that_of_torch_in_both_trainers(model_folder, tmp_path, accumulation):
    smoothing = {"label_smoothing_factor": 0.3}
    plain = make_plain(
        model_folder,
        tmp_path / "plain",
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=8 // accumulation,
        **smoothing,
    )
    model = copy.deepcopy(plain.model).train()
    plain.train()
    ours = make_trainer(model_folder, tmp_path / "ours", **(STEPS | smoothing))
    [batch, *_] = ours.get_train_dataloader()
    ours.train()
    loss = cross_entropy(model(**inputs_of(batch)).logits.mT, batch["shift_labels"], label_smoothing=0.3)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert logged(ours, *BOTH)[0] == pytest.approx([loss.item(), norm.item()], rel=1e-5)
    for found, expected in zip(logged(plain, *BOTH), logged(ours, *BOTH), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    assert plain.evaluate(Texts(8))["eval_loss"] == pytest.approx(ours.evaluate(Texts(8))["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["LORA", "PREFIX_TUNING"])
def test_adapters_are_smoothed_alike(model_folder, tmp_path, kind):
    peft = pytest.importorskip("peft")
    config = {"task_type": "CAUSAL_LM"} | ({"num_virtual_tokens": 2} if kind == "PREFIX_TUNING" else {})
    smoothing = {"label_smoothing_factor": 0.3}

    def adapted():
        torch.manual_seed(0)
        model = GLMForBlankInfilling.from_pretrained(model_folder, dtype="float32")
        return peft.get_peft_model(model, peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind](**config))

    plain = make_plain(model_folder, tmp_path / "plain", model=adapted(), **smoothing)
    ours = make_trainer(model_folder, tmp_path / "ours", objects={"model": adapted()}, **(STEPS | smoothing))
    for trainer in (plain, ours):
        trainer.train()
    for found, expected in zip(logged(plain, *BOTH), logged(ours, *BOTH), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_its_eval_loss_can_be_the_mean_over_tokens(model_folder, tmp_path, size, processes):
    objects = {"preprocess_logits_for_metrics": token_losses, "compute_metrics": mean_token_loss}
    ours = make_trainer(model_folder, tmp_path / "ours", per_device_eval_batch_size=5).evaluate(Texts(5))

    def rank_main(rank: int) -> float:
        trainer = make_plain(model_folder, tmp_path, objects=objects, per_device_eval_batch_size=size)
        return trainer.evaluate(Texts(5))["eval_loss"]

    found = run_ranks(rank_main, processes, tmp_path)
    assert found == pytest.approx([ours["eval_loss"]] * processes, rel=1e-5)


def test_labels_that_are_aligned_with_their_tokens_are_smoothed_one_token_before(model_folder, tmp_path):
    """As of any other collator."""

    def collate(features: list[dict]) -> dict:
        ids = torch.tensor([feature["input_ids"][:4] for feature in features])
        return {"input_ids": ids, "labels": ids}

    objects = {"data_collator": collate}
    trainer = make_plain(model_folder, tmp_path, objects=objects, label_smoothing_factor=0.2, max_steps=1)
    batch = collate([trainer.train_dataset[number] for number in range(8)])
    logits = copy.deepcopy(trainer.model)(batch["input_ids"]).logits
    expected = cross_entropy(logits[:, :-1].mT, batch["labels"][:, 1:], label_smoothing=0.2).item()
    trainer.train()
    assert logged(trainer, "loss") == [[pytest.approx(expected, rel=1e-6)]]


class Layouts(TrainerCallback):
    """Notes the positions and the mask that the layers of a model get."""

    def __init__(self, model) -> None:
        self.masks = []
        model.get_submodule("model.layers.0").register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs) -> None:
        mask = kwargs["attention_mask"]
        self.masks.append((mask.clone(), [part.clone() for part in kwargs["position_embeddings"]]))


@pytest.mark.parametrize("adapted", [False, True])
def test_noise_on_embeddings_leaves_the_layout_as_it_is(model_folder, tmp_path, adapted):
    seen, losses = [], []
    for alpha in (None, 5.0):
        model = GLMForBlankInfilling.from_pretrained(model_folder, dtype="float32")
        layouts = Layouts(model)
        if adapted:
            peft = pytest.importorskip("peft")
            model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
        trainer = make_plain(model_folder, tmp_path, model=model, neftune_noise_alpha=alpha, max_steps=1)
        trainer.train()
        seen.append(layouts.masks)
        losses += logged(trainer, "loss")
    [(plain_mask, plain_positions)], [(mask, positions)] = seen
    assert torch.equal(plain_mask, mask)
    assert mask.ndim == 4
    assert all(map(torch.equal, plain_positions, positions))
    assert losses[0] != losses[1]


@pytest.mark.parametrize(("config", "size"), [({}, 4), ({"dispatch_batches": False}, 4), ({"split_batches": True}, 8)])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_streams_are_shared_by_processes(model_folder, tmp_path, by_glm_trainer, config, size, num_workers):
    """accelerate joins the batches of all processes, which then need one length, or leaves each its own."""

    def rank_main(rank: int) -> list[list[float]]:
        settings = {"per_device_train_batch_size": size, "accelerator_config": config}
        settings |= {"dataloader_num_workers": num_workers}
        trainer = make_plain(model_folder, tmp_path, data=Stream(InOrder(Texts())), **settings)
        trainer.train()
        return logged(trainer, *BOTH)

    for rank in run_ranks(rank_main, 2, tmp_path):
        for found, expected in zip(rank, by_glm_trainer, strict=True):
            assert found == pytest.approx(expected, rel=2e-6)


def test_a_loss_of_ones_own_sees_logits_and_labels(model_folder, tmp_path, by_glm_trainer):
    """By the definition of transformers: labels are one token later than the logits that predict them."""

    def loss_of(outputs, labels, num_items_in_batch=None):
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return cross_entropy(logits, targets, reduction="sum") / num_items_in_batch

    plain = make_plain(model_folder, tmp_path, objects={"compute_loss_func": loss_of}, gradient_accumulation_steps=1)
    plain.train()
    for found, expected in zip(logged(plain, *BOTH), by_glm_trainer, strict=True):
        assert found == pytest.approx(expected, rel=1e-6)
