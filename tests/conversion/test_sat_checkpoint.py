import re
from pathlib import Path

import pytest
import torch
from golden import DATA

from glm_hf.conversion import sat_checkpoint
from glm_hf.conversion.sat_checkpoint import SatCheckpoint

MIXIN_ROTARY = "mixins.rotary-embedding.rotary_emb.inv_freq"


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_parts_are_those_of_the_rank_files_in_order(tp_size):
    folder = DATA / "cfg2" / f"sat_tp{tp_size}"
    checkpoint = SatCheckpoint(folder)
    assert checkpoint.tp_size == tp_size
    for rank in range(tp_size):
        module = torch.load(folder / "49300" / f"mp_rank_0{rank}_model_states.pt", weights_only=True)["module"]
        assert set(checkpoint.names) == {name for name in module if not name.endswith("inv_freq")}
        for name, tensor in module.items():
            assert torch.equal(checkpoint.parts(name)[rank], tensor)


def test_facts_come_from_the_tensors():
    checkpoint = SatCheckpoint(DATA / "cfg2" / "sat_tp2")
    assert checkpoint.num_layers == 5
    assert checkpoint.head_dim == 10
    assert checkpoint.dtypes == {torch.float16}
    assert checkpoint.shape("transformer.layers.4.mlp.dense_4h_to_h.weight") == (80, 80)


def test_ranks_are_in_numeric_order(random_module, cut_module, write_sat):
    # As strings, rank 100 comes before rank 11.
    module = random_module(hidden=208, inner=104, vocab=208)
    checkpoint = SatCheckpoint(write_sat(cut_module(module, 104)))
    assert [int(re.search(r"mp_rank_(\d+)", path.name)[1]) for path in checkpoint.paths] == list(range(104))
    embedding = torch.cat(checkpoint.parts("transformer.word_embeddings.weight"))
    assert torch.equal(embedding, module["transformer.word_embeddings.weight"])


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
    (part,) = SatCheckpoint(write_sat([{"module": module}])).parts("transformer.word_embeddings.weight")
    assert not part.requires_grad


def test_small_files_are_mapped_once(monkeypatch):
    mapped = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda path, **options: mapped.append(path) or load(path, **options))
    checkpoint = SatCheckpoint(DATA / "cfg1" / "sat_tp2")
    mapped.clear()
    for name in checkpoint.names:
        checkpoint.parts(name)
    assert mapped == []


def resident_file_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssFile:\s+(\d+) kB", status)[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts resident pages as Linux reports them")
def test_reading_everything_keeps_about_the_largest_tensor_in_memory(random_module, write_sat, monkeypatch):
    monkeypatch.setattr(sat_checkpoint, "MIN_BYTES_BETWEEN_MAPPINGS", 0)
    module = random_module(hidden=1024, inner=1024, vocab=1024, layers=6)  # 6 x 14 MB, largest 6 MB
    checkpoint = SatCheckpoint(write_sat([{"module": module}]))
    before, peak = resident_file_bytes(), 0
    for name in checkpoint.names:
        torch.stack(checkpoint.parts(name)).sum()
        peak = max(peak, resident_file_bytes() - before)
    assert 5e6 < peak < 12e6
