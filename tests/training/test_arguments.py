"""Every argument of the installed transformers' Trainer is honoured, or refused by name, in both trainers."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from accelerate import ParallelismConfig
from forked import run_ranks, start, wait
from pipeline_runs import make_3d_trainer
from small_runs import Texts, make_arguments, make_trainer, prepare_deepspeed
from transformers import Trainer, TrainingArguments

from glm_hf import GLMConfig
from glm_hf.training import GLM3DTrainer, GLMTrainingArguments
from glm_hf.training.arguments import REFUSED, REFUSED_3D, REFUSED_OBJECTS_3D

FOLDER = Path(__file__).parent
# Read by code of Trainer, accelerate or the integrations alone, none of which our trainers override.
OF_TRAINER = """
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    bf16 bf16_full_eval ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
    ddp_find_unused_parameters ddp_static_graph ddp_timeout debug disable_tqdm do_eval do_predict do_train
    eval_delay eval_on_start eval_steps eval_use_gather_object
    fp16 fp16_full_eval full_determinism greater_is_better hub_always_push hub_model_id hub_private_repo hub_revision
    hub_strategy hub_token include_num_input_tokens_seen local_rank log_level log_level_replica
    log_on_each_node logging_first_step logging_steps max_grad_norm metric_for_best_model neftune_noise_alpha
    optim_args optim_target_modules project report_to restore_callback_states_from_checkpoint
    resume_from_checkpoint run_name save_on_each_node save_only_model save_steps skip_memory_metrics tf32
    torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps trackio_bucket_id trackio_space_id
    trackio_static_space_id use_cache
