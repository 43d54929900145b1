import copy
import json
import re
from pathlib import Path

import pytest
import torch
from corpus import english, generate
from golden import DATA, golden_config, golden_model, golden_state_dict
from safetensors.torch import load_file
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, models
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from glm_hf import GLMConfig
from glm_hf.conversion import convert_sat_checkpoint
from glm_hf.conversion.streaming import blocks as streams
from glm_hf.conversion.streaming import stored_tensor
from glm_hf.tokenization_glm import GLMTokenizer

MIXIN_ROTARY = "mixins.rotary-embedding.rotary_emb.inv_freq"


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def assert_equal_tensors(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory) -> Path:
    """Unigram model of 144 pieces, which puts [MASK] where golden cfg1 has it; id 2 is `</s>`."""
    prefix = tmp_path_factory.mktemp("tokenizer") / "text"
    SentencePieceTrainer.train(
        sentence_iterator=iter(generate([english], 300, seed=0)),
        model_prefix=str(prefix),
        vocab_size=144,
        minloglevel=2,
        num_threads=1,
    )
    return prefix.with_suffix(".model")


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("name", ["cfg1", "cfg2"])
def test_folder_holds_the_tensors_of_the_original(name, tp_size, tmp_path):
    convert_sat_checkpoint(DATA / name / f"sat_tp{tp_size}", tmp_path / "hf", config=golden_config(name))
    expected = {key: tensor.half() for key, tensor in golden_state_dict(name).items()}
    assert_equal_tensors(load_file(tmp_path / "hf" / "model.safetensors"), expected)


@pytest.mark.parametrize("name", ["cfg1", "cfg2"])
def test_all_tensor_parallel_sizes_give_the_same_bytes(name, tmp_path):
    for tp_size in (1, 2, 4):
        convert_sat_checkpoint(
            DATA / name / f"sat_tp{tp_size}",
            tmp_path / str(tp_size),
            config=golden_config(name),
            max_shard_size="100KB",
        )
    first = read_folder(tmp_path / "1")
    assert len(first) > 5
    assert first == read_folder(tmp_path / "2") == read_folder(tmp_path / "4")


@pytest.mark.parametrize("max_shard_size", ["100KB", 20_000, "5GB"])
def test_folder_is_the_one_that_save_pretrained_writes(max_shard_size, tmp_path):
    copy.deepcopy(golden_model("cfg1")).half().save_pretrained(tmp_path / "saved", max_shard_size=max_shard_size)
    convert_sat_checkpoint(
        DATA / "cfg1" / "sat_tp2", tmp_path / "hf", config=golden_config("cfg1"), max_shard_size=max_shard_size
    )
    saved, converted = read_folder(tmp_path / "saved"), read_folder(tmp_path / "hf")
    assert converted.keys() == saved.keys()
    for file in converted:
        if file.endswith(".safetensors"):
            assert_equal_tensors(load_file(tmp_path / "hf" / file), load_file(tmp_path / "saved" / file))
        else:
            assert json.loads(converted[file]) == json.loads(saved[file])


def test_transformers_loads_every_weight(tmp_path):
    convert_sat_checkpoint(
        DATA / "cfg2" / "sat_tp4", tmp_path / "hf", config=golden_config("cfg2"), max_shard_size="100KB"
    )
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float16
    assert_equal_tensors(
        {key: tensor.float() for key, tensor in model.state_dict().items() if key != "lm_head.weight"},
        golden_state_dict("cfg2"),
    )
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_generation_stops_at_eop_and_eos(golden_special_ids, tmp_path):
    convert_sat_checkpoint(DATA / "cfg1" / "sat_tp1", tmp_path / "hf", config=golden_special_ids)
    generation_config = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert generation_config.eos_token_id == [149, 2]
    assert generation_config.pad_token_id == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", torch.bfloat16, torch.float16])
