"""Two processes under gloo against one."""

import json
from pathlib import Path

import pytest
import torch
from forked import run_ranks, start, wait
from small_runs import SomeTwice, Texts, losses, make_trainer, prepare_deepspeed, zero
from torch import distributed as dist

from glm_hf import GLMForBlankInfilling, GLMQuantizationConfig
from glm_hf.training import DivergenceError, GLMTrainingArguments

SETTINGS = {"max_steps": 5, "per_device_train_batch_size": 2, "embedding_gradient_shrink": 0.3}


def train(model_folder: Path, folder: Path, **changes):
    trainer = make_trainer(model_folder, folder, **(SETTINGS | changes))
    trainer.train(resume_from_checkpoint=changes.get("resume_from_checkpoint"))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return losses(trainer), logs


@pytest.fixture(scope="module")
def alone(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return wait(start(lambda: train(model_folder, folder), folder / "result"), folder / "result")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="processes have devices of their own")
def test_processes_without_a_device_know_of_each_other(tmp_path):
    """transformers takes them for one each, unless it is told to use the CPU."""

    def rank_main(rank: int) -> tuple[int, int]:
        args = GLMTrainingArguments(output_dir=str(tmp_path))
        dist.barrier()  # or one that leaves disconnects the other, which may be connecting still
        return args.process_index, args.world_size

    assert run_ranks(rank_main, 2, tmp_path) == [(0, 2), (1, 2)]


def test_all_ranks_return_to_the_best_model(model_folder, tmp_path):
    """The worst, in fact, which is the earliest."""
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    returning = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}

    def rank_main(rank: int):
        trainer = make_trainer(
            model_folder, tmp_path / "run", eval_dataset=Texts(8), **(SETTINGS | saving | returning | {"max_steps": 4})
        )
        trainer.train()
        return {name: weight.detach() for name, weight in trainer.model.named_parameters()}

    ranks = run_ranks(rank_main, 2, tmp_path)
    best = GLMForBlankInfilling.from_pretrained(tmp_path / "run" / "checkpoint-2", dtype="float32")
    for found in ranks:
        assert all(torch.equal(found[name], weight) for name, weight in best.named_parameters())


def test_ddp_gives_the_losses_of_one_process(model_folder, tmp_path, alone):
    ranks = run_ranks(lambda rank: train(model_folder, tmp_path / "run"), 2, tmp_path)
    expected, expected_logs = alone
    for found, logs in ranks:
        assert found == pytest.approx(expected, abs=1e-4)
        for log, expected_log in zip(logs, expected_logs, strict=True):
            names = {"grad_norm", "loss_mask", "loss_gmask", "embedding_grad_norm"} & expected_log.keys()
            assert {name: log[name] for name in names} == pytest.approx(
                {name: expected_log[name] for name in names}, rel=1e-3
            )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_gives_the_losses_of_one_process(model_folder, tmp_path, alone, stage):
    prepare_deepspeed()

    def rank_main(rank: int):
        return train(model_folder, tmp_path / "run", deepspeed=zero(stage))

    expected, expected_logs = alone
    for found, logs in run_ranks(rank_main, 2, tmp_path):
        assert found == pytest.approx(expected, abs=1e-4)
        for log, expected_log in zip(logs, expected_logs, strict=True):
            assert log["embedding_grad_norm"] == pytest.approx(expected_log["embedding_grad_norm"], rel=1e-3)
            assert log["grad_norm"] == pytest.approx(expected_log["grad_norm"], rel=1e-3)


def train_adapter(model_folder: Path, folder: Path, bits: int, **changes) -> list[float]:
    import peft

    config = GLMQuantizationConfig(bits=bits, quantize_embeddings=True)
    model = GLMForBlankInfilling.from_pretrained(model_folder, dtype="float32", quantization_config=config)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query_key_value", "dense"], r=4))
    trainer = make_trainer(model_folder, folder, objects={"model": adapted}, **(ADAPTER_SETTINGS | changes))
    trainer.train()
    return losses(trainer)


