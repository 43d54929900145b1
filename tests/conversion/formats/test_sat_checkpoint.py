import re

import pytest
import torch
from golden import CONFIGS, DATA, golden_state_dict

from glm_hf.conversion.formats.sat_checkpoint import SatCheckpoint
from glm_hf.conversion.streaming import stored_tensor

MIXIN_ROTARY = "mixins.rotary-embedding.rotary_emb.inv_freq"
EMBEDDING = "transformer.word_embeddings.weight"


def read(checkpoint: SatCheckpoint, name: str) -> torch.Tensor:
    return torch.cat(list(checkpoint.read(name)))


@pytest.mark.parametrize("block_bytes", [1, 1000, 2**22])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_original_joined(name, tp_size, block_bytes, monkeypatch):
    monkeypatch.setattr(stored_tensor, "BLOCK_BYTES", block_bytes)
    checkpoint = SatCheckpoint(DATA / name / f"sat_tp{tp_size}")
    expected = golden_state_dict(name)
    assert checkpoint.tp_size == tp_size
    assert set(checkpoint.names) == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(read(checkpoint, key), tensor.half()), key
        assert checkpoint.tensors[key].shape == tensor.shape
        assert checkpoint.tensors[key].dtype == torch.float16


def test_blocks_hold_the_bytes_that_are_allowed(monkeypatch):
    monkeypatch.setattr(stored_tensor, "BLOCK_BYTES", 1000)  # rows of the largest tensor have 320 bytes
    checkpoint = SatCheckpoint(DATA / "cfg2" / "sat_tp2")
    for name in checkpoint.names:
        assert all(block.nbytes <= 1000 for block in checkpoint.read(name))


def test_facts_come_from_the_tensors():
    checkpoint = SatCheckpoint(DATA / "cfg2" / "sat_tp2")
    assert checkpoint.num_layers == 5
    assert checkpoint.head_dim == 10
    assert checkpoint.hidden_size == 80
    assert checkpoint.dtypes == {torch.float16}
    assert checkpoint.bits is None
    assert checkpoint.numel("model.layers.4.mlp.dense_4h_to_h.weight") == 80 * 160


@pytest.mark.parametrize("bits", [4, 8])
def test_bits_come_from_the_shapes(bits):
    checkpoint = SatCheckpoint(DATA / "cfg2" / f"sat_int{bits}_tp2")
    assert checkpoint.bits == bits
    assert checkpoint.dtypes == {torch.float16}
    assert checkpoint.tensors["model.layers.0.attention.dense.weight_scale"].shape == (80, 2)
    assert checkpoint.tensors["model.layers.0.mlp.dense_h_to_4h.weight_scale"].shape == (320, 1)


def test_ranks_are_in_numeric_order(random_module, cut_module, write_sat):
    # As strings, rank 100 comes before rank 11.
    module = random_module(hidden=208, inner=104, vocab=208)
    checkpoint = SatCheckpoint(write_sat(cut_module(module, 104)))
    numbers = [int(re.search(r"mp_rank_(\d+)", rank.path.name)[1]) for rank in checkpoint.ranks]
    assert numbers == list(range(104))
    assert torch.equal(read(checkpoint, "model.embed_tokens.weight"), module[EMBEDDING])


@pytest.mark.parametrize("is_cut", [True, False])
def test_head_size_comes_from_the_mixin_frequencies_whole_or_cut(is_cut, random_module, cut_module, write_sat):
    frequencies = (1.0 / 10000 ** (torch.arange(0, 16, 2) / 16)).half()
    ranks = cut_module(random_module(hidden=64, inner=32, vocab=32), 4)
    for rank, part in zip(ranks, frequencies.chunk(4), strict=True):
        rank["module"][MIXIN_ROTARY] = part.clone() if is_cut else frequencies
    assert SatCheckpoint(write_sat(ranks)).head_dim == 16


def test_without_rotary_frequencies_the_head_size_is_unknown(random_module, write_sat):
    checkpoint = SatCheckpoint(write_sat([{"module": random_module(hidden=64, inner=32, vocab=32)}]))
    assert checkpoint.head_dim is None


def test_parameters_that_require_gradients_are_read_without(random_module, write_sat):
    module = {name: torch.nn.Parameter(tensor) for name, tensor in random_module(16, 16, 16).items()}
    checkpoint = SatCheckpoint(write_sat([{"module": module}]))
    embedding = read(checkpoint, "model.embed_tokens.weight")
    assert torch.equal(embedding, module[EMBEDDING].detach())
    assert not embedding.requires_grad


@pytest.mark.parametrize("is_damaged", [False, True])
def test_views_of_shared_storages_are_read_and_checked(is_damaged, random_module, write_sat):
    module = random_module(hidden=16, inner=16, vocab=16)
    whole = torch.randn(40, 16).half()
    module[EMBEDDING] = whole[7:23]  # torch.save keeps the storage with all 40 rows
    module["transformer.layers.0.attention.dense.weight"] = whole.T[:, 24:]
    src = write_sat([{"module": module}])
    if is_damaged:
        [path] = (src / "49300").iterdir()
        content = path.read_bytes()
        path.write_bytes(content.replace(whole[0].numpy().tobytes(), bytes(32)))
        with pytest.raises(ValueError, match=r"word_embeddings.weight is damaged: its CRC-32 is"):
            read(SatCheckpoint(src), "model.embed_tokens.weight")
        return
    checkpoint = SatCheckpoint(src)
    assert torch.equal(read(checkpoint, "model.embed_tokens.weight"), whole[7:23])
    assert torch.equal(read(checkpoint, "model.layers.0.attention.dense.weight"), whole.T[:, 24:])
