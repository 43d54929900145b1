from functools import partial
from types import SimpleNamespace

import pytest
import torch
from memory_peaks import peak_of
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from glm_hf import GLMConfig, GLMForBlankInfilling
from glm_hf.modeling_glm import GLMLayer
from glm_hf.planning.training_memory import (
    COMPONENTS,
    RECOMPUTE,
    Shape,
    backward_bytes,
    layer_bytes_kept,
    layer_parameters,
    num_model_parameters,
    stage_memory,
    stage_parameters,
)
from glm_hf.rotary_glm import GLMRotaryEmbedding
from glm_hf.sharding.degrees import ParallelDegrees
from glm_hf.training.pipeline import collectives
from glm_hf.training.pipeline.collectives import TensorGroup
from glm_hf.training.pipeline.recomputation import set_recomputation
from glm_hf.training.pipeline.tensor_parallel import VocabParallelEmbedding, shard_layer

PAPER = Shape(GLMConfig(), ParallelDegrees(4, 8, 24), 1, 176, 2048)
SIZES = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 80, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def _no_messages(monkeypatch):
    done = SimpleNamespace(wait=lambda: None)
    for name in ("_all_gather", "_reduce_scatter"):
        monkeypatch.setattr(collectives, name, lambda output, inputs, **options: done)


class OneOfSeveral(TensorGroup):
    """A rank that does not wait for the others: values are wrong, sizes are right."""

    def all_reduce(self, tensor, op=None):
        return tensor


def small_config(**sizes):
    names = ("pad", "eos", "mask", "gmask", "smask", "eod", "sop", "eop")
    special = {f"{name}_token_id": number for number, name in enumerate(names)}
    return GLMConfig(vocab_size=64, **special, **(SIZES | sizes))


def make_layer(config, parallel, recompute="none"):
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        layer = GLMLayer(config, 0)
    ranks = OneOfSeveral(parallel.tp_size, sequence_parallel=parallel.sequence_parallel)
    layer = shard_layer(layer, ranks).to_empty(device="cpu").train()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    granularity = None if recompute == "none" else recompute
    set_recomputation(layer, granularity, partial(checkpoint, use_reentrant=False))
    return layer


def inputs_of(shape):
    config, batch, length = shape.config, shape.micro_batch, shape.sequence
    states = torch.randn(batch, shape.slice_tokens // batch, config.hidden_size, requires_grad=True)
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, 1, -1, -1).clone()
    positions = GLMRotaryEmbedding(config)(states, torch.arange(length)[None].expand(batch, -1))
    return states, {"attention_mask": mask, "position_embeddings": positions}