ADAPTER_SETTINGS = {"max_steps": 3, "per_device_train_batch_size": 2}


@pytest.mark.parametrize("stage", [None, 2])
def test_adapters_on_quantized_weights_get_the_losses_of_one_process(model_folder, tmp_path, stage):
    pytest.importorskip("peft")
    prepare_deepspeed()
    alone = tmp_path / "alone"
    alone.mkdir()
    expected = wait(start(lambda: train_adapter(model_folder, alone, 4), alone / "result"), alone / "result")

    def rank_main(rank: int):
        options = {"gradient_checkpointing": True} if stage is None else {"deepspeed": zero(stage)}
        return train_adapter(model_folder, tmp_path / "run", 4, **options)

    for found in run_ranks(rank_main, 2, tmp_path):
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("has_fp16", [False, True])
def test_zero_stage_3_refuses_quantized_weights(model_folder, tmp_path, has_fp16):
    pytest.importorskip("peft")
    prepare_deepspeed()

    def rank_main(rank: int):
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: has_fp16  # it depends on the processor, and decides on dtypes
        with pytest.raises(ValueError, match=r"ZeRO stage 3 cannot shard quantized weights; use stage 2 or below"):
            train_adapter(model_folder, tmp_path / "run", 4, deepspeed=zero(3))

    run_ranks(rank_main, 2, tmp_path)


def test_zero_goes_on_from_a_checkpoint(model_folder, tmp_path):
    prepare_deepspeed()
    saving = {"save_strategy": "steps", "save_steps": 2, "deepspeed": zero(2)}

    def whole(rank: int):
        return train(model_folder, tmp_path / "run", **saving)

    def again(rank: int):
        trainer = make_trainer(model_folder, tmp_path / "again", **(SETTINGS | saving))
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        return losses(trainer)

    expected = run_ranks(whole, 2, tmp_path)
    assert (tmp_path / "run" / "checkpoint-2" / "latest").is_file()
    assert run_ranks(again, 2, tmp_path) == [found for found, _ in expected]


def test_a_batch_that_processes_cannot_share_is_one_error(model_folder, tmp_path):
    def rank_main(rank: int) -> str:
        with pytest.raises(ValueError, match="2 processes cannot share a batch of 5") as caught:
            train(model_folder, tmp_path / "run", global_batch_size=5)
        return str(caught.value)

    assert len(run_ranks(rank_main, 2, tmp_path)) == 2


def test_ranks_agree_to_skip_and_stop(model_folder, tmp_path):
    """Only one rank's sample overflows, and both act."""

    def rank_main(rank: int):
        trainer = make_trainer(model_folder, tmp_path / "run", **SETTINGS, divergence_action="skip")
        measure = trainer.compute_loss

        def overflow(model, inputs, *args, **kwargs):
            loss = measure(model, inputs, *args, **kwargs)
            return loss * torch.inf if rank == 1 and trainer.state.global_step == 2 else loss

        trainer.compute_loss = overflow
        trainer.train()
        total = sum(parameter.detach().double().sum().item() for parameter in trainer.model.parameters())
        return trainer.state.global_step, total

    first, second = run_ranks(rank_main, 2, tmp_path)
    assert first == second
    assert first[0] == 5
    [event] = json.loads((tmp_path / "run" / "divergence.json").read_text())
    assert (event["step"], event["action"]) == (3, "skip")
    assert len({sample["sample"] for sample in event["samples"]}) == 8


