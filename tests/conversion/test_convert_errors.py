"""Bad input gets one clear line, runs no code and changes nothing."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden import DATA, golden_config, golden_state_dict
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from glm_hf import GLMConfig
from glm_hf.conversion import convert_sat_checkpoint

EMBEDDING = "transformer.word_embeddings.weight"
DENSE = "transformer.layers.1.attention.dense"
QKV = "transformer.layers.0.attention.query_key_value"


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refuse(tmp_path, golden_special_ids) -> Callable[..., None]:
    """Function that checks that a conversion to `tmp_path / "hf"` fails in one line and changes nothing."""

    def check(src: Path, message: str, error: type[Exception] = ValueError, **options) -> None:
        before = snapshot(tmp_path)
        with pytest.raises(error, match=message) as caught:
            convert_sat_checkpoint(src, tmp_path / "hf", **{"config": golden_special_ids, **options})
        assert type(caught.value) is error
        assert "\n" not in str(caught.value)
        assert snapshot(tmp_path) == before

    return check


@pytest.fixture
def golden_copy(tmp_path) -> Path:
    """Copy of golden cfg1 in four ranks."""
    return shutil.copytree(DATA / "cfg1" / "sat_tp4", tmp_path / "sat")


def rank_file(src: Path, rank: int) -> Path:
    return src / "49300" / f"mp_rank_{rank:02d}_model_states.pt"


def test_missing_source(refuse, tmp_path):
    refuse(tmp_path / "nowhere", r"nowhere is not a folder; expected a SAT checkpoint", FileNotFoundError)


def test_missing_latest(refuse, golden_copy):
    (golden_copy / "latest").unlink()
    refuse(golden_copy, r"sat holds no SAT checkpoint; expected latest or mp_rank_00", FileNotFoundError)


@pytest.mark.parametrize("iteration", ["50000", ""])
def test_latest_without_its_folder(iteration, refuse, golden_copy):
    (golden_copy / "latest").write_text(iteration)
    refuse(golden_copy, rf"sat/latest names '{iteration}', but .*sat has no folder of that name", FileNotFoundError)


def test_iteration_folder_without_rank_files(refuse, golden_copy):
    for rank in range(4):
        rank_file(golden_copy, rank).unlink()
    refuse(golden_copy, r"49300 holds no SAT checkpoint; expected mp_rank_00_model_states.pt in it", FileNotFoundError)


def test_swapped_ranks(refuse, golden_copy, tmp_path):
    rank_file(golden_copy, 1).rename(tmp_path / "kept")
    rank_file(golden_copy, 2).rename(rank_file(golden_copy, 1))
    (tmp_path / "kept").rename(rank_file(golden_copy, 2))
    refuse(
        golden_copy, r"mp_rank_01\S+ was saved as mp_rank_02_model_states.pt: it was renamed, or files were swapped"
    )


@pytest.mark.parametrize("is_named", [True, False])
def test_copy_in_place_of_another_rank(is_named, refuse, golden_ranks, golden_copy):
    if is_named:
        shutil.copy(rank_file(golden_copy, 0), rank_file(golden_copy, 3))
        refuse(golden_copy, r"mp_rank_03\S+ was saved as mp_rank_00_model_states.pt")
        return
    for rank in range(4):
        content = torch.load(rank_file(golden_copy, 0 if rank == 3 else rank), weights_only=True)
        with open(rank_file(golden_copy, rank), "wb") as file:
            torch.save(content, file)  # the file does not know its name
    refuse(
        golden_copy, rf"mp_rank_03\S+: {EMBEDDING} and all other tensors are those of \S+mp_rank_00\S+; one of them"
    )


@pytest.mark.parametrize("rank", range(4))
def test_missing_rank_first_middle_or_last(rank, refuse, golden_copy):
    rank_file(golden_copy, rank).unlink()
    message = rf"49300: expected 4 ranks as the shapes tell, found 3: mp_rank_0{rank}_model_states.pt missing"
    refuse(golden_copy, message, FileNotFoundError)


def test_surplus_rank(refuse, golden_copy):
    shutil.copy(rank_file(golden_copy, 0), rank_file(golden_copy, 4))
    refuse(golden_copy, r"expected 4 ranks as the shapes tell, found 5: remove the files of ranks \[4\]")


def test_rank_of_another_tensor_parallel_size(refuse, golden_copy):
    shutil.copy(DATA / "cfg1/sat_tp2/49300/mp_rank_01_model_states.pt", rank_file(golden_copy, 1))
    message = r"mp_rank_01_model_states.pt: transformer.word_embeddings.weight is \(80, 64\) float16, but \(40, 64\)"
    refuse(golden_copy, message)


def test_rank_of_another_model(refuse, golden_copy):
    shutil.copy(DATA / "cfg2/sat_tp4/49300/mp_rank_03_model_states.pt", rank_file(golden_copy, 3))
    refuse(golden_copy, r"mp_rank_03\S+ holds transformer.layers.3\S+, but \S+mp_rank_00\S+ does not; all ranks")


@pytest.mark.parametrize("key", ["iteration", "global_steps"])
def test_ranks_of_two_iterations(key, refuse, golden_ranks, write_sat):
    golden_ranks[0][key], golden_ranks[1][key] = 49300, 49100
    refuse(write_sat(golden_ranks), rf"mp_rank_01\S+ is of {key} 49100, but \S+mp_rank_00\S+ is of 49300; all ranks")


@pytest.mark.parametrize("name", [f"{DENSE}.bias", "transformer.final_layernorm.weight"])
def test_replicated_tensor_that_differs_between_ranks(name, refuse, golden_ranks, write_sat):
    golden_ranks[1]["module"][name][5] += 1
    refuse(write_sat(golden_ranks), rf"{name} must be equal on all ranks, but rank 0 and ranks \[1\] differ")


@pytest.mark.parametrize("name", [EMBEDDING, f"{DENSE}.bias", f"{DENSE}.weight"])
def test_flipped_bit_of_a_weight(name, refuse, golden_copy):
    weight = torch.load(rank_file(golden_copy, 2), weights_only=True)["module"][name].numpy().tobytes()
    content = bytearray(rank_file(golden_copy, 2).read_bytes())
    content[content.index(weight) + 5] ^= 16
    rank_file(golden_copy, 2).write_bytes(content)
    refuse(
        golden_copy, rf"mp_rank_02_model_states.pt: {name} is damaged: its CRC-32 is \w{{8}}, but \w{{8}} was written"
    )


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_truncated_file(share, refuse, golden_copy):
    content = rank_file(golden_copy, 2).read_bytes()
    rank_file(golden_copy, 2).write_bytes(content[: int(len(content) * share)])
    refuse(golden_copy, r"mp_rank_02_model_states.pt is not a complete zip file of torch.save, copy it again: ")


def test_file_that_is_no_zip(refuse, golden_ranks, golden_copy):
    torch.save(golden_ranks[0], rank_file(golden_copy, 2), _use_new_zipfile_serialization=False)
    refuse(golden_copy, r"mp_rank_02_model_states.pt is not a complete zip file of torch.save, copy it again: ")
    rank_file(golden_copy, 2).write_bytes(b"<html>404</html>")
    refuse(golden_copy, r"mp_rank_02_model_states.pt is not a complete zip file of torch.save, copy it again: ")
    rank_file(golden_copy, 2).write_bytes(b"")
    refuse(golden_copy, r"mp_rank_02_model_states.pt is not a complete zip file of torch.save, copy it again: ")


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_pickle_that_runs_code_is_refused_unrun(rank, is_zip, refuse, golden_ranks, write_sat, tmp_path):
    src = write_sat(golden_ranks)
    torch.save(
        {**golden_ranks[rank], "x": Payload(tmp_path / "ran")},
        rank_file(src, rank),
        _use_new_zipfile_serialization=is_zip,
    )
    message = "holds more than plain tensors or is damaged; refused" if is_zip else "is not a complete zip file"
    refuse(src, rf"mp_rank_0{rank}_model_states.pt {message}")
    assert not (tmp_path / "ran").exists()
    torch.load(rank_file(src, rank), weights_only=False)
    assert (tmp_path / "ran").exists()  # the payload works


@pytest.mark.parametrize("content", [{}, {"module": {}}, {"module": [1]}, {"model": {}}, [1]])
def test_file_without_module(content, refuse, write_sat):
    refuse(write_sat([content]), r"mp_rank_00_model_states.pt has no tensors under the key 'module'")


@pytest.mark.parametrize("name", ["lm_head.weight", "transformer.layers.0.attention.key.weight", "transformer.foo"])
def test_unknown_tensor(name, refuse, golden_ranks, write_sat):
    for rank in golden_ranks:
        rank["module"][name] = torch.zeros(2).half()
    refuse(
        write_sat(golden_ranks), rf"mp_rank_00_model_states.pt: {name} is unknown; expected the tensors of GLM-130B"
    )


def test_tensor_that_one_rank_has_alone(refuse, golden_ranks, write_sat):
    golden_ranks[1]["module"]["transformer.foo"] = torch.zeros(2).half()
    refuse(write_sat(golden_ranks), r"mp_rank_01\S+ holds transformer.foo, but \S+mp_rank_00\S+ does not")


@pytest.mark.parametrize("name", sorted(golden_state_dict("cfg1")))
def test_missing_tensor(name, refuse, golden_ranks, write_sat):
    name = name.replace("embed_tokens", "word_embeddings").replace("model.norm", "model.final_layernorm")
    name = name.replace("model.", "transformer.")
    for rank in golden_ranks:
        del rank["module"][name]
    refuse(write_sat(golden_ranks), rf"mp_rank_00_model_states.pt: {name} is missing; expected a complete")


def test_missing_layer(refuse, golden_ranks, write_sat):
    for rank in golden_ranks:
        for name in [name for name in rank["module"] if ".layers.1." in name]:
            del rank["module"][name]
    refuse(write_sat(golden_ranks), r"mp_rank_00_model_states.pt: layer 1 is missing; expected a complete checkpoint")


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        (f"{DENSE}.weight", (64, 31), r"\(64, 31\), expected \(64, 32\)"),
        (f"{DENSE}.weight", (32, 64), r"\(32, 64\), expected \(64, 32\)"),
        (f"{DENSE}.bias", (32,), r"\(32,\), expected \(64,\)"),
        (f"{QKV}.weight", (64, 96), r"\(64, 96\), expected \(96, 64\)"),
        ("transformer.layers.2.mlp.dense_h_to_4h.bias", (88,), r"\(88,\), expected \(176,\)"),
        (EMBEDDING, (80, 65), r"\(80, 65\), expected \(81, 64\)"),
        ("transformer.final_layernorm.weight", (64, 1), r"\(64, 1\), expected \(64,\)"),
    ],
)
def test_wrong_shape_on_all_ranks(name, shape, expected, refuse, golden_ranks, write_sat):
    for rank in golden_ranks:
        rank["module"][name] = torch.zeros(shape).half()
    refuse(write_sat(golden_ranks), rf"mp_rank_00_model_states.pt: {name} has shape {expected}")


def test_share_of_query_key_value_that_fits_no_number_of_ranks(refuse, golden_ranks, write_sat):
    golden_ranks[0]["module"][f"{QKV}.bias"] = torch.zeros(95).half()
    refuse(
        write_sat(golden_ranks),
        rf"mp_rank_00_model_states.pt: {QKV}.bias has 95 elements; expected an equal share of 192",
    )


def test_dtype_that_differs_between_ranks(refuse, golden_ranks, write_sat):
    golden_ranks[1]["module"][f"{DENSE}.weight"] = golden_ranks[1]["module"][f"{DENSE}.weight"].float()
    refuse(write_sat(golden_ranks), rf"mp_rank_01\S+: {DENSE}.weight is \(64, 32\) float32, but \(64, 32\) float16 in")


def test_mixed_dtypes_without_a_choice(refuse, golden_ranks, write_sat):
    for rank in golden_ranks:
        rank["module"][f"{DENSE}.weight"] = rank["module"][f"{DENSE}.weight"].float()
    refuse(
        write_sat(golden_ranks), r"mixes torch.float16, torch.float32; pass dtype= to choose one of float16, bfloat16"
    )


@pytest.mark.parametrize("value", [torch.zeros(2, dtype=torch.int64), 7])
def test_entry_that_is_no_weight(value, refuse, golden_ranks, write_sat):
    golden_ranks[1]["module"][f"{DENSE}.bias"] = value
    refuse(write_sat(golden_ranks), rf"mp_rank_01_model_states.pt: {DENSE}.bias is (\(2,\) int64|a int); expected")


@pytest.mark.parametrize("dtype", ["int8", "half precision", torch.float64])
def test_dtype_that_cannot_be_written(dtype, refuse):
    refuse(DATA / "cfg1/sat_tp1", r"dtype must be one of float16, bfloat16, float32, got", dtype=dtype)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{QKV}.weight", r"transformer.layers.0.attention.query_key_value.weight_scale is missing"),
        (f"{DENSE}.weight", rf"{DENSE}.weight is quantized, but floating point was expected"),
        (f"{QKV}.weight_scale", r"weight_scale is unknown"),
    ],
)
def test_checkpoint_that_is_quantized_in_part(name, message, refuse, golden_ranks, write_sat):
    for rank in golden_ranks:
        if name.endswith("_scale"):
            rank["module"][name] = torch.ones(96).half()
        else:
            rank["module"][name] = torch.ones_like(rank["module"][name], dtype=torch.int8)
    refuse(write_sat(golden_ranks), message)


def test_quantization_that_is_none(refuse):
    refuse(DATA / "cfg1/sat_tp1", r"quantization must be one of int8, int4, got int3", quantization="int3")


def test_quantized_checkpoint_does_not_become_quantized_in_another_way(refuse):
    message = r"49300 is quantized to int4 already and cannot become int8; convert the checkpoint that is not"
    refuse(DATA / "cfg2/sat_int4_tp2", message, config=golden_config("cfg2"), quantization="int8")


def test_small_vocabulary_without_special_ids(refuse):
    message = (
        r"eos_token_id must lie inside the vocabulary \(0 to 159\), got 20002; .*pass config= \(a GLMConfig, a dict"
    )
    refuse(DATA / "cfg1/sat_tp2", message, config=None)


@pytest.mark.parametrize(
    ("field", "value", "actual"),
    [
        ("vocab_size", 161, 160),
        ("hidden_size", 128, 64),
        ("num_hidden_layers", 4, 3),
        ("num_attention_heads", 8, 4),
        ("intermediate_size", 352, 176),
    ],
)
@pytest.mark.parametrize("kind", ["object", "dict", "file"])
def test_config_that_contradicts_the_weights(field, value, actual, kind, refuse, golden_special_ids, tmp_path):
    config = golden_special_ids | {field: value}
    if kind == "object":
        config = GLMConfig.from_dict(golden_config("cfg1").to_dict() | {field: value})
    elif kind == "file":
        (tmp_path / "config.json").write_text(json.dumps(config))
        config = tmp_path / "config.json"
    refuse(DATA / "cfg1/sat_tp1", rf"config has {field} = {value}, but the weights have {actual}; ", config=config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tie_word_embeddings": False}, r"tie_word_embeddings = False, but a SAT checkpoint has no LM head"),
        ({"mask_tokenid": 3}, r"unknown fields mask_tokenid; expected fields of GLMConfig"),
        ({"gmask_token_id": 144}, r"the configuration does not fit the weights: .* must differ"),
        ({"mask_token_id": "[MASK]"}, r"the configuration does not fit the weights: .*mask_token_id.* expected int"),
    ],
)
def test_config_that_makes_no_sense(change, message, refuse, golden_special_ids):
    refuse(DATA / "cfg1/sat_tp1", message, config=golden_special_ids | change)


def test_config_file_that_is_missing_or_none(refuse, tmp_path):
    refuse(DATA / "cfg1/sat_tp1", r"config.json", FileNotFoundError, config=tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    refuse(DATA / "cfg1/sat_tp1", r"config.json is not a JSON file: ", config=tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    refuse(
        DATA / "cfg1/sat_tp1", r"config.json holds no fields; expected a JSON object", config=tmp_path / "config.json"
    )


def test_ranks_that_cut_a_head(refuse, random_module, cut_module, special_ids, write_sat):
    src = write_sat(cut_module(random_module(hidden=64, inner=32, vocab=32), 4))
    message = r"the number of ranks \(4\) must divide num_attention_heads, got 2"
    refuse(src, message, config=special_ids | {"num_attention_heads": 2})


def test_head_size_that_does_not_divide_the_hidden_size(refuse, golden_ranks, write_sat):
    for rank in golden_ranks:
        for name in [name for name in rank["module"] if name.endswith("inv_freq")]:
            rank["module"][name] = torch.ones(15).half()
    refuse(write_sat(golden_ranks), r"head size 30 of the rotary frequencies must divide hidden size 64")


def make_tokenizer(num_tokens: int, mask: str) -> PreTrainedTokenizerFast:
    vocabulary = {f"word{i}": i for i in range(num_tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="word0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, mask_token=mask, eos_token="word2")


def test_tokenizer_with_more_tokens_than_rows(refuse):
    message = r"the tokenizer has 161 tokens, but the model's vocabulary has 160 rows"
    refuse(DATA / "cfg1/sat_tp1", message, tokenizer=make_tokenizer(161, "word144"))


def test_tokenizer_with_other_special_ids(refuse):
    message = r"the tokenizer has mask_token_id = 143, but the config has 144; use the tokenizer that belongs"
    refuse(DATA / "cfg1/sat_tp1", message, tokenizer=make_tokenizer(160, "word143"))


def test_tokenizer_file_that_is_missing(refuse, tmp_path):
    refuse(DATA / "cfg1/sat_tp1", r"text\.model", FileNotFoundError, tokenizer=tmp_path / "text.model")


def test_shard_size_that_is_none(refuse):
    refuse(DATA / "cfg1/sat_tp1", r"parsecs", max_shard_size="5 parsecs")


def test_folder_that_holds_something(refuse, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("precious")
    refuse(DATA / "cfg1/sat_tp1", r"hf exists already; choose another folder or remove it", FileExistsError)


def test_file_in_place_of_the_folder(refuse, tmp_path):
    (tmp_path / "hf").write_text("precious")
    refuse(DATA / "cfg1/sat_tp1", r"hf exists already; choose another folder or remove it", FileExistsError)


def test_pipe_in_place_of_the_folder(golden_special_ids, tmp_path):
    os.mkfifo(tmp_path / "hf")
    with pytest.raises(FileExistsError, match=r"hf exists already; choose another folder or remove it"):
        convert_sat_checkpoint(DATA / "cfg1/sat_tp1", tmp_path / "hf", config=golden_special_ids)


def test_odd_columns_that_four_bits_cannot_pack(random_module, special_ids, write_sat, refuse):
    src = write_sat([{"module": random_module(hidden=8, inner=5, vocab=16)}])
    config = special_ids | {"num_attention_heads": 1}
    message = r"mlp.dense_4h_to_h.weight has 5 columns, which 4 bits cannot pack; use 8 bits"
    refuse(src, message, config=config, quantization="int4")


def test_checkpoint_of_integers_alone(refuse, golden_ranks, write_sat):
    for rank in golden_ranks:
        rank["module"] = {name: tensor.char() for name, tensor in rank["module"].items()}
    refuse(write_sat(golden_ranks), r"expected")


@pytest.mark.parametrize("config", [{"dtype": "nonsense"}, {"id2label": 5}, {"rope_parameters": {"rope_theta": "x"}}])
def test_config_of_the_wrong_kind(config, refuse, golden_special_ids):
    refuse(DATA / "cfg1/sat_tp1", r"the configuration does not fit the weights", config=golden_special_ids | config)


def test_mount_point_in_place_of_the_folder(golden_special_ids):
    with pytest.raises(ValueError, match=r"/proc is a mount point and cannot be replaced; choose a folder in it"):
        convert_sat_checkpoint(DATA / "cfg1/sat_tp1", "/proc", config=golden_special_ids)


def test_hidden_folder_of_something_else(refuse, tmp_path):
    (tmp_path / ".hf.partial").mkdir()
    (tmp_path / ".hf.partial" / "config.json").write_text("{}")
    message = r"\.hf\.partial is not of an interrupted run; remove it or choose another destination"
    refuse(DATA / "cfg1/sat_tp1", message, FileExistsError)


def test_disk_with_too_little_space(refuse, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    refuse(DATA / "cfg1/sat_tp1", r"needs 327,360 free bytes, but has 1,000; free some space", OSError)


@pytest.mark.parametrize(
    "name",
    [
        *("mp_rank_0000_model_states.pt", "mp_rank_0_model_states.pt", "mp_rank_001_model_states.pt"),
        *("mp_rank_００_model_states.pt", "mp_rank_٠٠_model_states.pt", "MP_RANK_00_MODEL_STATES.PT"),
        *("mp_rank_00_model_states (1).pt", "mp_rank_00_model_states.pt.part", "mp_rank_00_model_states.pth"),
    ],
)
@pytest.mark.parametrize("is_alone", [False, True])
def test_name_that_looks_like_that_of_a_rank(name, is_alone, refuse, golden_copy):
    content = rank_file(golden_copy, 1).read_bytes()
    if is_alone:
        rank_file(golden_copy, 1).unlink()
    (golden_copy / "49300" / name).write_bytes(content)
    refuse(golden_copy, rf"{re.escape(name)} looks like the file of a rank, but has another name")


def test_checksums_of_rank_files_may_lie_beside_them(golden_copy, golden_special_ids, tmp_path):
    (golden_copy / "49300" / "mp_rank_00_model_states.pt.sha256").write_text("0123")
    convert_sat_checkpoint(golden_copy, tmp_path / "hf", config=golden_special_ids)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_rank_file_that_never_ends(kind, refuse, golden_copy):
    path = rank_file(golden_copy, 1)
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises((ValueError, FileNotFoundError), match="mp_rank_01_model_states.pt"):
        convert_sat_checkpoint(golden_copy, golden_copy.parent / "hf")


@pytest.mark.parametrize("shape", [(60_000, 60_000), (1, 2_000_000_000)])
def test_small_file_with_large_tensors(shape, refuse, golden_ranks, write_sat):
    golden_ranks[0]["module"][f"{DENSE}.weight"] = torch.zeros(1).half().expand(shape)
    refuse(write_sat(golden_ranks), "bytes, but its tensors would have .* they are expanded")