def test_dtype_is_cast_once(dtype, tmp_path):
    convert_sat_checkpoint(DATA / "cfg1" / "sat_tp2", tmp_path / "hf", config=golden_config("cfg1"), dtype=dtype)
    torch_dtype = getattr(torch, str(dtype).removeprefix("torch."))
    expected = {key: tensor.to(torch_dtype) for key, tensor in golden_state_dict("cfg1").items()}
    assert_equal_tensors(read_weights(tmp_path / "hf"), expected)
    assert read_config(tmp_path / "hf")["dtype"] == str(torch_dtype).removeprefix("torch.")


def test_checkpoint_of_mixed_dtypes_converts_to_a_chosen_one(golden_ranks, golden_special_ids, write_sat, tmp_path):
    for rank in golden_ranks:
        rank["module"]["transformer.final_layernorm.bias"] = rank["module"]["transformer.final_layernorm.bias"].float()
    convert_sat_checkpoint(write_sat(golden_ranks), tmp_path / "hf", config=golden_special_ids, dtype="float16")
    expected = {key: tensor.half() for key, tensor in golden_state_dict("cfg1").items()}
    assert_equal_tensors(read_weights(tmp_path / "hf"), expected)


def test_iteration_folder_converts_as_well(golden_special_ids, tmp_path):
    convert_sat_checkpoint(DATA / "cfg1" / "sat_tp2", tmp_path / "a", config=golden_special_ids)
    convert_sat_checkpoint(str(DATA / "cfg1" / "sat_tp2" / "49300"), str(tmp_path / "b"), config=golden_special_ids)
    assert read_folder(tmp_path / "a") == read_folder(tmp_path / "b")


def test_sizes_come_from_the_weights_and_the_rest_from_glm_130b(golden_special_ids, tmp_path):
    convert_sat_checkpoint(DATA / "cfg1" / "sat_tp4", tmp_path / "hf", config=golden_special_ids)
    config = GLMConfig.from_pretrained(tmp_path / "hf")
    assert config.to_diff_dict().items() >= golden_special_ids.items()
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (160, 64, 176)
    assert (config.num_hidden_layers, config.num_attention_heads) == (3, 4)
    assert (config.max_position_embeddings, config.layer_norm_eps) == (2048, 1e-5)
    assert config.architectures == ["GLMForBlankInfilling"]


def test_config_may_be_an_object_a_dict_or_a_file(golden_special_ids, tmp_path):
    config = golden_config("cfg1", max_position_embeddings=1024)
    before = config.to_dict()
    fields = golden_special_ids | {"max_position_embeddings": 1024}
    (tmp_path / "fields.json").write_text(json.dumps(fields))
    config.save_pretrained(tmp_path / "config")
    sources = [config, fields, tmp_path / "fields.json", str(tmp_path / "config" / "config.json")]
    for i, source in enumerate(sources):
        convert_sat_checkpoint(DATA / "cfg1" / "sat_tp1", tmp_path / str(i), config=source)
    assert read_config(tmp_path / "0")["max_position_embeddings"] == 1024
    assert all(read_folder(tmp_path / "0") == read_folder(tmp_path / str(i)) for i in range(1, len(sources)))
    assert config.to_dict() == before


def test_heads_come_from_config_without_rotary_frequencies(
    random_module, cut_module, special_ids, write_sat, tmp_path
):
    src = write_sat(cut_module(random_module(hidden=64, inner=32, vocab=32), 2))
    convert_sat_checkpoint(src, tmp_path / "hf", config=special_ids | {"num_attention_heads": 8})
    assert read_config(tmp_path / "hf")["num_attention_heads"] == 8


def test_heads_come_from_mixin_frequencies_that_are_cut(random_module, cut_module, special_ids, write_sat, tmp_path):
    ranks = cut_module(random_module(hidden=64, inner=32, vocab=32), 2)
    for rank, part in zip(ranks, torch.linspace(1, 0, 8).half().chunk(2), strict=True):
        rank["module"][MIXIN_ROTARY] = part.clone()
    convert_sat_checkpoint(write_sat(ranks), tmp_path / "hf", config=special_ids)
    assert read_config(tmp_path / "hf")["num_attention_heads"] == 4


