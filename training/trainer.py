"""transformers' Trainer with what GLM-130B's training needs."""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging

from glm_hf.folders.validation import read_json
from glm_hf.training.arguments import (
    REFUSED,
    SAMPLE_SCHEDULE,
    GLMTrainingArguments,
    require_all_processes_apart,
    require_honoured,
    require_one_schedule,
    require_whole_steps,
)
from glm_hf.training.checkpoints import STATE_FILE
from glm_hf.training.data.collator import DataCollatorForBlankInfilling
from glm_hf.training.data.dataset import BlankInfillingDataset
from glm_hf.training.data.sampler import ROW_ORDER, ShuffledEpochs, StepSampler, loader_options
from glm_hf.training.deepspeed_zero import DeferredStep
from glm_hf.training.divergence import DivergenceError, DivergenceWatch, record_event, stop_message
from glm_hf.training.gradient_shrink import shrink_embedding_gradient
from glm_hf.training.logs.measured_trainer import MeasuredTrainer
from glm_hf.training.logs.run_log import RunLog
from glm_hf.training.measurements import LossMeter
from glm_hf.training.pipeline.micro_batches import Batch, split_rows
from glm_hf.training.schedules import BatchSchedule, LearningRateSchedule, PiecewiseLinear, parse_ranges
from glm_hf.training.token_loss import names_of_corpora

logger = logging.get_logger(__name__)


