"""A tokenizer and a small model of the same vocabulary."""

from pathlib import Path

import pytest
from pipeline_runs import save_deep_model
from small_runs import prepare_deepspeed
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


@pytest.fixture(scope="session")
def deep_folder(model_folder, tmp_path_factory) -> Path:
    """A model of 4 layers; DeepSpeed, which it is spread with, has been imported."""
    prepare_deepspeed()
    return save_deep_model(model_folder, tmp_path_factory.mktemp("deep") / "model")