def test_zero_stops_before_the_update_and_cannot_skip(model_folder, tmp_path):
    prepare_deepspeed()

    def rank_main(rank: int):
        options = SETTINGS | {"deepspeed": zero(2)}
        with pytest.raises(ValueError, match="DeepSpeed cannot leave out an update"):
            make_trainer(model_folder, tmp_path / "run", **options, divergence_action="skip")
        trainer = make_trainer(model_folder, tmp_path / "run", **options, divergence_action="lower_alpha")
        measure = trainer.compute_loss

        def overflow(*args, **kwargs):
            loss = measure(*args, **kwargs)
            return loss * torch.nan if rank == 0 and trainer.state.global_step == 2 else loss

        trainer.compute_loss = overflow
        with pytest.raises(DivergenceError, match="before the update of step 3: the loss is nan"):
            trainer.train()
        return all(bool(torch.isfinite(parameter).all()) for parameter in trainer.model.parameters())

    assert run_ranks(rank_main, 2, tmp_path) == [True, True]
    [event] = json.loads((tmp_path / "run" / "divergence.json").read_text())
    assert (event["step"], event["action"]) == (3, "stop")


def test_the_utilization_is_of_all_devices(model_folder, tmp_path):
    def rank_main(rank: int):
        trainer = make_trainer(model_folder, tmp_path / "run", max_steps=1, peak_tflops=0.001)
        trainer.train()
        return trainer.flops_per_token, trainer.state.log_history[0]

    for flops, log in run_ranks(rank_main, 2, tmp_path):
        assert log["mfu"] == pytest.approx(flops * log["tokens_per_second"] / (2 * 1e9))


def test_weights_that_zero_3_holds_elsewhere_count(model_folder, tmp_path):
    prepare_deepspeed()

    def rank_main(rank: int) -> tuple[float, float]:
        alone = make_trainer(model_folder, tmp_path / "alone")
        config = zero(3)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or ranks keep what is small
        trainer = make_trainer(model_folder, tmp_path / "run", max_steps=1, deepspeed=config)
        trainer.train()
        assert trainer.model.num_parameters() < alone.model.num_parameters()
        return trainer.flops_per_token, alone.flops_per_token

    for found, expected in run_ranks(rank_main, 2, tmp_path):
        assert found == expected


def test_every_process_takes_pieces_of_the_size_per_device(model_folder, tmp_path):
    def rank_main(rank: int) -> list[int]:
        trainer = make_trainer(model_folder, tmp_path / "run", **(SETTINGS | {"max_steps": 1}))
        trainer.train()
        return [len(sample_ids) for sample_ids, _ in trainer.meter.rows]

    assert run_ranks(rank_main, 2, tmp_path) == [[2, 2], [2, 2]]  # of a global batch of 8


def test_ranks_with_different_numbers_of_rows_act_together(model_folder, tmp_path):
    """As a collator of one's own may make them."""

    def rank_main(rank: int) -> int:
        settings = SETTINGS | {"max_steps": 3, "divergence_action": "skip"}
        trainer = make_trainer(model_folder, tmp_path / "run", **settings)
        trainer.data_collator = SomeTwice(trainer.data_collator, every=11)
        measure = trainer.compute_loss
        trainer.compute_loss = lambda *args, **kwargs: measure(*args, **kwargs) * torch.nan
        trainer.train()
        return trainer.state.global_step

    assert run_ranks(rank_main, 2, tmp_path) == [3, 3]
    events = json.loads((tmp_path / "run" / "divergence.json").read_text())
    assert [event["step"] for event in events] == [1, 2, 3]
    assert max(len(event["samples"]) for event in events) > 8


def test_an_infinite_loss_on_one_rank_stops_both(model_folder, tmp_path):
    """The gradients stay finite, so that nothing but the loss tells."""

    def rank_main(rank: int) -> list[float]:
        trainer = make_trainer(model_folder, tmp_path / "run", **SETTINGS, divergence_action="stop")
        measure = trainer.compute_loss

        def overflow(*args, **kwargs):
            loss = measure(*args, **kwargs)
            return loss + torch.inf if rank == 1 and trainer.state.global_step == 1 else loss

        trainer.compute_loss = overflow
        with pytest.raises(DivergenceError, match="before the update of step 2: the loss is inf"):
            trainer.train()
        return losses(trainer)

    first, second = run_ranks(rank_main, 2, tmp_path)
    assert first == second
    assert len(first) == 1
