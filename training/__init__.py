"""Blank-infilling training: data, schedules and the trainer."""

from glm_hf.training.arguments import GLMTrainingArguments
from glm_hf.training.data.collator import DataCollatorForBlankInfilling, sentence_ends
from glm_hf.training.data.conversations import to_conversation
from glm_hf.training.data.corpora import CorpusSource, load_corpus
from glm_hf.training.data.dataset import BlankInfillingDataset
from glm_hf.training.data.recipe import InfillingRecipe
from glm_hf.training.divergence import DivergenceError
from glm_hf.training.gradient_shrink import shrink_embedding_gradient
from glm_hf.training.token_metrics import mean_token_loss, token_losses
from glm_hf.training.trainer import GLMTrainer
from glm_hf.training.trainer_3d import GLM3DTrainer

__all__ = [
    "BlankInfillingDataset",
    "CorpusSource",
    "DataCollatorForBlankInfilling",
    "DivergenceError",
    "GLM3DTrainer",
    "GLMTrainer",
    "GLMTrainingArguments",
    "InfillingRecipe",
    "load_corpus",
    "mean_token_loss",
    "sentence_ends",
    "shrink_embedding_gradient",
    "to_conversation",
    "token_losses",
]
