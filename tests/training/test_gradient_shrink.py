"""Embedding gradient shrink against gradients computed path by path."""

import copy

import pytest
import torch
from golden import golden_model

from glm_hf.training import shrink_embedding_gradient


def batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 9, 7, 144, 11, 2, 148, 23, 31]])
    return {"input_ids": ids, "labels": torch.tensor([[-100] * 7 + [23, 31]])}


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()(**batch()).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_only_the_path_through_the_input_shrinks(alpha):
    """The tied weight's gradient is that of an untied output matrix plus alpha times that of an untied input."""
    tied = copy.deepcopy(golden_model("cfg1"))
    untied = copy.deepcopy(tied)
    untied.lm_head.weight = torch.nn.Parameter(tied.lm_head.weight.detach().clone())
    paths = gradients(untied)
    shrink_embedding_gradient(tied, alpha)
    found = gradients(tied)
    expected = alpha * paths["model.embed_tokens.weight"] + paths["lm_head.weight"]
    torch.testing.assert_close(found["model.embed_tokens.weight"], expected, rtol=1e-5, atol=1e-7)
    for name in found.keys() - {"model.embed_tokens.weight"}:
        torch.testing.assert_close(found[name], paths[name], rtol=1e-5, atol=1e-7)


def test_outputs_stay_bit_for_bit_the_same():
    model = copy.deepcopy(golden_model("cfg1")).train()
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        shrink_embedding_gradient(model, 1.0)
        before = model(**batch()).logits
        shrink_embedding_gradient(model)
        assert torch.equal(model(**batch()).logits, before)
    assert model.config.embedding_gradient_shrink == 0.1


def test_one_switches_shrinking_off():
    model = copy.deepcopy(golden_model("cfg1"))
    plain = gradients(model)
    shrink_embedding_gradient(model, 0.3)
    shrink_embedding_gradient(model, 1.0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], rtol=0, atol=0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1.5])
def test_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha must lie in"):
        shrink_embedding_gradient(golden_model("cfg1"), alpha)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="Linear holds no GLM model"):
        shrink_embedding_gradient(torch.nn.Linear(2, 2))
