"""Arguments of transformers' `Trainer` that a trainer of ours does not honour, each with what to do instead.

Tests walk all arguments of the installed transformers: one that is neither here nor known to be honoured fails them.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from accelerate.utils import DistributedType
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SchedulerType

SAMPLE_SCHEDULE = SchedulerType.COSINE_WITH_MIN_LR  # the default, which counts samples
UPDATES_WHILE_IT_GOES_BACK = ("lomo", "adalomo")
MATRIX_FREE = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")

REFUSED = {
    "accelerator_config": "samples are shared by global_batch_size; leave it out",
    "dataloader_in_order": "a step takes given samples; leave it True",
    "fsdp": "use deepspeed (ZeRO), or GLM3DTrainer",
    "fsdp_config": "use deepspeed (ZeRO), or GLM3DTrainer",
    "length_column_name": "samples come in the order of the seed; leave it out",
    "liger_kernel_config": "there are no Liger kernels for GLM; leave it out",
    "parallelism_config": "use deepspeed (ZeRO), or GLM3DTrainer with parallel",
    "remove_unused_columns": "the collator needs all columns; remove some from the dataset itself",
    "train_sampling_strategy": "samples come in the order of the seed; leave it out",
    "use_liger_kernel": "there are no Liger kernels for GLM; leave it out",
}
REFUSED_3D = REFUSED | {
    "auto_find_batch_size": "set per_device_train_batch_size; `glm-hf plan --train` tells what fits",
    "batch_eval_metrics": "a pipeline gives no predictions",
    "bf16_full_eval": "evaluation has the dtype of training; set bf16",
    "ddp_broadcast_buffers": "DeepSpeed reduces gradients; leave it out",
    "ddp_bucket_cap_mb": "DeepSpeed reduces gradients; set reduce_bucket_size in deepspeed",
    "ddp_find_unused_parameters": "DeepSpeed reduces gradients; leave it out",
    "ddp_static_graph": "DeepSpeed reduces gradients; leave it out",
    "debug": "a pipeline cannot be watched; debug with GLMTrainer",
    "enable_jit_checkpoint": "it would save weights and step apart; set save_steps",
    "eval_accumulation_steps": "a pipeline gives no predictions",
    "eval_do_concat_batches": "a pipeline gives no predictions",
    "eval_use_gather_object": "a pipeline gives no predictions",
    "fp16_full_eval": "evaluation has the dtype of training; set fp16",
    "include_for_metrics": "a pipeline gives no predictions",
    "include_num_input_tokens_seen": "processes share samples; read samples and tokens_per_second in the logs",
    "label_names": "a pipeline takes the labels of DataCollatorForBlankInfilling; leave it out",
    "neftune_noise_alpha": "no process has whole embeddings; use GLMTrainer",
    "optim_target_modules": "no process has whole matrices; leave it out",
    "save_on_each_node": "all processes write into one folder; leave it out",
    "torch_compile": "a pipeline is not compiled; leave it out",
    "torch_compile_backend": "a pipeline is not compiled; leave it out",
    "torch_compile_mode": "a pipeline is not compiled; leave it out",
    "torch_empty_cache_steps": "micro-batches follow without a pause; leave it out",
}
REFUSED_OBJECTS_3D = {
    "compute_loss_func": "a loss needs logits of the whole vocabulary, which no process has; use GLMTrainer",
    "compute_metrics": "compute_metrics needs logits of the whole vocabulary, which no process has; export the model",
    "model_init": "every process reads its own share; give the folder or the GLMConfig of a model",
    "optimizer_cls_and_kwargs": f"no process has whole matrices; set optim to one of {', '.join(MATRIX_FREE)}",
    "optimizers": f"parameters are made by the trainer; set optim to one of {', '.join(MATRIX_FREE)}",
    "preprocess_logits_for_metrics": "a pipeline gives no predictions; export the model",
}


def is_set(args: TrainingArguments, name: str) -> bool:
    """Tell whether an argument has another value than by default; False for one that this transformers lacks."""
    known = {field.name: field for field in fields(args)}.get(name)
    if known is None:
        return False
    default = known.default if known.default_factory is MISSING else known.default_factory()
    value = getattr(args, name)
    if isinstance(value, AcceleratorConfig):
        return value != AcceleratorConfig()
    return value != default and bool(value or default)


def require_honoured(args: TrainingArguments, refused: Mapping[str, str], trainer: str) -> None:
    """Raise ValueError if an argument is set that `trainer` would ignore, saying what to do."""
    for name, way_out in refused.items():
        if is_set(args, name):
            value = getattr(args, name)
            given = f"={value!r}" if isinstance(value, (bool, int, float, str)) else ""
            raise ValueError(f"{trainer} does not support {name}{given}: {way_out}")


def require_objects(given: Mapping[str, Any], refused: Mapping[str, str], trainer: str) -> None:
    """Raise ValueError if an argument of `Trainer` itself is given that `trainer` would ignore."""
    for name, way_out in refused.items():
        value = given.get(name)
        if value is not None and value != (None, None):
            raise ValueError(f"{trainer} does not take {name}: {way_out}")


def require_one_schedule(args: Any, scheduler: Any) -> None:
    """
    Raise ValueError if an argument belongs to another schedule of the learning rate than the one that is followed.

    Args:
        args: `GLMTrainingArguments`.
        scheduler: Given to the trainer, None for that of `lr_scheduler_type`.
    """
    name = SAMPLE_SCHEDULE.value
    if args.lr_scheduler_type == SAMPLE_SCHEDULE and scheduler is None:
        way_out = f"lr_scheduler_type={name} counts samples; set warmup_share and min_learning_rate"
        refused = dict.fromkeys(("warmup_steps", "lr_scheduler_kwargs"), way_out)
    else:
        way_out = f"it belongs to lr_scheduler_type={name}; leave it out, or set warmup_steps and lr_scheduler_kwargs"
        refused = dict.fromkeys(("warmup_share", "initial_learning_rate", "min_learning_rate"), way_out)
    require_honoured(args, refused, "this learning rate schedule")


def require_whole_steps(trainer: Any) -> None:
    """Raise ValueError if an argument updates weights, or stops, within a step, whose samples go through in pieces."""
    args = trainer.args
    if args.optim in UPDATES_WHILE_IT_GOES_BACK or args.optim.endswith("_layerwise"):
        raise ValueError(
            f"optim={args.optim.value} updates weights before the gradients of a step are complete; take another"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"one process has {args.n_gpu} GPUs; start one for each with torchrun, or set CUDA_VISIBLE_DEVICES to one"
        )
    if not trainer.is_deepspeed_enabled:
        return
    for name in ("auto_find_batch_size", "enable_jit_checkpoint"):
        if getattr(args, name):
            raise ValueError(f"{name} does not work with deepspeed, which updates weights itself; leave one out")
    if trainer.accelerator.state.deepspeed_plugin.hf_ds_config.get_value("scheduler") is not None:
        raise ValueError("deepspeed must not have a scheduler: the learning rate follows lr_scheduler_type")


def require_all_processes_apart(trainer: Any) -> None:
    """Raise ValueError if processes share a model that was split while loading, and so ought to share samples."""
    model, state = trainer.model, trainer.accelerator.state
    sizes = (trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size())
    if max(sizes) > 1 or getattr(model, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            "GLMTrainer gives every process samples of its own, but this model is split over processes; load it whole "
            "and use deepspeed (ZeRO), or use GLM3DTrainer"
        )
    if state.distributed_type in (DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise ValueError(f"GLMTrainer does not support {state.distributed_type.value}: use deepspeed (ZeRO)")
