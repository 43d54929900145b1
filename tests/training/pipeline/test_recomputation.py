"""Layers that compute again what they do not keep, all of it or attention and the gate of the MLP."""

import pytest
import torch
from forked import run_ranks
from pipeline_runs import make_3d_trainer, train_3d, weights_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from glm_hf import GLMConfig, GLMForBlankInfilling
from glm_hf.training.pipeline.recomputation import recomputed_flops_per_token, set_recomputation


@pytest.mark.parametrize("is_sliced", [False, True])
def test_what_is_recomputed_changes_nothing(deep_folder, tmp_path, is_sliced):
    """To the last bit, with dropout, which must be drawn again as it was."""
    degrees = {"tp_size": 2, "sequence_parallel": is_sliced}
    options = {"dropout": 0.2, "max_steps": 2}
    kept = train_3d(deep_folder, tmp_path / "none", degrees, **options)
    weights = weights_of(tmp_path / "none" / "model")
    for granularity in ("full", "selective"):
        options["activation_checkpointing_kwargs"] = {"recompute_granularity": granularity}
        history = train_3d(deep_folder, tmp_path / granularity, degrees, activation_checkpointing=True, **options)
        assert [entry["loss"] for entry in history[:-1]] == [entry["loss"] for entry in kept[:-1]]
        assert [entry["grad_norm"] for entry in history[:-1]] == [entry["grad_norm"] for entry in kept[:-1]]
        found = weights_of(tmp_path / granularity / "model")
        assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def test_selective_recomputation_repeats_no_matrix_product(deep_folder, tmp_path):
    def rank_main(rank: int):
        trainer = make_3d_trainer(deep_folder, tmp_path / "run", {}, max_steps=1)
        model, products = trainer.model, []

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                products.append(str(function))
                return function(*args, **(kwargs or {}))

        def count(kwargs: dict | None) -> tuple[int, int]:
            layer = model.layers[0].train()
            if kwargs is not None:
                model.activation_checkpointing_enable(kwargs)
            states = torch.randn(1, 4, model.config.hidden_size, requires_grad=True)
            positions = model.rotary_emb(states, torch.arange(4)[None])
            products.clear()
            with Count():
                layer(states, position_embeddings=positions).sum().backward()
            is_product = [name.startswith(("aten.mm", "aten.addmm")) for name in products]
            return sum(is_product), sum("attention" in name for name in products)

        kept, selective, full = (count(None), *(count({"recompute_granularity": g}) for g in ("selective", "full")))
        with pytest.raises(ValueError, match="recompute_granularity must be one of full, selective, got 'some'"):
            model.activation_checkpointing_enable({"recompute_granularity": "some"})
        return kept, selective, full

    [(kept, selective, full)] = run_ranks(rank_main, 1, tmp_path)
    assert kept == (4 + 8, 2)  # forward, and for inputs and weights; attention forward and backward
    assert selective == (4 + 8, 3)
    assert full == (4 + 3 + 8, 3)  # all but the last, whose output nobody needs


def test_operations_that_are_done_again_are_counted_by_hand():
    with torch.device("meta"):
        model = GLMForBlankInfilling(
            GLMConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)
        )
    for layer, granularity in zip(model.model.layers, ("full", "selective", "selective", None), strict=True):
        set_recomputation(layer, granularity, checkpoint)
    attention = 4 * 64 * 48
    assert recomputed_flops_per_token(model, 48) == 3 * attention + 2 * (4 * 64 * 64 + 3 * 64 * 96)
    for layer in model.model.layers:
        set_recomputation(layer, None, checkpoint)
    assert recomputed_flops_per_token(model, 48) == 0
