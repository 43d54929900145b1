import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from glm_hf import GLMConfig


def test_defaults_are_glm_130b():
    config = GLMConfig()
    sizes = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size)
    assert sizes == (70, 12288, 96, 32768)
    assert config.head_dim == 128
    assert (config.vocab_size, config.max_position_embeddings, config.layer_norm_eps) == (150528, 2048, 1e-5)
    special = (config.mask_token_id, config.gmask_token_id, config.smask_token_id)
    assert special == (150000, 150001, 150002)
    assert (config.eod_token_id, config.sop_token_id, config.eop_token_id) == (150003, 150004, 150005)
    assert (config.eos_token_id, config.pad_token_id) == (20002, 0)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_save_and_load_through_auto_config(tmp_path):
    config = GLMConfig(num_hidden_layers=3, rope_dtype="float32", rope_theta=5000.0)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is GLMConfig
    paths = ("_name_or_path",)
    assert all(loaded.to_dict()[key] == value for key, value in config.to_dict().items() if key not in paths)
    assert loaded.rope_parameters["rope_theta"] == 5000.0


def test_auto_map_is_there_and_saved_where_it_names_something(tmp_path):
    config = GLMConfig()
    assert config.auto_map == {}
    config.save_pretrained(tmp_path / "none")
    assert "auto_map" not in (tmp_path / "none" / "config.json").read_text()
    config.auto_map["AutoModel"] = "modeling_glm.GLMModel"
    config.save_pretrained(tmp_path / "one")
    assert GLMConfig.from_pretrained(tmp_path / "one").auto_map == {"AutoModel": "modeling_glm.GLMModel"}
    assert GLMConfig().auto_map == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 7}, r"hidden_size must be a multiple of 2 \* num_attention_heads \(14\)"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be positive and finite, got 0.0"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps must be positive and finite, got nan"),
        ({"layer_norm_eps": float("inf")}, "layer_norm_eps must be positive and finite, got inf"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}}, "rope_theta must be a positive"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "rope_theta must be a positive"),
        ({"vocab_size": 1000}, "eos_token_id must lie inside the vocabulary .0 to 999., got 20002"),
        ({"mask_token_id": 150001}, "must differ"),
        ({"rope_dtype": "bfloat16"}, "rope_dtype"),
        ({"hidden_dropout": 1.5}, r"hidden_dropout must lie in \[0, 1\], got 1.5"),
        ({"embedding_gradient_shrink": 0.0}, "embedding_gradient_shrink must lie in"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type must be one of"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "whole head"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, 'need rope_dtype="float32"'),
        ({"max_position_embeddings": 4096}, 'need rope_dtype="float32"'),
        ({"hidden_size": "12288"}, "hidden_size"),
    ],
)
def test_bad_values_are_refused(changes, message):
    with pytest.raises(StrictDataclassError, match=message):
        GLMConfig(**changes)
