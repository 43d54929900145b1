"""The mean loss over predicted tokens for transformers' own `Trainer`, which else takes the mean over batches.

    Trainer(..., preprocess_logits_for_metrics=token_losses, compute_metrics=mean_token_loss)

Shapes: `B` rows, `L` length, `V` vocabulary.
"""

import numpy as np
import torch
from torch.nn import functional as F
from transformers import EvalPrediction

from glm_hf.training.data.blanks import IGNORED


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