def test_many_ranks_join_to_the_tensors_they_were_cut_from(
    random_module, cut_module, special_ids, write_sat, tmp_path
):
    module = random_module(hidden=96, inner=48, vocab=48, layers=11)
    src = write_sat(cut_module(module, 12))
    convert_sat_checkpoint(src, tmp_path / "hf", config=special_ids | {"num_attention_heads": 12})
    weights = read_weights(tmp_path / "hf")
    assert len(weights) == len(module)
    for name, tensor in module.items():
        name = name.replace("word_embeddings", "embed_tokens").replace("final_layernorm", "norm")
        assert torch.equal(weights[name.replace("transformer", "model")], tensor), name


def test_existing_empty_folder_is_filled(golden_special_ids, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "hf")
    convert_sat_checkpoint(DATA / "cfg1" / "sat_tp1", tmp_path / "link", config=golden_special_ids)
    assert (tmp_path / "hf" / "config.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "link"}


def test_missing_parents_of_the_folder_are_made(golden_special_ids, tmp_path):
    convert_sat_checkpoint(DATA / "cfg1" / "sat_tp1", tmp_path / "a" / "b", config=golden_special_ids)
    assert (tmp_path / "a" / "b" / "config.json").is_file()


def test_source_is_left_as_it_is(golden_ranks, golden_special_ids, write_sat, tmp_path):
    src = write_sat(golden_ranks)
    before = {path.relative_to(src): path.is_file() and path.read_bytes() for path in src.rglob("*")}
    convert_sat_checkpoint(src, tmp_path / "hf", config=golden_special_ids, dtype="float32")
    assert {path.relative_to(src): path.is_file() and path.read_bytes() for path in src.rglob("*")} == before


def test_tokenizer_object_and_folder_are_saved_with_the_model(sentencepiece_model, golden_special_ids, tmp_path):
    tokenizer = GLMTokenizer.from_sentencepiece(sentencepiece_model, num_image_tokens=0)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    src, config = DATA / "cfg1" / "sat_tp2", golden_special_ids | {"max_position_embeddings": 64}
    convert_sat_checkpoint(src, tmp_path / "a", config=config, tokenizer=tokenizer)
    convert_sat_checkpoint(src, tmp_path / "b", config=config, tokenizer=tmp_path / "tokenizer")
    text = "people keep [MASK] time"
    for folder in ("a", "b"):
        loaded = GLMTokenizer.from_pretrained(tmp_path / folder)
        assert loaded(text).input_ids == tokenizer(text).input_ids
        assert loaded.mask_token_id == 144
        assert loaded.model_max_length == GLMConfig.from_pretrained(tmp_path / folder).max_position_embeddings == 64
        assert (
            loaded.chat_template == tokenizer.chat_template == (tmp_path / folder / "chat_template.jinja").read_text()
        )
    assert tokenizer.model_max_length == 2048


def test_tokenizer_need_not_name_every_special_token(golden_special_ids, tmp_path):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"people": 0}, unk_token="people"))
    )
    convert_sat_checkpoint(DATA / "cfg1" / "sat_tp1", tmp_path / "hf", config=golden_special_ids, tokenizer=tokenizer)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_sentencepiece_model_becomes_a_tokenizer_behind_the_image_tokens(
    sentencepiece_model, random_module, write_sat, tmp_path
):
    names = ("mask", "gmask", "smask", "eod", "sop", "eop")
    config = {"eos_token_id": 20002, "num_attention_heads": 1} | {
        f"{n}_token_id": 20144 + i for i, n in enumerate(names)
    }
    src = write_sat([{"module": random_module(hidden=4, inner=4, vocab=20160)}])
    convert_sat_checkpoint(src, tmp_path / "hf", config=config, tokenizer=str(sentencepiece_model))
    tokenizer = GLMTokenizer.from_pretrained(tmp_path / "hf")
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (20144, 20002)
    assert min(tokenizer("people keep time").input_ids) >= 20000


