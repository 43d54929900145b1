"""Blank-infilling training: data, schedules and the trainers.

The names below are imported when they are asked for, since plans need only some of the files.
"""

from typing import TYPE_CHECKING

from glm_hf import lazy_names

if TYPE_CHECKING:
    from glm_hf.training.arguments import GLMTrainingArguments
    from glm_hf.training.data.collator import DataCollatorForBlankInfilling, sentence_ends
    from glm_hf.training.data.conversations import to_conversation
    from glm_hf.training.data.corpora import CorpusSource, load_corpus
    from glm_hf.training.data.dataset import BlankInfillingDataset
    from glm_hf.training.data.recipe import InfillingRecipe
    from glm_hf.training.data.tokenizing.tokenize import tokenize_corpus
    from glm_hf.training.divergence import DivergenceError
    from glm_hf.training.gradient_shrink import shrink_embedding_gradient
    from glm_hf.training.token_loss import mean_token_loss, token_losses
    from glm_hf.training.trainer import GLMTrainer
    from glm_hf.training.trainer_3d import GLM3DTrainer

MODULES = {
    "BlankInfillingDataset": "glm_hf.training.data.dataset",
    "CorpusSource": "glm_hf.training.data.corpora",
    "DataCollatorForBlankInfilling": "glm_hf.training.data.collator",
    "DivergenceError": "glm_hf.training.divergence",
    "GLM3DTrainer": "glm_hf.training.trainer_3d",
    "GLMTrainer": "glm_hf.training.trainer",
    "GLMTrainingArguments": "glm_hf.training.arguments",
    "InfillingRecipe": "glm_hf.training.data.recipe",
    "load_corpus": "glm_hf.training.data.corpora",
    "mean_token_loss": "glm_hf.training.token_loss",
    "sentence_ends": "glm_hf.training.data.collator",
    "shrink_embedding_gradient": "glm_hf.training.gradient_shrink",
    "to_conversation": "glm_hf.training.data.conversations",
    "token_losses": "glm_hf.training.token_loss",
    "tokenize_corpus": "glm_hf.training.data.tokenizing.tokenize",
}
"""Where the public names are defined."""


__getattr__, __dir__ = lazy_names(globals(), MODULES)

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
    "tokenize_corpus",
]
