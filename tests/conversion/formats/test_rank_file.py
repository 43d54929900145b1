"""Rank files of every kind: damaged, malicious, without checksums, and without values."""

import random
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from golden import DATA, golden_config, golden_state_dict
from safetensors.torch import load_file

from glm_hf.conversion import convert_sat_checkpoint, reshard_sat_checkpoint, verify_checkpoint
from glm_hf.conversion.formats.rank_file import read_rank_file
from glm_hf.conversion.streaming.stored_tensor import RowReader

NAME = "mp_rank_00_model_states.pt"


@pytest.fixture
def src(tmp_path) -> Path:
    return shutil.copytree(DATA / "cfg1" / "sat_tp2", tmp_path / "sat")


def refusal(run: Callable[[], object]) -> str | None:
    """Run a function and return the message of the ValueError that it raises, None if it raises none."""
    try:
        run()
    except ValueError as error:
        return str(error)
    return None


def test_every_flipped_bit_is_noticed_or_harmless(src, tmp_path):
    path = src / "49300" / NAME
    whole = path.read_bytes()
    expected = {name: tensor.half() for name, tensor in golden_state_dict("cfg1").items()}
    generator = random.Random(0)
    # as many in the pickle, the headers and the directory, which are smaller than the weights
    offsets = generator.sample(range(len(whole)), 100) + generator.sample(range(8000), 50)
    offsets += generator.sample(range(len(whole) - 6000, len(whole)), 100)
    num_noticed = 0
    for offset in offsets:
        content = bytearray(whole)
        content[offset] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        if message := refusal(partial(convert_sat_checkpoint, src, tmp_path / "hf", config=golden_config("cfg1"))):
            num_noticed += 1
            assert NAME in message
            assert "\n" not in message
            assert not (tmp_path / "hf").exists()
            continue
        weights = load_file(tmp_path / "hf" / "model.safetensors")
        shutil.rmtree(tmp_path / "hf")
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items()), offset
    assert num_noticed > 150


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.97, 0.9999])
def test_truncated_file_is_noticed(share, src):
    path = src / "49300" / NAME
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states.pt is not a complete zip file of torch.save, copy"):
        read_rank_file(path)


def test_file_that_shrinks_while_it_is_read(src, tmp_path):
    path = src / "49300" / NAME
    rank = read_rank_file(path)
    path.write_bytes(path.read_bytes()[:20_000])
    tensor = rank.tensors["transformer.layers.2.mlp.dense_4h_to_h.weight"]
    with pytest.raises(ValueError, match=r"mlp.dense_4h_to_h.weight is truncated; the file has changed or is damaged"):
        RowReader(tensor).take(64)


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize(
    "run",
    [
        lambda src, dst: verify_checkpoint(src, src),
        lambda src, dst: reshard_sat_checkpoint(src, dst, tp_size=1),
    ],
    ids=["verify", "reshard"],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_malicious_pickle_is_refused_unrun(rank, run, src, tmp_path):
    path = src / "49300" / f"mp_rank_{rank:02d}_model_states.pt"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "x": Payload(tmp_path / "ran")}, path)
    message = refusal(lambda: run(src, tmp_path / "out"))
    assert "holds more than plain tensors or is damaged; refused" in message
    assert path.name in message
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def without_checksums():
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)


@pytest.mark.usefixtures("without_checksums")
def test_file_without_checksums_is_read_with_a_warning(golden_ranks, golden_special_ids, write_sat, tmp_path, caplog):
    convert_sat_checkpoint(write_sat(golden_ranks), tmp_path / "hf", config=golden_special_ids)
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(weights[name], tensor.half()) for name, tensor in golden_state_dict("cfg1").items())
    assert "mp_rank_01_model_states.pt was saved without checksums, so damage in it cannot be noticed" in caplog.text


def test_tensors_on_meta_can_be_planned_but_not_converted(golden_ranks, golden_special_ids, write_sat, tmp_path):
    ranks = [{"module": {name: t.to("meta") for name, t in rank["module"].items()}} for rank in golden_ranks]
    src = write_sat(ranks)
    tensor = read_rank_file(src / "49300" / NAME).tensors["transformer.word_embeddings.weight"]
    assert (tensor.shape, tensor.dtype, tensor.has_values) == ((80, 64), torch.float16, False)
    with pytest.raises(ValueError, match=r"mp_rank_00\S+: transformer.\S+ was saved on meta and has no values"):
        convert_sat_checkpoint(src, tmp_path / "hf", config=golden_special_ids)