class RecordingBar(tqdm):
    """Progress bar that notes the memory of the process at every update."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        RecordingBar.bytes, RecordingBar.memory, RecordingBar.whole = 0, [self.resident_bytes()], self.total

    def update(self, n=1):
        RecordingBar.bytes += n
        RecordingBar.memory.append(self.resident_bytes())
        return super().update(n)

    @staticmethod
    def resident_bytes() -> int:
        return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads resident memory as Linux reports it")
@pytest.mark.parametrize("quantization", [None, "int4"])
def test_memory_holds_some_blocks_and_progress_counts_bytes(
    quantization, random_module, cut_module, special_ids, write_sat, tmp_path, monkeypatch
):
    monkeypatch.setattr(streams, "tqdm", RecordingBar)
    monkeypatch.setattr(stored_tensor, "BLOCK_BYTES", 2**18)
    module = random_module(hidden=1024, inner=2048, vocab=8192, layers=3)  # 80 MB, largest 17 MB
    src = write_sat(cut_module(module, 2))
    config = special_ids | {"num_attention_heads": 8}
    convert_sat_checkpoint(src, tmp_path / "first", config=config, quantization=quantization)  # allocates what stays
    convert_sat_checkpoint(src, tmp_path / "hf", config=config, quantization=quantization)
    assert RecordingBar.bytes == RecordingBar.whole == sum(t.nbytes for t in read_weights(tmp_path / "hf").values())
    assert max(RecordingBar.memory) - RecordingBar.memory[0] < 8e6


@pytest.mark.parametrize("value", [70000.0, -70000.0])
def test_values_that_float16_cannot_hold_are_refused(value, golden_ranks, golden_special_ids, write_sat, tmp_path):
    for rank in golden_ranks:
        rank["module"] = {name: tensor.float() for name, tensor in rank["module"].items()}
    golden_ranks[1]["module"]["transformer.layers.1.attention.dense.weight"][3, 5] = value
    src = write_sat(golden_ranks)
    for options in ({"dtype": "float16"}, {"quantization": "int8"}):
        with pytest.raises(
            ValueError, match=r"layers.1.attention.dense.weight.*(beyond the largest torch.float16|finite in fp16)"
        ):
            convert_sat_checkpoint(src, tmp_path / "hf", config=golden_special_ids, **options)
    convert_sat_checkpoint(src, tmp_path / "hf", config=golden_special_ids, dtype="bfloat16")


def test_values_that_bfloat16_cannot_hold_are_refused(golden_ranks, golden_special_ids, write_sat, tmp_path):
    for rank in golden_ranks:
        rank["module"] = {name: tensor.float() for name, tensor in rank["module"].items()}
    golden_ranks[0]["module"]["transformer.layers.1.attention.dense.weight"][3, 5] = 3.4e38
    with pytest.raises(ValueError, match=r"attention.dense.weight has values beyond the largest torch.bfloat16"):
        convert_sat_checkpoint(write_sat(golden_ranks), tmp_path / "hf", config=golden_special_ids, dtype="bfloat16")


def test_ranks_of_one_number_are_no_copies_of_each_other(golden_ranks, golden_special_ids, write_sat, tmp_path):
    for rank in golden_ranks:
        rank["module"] = {name: torch.full_like(tensor, 0.25) for name, tensor in rank["module"].items()}
    convert_sat_checkpoint(write_sat(golden_ranks), tmp_path / "hf", config=golden_special_ids)
    assert all((tensor == 0.25).all() for tensor in read_weights(tmp_path / "hf").values())


def test_infinite_weights_are_kept(golden_ranks, golden_special_ids, write_sat, tmp_path):
    for rank in golden_ranks:
        rank["module"] = {name: tensor.float() for name, tensor in rank["module"].items()}
    golden_ranks[1]["module"]["transformer.layers.1.attention.dense.weight"][3, 5] = float("inf")
    convert_sat_checkpoint(write_sat(golden_ranks), tmp_path / "hf", config=golden_special_ids, dtype="float16")
    assert read_weights(tmp_path / "hf")["model.layers.1.attention.dense.weight"][3, 37] == float("inf")
