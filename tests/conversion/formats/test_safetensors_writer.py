import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from glm_hf.conversion.formats.safetensors_writer import ShardFile, plan_shards
from glm_hf.folders.model_folder import write_index

TENSORS = {
    "b.weight": torch.randn(3, 5).half(),
    "a.weight": torch.randn(7).bfloat16(),
    "c.weight": torch.randn(2, 1, 4),
}


def as_units(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Return every tensor, on meta, as a group of its own."""
    return {name: {name: tensor.to("meta")} for name, tensor in tensors.items()}


def write_shard(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    with ShardFile("model.safetensors", as_units(tensors)).open(folder) as write:
        for name, tensor in tensors.items():
            write(name, tensor)


@pytest.fixture
def shard(tmp_path):
    write_shard(tmp_path, TENSORS)
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
        write_shard(tmp_path, tensors)
        assert int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") % 8 == 0
        assert load_file(tmp_path / "model.safetensors") == tensors


def test_tensors_lie_in_the_given_order_after_the_header(shard):
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert list(header) == ["__metadata__", *TENSORS]
    assert header["a.weight"] == {"dtype": "BF16", "shape": [7], "data_offsets": [30, 44]}
    assert len(content) == 8 + length + sum(tensor.nbytes for tensor in TENSORS.values())


def test_tensors_are_written_in_blocks_of_rows(tmp_path):
    tensors = {"a": torch.randn(5, 3), "b": torch.arange(4).to(torch.uint8)}
    shard = ShardFile("model.safetensors", as_units(tensors))
    with shard.open(tmp_path) as write:
        for name, tensor in tensors.items():
            for block in tensor.split(2):
                write(name, block)
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("written", [{"a": torch.zeros(2).half()}, {"b": torch.zeros(2)}, {"a": torch.zeros(1)}])
def test_tensor_that_differs_from_the_plan_is_a_bug(written, tmp_path):
    shard = ShardFile("model.safetensors", as_units({"a": torch.zeros(2)}))

    def write_all() -> None:
        with shard.open(tmp_path) as write:
            for name, tensor in written.items():
                write(name, tensor)

    with pytest.raises(AssertionError):
        write_all()


def test_half_written_shard_does_not_load(tmp_path):
    with ExitStack() as stack:
        write = stack.enter_context(ShardFile("model.safetensors", as_units(TENSORS)).open(tmp_path))
        write("b.weight", TENSORS["b.weight"])
        stack.pop_all()  # as if the process were killed here
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "model.safetensors")


def test_shards_fill_up_in_order():
    tensors = {
        name: torch.empty(size, dtype=torch.float16, device="meta")
        for name, size in zip("cab", (3, 2, 4), strict=True)
    }
    shards = plan_shards(as_units(tensors), 10)
    assert {shard.label: list(shard.tensors) for shard in shards} == {
        "model-00001-of-00002.safetensors": ["c", "a"],
        "model-00002-of-00002.safetensors": ["b"],
    }


def test_groups_stay_together():
    weight, scale, other = (torch.empty(size, dtype=torch.uint8, device="meta") for size in (6, 2, 3))
    shards = plan_shards({"a": {"a": weight, "a_scale": scale}, "b": {"b": other}}, 7)
    assert [list(shard.tensors) for shard in shards] == [["a", "a_scale"], ["b"]]
    assert [shard.num_bytes for shard in shards] == [8, 3]


def test_single_shard_has_neither_number_nor_index(tmp_path):
    shards = plan_shards(as_units(TENSORS), "1KB")
    assert [shard.label for shard in shards] == ["model.safetensors"]
    write_index(tmp_path, {shard.label: shard.tensors for shard in shards})
    assert not any(tmp_path.iterdir())


def test_index_finds_every_tensor(tmp_path):
    shards = plan_shards(as_units(TENSORS), 44)
    write_index(tmp_path, {shard.label: shard.tensors for shard in shards})
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
        plan_shards(as_units(TENSORS), size)
