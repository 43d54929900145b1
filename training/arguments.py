"""The arguments of a training run, and those of transformers' `Trainer` that trainers refuse, with what to do instead.

Tests walk all arguments of the installed transformers: one that is neither refused nor known to be honoured fails.
"""

import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import distributed as dist
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SchedulerType

from glm_hf.sharding.degrees import ParallelDegrees
from glm_hf.sharding.restarts import require_fresh_store
from glm_hf.training.deepspeed_zero import add_up_in_fp32
from glm_hf.training.saving.plain_writer import require_plain_writer

SAMPLE_SCHEDULE = SchedulerType.COSINE_WITH_MIN_LR  # the default, which counts samples
DIVERGENCE_ACTIONS = ("none", "skip", "lower_alpha", "stop")
LOSS_NORMALIZATIONS = ("step", "micro_batch")


@dataclass
class GLMTrainingArguments(TrainingArguments):
    r"""
    transformers' `TrainingArguments` with the schedules and safeguards of GLM-130B; rates are the paper's.

    Everything is counted in samples: a sample is a row of the dataset, and a step takes `global_batch_size` of them,
    in pieces of `per_device_train_batch_size`. The length of a run is `max_steps` if above 0, else `train_samples`,
    else `num_train_epochs`. An argument of `TrainingArguments` that a trainer would ignore, it refuses.

    Args:
        learning_rate: Peak learning rate.
        lr_scheduler_type: Schedule of the learning rate: by default a cosine by samples, which `warmup_share`,
            `initial_learning_rate` and `min_learning_rate` describe; any other is `Trainer`'s, by steps, with
            `warmup_steps` and `lr_scheduler_kwargs`.
        initial_learning_rate: Learning rate at the first sample.
        min_learning_rate: Learning rate at the last sample.
        warmup_share: Share of the samples over which the learning rate grows, before it falls along a cosine.
        train_samples: Number of samples of the run.
        global_batch_size: Samples of a step on all devices; by default `per_device_train_batch_size` times
            `gradient_accumulation_steps` times devices, or replicas of the model under `parallel`.
        loss_normalization: `step` for the mean over all predicted tokens of a step, `micro_batch` for the mean over
            its micro-batches (of `per_device_train_batch_size` samples) of their means, as GLM-130B was trained.
        batch_ramp_start: Samples of the first step, from which the batch grows to `global_batch_size`; GLM-130B grew
            from 192 to 4224. No ramp by default.
        batch_ramp_share: Share of the samples over which the batch grows.
        skip_data_ranges: Ranges of data that are left out, as the steps `FIRST-LAST` that would have trained on them.
        embedding_gradient_shrink: Alpha of `shrink_embedding_gradient`: a number, or points `[step, alpha]` with
            linear interpolation between them; the model's own by default.
        divergence_action: Action where the loss or the gradient is not finite, or the gradient of the embedding
            spikes: `skip` the step; `lower_alpha` by half from then on, and skip the step if something is not finite;
            `stop`, with the samples written to divergence.json; `none` only logs. Overflows of the fp16 loss scale
            do not count as divergence. DeepSpeed cannot skip a step: it stops where something is not finite.
        spike_threshold: Multiple of the median of the last 100 gradient norms of the embedding that counts as a spike.
        parallel: Degrees of `GLM3DTrainer`, `{"tp_size": 4, "pp_size": 8, "dp_size": 24}`, whose product is the number
            of processes, `partition`, the layers of every stage, if not balanced, and `sequence_parallel`. With it,
            `activation_checkpointing_kwargs` may have `recompute_granularity`: `full`, the default, or `selective`.
        async_save: Whether checkpoints are written while training goes on, from a copy of the state in host memory: a
            step waits for the copy, and for the checkpoint before. The files are the same.
        peak_tflops: Peak of a device at the precision of the run, in 10^12 operations per second, to log the model and
            hardware FLOPs utilization (MFU and HFU); known for some GPUs by default.
    """

    learning_rate: float = field(default=8e-5, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: SchedulerType | str = field(default=SAMPLE_SCHEDULE, metadata={"help": "Learning rate."})
    initial_learning_rate: float = field(default=1e-7, metadata={"help": "Learning rate at the first sample."})
    min_learning_rate: float = field(default=8e-6, metadata={"help": "Learning rate at the last sample."})
    warmup_share: float = field(default=0.005, metadata={"help": "Share of the samples for the warm-up."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second beta of AdamW."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay, without biases and norms."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Folded into global_batch_size."})
    train_samples: int | None = field(default=None, metadata={"help": "Samples of the run."})
    global_batch_size: int | None = field(default=None, metadata={"help": "Samples of a step on all devices."})
    loss_normalization: str = field(default="step", metadata={"help": f"One of {', '.join(LOSS_NORMALIZATIONS)}."})
    batch_ramp_start: int | None = field(default=None, metadata={"help": "Samples of the first step."})
    batch_ramp_share: float = field(default=0.025, metadata={"help": "Share of the samples for the batch ramp."})
    skip_data_ranges: list[str] = field(default_factory=list, metadata={"help": "Steps whose data is left out."})
    embedding_gradient_shrink: Any = field(default=None, metadata={"help": "Alpha, or points [step, alpha]."})
    divergence_action: str = field(default="stop", metadata={"help": f"One of {', '.join(DIVERGENCE_ACTIONS)}."})
    spike_threshold: float = field(default=20.0, metadata={"help": "Spike of the embedding's gradient, in medians."})
    parallel: Any = field(default=None, metadata={"help": "Degrees {tp_size, pp_size, dp_size} of GLM3DTrainer."})
    async_save: bool = field(default=False, metadata={"help": "Whether to write checkpoints in the background."})
    peak_tflops: float | None = field(
        default=None, metadata={"help": "Peak of one device in 10^12 operations per second, for the MFU."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Whether to hide losses that are NaN."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "The collator needs all columns."})
    label_names: list[str] | None = field(
        default_factory=lambda: ["shift_labels"], metadata={"help": "What the collator calls the labels."}
    )

    def __post_init__(self) -> None:
        """Check ranges, and turn accumulation steps into samples of a step."""
        require_fresh_store()
        if self.parallel is not None:
            self.parallel = ParallelDegrees.of(self.parallel)
            if "WORLD_SIZE" in os.environ:
                self.parallel.require_world(int(os.environ["WORLD_SIZE"]))  # before any process waits for another
        deepspeed = getattr(self, "deepspeed", None)
        if not torch.accelerator.is_available():
            self.use_cpu = True  # or processes that a launcher has started do not know of each other
        if self.parallel is not None:
            self.deepspeed = None  # the pipeline has an engine of its own
        super().__post_init__()
        is_recomputed = getattr(self, "activation_checkpointing", False) or self.gradient_checkpointing
        if "recompute_granularity" in (self.gradient_checkpointing_kwargs or {}):
            if self.parallel is None or not is_recomputed:
                raise ValueError("recompute_granularity takes activation_checkpointing=True, and parallel")
        self.deepspeed = deepspeed
        choices = {"divergence_action": DIVERGENCE_ACTIONS, "loss_normalization": LOSS_NORMALIZATIONS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not self.spike_threshold > 1:
            raise ValueError(f"spike_threshold must be above 1, got {self.spike_threshold}")
        for name in ("warmup_share", "batch_ramp_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.async_save:
            require_honoured(self, REFUSED_ASYNC, "async_save")
            if self.parallel is not None and self.save_only_model:
                raise ValueError("under parallel, async_save does not support save_only_model: leave one out")
        dp_size = self.world_size
        if self.parallel is not None:
            self.parallel.require_world(self.world_size)
            dp_size = self.parallel.dp_size
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.barrier()  # or one that leaves with an error disconnects others that are still connecting
        accumulated = (
            self.per_device_train_batch_size * self.gradient_accumulation_steps * max(self.n_gpu, 1) * dp_size
        )
        if self.global_batch_size is None:
            self.global_batch_size = accumulated
        elif self.gradient_accumulation_steps > 1 and self.global_batch_size != accumulated:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} makes steps of {accumulated} "
                f"samples, but global_batch_size is {self.global_batch_size}; give one of them"
            )
        self.gradient_accumulation_steps = 1  # the trainer splits a step's samples into micro-batches itself

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments as values that JSON knows."""
        fields = super().to_dict()
        return fields if self.parallel is None else {**fields, "parallel": asdict(self.parallel)}


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
    "bf16_full_eval": "evaluation has the dtype of training; set bf16",
    "ddp_broadcast_buffers": "DeepSpeed reduces gradients; leave it out",
    "ddp_bucket_cap_mb": "DeepSpeed reduces gradients; set reduce_bucket_size in deepspeed",
    "ddp_find_unused_parameters": "DeepSpeed reduces gradients; leave it out",
    "ddp_static_graph": "DeepSpeed reduces gradients; leave it out",
    "debug": "a pipeline cannot be watched; debug with GLMTrainer",
    "enable_jit_checkpoint": "it would save weights and step apart; set save_steps",
    "eval_use_gather_object": "predictions may be any nest of tensors; leave it out",
    "fp16_full_eval": "evaluation has the dtype of training; set fp16",
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
REFUSED_ASYNC = {
    "enable_jit_checkpoint": "it saves where the process is about to end; leave one out",
    "save_on_each_node": "one process completes a checkpoint; write into a folder that all processes share",
}
REFUSED_OBJECTS_3D = {
    "compute_loss_func": "a loss needs logits of the whole vocabulary, which no process has; use GLMTrainer",
    "model_init": "every process reads its own share; give the folder or the GLMConfig of a model",
    "optimizer_cls_and_kwargs": f"no process has whole matrices; set optim to one of {', '.join(MATRIX_FREE)}",
    "optimizers": f"parameters are made by the trainer; set optim to one of {', '.join(MATRIX_FREE)}",
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
    given = trainer.accelerator.state.deepspeed_plugin.hf_ds_config
    if given.get_value("scheduler") is not None:
        raise ValueError("deepspeed must not have a scheduler: the learning rate follows lr_scheduler_type")
    if given.get_value("zero_optimization.zenflow") is not None:
        raise ValueError(
            "deepspeed must not have zenflow, which chooses when weights are updated, while accelerate tells it "
            "when; use offload_optimizer without zenflow"
        )
    require_plain_writer(given.config)
    add_up_in_fp32(given)


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
