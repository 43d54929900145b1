from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import glm_hf
from glm_hf.evaluation.evaluator import Evaluator

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "evaluation"
"""Tasks that the code released with GLM-130B ran on a small model of ours."""


@pytest.fixture(scope="session")
def golden():
    return GOLDEN


@pytest.fixture(scope="session")
def loaded():
    """The model of the golden tasks in fp32, and its tokenizer."""
    glm_hf.register()
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "model", dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(GOLDEN / "model")


@pytest.fixture
def evaluator(loaded):
    return Evaluator(*loaded)
