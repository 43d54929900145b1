"""A trainer that measures losses, norms of gradients, throughput and its share of the devices' peak."""

import time
from functools import cached_property
from typing import Any

import torch

from glm_hf.training.checkpoints import CheckpointingTrainer
from glm_hf.training.deepspeed_zero import local_gradients, loss_scale_of
from glm_hf.training.logs.run_log import RunLog
from glm_hf.training.measurements import ParameterGroups, count_parameters, flops_per_token, peak_tflops
from glm_hf.training.pipeline.recomputation import recomputed_flops_per_token


class MeasuredTrainer(CheckpointingTrainer):
    """
    `Trainer` that logs losses by objective and corpus, norms of gradients and throughput, also to `log.jsonl`.

    Nothing is read from the device between two logs.

    Attributes:
        run_log: The file.
        samples_before: `(steps + 1,)` the samples before every step and after the last.
        gradient_norms: `(G,)` norms of the last step, before clipping.
        embedding_norm: That of the embedding; None where it is not trained.
    """

    run_log: RunLog
    samples_before: Any
    alpha_schedule: Any
    last_log: float
    gradient_norms: torch.Tensor | None = None
    embedding_norm: torch.Tensor | None = None

    @cached_property
    def parameter_groups(self) -> ParameterGroups:
        """Groups of parameters whose gradients' norms are logged."""
        embedding = self.model.get_input_embeddings().weight
        return ParameterGroups(self.model.named_parameters(), embedding, self.model.config.num_hidden_layers)

    def _squared_gradient_norms(self) -> torch.Tensor:
        """Return `(G,)` the squared norms of the groups' gradients before an update, without a loss scale."""
        groups = self.parameter_groups
        if self.is_deepspeed_enabled:
            scale = loss_scale_of(self.model_wrapped.optimizer)
            local = groups.squared_norms(local_gradients(p for p, _ in groups.members), self.args.device)
            return self.accelerator.reduce(local) / scale**2
        scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
        return groups.squared_norms((p.grad for p, _ in groups.members), self.args.device) / scale**2

    def _take_gradient_norms(self, norms: torch.Tensor) -> None:
        """Keep `(G,)` norms to be watched and logged; that of the embedding is None where it is not trained."""
        self.gradient_norms = norms
        self.embedding_norm = norms[0] if self.parameter_groups.has_embedding else None

    def _start_clock(self) -> None:
        """Begin the time over which throughput is measured."""
        self.last_log = time.perf_counter()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer` does, with losses by objective and corpus, norms of gradients and throughput."""
        if "loss" in logs:
            logs = logs | self._measurements()
        super().log(logs, start_time)
        if self.is_in_train and self.is_world_process_zero():
            self.run_log.append(self.state.log_history[-1])

    def _measurements(self) -> dict[str, float]:
        """Return what was measured since the last log."""
        taken = self.accelerator.reduce(self.meter.take())
        now = time.perf_counter()
        seconds, self.last_log = now - self.last_log, now
        found = self.meter.describe(taken)
        if self.embedding_norm is not None:
            found["embedding_grad_norm"] = float(self.embedding_norm)
        if self.gradient_norms is not None:
            found |= self.parameter_groups.describe(self.gradient_norms)
        if self.alpha_schedule is not None:
            found["embedding_gradient_shrink"] = self.model.config.embedding_gradient_shrink
        found["samples"] = int(self.samples_before[self.state.global_step])
        num_tokens = float(taken[-1])
        if num_tokens:
            found["tokens_per_second"] = num_tokens / seconds
            peak = self.args.peak_tflops or peak_tflops(self.args.device)
            if peak:
                per_flop = num_tokens / (seconds * peak * 1e12 * self.args.world_size)
                found["mfu"] = self.flops_per_token * per_flop
                found["hfu"] = (self.flops_per_token + self.recomputed_flops_per_token) * per_flop
        return found

    @property
    def row_length(self) -> int:
        """Number of tokens that attend to each other, 0 if it is not known."""
        return getattr(getattr(self.data_collator, "recipe", None), "row_length", 0)

    @cached_property
    def flops_per_token(self) -> float:
        """Operations of forward and backward pass per token."""
        return flops_per_token(self.model.config, *self._parameter_counts(), self.row_length)

    def _parameter_counts(self) -> tuple[float, float]:
        """Return the number of parameters of the model, and of those that are trained."""
        return count_parameters(self.model), count_parameters(self.model, only_trainable=True)

    @cached_property
    def recomputed_flops_per_token(self) -> float:
        """Operations per token that are done twice to save memory."""
        return recomputed_flops_per_token(self.model, self.row_length)

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Return the operations of a step's inputs."""
        return self.flops_per_token * inputs["input_ids"].numel()
