"""What a training run is told, beside its data."""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed as dist
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from glm_hf.sharding.degrees import Parallel
from glm_hf.training.unsupported import SAMPLE_SCHEDULE

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
        learning_rate: Peak.
        lr_scheduler_type: By default a cosine by samples, which the next three arguments describe; any other is
            `Trainer`'s, by steps, with `warmup_steps` and `lr_scheduler_kwargs`.
        initial_learning_rate: At the first sample.
        min_learning_rate: At the last sample.
        warmup_share: Share of the samples over which the rate grows, before it falls along a cosine.
        train_samples: Length of the run.
        global_batch_size: Samples of a step on all devices; by default `per_device_train_batch_size` times
            `gradient_accumulation_steps` times devices, or copies of the model under `parallel`.
        loss_normalization: `step` for the mean over all predicted tokens of a step, `micro_batch` for the mean over
            its micro-batches (of `per_device_train_batch_size` samples) of their means, as GLM-130B was trained.
        batch_ramp_start: Samples of the first step, from which the batch grows to `global_batch_size`; GLM-130B grew
            from 192 to 4224. No ramp by default.
        batch_ramp_share: Share of the samples over which the batch grows.
        skip_data_ranges: Data to leave out, as the steps `FIRST-LAST` that would have trained on it.
        embedding_gradient_shrink: Alpha of `shrink_embedding_gradient`: a number, or points `[step, alpha]` with
            straight lines between; by default the model's own.
        divergence_action: What happens where the loss or the gradient is not finite, or the gradient of the embedding
            leaps: `skip` the step; `lower_alpha` by half from then on, and skip the step if something is not finite;
            `stop`, with the samples written to divergence.json; `none` only logs. Overflows of the fp16 loss scale are
            none of this. DeepSpeed cannot skip a step: it stops where something is not finite.
        spike_threshold: How many times the median of the last 100 norms of the embedding's gradient a leap is.
        parallel: Degrees of `GLM3DTrainer`, `{"tensor": 4, "pipeline": 8, "data": 24}`, whose product is the number of
            processes, and `partition`, the layers of every stage, if not balanced.
        peak_tflops: What a device can do at the precision of the run, in 10^12 operations per second, to log the
            model FLOPs utilization; by default known for some GPUs.
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
    spike_threshold: float = field(default=20.0, metadata={"help": "Leap of the embedding's gradient, in medians."})
    parallel: Any = field(default=None, metadata={"help": "Degrees {tensor, pipeline, data} of GLM3DTrainer."})
    peak_tflops: float | None = field(default=None, metadata={"help": "Of one device, for the utilization."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Whether to hide losses that are NaN."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "The collator needs all columns."})
    label_names: list[str] | None = field(
        default_factory=lambda: ["shift_labels"], metadata={"help": "What the collator calls the labels."}
    )

    def __post_init__(self) -> None:
        """Check ranges, and turn accumulation steps into samples of a step."""
        parallel = None if self.parallel is None else Parallel.of(self.parallel)
        if parallel is not None and "WORLD_SIZE" in os.environ:
            parallel.require_world(int(os.environ["WORLD_SIZE"]))  # before any process waits for another
        deepspeed = getattr(self, "deepspeed", None)
        if not torch.accelerator.is_available():
            self.use_cpu = True  # or processes that a launcher has started do not know of each other
        if self.parallel is not None:
            self.deepspeed = None  # the pipeline has an engine of its own
        super().__post_init__()
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
        copies = self.world_size
        if parallel is not None:
            parallel.require_world(self.world_size)
            copies = parallel.data
            if dist.is_initialized() and dist.get_backend() == "gloo":
                dist.barrier()  # or one that leaves with an error cuts off others that are still connecting
        accumulated = self.per_device_train_batch_size * self.gradient_accumulation_steps * max(self.n_gpu, 1) * copies
        if self.global_batch_size is None:
            self.global_batch_size = accumulated
        elif self.gradient_accumulation_steps > 1 and self.global_batch_size != accumulated:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} makes steps of {accumulated} "
                f"samples, but global_batch_size is {self.global_batch_size}; give one of them"
            )
        self.gradient_accumulation_steps = 1  # the trainer cuts a step's samples into pieces itself
