"""GLMTrainer on a model that no device can hold: tensor x pipeline x data parallelism on DeepSpeed's engine."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer import SCHEDULER_NAME

from glm_hf.configuration_glm import GLMConfig
from glm_hf.folders.validation import read_config, reading
from glm_hf.training.arguments import (
    MATRIX_FREE,
    REFUSED_3D,
    REFUSED_OBJECTS_3D,
    GLMTrainingArguments,
    require_honoured,
    require_objects,
)
from glm_hf.training.checkpoints import UNFIT
from glm_hf.training.data.blanks import IGNORED
from glm_hf.training.deepspeed_zero import local_gradients, loss_scale_of
from glm_hf.training.measurements import ParameterGroups
from glm_hf.training.pipeline.checkpoint import load_engine, require_own, save_engine
from glm_hf.training.pipeline.engine import (
    check_before_update,
    deepspeed_3d_config,
    global_norm,
    make_engine,
    start_deepspeed,
    summed,
)
from glm_hf.training.pipeline.evaluation import PipelineEvaluationTrainer
from glm_hf.training.pipeline.heartbeat import Heartbeat
from glm_hf.training.pipeline.lora import LoRAPlan, add_lora, save_adapter
from glm_hf.training.pipeline.micro_batches import Batch, common_shape, micro_batches, require_names
from glm_hf.training.pipeline.recomputation import recomputed_flops_per_token


class GLM3DTrainer(PipelineEvaluationTrainer):
    """
    `GLMTrainer` with every layer sharded over tensor-parallel ranks and the layers spread over pipeline stages.

    Data, schedules, logs, callbacks, evaluation and safeguards are those of `GLMTrainer`, and so are losses, norms and
    weights, whatever the degrees of parallelism.

    Args:
        model: Folder of a Hugging Face model, of which every process reads its own share, or the `GLMConfig` of a new
            one.
        args: Arguments with `parallel`, degrees whose product is the number of processes. A micro-batch has
            `per_device_train_batch_size` samples. `deepspeed` may hold further keys for DeepSpeed. In fp16 and bf16
            weights have 16 bits, and the optimizer keeps fp32 ones.
        data_collator: Collator, as `GLMTrainer` takes it.
        config: Configuration of `model`, if some of its fields are not those in its folder.
        peft_config: PEFT's configuration of a LoRA adapter that alone is trained and saved, or the folder of one whose
            training continues.
        **kwargs: Further arguments of `GLMTrainer`, without those of `REFUSED_OBJECTS_3D`.

    Raises:
        ValueError: If the model cannot be sharded in this way, on all processes, before any waits for another, or an
            argument would be ignored.
    """

    takes_parallel = True
    refused = REFUSED_3D
    lr_scheduler: Any

    def __init__(
        self,
        model: str | Path | GLMConfig,
        args: GLMTrainingArguments,
        data_collator: Any = None,
        *,
        config: GLMConfig | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, GLMTrainingArguments) or args.parallel is None:
            raise ValueError("GLM3DTrainer takes GLMTrainingArguments with parallel={tp_size, pp_size, dp_size}")
        require_objects(kwargs, REFUSED_OBJECTS_3D, "GLM3DTrainer")
        require_honoured(args, self.refused, "GLM3DTrainer")
        if args.optim not in MATRIX_FREE:
            raise ValueError(f"optim must be one of {', '.join(MATRIX_FREE)}, as no process has whole matrices")
        self.parallel = args.parallel
        self.stage, _, self.tensor_rank = self.parallel.coordinates(args.process_index)
        super().__init__(self._make_pipeline(model, args, config, peft_config), args, data_collator, **kwargs)
        self.model.observe = self._observe
        self.model.label_smoothing = args.label_smoothing_factor
        self.engine: Any = None
        self.shape: tuple[int, ...] = ()

    def _make_pipeline(
        self, model: str | Path | GLMConfig, args: GLMTrainingArguments, config: GLMConfig | None, peft_config: Any
    ) -> Any:
        """Return this process's share of the model, with its weights."""
        from glm_hf.training.pipeline.model import GLMPipeline
        from glm_hf.training.pipeline.weights import initialize, load_folder

        if config is None:
            config = model if isinstance(model, GLMConfig) else read_config(model)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"{model} is quantized, whose weights cannot be trained; give the model that is not")
        self.parallel.require_fits(config)
        adapter = None if peft_config is None else LoRAPlan.of(peft_config, model, config, self.parallel)
        if not dist.is_initialized():
            raise ValueError(
                f"a launcher must start the processes of 3D training: torchrun --nproc-per-node {args.world_size}"
            )
        deepspeed_settings(args)  # which may be wrong
        start_deepspeed()
        pipeline = GLMPipeline(config, self.parallel, dtype_of(args))
        if isinstance(model, GLMConfig):
            initialize(pipeline, args.seed)
        else:
            load_folder(pipeline, model)
        if adapter is not None:
            add_lora(pipeline, adapter, args.seed)
        return pipeline

    @property
    def data_rank(self) -> int:
        """Which replica this process belongs to."""
        return self.parallel.coordinates(self.args.process_index)[1]

    @property
    def data_size(self) -> int:
        """Replicas of the model, each with samples of its own."""
        return self.parallel.dp_size

    @property
    def is_reporter(self) -> bool:
        """Whether this process has the losses that are to be counted: those of the last stage, once."""
        return self.model.is_last and self.tensor_rank == 0

    @cached_property
    def data_group(self) -> Any:
        """Process group of the replicas."""
        return self.model.mpu().get_data_parallel_group()

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Leave precision to the engine."""
        return super()._build_accelerator_args(**kwargs) | {"mixed_precision": "no"}

    def make_engine(self) -> Any:
        """Return the engine, made when it is first needed."""
        if self.engine is None:
            self.engine = make_engine(self.model, self.create_optimizer(), deepspeed_settings(self.args))
            check_before_update(self.engine, self._may_update)
        return self.engine

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """
        Train as `Trainer` does; if a process dies, all others end and name it.

        Raises:
            ConnectionError: If another process has died, failed or stopped answering.
        """
        with Heartbeat(self.args.process_index, self.args.world_size):
            return super().train(*args, **kwargs)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[Any, DataLoader]:
        """Return the engine instead of a wrapped model, after it has loaded a checkpoint."""
        from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper

        engine = self.make_engine()
        if self._created_lr_scheduler:
            self.lr_scheduler = None
        self.create_scheduler(max_steps, engine.optimizer.optimizer)
        self.optimizer = DeepSpeedOptimizerWrapper(engine.optimizer)  # its step does nothing, the engine's does
        self.model_wrapped = engine
        if resume_from_checkpoint is not None:
            self._load_engine(resume_from_checkpoint)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return engine, train_dataloader

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Train on a step's samples, update included, and return their mean loss."""
        require_names(inputs)
        self._begin_step()
        torch.manual_seed(self._seed_of_step())
        pieces = self._split(inputs)
        items = self._loss_divisors(pieces, num_items_in_batch)
        factors = [len(pieces) * self.num_averaged / float(count) for count in items]  # the engine takes means
        self.engine.set_train_batch_size(len(pieces) * self.args.per_device_train_batch_size * self.data_size)
        loss = self.engine.train_batch(self._prepared(list(zip(pieces, factors, strict=True))))
        return loss.detach().to(self.args.device)

    def _seed_of_step(self) -> int:
        """Return a seed that ranks of a layer share, and that a resumed run finds again."""
        place = (self.args.seed, self.state.global_step, self.stage, self.data_rank)
        return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def _prepared(self, pieces: Sequence[tuple[Batch, float]]) -> Any:
        """Return the micro-batches of some pieces, after telling the engine if their shape has changed."""
        multiple = self.parallel.sequence_multiple
        shape = common_shape([piece for piece, _ in pieces], multiple)
        if self.shape != shape:
            self.shape = shape
            self.engine.reset_activation_shape()
        return micro_batches(pieces, self.model.config.pad_token_id, multiple)

    def _observe(self, losses: torch.Tensor, labels: torch.Tensor, *origin: torch.Tensor) -> None:
        """Take note of the losses of a micro-batch."""
        if self.is_reporter:
            (self.meter if self.model.training else self.eval_meter).add(losses, labels, *origin)

    @cached_property
    def parameter_groups(self) -> ParameterGroups:
        """Groups of the parameters of this process that no other counts."""
        named = [
            (prefix + name, parameter)
            for prefix, module in self.model.named_parts()
            for name, parameter in module.named_parameters()
            if not parameter.ds_pipe_replicated and (parameter.tensor_model_parallel or self.tensor_rank == 0)
        ]
        embedding = self.model.forward_funcs[0].weight if self.model.is_first else None
        groups = ParameterGroups(named, embedding, self.model.config.num_hidden_layers)
        groups.has_embedding = self.model.adapter is None  # on all stages
        return groups

    def _squared_gradient_norms(self) -> torch.Tensor:
        """Return `(G,)` the squared norms of this process's part of the groups' gradients, without a loss scale."""
        groups = self.parameter_groups
        local = groups.squared_norms(local_gradients(p for p, _ in groups.members), self.args.device)
        return local / loss_scale_of(self.engine.optimizer) ** 2

    def _parameter_counts(self) -> tuple[float, float]:
        """Return these of all stages and ranks."""
        own = sum(parameter.numel() for parameter, _ in self.parameter_groups.members)
        trained = summed([torch.tensor(own, device=self.args.device)])[0] / self.parallel.dp_size
        return self.model.num_parameters() + (0 if self.model.adapter is None else trained), trained

    @cached_property
    def recomputed_flops_per_token(self) -> float:
        """Operations per token that are done twice to save memory, on all stages."""
        own = torch.tensor(recomputed_flops_per_token(self.model, self.row_length), device=self.args.device)
        return summed([own])[0] / (self.parallel.tp_size * self.parallel.dp_size)

    def _may_update(self) -> bool:
        """Measure a step's loss and gradients before its update, and tell whether it may be made."""
        engine = self.engine
        loss = engine.total_loss / engine.gradient_accumulation_steps() if self.is_reporter else torch.zeros(1)
        *squared, total = summed([*self._squared_gradient_norms(), loss.to(self.args.device)])
        self._take_gradient_norms(torch.tensor(squared).sqrt())
        self.step_loss = torch.tensor(total / self.data_size, device=self.args.device)
        if self.args.divergence_action == "none":
            return True
        norm = global_norm(engine)
        engine.optimizer._global_grad_norm = norm  # to be logged if there is no update
        return self._check_step(norm)

    @property
    def has_loss_scale(self) -> bool:
        """Whether a gradient that is not finite may be an overflow, which lowers the loss scale and skips the step."""
        return self.args.fp16

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Do nothing: the engine has clipped."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """Return the norm of the gradient before it was clipped."""
        return float(self.engine.get_global_grad_norm())

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> float:
        """Return the number of predicted tokens of a step, on all replicas if they are averaged."""
        require_names(batch_samples[0])
        count = sum((batch["shift_labels"] != IGNORED).sum() for batch in batch_samples)
        if not self.args.average_tokens_across_devices:
            return float(count)
        return summed([torch.as_tensor(count, device=device)], self.data_group)[0]

    def floating_point_ops(self, inputs: Batch) -> float:
        """Return the operations of a step's inputs, of which every process of a replica reports a part."""
        return super().floating_point_ops(inputs) / (self.parallel.tp_size * self.parallel.pp_size)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a folder of the model, or of its adapter; within a checkpoint, what training resumes from."""
        from glm_hf.training.pipeline.weights import save_folder

        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if _internal_call and not self.args.save_only_model:
            save_engine(self.engine, folder, self.state.global_step)
        elif self.model.adapter is not None:
            save_adapter(self.model, folder)
        else:
            save_folder(self.model, folder)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the scheduler; the engine has saved the optimizer."""
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _require_checkpoint(self, checkpoint: Path) -> None:
        """Raise an error unless a checkpoint is one of 3D-parallel training of this model, and whole."""
        require_own(checkpoint, self.model.config, self.model.adapter)
        super()._require_checkpoint(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing: weights come with the engine's state."""

    def _load_engine(self, checkpoint: str) -> None:
        """Go on from a checkpoint, of these degrees of parallelism or others."""
        with reading(checkpoint, UNFIT):
            load_engine(self.engine, Path(checkpoint), self.parallel)
            state = torch.load(Path(checkpoint) / SCHEDULER_NAME, map_location="cpu", weights_only=True)
            self.lr_scheduler.load_state_dict(state)

    def _load_best_model(self) -> None:
        """Return to the best checkpoint; ValueError if it is damaged."""
        self._require_checkpoint(Path(self.state.best_model_checkpoint))
        self._load_engine(self.state.best_model_checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        """Do nothing: every step begins with a seed of its own."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Do nothing: every step begins with a seed of its own."""


def deepspeed_settings(args: GLMTrainingArguments) -> dict[str, Any]:
    """Return the configuration of DeepSpeed that training arguments ask for."""
    degrees = args.parallel
    return deepspeed_3d_config(
        degrees.tp_size,
        degrees.pp_size,
        degrees.dp_size,
        micro_batch_size=args.per_device_train_batch_size,
        global_batch_size=args.global_batch_size,
        precision=precision_of(args),
        max_grad_norm=args.max_grad_norm,
        base=args.deepspeed,
    )


def precision_of(args: GLMTrainingArguments) -> str:
    """Return the precision that training arguments ask for."""
    return "fp16" if args.fp16 else "bf16" if args.bf16 else "fp32"


def dtype_of(args: GLMTrainingArguments) -> torch.dtype:
    """Return the dtype of the weights that training arguments ask for."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision_of(args)]