@pytest.mark.parametrize(("tensor", "is_sliced"), [(1, False), (2, False), (4, False), (2, True), (4, True)])
@pytest.mark.parametrize(("batch", "length"), [(1, 8), (3, 32)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_a_layer_keeps_what_the_formula_says(tensor, is_sliced, batch, length, dropout, recompute):
    """Every storage that autograd saves, except parameters and what all layers of a stage share."""
    config = small_config(hidden_dropout=dropout)
    shape = Shape(config, ParallelDegrees(tensor, sequence_parallel=is_sliced), batch, 1, length, "fp32")
    layer = make_layer(config, shape.parallel, recompute)
    states, shared = inputs_of(shape)
    elsewhere = [*layer.parameters(), shared["attention_mask"], *shared["position_embeddings"]]
    found = {}

    def pack(saved):
        found[saved.untyped_storage().data_ptr()] = saved  # kept, so that no address is used again
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved):
        output = layer(states, **shared)
    assert output.requires_grad
    for known in elsewhere:
        found.pop(known.untyped_storage().data_ptr(), None)
    kept = sum(saved.untyped_storage().nbytes() for saved in found.values())
    drawn = 2 * shape.slice_tokens * config.hidden_size * (dropout > 0 and recompute != "full")
    on_cpu = 3 * drawn  # which draws dropout in fp32, not in bytes
    assert kept == layer_bytes_kept(shape, recompute) + on_cpu


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_parameters_are_those_of_a_cut_layer(tensor):
    config = small_config()
    layer = make_layer(config, ParallelDegrees(tensor))
    expected = [(name, parameter.numel()) for name, parameter in layer.named_parameters()]
    assert list(layer_parameters(Shape(config, ParallelDegrees(tensor), 1, 1, 8))) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_stages_hold_every_parameter_of_the_model(tied):
    config = small_config(num_hidden_layers=5, tie_word_embeddings=tied)
    expected = GLMForBlankInfilling(config).num_parameters()
    assert num_model_parameters(config) == expected
    shape = Shape(config, ParallelDegrees(1, 3, 2), 1, 4, 8)
    held = sum(numbers for stage in range(3) for _, numbers in stage_parameters(shape, stage))
    assert held == expected + (config.vocab_size * config.hidden_size if tied else 0)


def test_a_gpu_of_the_paper_holds_these_parameters():
    """Counted by hand: a quarter of the matrices, whole norms and biases of row-parallel linears."""
    matrices = 9216 * 12288 + 12288 * 3072 + 16384 * 12288 + 12288 * 8192
    layer = matrices + (9216 + 12288 + 16384 + 12288) + 4 * 12288
    embedding = 37632 * 12288
    held = [sum(numbers for _, numbers in stage_parameters(PAPER, stage)) for stage in range(8)]
    assert layer == 453_084_160
    assert held == [8 * layer + embedding, *[9 * layer] * 6, 8 * layer + embedding + 2 * 12288]
    assert num_model_parameters(GLMConfig()) == 128_697_794_560


def test_a_gpu_of_the_paper_holds_these_bytes():
    memory = stage_memory(PAPER, 1, 7, recompute="full")
    decayed, plain = 9 * 452_984_832, 9 * (50_176 + 49_152)
    assert (decayed % 48, plain % 48) == (0, 0)  # no padding
    assert memory.weights == 2 * (decayed + plain) == 8_155_514_880
    assert memory.gradients == 4 * (decayed + plain)
    assert memory.optimizer == 12 * (decayed + plain) // 24 == 2_038_878_720
    states = 2048 * 12288 * 2
    layer = 2048 * 2 * (4 * 12288 + 6 * 3072 + 4 * 8192) + 2048 * 4 * (4 + 24) + 2048 * 2048 * 2
    kept = 9 * states + 2048 * 2048 + 2048 * 2 * 128 * 2 + 2048 * 24 + 2 * states
    widest = layer - states + 2048 * 2 * (2 * 12288 + 2 * 8192)
    assert memory.activations == 7 * kept + widest
    assert memory.moments["computing"] == memory.total
    assert memory.buffers == 2 * states + (2 + 4) * 16384 * 12288  # messages, and the up-projection's gradient, twice


def test_without_checkpointing_every_layer_counts():
    with_it, without = (stage_memory(PAPER, 0, 8, recompute) for recompute in ("full", "none"))
    states, layer = PAPER.state_bytes, layer_bytes_kept(PAPER, "none")
    assert without.activations - with_it.activations == 8 * 8 * (layer - states) - (layer - states)
    assert (without.weights, without.optimizer) == (with_it.weights, with_it.optimizer)


def test_the_output_matrix_counts_for_predicted_tokens():
    config = small_config(hidden_size=16, intermediate_size=16, num_attention_heads=1)
    config.vocab_size = 1000
    whole, part = (Shape(config, ParallelDegrees(1, 2, 1), 4, 8, 16, "fp16", share) for share in (1.0, 0.25))
    saved = [stage_memory(shape, 1, 1, recompute="full").activations for shape in (whole, part)]
    assert (whole.num_targets, part.num_targets) == (64, 16)
    assert saved[0] - saved[1] == 48 * (16 * 2 + 3 * 4 * 1000)
    others = [stage_memory(shape, 0, 2, recompute="full").activations for shape in (whole, part)]
    assert others[0] == others[1]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_weights_have_an_fp32_master_in_every_precision(precision):
    shape = Shape(small_config(), ParallelDegrees(2, 2, 3), 1, 4, 8, precision)
    memory = stage_memory(shape, 0, 2, recompute="full")
    size = 4 if precision == "fp32" else 2
    assert memory.weights == 3 * (memory.optimizer // 12) * size
    assert sum(getattr(memory, name) for name in COMPONENTS) == memory.total == max(memory.moments.values())


def test_gradients_of_a_single_copy_move_by_way_of_a_bucket():
    """All fit the bucket, which they fill while their own place is made."""
    shape = Shape(small_config(), ParallelDegrees(), 1, 1, 8, "fp32")
    memory = stage_memory(shape, 0, 1, recompute="full")
    numbers = num_model_parameters(shape.config)
    assert memory.moments["reducing"] == memory.weights + memory.optimizer + 4 * (50_000_000 + numbers)
    assert memory.total == memory.moments["reducing"]
    assert memory.moments["updating"] == memory.weights + memory.optimizer + 4 * numbers + memory.weights


def test_update_in_16_bits_has_what_a_replica_updates_by():
    shape = Shape(small_config(), ParallelDegrees(1, 1, 2), 1, 1, 8, "fp16")
    memory = stage_memory(shape, 0, 1, recompute="full")
    parameters, largest = num_model_parameters(shape.config), 160 * 48
    assert memory.moments["updating"] == memory.weights + memory.optimizer + 4 * parameters // 2 + 8 * largest


def test_update_in_fp32_has_gradients_twice():
    shape = Shape(small_config(), ParallelDegrees(1, 1, 2), 1, 1, 8, "fp32")
    memory = stage_memory(shape, 0, 1, recompute="full")
    matrices = [64 * 48, *[144 * 48, 48 * 48, 160 * 48, 48 * 80] * 2]  # the fifth lies across the middle
    vectors = [48, 48, 144, 48, 48, 48, 160, 48] * 2 + [48, 48]  # the tenth begins the second half
    halves, largest = (sum(matrices) // 2, sum(vectors) // 2), 160 * 48
    assert sum(matrices[:4]) < halves[0] < sum(matrices[:5])
    assert sum(vectors[:9]) == halves[1]
    first = sum(matrices[:5]) + sum(vectors[:9])
    second = sum(matrices[4:]) + sum(vectors[9:])
    updating = 4 * max(first, second) + max(4 * sum(halves), 8 * largest)
    assert memory.moments["updating"] == memory.weights + memory.optimizer + updating


@pytest.mark.parametrize("is_sliced", [False, True])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_layers_need_at_most_what_is_planned_and_not_much_less(recompute, is_sliced):
    """Gradients are there already, as in all micro-batches but the first; the plan adds two moments that differ."""
    config, count = small_config(hidden_size=128, intermediate_size=344), 4
    parallel = ParallelDegrees(2 if is_sliced else 1, 2, sequence_parallel=is_sliced)
    shape = Shape(config, parallel, 4, 2, 256, "fp32")
    layers = [make_layer(config, parallel, recompute) for _ in range(count)]
    for layer in layers:
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
    states, shared = inputs_of(shape)

    def work():
        hidden = states.detach().clone().requires_grad_()
        output = hidden
        for layer in layers:
            output = layer(output, **shared)
        output.backward(torch.ones_like(output))

    kept = count * layer_bytes_kept(shape, recompute)
    gradient = 4 * 2 * 344 * 128 // parallel.tp_size
    planned = kept + backward_bytes(shape, 0, recompute) + 2 * shape.state_bytes + gradient
    assert 0.9 * planned <= peak_of(work) <= planned


def test_the_output_matrix_needs_at_most_what_is_planned_and_not_much_less():
    config = small_config(hidden_size=32, intermediate_size=32)
    config.vocab_size = 4096
    head = VocabParallelEmbedding(config, OneOfSeveral(2))
    torch.nn.init.normal_(head.weight)
    head.weight.grad = torch.zeros_like(head.weight)
    states, labels = torch.randn(128, 32), torch.randint(4096, (128,))

    def work():
        hidden = states.clone().requires_grad_()
        head.cross_entropy(head.logits(hidden), labels).sum().backward()

    shape = Shape(config, ParallelDegrees(2, 2), 1, 2, 128, "fp32")
    planned = 4 * 128 * 2048 + backward_bytes(shape, 1, recompute="full") + 4 * 2048 * 32 + 2 * shape.state_bytes
    assert backward_bytes(shape, 1, recompute="full") == 8 * 128 * 2048
    assert 0.8 * planned <= peak_of(work) <= planned
