import pytest
import torch
from golden import DATA, golden_config

from glm_hf import GLMForBlankInfilling
from glm_hf.conversion.formats.names import is_rotary_buffer, layer_index, to_sat_name


@pytest.mark.parametrize("config", ["cfg1", "cfg2"])
def test_every_parameter_of_the_model_has_its_sat_name(config):
    path = DATA / config / "sat_tp1" / "49300" / "mp_rank_00_model_states.pt"
    sat_names = {name for name in torch.load(path, weights_only=True)["module"] if not is_rotary_buffer(name)}
    with torch.device("meta"):
        names = GLMForBlankInfilling(golden_config(config)).state_dict().keys() - {"lm_head.weight"}
    assert {to_sat_name(name) for name in names} == sat_names


def test_layers_keep_their_number():
    assert to_sat_name("model.layers.12.mlp.dense_4h_to_h.bias") == "transformer.layers.12.mlp.dense_4h_to_h.bias"


def test_name_without_counterpart_is_refused():
    with pytest.raises(KeyError, match="lm_head"):
        to_sat_name("lm_head.weight")


def test_layer_index_is_none_outside_the_layers():
    assert layer_index("transformer.layers.12.attention.dense.bias") == 12
    assert layer_index("transformer.word_embeddings.weight") is None


def test_only_rotary_frequencies_are_rotary_buffers():
    assert is_rotary_buffer("mixins.rotary-embedding.rotary_emb.inv_freq")
    assert is_rotary_buffer("transformer.layers.0.attention.rotary_emb.inv_freq")
    assert not is_rotary_buffer("transformer.layers.0.attention.rotary_emb.weight")
    assert not is_rotary_buffer("transformer.layers.0.attention.inv_freq.weight")
