"""Blank-infilling training: data, schedules and the trainers.

The names below are imported when they are asked for, since plans need only some of the files.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm_hf.training.arguments import GLMTrainingArguments
    from glm_hf.training.data.collator import DataCollatorForBlankInfilling, sentence_ends
    from glm_hf.training.data.conversations import to_conversation
    from glm_hf.training.data.corpora import CorpusSource, load_corpus
    from glm_hf.training.data.dataset import BlankInfillingDataset
    from glm_hf.training.data.recipe import InfillingRecipe
    from glm_hf.training.divergence import DivergenceError
    from glm_hf.training.gradient_shrink import shrink_embedding_gradient
    from glm_hf.training.token_loss import mean_token_loss, token_losses
    from glm_hf.training.trainer import GLMTrainer
    from glm_hf.training.trainer_3d import GLM3DTrainer

MODULES = {
    "BlankInfillingDataset": "data.dataset",
    "CorpusSource": "data.corpora",
    "DataCollatorForBlankInfilling": "data.collator",
    "DivergenceError": "divergence",
    "GLM3DTrainer": "trainer_3d",
    "GLMTrainer": "trainer",
    "GLMTrainingArguments": "arguments",
    "InfillingRecipe": "data.recipe",
    "load_corpus": "data.corpora",
    "mean_token_loss": "token_loss",
    "sentence_ends": "data.collator",
    "shrink_embedding_gradient": "gradient_shrink",
    "to_conversation": "data.conversations",
    "token_losses": "token_loss",
}
"""Where the public names are defined."""


def __getattr__(name: str) -> Any:
    """Import a public name, and keep it."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the names of the module, those included that are not imported yet."""
    return sorted({*globals(), *MODULES})


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
