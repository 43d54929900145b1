"""Arguments of transformers' Trainer have the effect on GLMTrainer that they have there."""

import signal

import pytest
import torch
from forked import run_ranks
from plain_runs import InOrder, logged, make_plain
from small_runs import RECIPE, Texts, losses, make_arguments, make_trainer
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from glm_hf import GLMForBlankInfilling
from glm_hf.training import DataCollatorForBlankInfilling, GLMTrainer

CONSTANT = {"max_steps": 3, "lr_scheduler_type": "constant", "warmup_share": 0.005}


def rates(trainer: GLMTrainer) -> list[float]:
    return [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]


def mean_loss(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lr_scheduler_type": "linear", "warmup_steps": 2}, [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
        ({"lr_scheduler_type": "constant"}, [1.0] * 6),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 5e-3, "power": 1.0}}, None),
    ],
)
def test_schedules_of_transformers_are_followed(model_folder, tmp_path, changes, expected):
    if expected is None:
        expected = [1 - step / 12 for step in range(6)]
    trainer = make_trainer(model_folder, tmp_path, warmup_share=0.005, **changes)
    trainer.train()
    assert rates(trainer) == pytest.approx([1e-2 * share for share in expected])


def test_an_optimizer_and_a_schedule_of_ones_own_are_taken(model_folder, tmp_path):
    model = GLMForBlankInfilling.from_pretrained(model_folder, dtype="float32")
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    objects = {"model": model, "optimizers": (optimizer, schedule)}
    trainer = make_trainer(model_folder, tmp_path, objects=objects, warmup_share=0.005, max_steps=3)
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    assert rates(trainer) == [0.5, 0.25, 0.125]


def test_a_class_of_optimizers_is_taken(model_folder, tmp_path):
    objects = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.5})}
    trainer = make_trainer(model_folder, tmp_path, objects=objects, max_steps=1)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    assert trainer.optimizer.param_groups[0]["momentum"] == 0.5


def test_a_loss_of_ones_own_is_taken(model_folder, tmp_path):
    """The mean over tokens as one would write it for any causal model is ours."""
    ours = make_trainer(model_folder, tmp_path / "ours")
    own = make_trainer(model_folder, tmp_path / "own", objects={"compute_loss_func": mean_loss})
    for trainer in (ours, own):
        trainer.train()
    assert losses(own) == pytest.approx(losses(ours), rel=1e-5)
    assert own.evaluate(Texts(7))["eval_loss"] == pytest.approx(ours.evaluate(Texts(7))["eval_loss"], rel=1e-5)


def test_a_model_may_be_made_by_the_trainer(model_folder, tmp_path):
    made = []

    def make() -> GLMForBlankInfilling:
        made.append(GLMForBlankInfilling.from_pretrained(model_folder, dtype="float32"))
        return made[-1]

    trainer = GLMTrainer(args=make_arguments(tmp_path, max_steps=1), model_init=make, train_dataset=Texts())
    trainer.train()
    assert trainer.model is made[-1]
    assert trainer.data_collator.config is made[0].config


def test_smaller_pieces_are_found_and_give_the_same_losses(model_folder, tmp_path):
    """A step has as many samples as before, so that nothing changes but the memory."""
    plain = make_trainer(model_folder, tmp_path / "plain")
    small = make_trainer(model_folder, tmp_path / "small", auto_find_batch_size=True)
    seen = []
    forward = small.model.forward

    def with_little_memory(*args, **kwargs):
        seen.append(len(kwargs["input_ids"]))
        if seen[-1] > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward(*args, **kwargs)

    small.model.forward = with_little_memory
    for trainer in (plain, small):
        trainer.train()
    assert seen[0] == 4
    assert seen[-8:] == [1] * 8
    assert losses(small) == pytest.approx(losses(plain), rel=1e-5)


def test_accumulated_samples_make_a_step(model_folder, tmp_path):
    args = make_arguments(tmp_path, global_batch_size=None, gradient_accumulation_steps=3)
    assert (args.global_batch_size, args.gradient_accumulation_steps) == (12, 1)
    with pytest.raises(ValueError, match="makes steps of 12 samples, but global_batch_size is 8; give one of them"):
        make_arguments(tmp_path, gradient_accumulation_steps=3)


def test_the_seed_of_the_data_orders_it(model_folder, tmp_path):
    def order(**seeds: int) -> list:
        return [
            batch["input_ids"].tolist()
            for batch in make_trainer(model_folder, tmp_path, **seeds).get_train_dataloader()
        ]

    assert order(seed=1, data_seed=5) == order(seed=2, data_seed=5) == order(seed=5) != order(seed=1)


