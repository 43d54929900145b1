"""A model from its folder, with a look at its files before."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch

from glm_hf import GLMForBlankInfilling
from glm_hf.conversion.loading import load
from glm_hf.decoding import Decoder, Engine, Request

MODEL = Path(__file__).parents[2] / "examples" / "world_facts" / "model"


def answer(loaded):
    ids = loaded.tokenizer("The capital of France is [MASK].")["input_ids"]
    config = loaded.model.config
    (found,) = Decoder(Engine(loaded.model, 1)).run([Request([*ids, config.sop_token_id], max_new_tokens=8)])
    return loaded.tokenizer.decode(found.ids).strip()


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"device": "cpu"}, {"dtype": "float32", "bits": 4}])
def test_a_folder_is_loaded_to_be_asked(options):
    loaded = load(str(MODEL), **options)
    assert not loaded.model.training
    assert loaded.model.dtype == (torch.float32 if "dtype" in options else torch.float16)
    assert answer(loaded) == "Paris"


def test_an_adapter_is_loaded_with_its_model(tmp_path):
    model = GLMForBlankInfilling.from_pretrained(MODEL, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["query_key_value"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(MODEL)
    loaded, plain = load(str(tmp_path / "adapter"), dtype="float32"), load(str(MODEL), dtype="float32")
    ids = plain.tokenizer("The capital of France is [MASK].", return_tensors="pt")["input_ids"]
    difference = (loaded.model(ids).logits - plain.model(ids).logits).abs().max()
    torch.testing.assert_close(loaded.model(ids).logits, adapted.eval()(ids).logits)
    assert difference > 1e-3
    assert loaded.origin != plain.origin


def test_origins_tell_models_and_ways_of_loading_apart(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    plain = load(str(tmp_path / "model")).origin
    assert load(str(tmp_path / "model")).origin == plain
    assert load(str(tmp_path / "model"), bits=4).origin != plain
    assert load(str(tmp_path / "model"), dtype="float32").origin != plain
    model = GLMForBlankInfilling.from_pretrained(tmp_path / "model")
    model.model.norm.weight.data += 1
    model.save_pretrained(tmp_path / "model")
    assert load(str(tmp_path / "model")).origin != plain
    json.dumps(plain)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(str(tmp_path))
    shutil.copytree(MODEL, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(str(tmp_path / "model"))