def test_file_that_is_compressed_or_big_endian(src, golden_ranks):
    path = src / "49300" / NAME
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"copy it again: mp_rank_00_model_states/data.pkl is compressed"):
        read_rank_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, b"big" if name.endswith("/byteorder") else content)
    with pytest.raises(ValueError, match=r"copy it again: its numbers are not little-endian"):
        read_rank_file(path)


@pytest.mark.parametrize("name", ["transformer.final_layernorm.weight", "transformer.layers.0.attention.dense.weight"])
def test_expanded_tensors_are_written_in_full(name, golden_ranks, golden_special_ids, write_sat, tmp_path):
    for rank in golden_ranks:
        rank["module"][name] = torch.full((1,), 0.5).half().expand(rank["module"][name].shape)
    src = write_sat(golden_ranks)
    convert_sat_checkpoint(src, tmp_path / "hf", config=golden_special_ids)
    reshard_sat_checkpoint(src, tmp_path / "out", tp_size=1)
    assert verify_checkpoint(src).problems == verify_checkpoint(src, tmp_path / "hf").problems == []
    assert verify_checkpoint(tmp_path / "hf", tmp_path / "out").problems == []
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    model_name = name.replace("transformer.final_layernorm", "model.norm").replace("transformer", "model")
    assert (weights[model_name] == 0.5).all()


def test_download_without_values_is_not_whole(golden_ranks, write_sat):
    name = "transformer.layers.0.attention.dense.weight"
    for rank in golden_ranks:
        rank["module"][name] = rank["module"][name].to("meta")
    [problem] = verify_checkpoint(write_sat(golden_ranks)).problems
    assert f"{name} was saved on meta and has no values" in problem


@pytest.mark.usefixtures("without_checksums")
def test_download_without_checksums_cannot_be_checked(golden_ranks, write_sat):
    problems = verify_checkpoint(write_sat(golden_ranks)).problems
    assert [problem.rpartition("/")[2] for problem in problems] == [
        f"mp_rank_0{rank}_model_states.pt was saved without checksums and cannot be checked" for rank in range(2)
    ]


def test_rank_that_is_a_folder_does_not_hide_the_others(src):
    (src / "49300" / NAME).unlink()
    (src / "49300" / NAME).mkdir()
    other = src / "49300" / "mp_rank_01_model_states.pt"
    other.write_bytes(other.read_bytes()[:-50])
    problems = verify_checkpoint(src).problems
    assert len(problems) == 2
    assert NAME in problems[0]
    assert "mp_rank_01_model_states.pt is not a complete zip file" in problems[1]


def test_damage_is_reported_once(src):
    path = src / "49300" / NAME
    name = "transformer.final_layernorm.bias"
    content = bytearray(path.read_bytes())
    content[content.index(torch.load(path, weights_only=True)["module"][name].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert len(verify_checkpoint(src).problems) == 1


def test_layer_number_out_of_all_bounds(golden_ranks, write_sat):
    for rank in golden_ranks:
        rank["module"]["transformer.layers.300000000.input_layernorm.weight"] = torch.zeros(64).half()
    [problem] = verify_checkpoint(write_sat(golden_ranks)).problems
    assert "layer 3 is missing; expected a complete checkpoint" in problem


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(0, 4).half(), "is sparse, empty or without a dimension"),
        (torch.tensor(1.0).half(), "is sparse, empty or without a dimension"),
        (torch.zeros(2, 2).half().to_sparse(), "is sparse, empty or without a dimension"),
    ],
)
def test_tensor_of_another_kind(value, message, golden_ranks, write_sat):
    golden_ranks[0]["module"]["transformer.final_layernorm.bias"] = value
    assert message in refusal(lambda: read_rank_file(write_sat(golden_ranks) / "49300" / NAME))


def test_name_that_is_none(golden_ranks, write_sat):
    golden_ranks[0]["module"][5] = torch.zeros(2).half()
    assert "5 is no name" in refusal(lambda: read_rank_file(write_sat(golden_ranks) / "49300" / NAME))


def test_view_beyond_its_storage_is_refused(src):
    path = src / "49300" / NAME
    name = "transformer.final_layernorm.bias"
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    key = max(members, key=lambda member: members[member] == b"" or len(members[member]) == 128)
    members[key] = members[key][:-2]  # a byte range shorter than the pickle tells, with a checksum that fits
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    assert "are not where they should be" in refusal(lambda: read_rank_file(path)), name