class GLMTrainer(MeasuredTrainer):
    """
    transformers' `Trainer`, counting in samples, with GLM-130B's schedules, losses by objective and safeguards.

    Everything else is `Trainer`'s: callbacks, evaluation, logging, DDP and DeepSpeed's ZeRO. A run is one pass over as
    many samples as `GLMTrainingArguments` tell; `train_dataset` is a `BlankInfillingDataset`, or any dataset with a
    length whose items `DataCollatorForBlankInfilling` takes. Checkpoints appear only when they are complete; a run
    that is resumed continues with the same batches, whatever the number of workers and processes.

    Logged besides: `loss_mask`, `loss_smask`, `loss_gmask`, `loss_instruction` (means per predicted token), of several
    corpora `loss/NAME`, `embedding_grad_norm` and `grad_norm/GROUP` of groups of layers, before clipping,
    `embedding_gradient_shrink`, `samples`, `tokens_per_second`, and where the peak of the device is known `mfu` and
    `hfu`, the model and hardware FLOPs utilization. `eval_loss` is the mean over all predicted tokens, whatever the
    batches and processes, with `eval_loss_mask`, `eval_loss/NAME` and so on beside it. All of it is also in
    `log.jsonl` in the output folder.

    Predictions, as `predict` returns and metrics get them, are `(rows, L, V)`, and label ids `(rows, L)` are what each
    token is to predict.

    Args:
        model: Model to train, as `Trainer` takes it.
        args: `GLMTrainingArguments`.
        data_collator: `DataCollatorForBlankInfilling` with the recipe of GLM-130B by default.
        **kwargs: Further arguments of `Trainer`.

    Raises:
        ValueError: If an argument would be ignored, schedules are impossible, or `train_dataset` has no length.
        DivergenceError: If training has stopped itself, from `train`.
    """

    args: GLMTrainingArguments
    takes_parallel = False
    lr_scheduler: Any
    refused: ClassVar[Mapping[str, str]] = REFUSED

    def __init__(
        self, model: Any = None, args: GLMTrainingArguments | None = None, data_collator: Any = None, **kwargs: Any
    ) -> None:
        args = GLMTrainingArguments() if args is None else args
        if not isinstance(args, GLMTrainingArguments):
            raise ValueError(f"GLMTrainer takes GLMTrainingArguments, got {type(args).__name__}")
        if args.parallel is not None and not self.takes_parallel:
            raise ValueError(
                "args.parallel is for GLM3DTrainer, which takes the folder of a model instead of the model"
            )
        require_honoured(args, self.refused, type(self).__name__)
        require_one_schedule(args, kwargs.get("optimizers", (None, None))[1])
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)
        if data_collator is None:
            self.data_collator = DataCollatorForBlankInfilling(self.model.config, seed=args.seed)
        if isinstance(self.data_collator, DataCollatorForBlankInfilling):
            self.data_collator = replace(
                self.data_collator, with_origin=True, with_labels=self.compute_loss_func is not None
            )
        self._require_possible()
        shrink = args.embedding_gradient_shrink
        self.alpha_schedule = None if shrink is None else PiecewiseLinear.of(shrink)
        self.alpha_factor = 1.0
        self.watch = DivergenceWatch(args.spike_threshold)
        self.meter = LossMeter(args.device, names_of_corpora(self.train_dataset))
        self.eval_meter = LossMeter(args.device)
        self.run_log = RunLog(args.output_dir)
        self.step_loss: torch.Tensor | None = None

    def _require_possible(self) -> None:
        """Raise ValueError if the model, the data or DeepSpeed do not go with the arguments."""
        adapter = getattr(self.model, "active_peft_config", None)
        if adapter is not None and adapter.is_prompt_learning and adapter.peft_type != "PREFIX_TUNING":
            raise ValueError(
                f"samples share rows, in which {adapter.peft_type.value} has no place for a prompt of each; use "
                "PREFIX_TUNING (P-tuning v2) or LORA"
            )
        if self.is_fsdp_enabled:  # by the environment of a launcher
            raise ValueError(f"GLMTrainer does not train under FSDP: {REFUSED['fsdp']}")
        if self.is_deepspeed_enabled and self.args.divergence_action == "skip":
            raise ValueError("DeepSpeed cannot leave out an update; set divergence_action to stop or lower_alpha")
        if self.args.data_seed is not None and isinstance(self.train_dataset, BlankInfillingDataset):
            raise ValueError("data_seed has no effect on a BlankInfillingDataset; give the dataset its own seed")
        require_whole_steps(self)
        if not self.takes_parallel:
            require_all_processes_apart(self)

    @property
    def data_rank(self) -> int:
        """Which share of a step's samples this process takes."""
        return self.args.process_index

    def plan_steps(self) -> np.ndarray:
        """Return `(steps + 1,)` the samples before every step and after the last."""
        args = self.args
        full = args.global_batch_size
        assert full is not None, "the arguments have set it"
        if args.max_steps > 0 and args.batch_ramp_start is not None:
            raise ValueError("a batch ramp is a share of the samples: give train_samples instead of max_steps")
        if args.max_steps > 0:
            total = args.max_steps * full
        else:
            total = args.train_samples or int(args.num_train_epochs * len(self.train_dataset))
        start = full if args.batch_ramp_start is None else args.batch_ramp_start
        schedule = BatchSchedule(total, full, start, args.batch_ramp_share * total if start < full else 0)
        return np.append(0, schedule.batch_sizes().cumsum())

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader of whole steps, this process's share of each, through the whole run."""
        if isinstance(self.train_dataset, IterableDataset) or not hasattr(self.train_dataset, "__len__"):
            raise ValueError("train_dataset needs a length; tokenize a stream with glm_hf.training.load_corpus first")
        args = self.args
        self.samples_before = self.plan_steps()
        dataset = self.train_dataset
        if not isinstance(dataset, BlankInfillingDataset):
            dataset = ShuffledEpochs(dataset, args.seed if args.data_seed is None else args.data_seed)
        skipped = parse_ranges(args.skip_data_ranges, self.samples_before[1:])
        sampler = StepSampler(np.diff(self.samples_before), skipped, self.data_rank, self.data_size)
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            generator=torch.Generator().manual_seed(args.seed),  # the global one would move with the loader
            **loader_options(args),
        )

    def set_initial_training_values(
        self, args: GLMTrainingArguments, dataloader: DataLoader
    ) -> tuple[int, int, int, int, int, int, int]:
        """Return the counts of a run that is one pass over the loader."""
        steps, samples, batch_size = len(dataloader), int(self.samples_before[-1]), args.global_batch_size or 0
        return 1, steps, len(self.train_dataset), samples, batch_size, steps, steps

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the learning rate follow the samples, unless another schedule is asked for."""
        if self.lr_scheduler is not None or self.args.lr_scheduler_type != SAMPLE_SCHEDULE:
            return super().create_scheduler(num_training_steps, optimizer)
        args, total = self.args, int(self.samples_before[-1])
        rate = LearningRateSchedule(
            args.initial_learning_rate, args.learning_rate, args.min_learning_rate, args.warmup_share * total, total
        )
        last = len(self.samples_before) - 1
        self.lr_scheduler = LambdaLR(
            self.optimizer if optimizer is None else optimizer,
            lambda step: rate.at(int(self.samples_before[min(step, last)])) / args.learning_rate,
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Train on a step's samples in pieces of `per_device_train_batch_size`, and return their mean loss."""
        self._begin_step()
        uses_zero = self.is_deepspeed_enabled
        if uses_zero and not isinstance(self.accelerator.deepspeed_engine_wrapped, DeferredStep):
            self.accelerator.deepspeed_engine_wrapped = DeferredStep(self.model_wrapped)
        pieces = self._split(inputs)
        items = self._loss_divisors(pieces, num_items_in_batch)
        losses = []
        for number, (piece, num_items) in enumerate(zip(pieces, items, strict=True), 1):
            is_last = number == len(pieces)
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            with contextlib.nullcontext() if is_last or uses_zero else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, piece, num_items))
        self.step_loss = torch.stack(losses).sum()
        self._take_gradient_norms(self._squared_gradient_norms().sqrt())
        if uses_zero:
            self._check_step(0.0)
            self.model_wrapped.step()
        return self.step_loss

    def _update_auto_batch_size(self, batch_size: int) -> None:
        """Begin with smaller pieces of a step, which has as many samples as before."""
        super()._update_auto_batch_size(batch_size)
        self.meter.take()
        self.watch = DivergenceWatch(self.args.spike_threshold)

    def _begin_step(self) -> None:
        """Forget the rows of the step before, and set what changes from step to step."""
        self.meter.begin_step()
        if self.alpha_schedule is not None:
            alpha = float(self.alpha_schedule(np.array(self.state.global_step)))
            shrink_embedding_gradient(self.model, alpha * self.alpha_factor)

    def _split(self, inputs: Batch) -> list[Batch]:
        """Return a step's samples in pieces of `per_device_train_batch_size`, or less if `auto_find_batch_size`."""
        first, end = self.samples_before[self.state.global_step : self.state.global_step + 2]
        return split_rows(inputs, -(-(int(end - first) // self.data_size) // self._train_batch_size))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm of the gradient, after a look at whether the update may be made."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.is_deepspeed_enabled and not self._check_step(float(norm)):
            self.model.zero_grad(set_to_none=True)  # so that the update changes nothing
        return norm

    @property
    def has_loss_scale(self) -> bool:
        """Whether a gradient that is not finite may be an overflow, which lowers the loss scale and skips the step."""
        return self.accelerator.scaler is not None or self.accelerator.mixed_precision == "fp16"

    def _check_step(self, grad_norm: float) -> bool:
        """Act as `divergence_action` says if the step diverges; return whether its update may be made."""
        if self.args.divergence_action == "none":
            return True
        loss = float(self.accelerator.reduce(self.step_loss, "mean"))
        embedding_norm = None if self.embedding_norm is None else float(self.embedding_norm)
        if self.has_loss_scale and math.isfinite(loss) and not math.isfinite(grad_norm + (embedding_norm or 0)):
            return True
        reason = self.watch.observe(loss, grad_norm, embedding_norm)
        if reason is None:
            return True
        action, step = self.args.divergence_action, self.state.global_step + 1
        is_finite = math.isfinite(loss + grad_norm + (embedding_norm or 0))
        if self.is_deepspeed_enabled and not is_finite:
            action = "stop"  # its update can neither be left out nor made
        file = self._record_divergence({"step": step, "reason": reason, "action": action})
        if action == "stop":
            self.model.zero_grad(set_to_none=True)
            raise DivergenceError(stop_message(step, reason, file))
        if action == "lower_alpha":
            self.alpha_factor /= 2
            if self.alpha_schedule is None:
                self.alpha_schedule = PiecewiseLinear.of(self.model.config.embedding_gradient_shrink)
        logger.warning(f"step {step}: {reason}; {action.replace('_', ' ')}")
        return action != "skip" and is_finite

    def _record_divergence(self, event: dict[str, Any]) -> Path:
        """Append what has happened to divergence.json, with the samples of the step."""
        samples = [{"sample": sample, "loss": loss} for sample, loss in gather_object(self.meter.losses_of_rows())]
        if isinstance(self.train_dataset, BlankInfillingDataset):
            samples = [sample | self.train_dataset.origin(sample["sample"]) for sample in samples]
        return record_event(self.args.output_dir, event | {"samples": samples}, writes=self.is_world_process_zero())

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Do what is due at the end of a step; an epoch ends when the dataset's length was trained on."""
        step, length = self.state.global_step, len(self.train_dataset)
        before, samples = self.samples_before[max(step - 1, 0)], self.samples_before[step]
        self.state.epoch = samples / length
        if samples // length > before // length and step < self.state.max_steps:  # `Trainer` sees the end itself
            self.control.should_log |= self.args.logging_strategy == IntervalStrategy.EPOCH
            self.control.should_evaluate |= self.args.eval_strategy == IntervalStrategy.EPOCH
            self.control.should_save |= self.args.save_strategy == SaveStrategy.EPOCH
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._globalstep_last_logged == step:
            self._tr_loss.nan_to_num_()  # it was reset by subtracting itself

    def _own_state(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the state of `Trainer`."""
        return {
            "samples": int(self.samples_before[self.state.global_step]),
            "row_order": ROW_ORDER,
            "alpha_factor": self.alpha_factor,
            "watch": self.watch.state(),
        }

    def _init_training_state(
        self, max_steps: int, num_steps: int, num_epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """
        Begin, or resume from a checkpoint.

        Raises:
            ValueError: If the batches of this run would have come to another place in the data.
        """
        result = super()._init_training_state(max_steps, num_steps, num_epochs, resume_from_checkpoint, trial)
        file = Path(resume_from_checkpoint or "") / STATE_FILE
        if resume_from_checkpoint is not None and file.is_file():
            state = read_json(file)
            step = self.state.global_step
            if state.get("row_order") != ROW_ORDER and not self.args.ignore_data_skip:
                raise ValueError(
                    f"{resume_from_checkpoint} is of a version that took samples in another order; set "
                    "ignore_data_skip to begin with the first sample of the order of this one"
                )
            here = int(self.samples_before[min(step, max_steps)])
            if state["samples"] != here and not self.args.ignore_data_skip:
                raise ValueError(
                    f"{resume_from_checkpoint} has seen {state['samples']} samples in {step} steps, but by these "
                    f"arguments it would be {here}; keep the batch sizes, or set ignore_data_skip"
                )
            self.alpha_factor = state["alpha_factor"]
            if self.alpha_factor != 1 and self.alpha_schedule is None:
                self.alpha_schedule = PiecewiseLinear.of(self.model.config.embedding_gradient_shrink)
            self.watch.restore(state["watch"])
        self._start_clock()
        if self.is_world_process_zero():
            self.run_log.begin(self.state.log_history)
        return result