def test_loaders_work_as_they_are_told(model_folder, tmp_path):
    told = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 3}
    trainer = make_trainer(model_folder, tmp_path, dataloader_multiprocessing_context="fork", **told)
    loader = trainer.get_train_dataloader()
    assert (loader.num_workers, loader.persistent_workers, loader.prefetch_factor) == (1, True, 3)
    assert loader.multiprocessing_context.get_start_method() == "fork"
    assert not loader.pin_memory  # there is no device
    whole, cut = (
        make_trainer(model_folder, tmp_path, per_device_eval_batch_size=4, dataloader_drop_last=drops)
        for drops in (False, True)
    )
    assert [len(trainer.get_eval_dataloader(Texts(10))) for trainer in (whole, cut)] == [3, 2]


def test_a_signal_saves_a_checkpoint(model_folder, tmp_path):
    class Signal(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                [callback] = [c for c in trainer.callback_handler.callbacks if isinstance(c, JITCheckpointCallback)]
                callback.jit_manager.is_checkpoint_requested = True

    handler = signal.getsignal(signal.SIGTERM)
    settings = {"enable_jit_checkpoint": True, "callbacks": [Signal]}
    whole = make_trainer(model_folder, tmp_path / "whole")
    trainer = make_trainer(model_folder, tmp_path / "run", **settings)
    whole.train()
    trainer.train()
    assert signal.getsignal(signal.SIGTERM) == handler
    [checkpoint] = (tmp_path / "run").glob("checkpoint-*")
    assert not list(checkpoint.glob("*incomplete*"))
    again = make_trainer(model_folder, tmp_path / "again")
    again.train(resume_from_checkpoint=str(checkpoint))
    assert losses(again) == losses(whole)


def test_processes_may_each_take_the_mean_of_their_own_tokens(model_folder, tmp_path):
    """As without `average_tokens_across_devices` in transformers."""
    settings = CONSTANT | {"average_tokens_across_devices": False, "max_steps": 1}

    def rank_main(rank: int) -> list[float]:
        trainer = make_trainer(model_folder, tmp_path / "run", **settings)
        trainer.train()
        return logged(trainer, "loss", "grad_norm")[0]

    model = GLMForBlankInfilling.from_pretrained(model_folder, dtype="float32").train()
    collator = DataCollatorForBlankInfilling(model.config, RECIPE, seed=3)
    items = InOrder(Texts())
    means = []
    for first in (0, 4):
        batch = collator([items[number] for number in range(first, first + 4)])
        means.append(model(**batch).loss)
    loss = torch.stack(means).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for found in run_ranks(rank_main, 2, tmp_path):
        assert found == pytest.approx([loss.item(), norm.item()], rel=1e-5)


@pytest.mark.parametrize("size", [2, 8])
def test_micro_batches_may_count_alike_as_in_the_original(model_folder, tmp_path, size):
    """Whatever they predict, where the default is the mean over the tokens of the step."""
    settings = CONSTANT | {"per_device_train_batch_size": size, "max_steps": 1}
    trainer = make_trainer(model_folder, tmp_path, loss_normalization="micro_batch", **settings)
    model = GLMForBlankInfilling.from_pretrained(model_folder, dtype="float32").train()
    [batch] = trainer.get_train_dataloader()
    trainer.train()
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "segment_ids")}
    logits, labels = model(**inputs).logits, batch["shift_labels"]
    means = [
        cross_entropy(logits[first : first + size].flatten(0, 1), labels[first : first + size].flatten())
        for first in range(0, 8, size)
    ]
    loss = torch.stack(means).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert logged(trainer, "loss", "grad_norm")[0] == pytest.approx([loss.item(), norm.item()], rel=1e-5)
    with pytest.raises(ValueError, match="loss_normalization must be one of step, micro_batch, got 'token'"):
        make_arguments(tmp_path, loss_normalization="token")


@pytest.mark.parametrize("changes", [{"torch_compile": True, "torch_compile_backend": "eager"}, {"bf16": True}])
def test_it_trains_as_transformers_own_does_in_other_modes(model_folder, tmp_path, changes):
    plain = make_plain(model_folder, tmp_path / "plain", **changes)
    ours = make_trainer(model_folder, tmp_path / "ours", **(CONSTANT | changes))
    for trainer in (plain, ours):
        trainer.train()
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-5 if "bf16" not in changes else 1e-2)


def test_noise_on_embeddings_is_added(model_folder, tmp_path):
    quiet, noisy = (make_trainer(model_folder, tmp_path, neftune_noise_alpha=alpha, **CONSTANT) for alpha in (None, 5))
    for trainer in (quiet, noisy):
        trainer.train()
    assert losses(quiet) != losses(noisy)
    assert losses(noisy) == pytest.approx(losses(quiet), rel=0.2)
