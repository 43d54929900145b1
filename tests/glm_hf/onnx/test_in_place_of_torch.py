"""An exported folder where a model of torch is expected: copies, sizes, ways of generating, commands."""

import copy
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import partial
from importlib.resources import files
from pathlib import Path

import httpx
import pytest
import torch
from running_server import serving
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from glm_hf.conversion.loading import load
from glm_hf.folders.validation import MODEL_FILES
from glm_hf.onnx import ORTGLMForBlankInfilling, export_onnx, verify_onnx
from glm_hf.onnx.runtime import GRAPH_FILES

FOLDER = str(files("glm_hf") / "world_facts")
NEAR = 1e-4
IDS = torch.tensor([[25, 56, 17, 41, 12]])


@pytest.fixture(scope="module")
def torch_model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.mark.parametrize("make", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same(world_facts, make):
    assert torch.equal(make(world_facts)(IDS).logits, world_facts(IDS).logits)


def test_a_folder_is_opened_by_every_way_of_naming_it(world_facts):
    name = world_facts.name_or_path
    expected = world_facts(IDS).logits
    for options in ({"pretrained_model_name_or_path": name}, {"pretrained_model_name_or_path": name, "config": name}):
        assert torch.equal(ORTGLMForBlankInfilling.from_pretrained(**options)(IDS).logits, expected)


@pytest.mark.parametrize("patterns", [MODEL_FILES, GRAPH_FILES], ids=["by commands", "by the class"])
def test_every_file_that_a_graph_needs_is_downloaded(world_facts, patterns):
    names = {path.name for path in Path(world_facts.name_or_path).iterdir()} - {"LICENSE", "README.md"}
    assert {"model.onnx", "model.onnx.data"} < names
    assert [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)] == []


@pytest.mark.parametrize("counted", [{}, {"exclude_embeddings": True}])
def test_sizes_are_those_of_torch(world_facts, torch_model, counted):
    assert world_facts.num_parameters(**counted) == torch_model.num_parameters(**counted)
    assert world_facts.num_parameters(only_trainable=True) == 0
    assert world_facts.get_memory_footprint() == pytest.approx(torch_model.get_memory_footprint(), rel=0.02)


@pytest.mark.parametrize("ways", ["prompt_lookup_num_tokens", "assistant_model"])
def test_candidates_change_no_token(world_facts, torch_model, ways):
    ids = torch.tensor([[25, 56, 17, 41, 25, 56, 17]])
    option = {ways: 3 if ways == "prompt_lookup_num_tokens" else torch_model}
    results = [world_facts.generate(ids, max_new_tokens=10, do_sample=False, **more) for more in ({}, option)]
    assert torch.equal(*results)


def test_a_copy_of_a_cache_is_continued_by_itself(world_facts):
    cache = DynamicCache(config=world_facts.config)
    world_facts(IDS, past_key_values=cache)
    other = copy.deepcopy(cache)
    world_facts(IDS[:, 1:4], past_key_values=other)  # which must not reach the first one's memory
    actual = world_facts(IDS[:, :1], past_key_values=cache).logits[:, -1]
    expected = world_facts(torch.cat((IDS, IDS[:, :1]), dim=1)).logits[:, -1]
    assert (actual - expected).abs().max() < NEAR


def test_a_cache_outgrows_its_room(world_facts, torch_model):
    """More tokens than any room that is kept at once, one by one and several at a time."""
    ids = torch.randint(10, 200, (2, 300), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=world_facts.config)
    with torch.inference_mode():
        parts = [world_facts(part, past_key_values=cache).logits for part in ids.split([1, 1, 30, 1, 200, 67], dim=1)]
        assert (torch.cat(parts, dim=1) - torch_model(ids).logits).abs().max() < NEAR


def test_a_longer_layer_is_refused(world_facts):
    cache = DynamicCache(config=world_facts.config)
    world_facts(IDS, past_key_values=cache)
    cache.layers[1].crop(-2)
    with pytest.raises(ValueError, match="all layers of the cache must hold 5 tokens, got 3 in one"):
        world_facts(IDS[:, :1], past_key_values=cache)


def test_what_onnxruntime_refuses_is_one_line(world_facts, capfd, monkeypatch):
    fields = world_facts.session.config
    monkeypatch.setattr(fields, "num_hidden_layers", fields.num_hidden_layers - 1)
    with pytest.raises(ValueError, match="onnxruntime cannot compute") as error:
        world_facts(IDS)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_labels_of_any_name_are_refused_in_training(world_facts):
    world_facts.train()
    try:
        with pytest.raises(ValueError, match="training"):
            world_facts(IDS, shift_labels=IDS)
    finally:
        world_facts.eval()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: AutoModelForCausalLM.from_config(model.config), "opened by from_pretrained"),
        (lambda model: model.generate(IDS, assistant_early_exit=2), "assistant_early_exit"),
        (lambda model: load(model.name_or_path, bits=4), "quantization_config"),
    ],
)
def test_what_has_no_meaning_is_refused(world_facts, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(world_facts)
    assert "\n" not in str(error.value)


def test_a_changed_configuration_does_not_change_the_graph(world_facts):
    model = ORTGLMForBlankInfilling.from_pretrained(world_facts.name_or_path)
    expected = model(IDS).logits
    model.config.num_hidden_layers, model.config.vocab_size, model.config.max_position_embeddings = 1, 9, 10**6
    assert torch.equal(model(IDS, use_cache=False).logits, expected)
    with pytest.raises(ValueError, match="input_ids must be from"):
        model(torch.tensor([[10**5]]))
    with pytest.raises(ValueError, match="lies beyond the 512 of the graph"):
        model(IDS, position_ids=torch.arange(5)[None] + 600)


def test_a_graph_with_few_positions_is_verified(tmp_path, torch_model):
    config = copy.deepcopy(torch_model.config)
    config.max_position_embeddings = 12
    model = type(torch_model)(config)
    model.save_pretrained(tmp_path / "model")
    export_onnx(tmp_path / "model", tmp_path / "graph")
    assert len(verify_onnx(tmp_path / "model", tmp_path / "graph")) == 5


def test_a_server_gives_the_answers_of_torch(world_facts, torch_model):
    texts = ["The capital of France is [MASK].", "Water is [gMASK]", "法国的首都是[MASK]。"]
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    answers = []
    for model in (world_facts, torch_model):
        with serving(model, tokenizer) as server, ThreadPoolExecutor() as pool:
            bodies = ({"model": "glm", "prompt": text, "temperature": 0, "max_tokens": 8} for text in texts)
            post = partial(httpx.post, f"{server.url}/v1/completions", timeout=60)
            replies = pool.map(lambda body, post=post: post(json=body).json(), bodies)
            answers.append([reply["choices"][0]["text"] for reply in replies])
    assert answers[0] == answers[1]
    assert answers[0][0] == "Paris"


def test_commands_take_the_folder(world_facts):
    folder = world_facts.name_or_path
    text = "The capital of France is [MASK]."
    printed = []
    for model in (folder, FOLDER):
        command = [sys.executable, "-m", "glm_hf.cli", "fill", "--model", model, "--json", text]
        printed.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert printed[0]["filled"] == printed[1]["filled"]
    loaded = load(folder)
    assert "model.onnx.data" in loaded.origin["files"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
