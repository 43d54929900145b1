"""Losses as means over predicted tokens, in training and in evaluation, also for transformers' own `Trainer`:

    Trainer(..., preprocess_logits_for_metrics=token_losses, compute_metrics=mean_token_loss)

Shapes: `B` rows, `L` length, `V` vocabulary.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import EvalLoopOutput

from glm_hf.training.arguments import GLMTrainingArguments
from glm_hf.training.data.blanks import IGNORED
from glm_hf.training.data.dataset import BlankInfillingDataset
from glm_hf.training.data.packing.rows import NO_CORPUS
from glm_hf.training.measurements import NOT_KNOWN, LossMeter, row_losses
from glm_hf.training.pipeline.micro_batches import Batch, predicted_by


class TokenLossTrainer(Trainer):
    """
    transformers' `Trainer` with the losses of predicted tokens, each counted once and by kind of blank.

    Attributes:
        meter: Collects the losses of training.
        eval_meter: Collects the losses of an evaluation.
    """

    args: GLMTrainingArguments
    meter: LossMeter
    eval_meter: LossMeter
    evaluated: torch.Tensor | None = None
    keeps_logits = True

    @property
    def data_size(self) -> int:
        """Number of processes, or of replicas, that share the samples of a step."""
        return self.args.world_size

    @property
    def num_averaged(self) -> int:
        """How many processes' gradients are averaged whose losses are divided by the tokens of all."""
        return self.data_size if self.args.average_tokens_across_devices else 1

    def _loss_divisors(self, pieces: list[Batch], num_items_in_batch: Any) -> list[Any]:
        """Return what the summed loss of each micro-batch is divided by, besides the average over processes."""
        if self.args.loss_normalization == "step":
            return [num_items_in_batch] * len(pieces)
        counts = [(predicted_by(piece) != IGNORED).sum().clamp(min=1) for piece in pieces]
        return [count * len(pieces) * self.num_averaged for count in counts]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss of the predicted tokens; logits are made for these only, unless all are returned."""
        inputs = dict(inputs)
        objectives, corpora, sample_ids = (inputs.pop(name, None) for name in ("objectives", "corpora", "sample_ids"))
        if "shift_labels" not in inputs or self.compute_loss_func is not None:
            num_predicted = None if model.training else count_predicted(inputs)
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if num_predicted is not None:
                count = num_predicted if num_items_in_batch is None else num_items_in_batch / self.num_averaged
                self.evaluated = rows_of_mean(result[0] if return_outputs else result, count, inputs)
            return result
        inputs.pop("labels", None)
        labels = inputs.pop("shift_labels")
        is_target = labels != IGNORED
        keeps_all = return_outputs and self.keeps_logits
        outputs = model(**inputs, use_cache=False, logits_to_keep=0 if keeps_all else is_target)
        logits = outputs.logits[is_target] if keeps_all else outputs.logits
        losses = nn.functional.cross_entropy(
            logits.float(), labels[is_target], reduction="none", label_smoothing=self.args.label_smoothing_factor
        )
        if not model.training:
            self.evaluated = row_losses(losses, labels, objectives, corpora)
        elif objectives is not None:
            self.meter.add(losses, labels, inputs["segment_ids"], objectives, corpora, sample_ids)
        if num_items_in_batch is None:
            loss = losses.mean()
        else:
            loss = losses.sum() * (self.num_averaged / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> Any:
        """Return the number of predicted tokens of a step, on all processes if they are averaged."""
        if not batch_samples or "shift_labels" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        count = sum((batch["shift_labels"] != IGNORED).sum() for batch in batch_samples)
        count = torch.as_tensor(count, device=device)
        return self.accelerator.reduce(count) if self.args.average_tokens_across_devices else count

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Return loss, logits `(B, L, V)` and labels `(B, L)` of a batch, whose rows are counted by their losses."""
        self.label_names = [name for name in self.args.label_names or () if name in inputs] or ["labels"]
        self.keeps_logits, self.evaluated = not prediction_loss_only, None
        try:
            result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self.keeps_logits = True
        if self.evaluated is not None:
            rows = self.accelerator.gather_for_metrics(self.evaluated.contiguous())  # each once
            self.eval_meter.add_rows(rows[rows[:, 0].isfinite()] if self.args.logging_nan_inf_filter else rows)
        return result

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as `Trainer` does, with the mean loss over all predicted tokens, and by kind of blank."""
        self.eval_meter = LossMeter(self.args.device, names_of_corpora(dataloader.dataset))
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        output.metrics.update(self.eval_meter.describe_evaluation(self.eval_meter.take(), metric_key_prefix))
        return output


def count_predicted(inputs: Batch) -> torch.Tensor | None:
    """Return how many tokens a batch predicts; None if it has no labels."""
    if "labels" not in inputs and "shift_labels" not in inputs:
        return None
    return (predicted_by(inputs) != IGNORED).sum()


def rows_of_mean(loss: torch.Tensor, count: Any, inputs: Batch) -> torch.Tensor:
    """Return a mean loss over `count` tokens as `row_losses` returns rows, which have equal shares of it."""
    size = len(inputs["input_ids"])
    share = torch.as_tensor(count, device=loss.device).double() / size
    unknown = (torch.full_like(share, place) for place in (NOT_KNOWN, NO_CORPUS))
    row = torch.stack((loss.detach().double() * share, share, *unknown))
    return row.expand(size, 4)


def names_of_corpora(dataset: Any) -> tuple[str, ...]:
    """Return the names of the corpora whose losses are told apart: of a `BlankInfillingDataset` of several."""
    names = dataset.corpus_names if isinstance(dataset, BlankInfillingDataset) else ()
    return names if len(names) > 1 else ()


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Return the loss of every label `(B, L)` in fp32, 0 where nothing is predicted.

    Args:
        logits: `(B, L, V)`.
        labels: `(B, L)`, each predicted one token before, as `DataCollatorForBlankInfilling` returns them.
    """
    losses = F.cross_entropy(logits[:, :-1].mT.float(), labels[:, 1:], reduction="none", ignore_index=IGNORED)
    return F.pad(losses, (1, 0))  # (B, L)


def mean_token_loss(prediction: EvalPrediction) -> dict[str, float]:
    """Return what becomes `eval_loss`: the mean of `token_losses` over all predicted tokens."""
    is_target = prediction.label_ids != IGNORED
    return {"loss": float(np.asarray(prediction.predictions, dtype=np.float64)[is_target].mean())}
