"""A tokenizer and a small model of the same vocabulary."""

from pathlib import Path

import pytest
from tiny_model import save_tiny_model, train_sentencepiece

from glm_hf import GLMTokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    save_tiny_model(folder / "model", train_sentencepiece(folder / "text.model"))
    return folder / "model"


@pytest.fixture(scope="session")
def tokenizer(model_folder) -> GLMTokenizer:
    return GLMTokenizer.from_pretrained(model_folder)