""".split()
# Read by our code, or by code that ours might get into the way of; the test that shows the effect.
TESTED = {
    "adam_beta1": "test_a_run_equals_a_plain_loop",
    "adam_beta2": "test_a_run_equals_a_plain_loop",
    "adam_epsilon": "test_a_run_equals_a_plain_loop",
    "auto_find_batch_size": "test_smaller_pieces_are_found_and_give_the_same_losses",
    "average_tokens_across_devices": "test_processes_may_each_take_the_mean_of_their_own_tokens",
    "batch_eval_metrics": "test_metrics_by_batch_see_the_batches_of_one_process",
    "data_seed": "test_the_seed_of_the_data_orders_it",
    "dataloader_drop_last": "test_loaders_work_as_they_are_told",
    "dataloader_multiprocessing_context": "test_loaders_work_as_they_are_told",
    "dataloader_num_workers": "test_loaders_work_as_they_are_told",
    "dataloader_persistent_workers": "test_loaders_work_as_they_are_told",
    "dataloader_pin_memory": "test_loaders_work_as_they_are_told",
    "dataloader_prefetch_factor": "test_loaders_work_as_they_are_told",
    "deepspeed": "test_zero_gives_the_losses_of_one_process",
    "enable_jit_checkpoint": "test_a_signal_saves_a_checkpoint",
    "eval_accumulation_steps": "test_every_option_of_metrics_has_the_effect_of_one_process",
    "eval_do_concat_batches": "test_every_option_of_metrics_has_the_effect_of_one_process",
    "eval_strategy": "test_epochs_evaluate_and_save",
    "gradient_accumulation_steps": "test_accumulated_samples_make_a_step",
    "ignore_data_skip": "test_other_batch_sizes_are_taken_where_no_data_is_skipped",
    "include_for_metrics": "test_every_option_of_metrics_has_the_effect_of_one_process",
    "label_names": "test_label_ids_are_the_labels_of_that_name",
    "label_smoothing_factor": "test_label_smoothing_is_that_of_torch_in_both_trainers",
    "learning_rate": "test_a_run_equals_a_plain_loop",
    "load_best_model_at_end": "test_all_ranks_return_to_the_best_model",
    "logging_nan_inf_filter": "test_losses_that_are_not_finite_are_left_out_of_an_evaluation_if_asked_for",
    "logging_strategy": "test_epochs_log",
    "lr_scheduler_kwargs": "test_schedules_of_transformers_are_followed",
    "lr_scheduler_type": "test_schedules_of_transformers_are_followed",
    "max_steps": "test_a_run_of_steps_is_longer_than_its_samples",
    "num_train_epochs": "test_epochs_log",
    "optim": "test_optimizers_that_update_within_a_step_are_refused",
    "output_dir": "test_epochs_evaluate_and_save",
    "per_device_eval_batch_size": "test_eval_loss_is_the_mean_over_tokens_whatever_the_batch",
    "per_device_train_batch_size": "test_every_process_takes_pieces_of_the_size_per_device",
    "prediction_loss_only": "test_losses_alone_need_no_logits_of_all_tokens",
    "push_to_hub": "test_pushed_checkpoints_have_their_name_and_are_whole",
    "save_strategy": "test_epochs_evaluate_and_save",
    "save_total_limit": "test_the_best_model_comes_back_at_the_end",
    "seed": "test_the_seed_orders_the_data",
    "use_cpu": "test_processes_without_a_device_know_of_each_other",
    "warmup_steps": "test_schedules_of_transformers_are_followed",
    "weight_decay": "test_a_run_equals_a_plain_loop",
}
OBJECTS = {
    "model": "test_a_run_equals_a_plain_loop",
    "args": "test_a_run_equals_a_plain_loop",
    "data_collator": "test_a_run_equals_a_plain_loop",
    "train_dataset": "test_a_run_equals_a_plain_loop",
    "eval_dataset": "test_epochs_evaluate_and_save",
    "processing_class": "test_a_saved_model_loads_as_any_other",
    "model_init": "test_a_model_may_be_made_by_the_trainer",
    "compute_loss_func": "test_a_loss_of_ones_own_is_taken",
    "compute_metrics": "test_metrics_see_the_logits_of_all_tokens",
    "callbacks": "test_batches_grow_and_come_in_pieces",
    "optimizers": "test_an_optimizer_and_a_schedule_of_ones_own_are_taken",
    "optimizer_cls_and_kwargs": "test_a_class_of_optimizers_is_taken",
    "preprocess_logits_for_metrics": "test_predictions_are_what_logits_were_made_to",
}


def names_of(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def defined_tests() -> str:
    return "".join(file.read_text() for file in FOLDER.rglob("test_*.py"))


def test_every_argument_of_a_run_is_known():
    """One that a newer transformers has fails here until it is put into one of the tables, and means what it says."""
    groups = [set(OF_TRAINER), TESTED.keys(), REFUSED.keys()]
    assert names_of(TrainingArguments) <= set().union(*groups)
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert REFUSED_3D.keys() - REFUSED.keys() <= set(OF_TRAINER) | TESTED.keys()


def test_every_argument_of_the_trainer_is_known():
    assert set(inspect.signature(Trainer.__init__).parameters) - {"self"} == set(OBJECTS)
    assert REFUSED_OBJECTS_3D.keys() <= OBJECTS.keys()


@pytest.mark.parametrize("name", sorted({*TESTED.values(), *OBJECTS.values()}))
def test_what_is_honoured_has_a_test(name):
    assert f"def {name}(" in defined_tests()


def another_value(name: str) -> object:
    """A value that is not the default of an argument."""
    default = getattr(GLMTrainingArguments, name, None)
    return (not default) if isinstance(default, bool) else 3 if isinstance(default, int) else "other"


def build(trainer: str, source: Path, args: GLMTrainingArguments, **objects: object) -> None:
    if trainer == "GLM3DTrainer":
        GLM3DTrainer(GLMConfig.from_pretrained(source), args, train_dataset=Texts(), **objects)
    else:
        make_trainer(source, Path(args.output_dir), objects=objects, args=args)


@pytest.mark.parametrize(
    ("trainer", "name"),
    [("GLMTrainer", name) for name in sorted(REFUSED)] + [("GLM3DTrainer", name) for name in sorted(REFUSED_3D)],
)
def test_an_argument_without_effect_is_refused_by_name(model_folder, tmp_path, trainer, name):
    args = make_arguments(tmp_path, parallel={"dp_size": 1} if trainer == "GLM3DTrainer" else None)
    if name not in names_of(GLMTrainingArguments):
        pytest.skip("this transformers has no such argument")
    setattr(args, name, another_value(name))
    refused = REFUSED if trainer == "GLMTrainer" else REFUSED_3D
    with pytest.raises(ValueError, match=f"{trainer} does not support {name}[=:]") as caught:
        build(trainer, model_folder, args)
    assert refused[name] in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config: samples are shared"),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}}, "accelerator_config"),
        ({"fsdp": "full_shard"}, "fsdp=True: use deepspeed"),
        ({"parallelism_config": ParallelismConfig()}, "parallelism_config"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length': samples come"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True: the collator needs all columns"),
        ({"dataloader_in_order": False}, "dataloader_in_order=False: a step takes given samples"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True: there are no Liger kernels for GLM"),
        ({"warmup_steps": 2}, "warmup_steps=2: lr_scheduler_type=cosine_with_min_lr counts samples"),
        ({"lr_scheduler_kwargs": {"min_lr": 0.0}}, "lr_scheduler_kwargs"),
        ({"lr_scheduler_type": "linear"}, "warmup_share=0.2: it belongs to lr_scheduler_type=cosine_with_min_lr"),
    ],
)
def test_refusals_are_one_sentence_with_the_way_out(model_folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_trainer(model_folder, tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_defaults_spelled_out_are_no_arguments(model_folder, tmp_path):
    settings = {"accelerator_config": {}, "fsdp": "", "lr_scheduler_type": "cosine_with_min_lr", "warmup_steps": 0}
    settings |= {"train_sampling_strategy": "random", "use_liger_kernel": False, "ddp_find_unused_parameters": False}
    make_trainer(model_folder, tmp_path, **settings)


@pytest.mark.parametrize("name", sorted(REFUSED_OBJECTS_3D))
def test_objects_that_a_pipeline_has_no_use_for_are_refused_by_name(model_folder, tmp_path, name):
    value: Callable | tuple = (object(), None) if name == "optimizers" else print
    with pytest.raises(ValueError, match=f"GLM3DTrainer does not take {name}: "):
        build("GLM3DTrainer", model_folder, make_arguments(tmp_path, parallel={"dp_size": 1}), **{name: value})


@pytest.mark.parametrize("given", [{"parallel": {"dp_size": 1}}, {"activation_checkpointing": True}])
def test_selective_recomputation_takes_a_pipeline_that_recomputes(tmp_path, given):
    settings = {"activation_checkpointing_kwargs": {"recompute_granularity": "selective"}}
    with pytest.raises(ValueError, match="takes activation_checkpointing=True, and parallel"):
        make_arguments(tmp_path, **settings, **given)
    make_arguments(tmp_path, parallel={"dp_size": 1}, activation_checkpointing=True, **settings)


@pytest.mark.parametrize("optim", ["adafactor", "lion_32bit", "schedule_free_adamw"])
def test_optimizers_of_whole_matrices_are_refused_in_a_pipeline(model_folder, tmp_path, optim):
    args = make_arguments(tmp_path, parallel={"dp_size": 1}, optim=optim)
    with pytest.raises(ValueError, match="optim must be one of adamw_torch, adamw_torch_fused, sgd"):
        build("GLM3DTrainer", model_folder, args)


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizers_that_update_within_a_step_are_refused(model_folder, tmp_path, optim):
    with pytest.raises(ValueError, match=f"optim={optim} updates weights before the gradients of a step are complete"):
        make_trainer(model_folder, tmp_path, optim=optim)


def test_a_scheduler_of_deepspeed_is_refused(model_folder, tmp_path):
    prepare_deepspeed()

    def construct() -> str:
        settings = {"zero_optimization": {"stage": 1}, "scheduler": {"type": "WarmupLR"}, "train_batch_size": "auto"}
        settings |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
        with pytest.raises(ValueError, match="deepspeed must not have a scheduler") as caught:
            make_trainer(model_folder, tmp_path, deepspeed=settings)
        return str(caught.value)

    assert wait(start(construct, tmp_path / "result"), tmp_path / "result")


def test_a_model_that_processes_share_is_refused(model_folder, tmp_path):
    """Each would get samples of its own."""
    trainer = make_trainer(model_folder, tmp_path)
    trainer.get_tp_size = lambda: 2
    with pytest.raises(ValueError, match="this model is split over processes"):
        trainer._require_possible()


def test_no_default_is_refused_in_a_pipeline(deep_folder, tmp_path):
    built = run_ranks(lambda rank: type(make_3d_trainer(deep_folder, tmp_path, {})).__name__, 1, tmp_path)
    assert built == [GLM3DTrainer.__name__]
