"""Layers cut over ranks against the whole ones."""

import pytest
import torch
from forked import run_ranks
from torch import distributed as dist
from torch import nn

from glm_hf import GLMConfig
from glm_hf.modeling_glm import GLMLayer
from glm_hf.sharding.rules import shard_rule
from glm_hf.training.pipeline.collectives import TensorGroup
from glm_hf.training.pipeline.tensor_parallel import VocabParallelEmbedding, mark_sharded, shard_layer

SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "mask_token_id": 2, "gmask_token_id": 3, "smask_token_id": 4}
CONFIG = GLMConfig(
    vocab_size=36, hidden_size=24, num_hidden_layers=2, num_attention_heads=6, intermediate_size=30,
    **SPECIAL, eod_token_id=5, sop_token_id=6, eop_token_id=7,
)  # fmt: skip


def in_group(function, size: int, folder, sequence_parallel: bool = False) -> list:
    """Run `function(ranks)` on as many processes."""

    def rank_main(rank: int):
        dist.init_process_group("gloo")
        torch.manual_seed(0)
        return function(TensorGroup(size, rank, dist.group.WORLD, sequence_parallel))

    return run_ranks(rank_main, size, folder)


@pytest.mark.parametrize("is_sliced", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_a_cut_layer_computes_what_the_whole_one_does(tmp_path, size, is_sliced):
    """Outputs, the gradient of the input, each rank's part of every gradient; of slices, sums of what ranks share."""
    CONFIG._attn_implementation = "eager"
    torch.manual_seed(1)
    whole = GLMLayer(CONFIG, 1).double()
    inputs = torch.randn(2, 6, 24, dtype=torch.float64, requires_grad=True)
    positions = (torch.randn(2, 6, 4, dtype=torch.float64), torch.randn(2, 6, 4, dtype=torch.float64))
    outputs = whole(inputs, position_embeddings=positions)
    weight = torch.randn_like(outputs)
    (outputs * weight).sum().backward()
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}

    def part_of(tensor: torch.Tensor, rank: int) -> torch.Tensor:
        return tensor.chunk(size, 1)[rank] if is_sliced else tensor

    def of_rank(ranks):
        with torch.device("meta"):
            layer = GLMLayer(CONFIG, 1).double()
        layer = shard_layer(layer, ranks).to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                parameter.copy_(shard_rule(name).split(whole.get_parameter(name), size)[ranks.rank])
        mine = part_of(inputs.detach(), ranks.rank).clone().requires_grad_()
        found = layer(mine, position_embeddings=positions)
        (found * part_of(weight, ranks.rank)).sum().backward()
        mark_sharded(layer, "", ranks)
        cut = {name: parameter.tensor_model_parallel for name, parameter in layer.named_parameters()}
        gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
        return found.detach(), mine.grad, gradients, cut

    of_ranks = in_group(of_rank, size, tmp_path, is_sliced)
    for rank, (found, input_gradient, gradients, cut) in enumerate(of_ranks):
        assert torch.allclose(found, part_of(outputs, rank), atol=1e-12)
        assert torch.allclose(input_gradient, part_of(inputs.grad, rank), atol=1e-12)
        for name, gradient in gradients.items():
            if is_sliced and not cut[name]:
                gradient = sum(others[name] for _, _, others, _ in of_ranks)
            assert torch.allclose(gradient, shard_rule(name).split(expected[name], size)[rank], atol=1e-12), name
        kept_whole = {name for name, is_cut in cut.items() if not is_cut}
        norms = {name for name in cut if "layernorm" in name}
        assert kept_whole == norms | {"attention.dense.bias", "mlp.dense_4h_to_h.bias"}


@pytest.mark.parametrize("size", [2, 3])
def test_a_cut_vocabulary_gives_the_losses_of_the_whole_one(tmp_path, size):
    torch.manual_seed(2)
    table = torch.randn(36, 24, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(36, (3, 7))
    labels = torch.cat((torch.tensor([0, 35]), torch.randint(36, (9,))))
    hidden = (4 * torch.randn(11, 24, dtype=torch.float64)).requires_grad_()
    looked_up = nn.functional.embedding(ids, table)
    losses = nn.functional.cross_entropy((hidden @ table.T).float(), labels, reduction="none")
    (looked_up.square().sum() + losses.square().sum()).backward()

    def of_rank(ranks):
        embedding = VocabParallelEmbedding(CONFIG, ranks).double()
        with torch.no_grad():
            embedding.weight.copy_(table.chunk(size)[ranks.rank])
        mine = hidden.detach().clone().requires_grad_()
        found, rows = embedding.cross_entropy(embedding.logits(mine), labels), embedding(ids)
        (rows.square().sum() + found.square().sum()).backward()
        return found.detach(), rows.detach(), mine.grad, embedding.weight.grad

    for rank, (found, rows, hidden_gradient, gradient) in enumerate(in_group(of_rank, size, tmp_path)):
        assert found.dtype == torch.float32
        assert torch.allclose(found, losses, atol=1e-5)
        assert torch.equal(rows, looked_up)
        assert torch.allclose(hidden_gradient, hidden.grad, rtol=1e-5, atol=1e-5)
        assert torch.allclose(gradient, table.grad.chunk(size)[rank], rtol=1e-5, atol=1e-5)


def test_losses_of_no_token_are_none(tmp_path):
    def of_rank(ranks):
        embedding = VocabParallelEmbedding(CONFIG, ranks)
        nn.init.normal_(embedding.weight)
        hidden = torch.empty(0, 24, requires_grad=True)
        losses = embedding.cross_entropy(embedding.logits(hidden), torch.empty(0, dtype=torch.long))
        losses.sum().backward()
        return losses.shape, float(embedding.weight.grad.abs().sum())

    assert in_group(of_rank, 2, tmp_path) == [((0,), 0.0)] * 2


def test_large_logits_stay_finite(tmp_path):
    """The highest logit lies on one rank only, and all subtract it."""

    def of_rank(ranks):
        embedding = VocabParallelEmbedding(CONFIG, ranks)
        logits = torch.zeros(1, 18)
        if ranks.rank == 1:
            logits[0, 4] = 1000.0
        return embedding.cross_entropy(logits, torch.tensor([22])).item(), embedding.cross_entropy(
            logits, torch.tensor([3])
        ).item()

    assert in_group(of_rank, 2, tmp_path) == [(0.0, 1000.0)] * 2
