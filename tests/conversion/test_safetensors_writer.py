import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from glm_hf.conversion.safetensors_writer import plan_shards, write_index, write_shard

TENSORS = {
    "b.weight": torch.randn(3, 5).half(),
    "a.weight": torch.randn(7).bfloat16(),
    "c.weight": torch.randn(2, 1, 4),
}


def on_meta(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


@pytest.fixture
def shard(tmp_path):
    write_shard(tmp_path / "model.safetensors", on_meta(TENSORS), TENSORS.__getitem__)
    return tmp_path / "model.safetensors"


def test_safetensors_library_reads_the_same_tensors(shard):
    loaded = load_file(shard)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_metadata_names_the_format(shard):
    with safe_open(shard, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_begin_at_a_multiple_of_eight_bytes(tmp_path):
    for size in range(1, 9):
        tensors = {"x" * size: torch.ones(1)}
        write_shard(tmp_path / "model.safetensors", on_meta(tensors), tensors.__getitem__)
        assert int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") % 8 == 0
        assert load_file(tmp_path / "model.safetensors") == tensors


def test_tensors_lie_in_the_given_order_after_the_header(shard):
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert list(header) == ["__metadata__", *TENSORS]
    assert header["a.weight"] == {"dtype": "BF16", "shape": [7], "data_offsets": [30, 44]}
    assert len(content) == 8 + length + sum(tensor.nbytes for tensor in TENSORS.values())


def test_reads_one_tensor_at_a_time_in_order(tmp_path):
    order = []
    buffer = torch.empty(2)

    def read(name: str) -> torch.Tensor:
        order.append(name)
        return buffer.fill_(len(order))

    write_shard(tmp_path / "model.safetensors", {name: torch.empty(2, device="meta") for name in "bca"}, read)
    assert order == list("bca")
    loaded = load_file(tmp_path / "model.safetensors")
    assert [loaded[name][0].item() for name in "bca"] == [1, 2, 3]


def test_tensor_that_differs_from_the_plan_is_a_bug(tmp_path):
    with pytest.raises(AssertionError):
        write_shard(tmp_path / "model.safetensors", on_meta(TENSORS), lambda name: torch.zeros(3, 5))


def test_shards_fill_up_in_order():
    tensors = {
        name: torch.empty(size, dtype=torch.float16, device="meta")
        for name, size in zip("cab", (3, 2, 4), strict=True)
    }
    shards = plan_shards(tensors, 10)
    assert {file: list(shard) for file, shard in shards.items()} == {
        "model-00001-of-00002.safetensors": ["c", "a"],
        "model-00002-of-00002.safetensors": ["b"],
    }


def test_single_shard_has_neither_number_nor_index(tmp_path):
    shards = plan_shards(on_meta(TENSORS), "1KB")
    assert list(shards) == ["model.safetensors"]
    write_index(tmp_path, shards)
    assert not any(tmp_path.iterdir())


def test_index_finds_every_tensor(tmp_path):
    write_index(tmp_path, plan_shards(on_meta(TENSORS), 44))
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_parameters": 30, "total_size": 76},
        "weight_map": {
            "b.weight": "model-00001-of-00002.safetensors",
            "a.weight": "model-00001-of-00002.safetensors",
            "c.weight": "model-00002-of-00002.safetensors",
        },
    }


@pytest.mark.parametrize("size", ["5 parsecs", "many GB"])
def test_shard_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match=size.split()[0]):
        plan_shards(on_meta(TENSORS), size)
