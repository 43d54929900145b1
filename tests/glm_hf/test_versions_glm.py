"""Generation of another transformers: whatever it renames, the answer is an error and not another text."""

import inspect
import re
import types

import pytest
import torch
import transformers
from golden import golden_model
from transformers.generation import GenerationMixin
from transformers.generation import utils as generation_utils

from glm_hf.versions_glm import CACHE, SUPPORTED

MODEL = golden_model("cfg1")
CONFIG = MODEL.config
TEXTS = torch.tensor([[CONFIG.pad_token_id, 83, 23, CONFIG.mask_token_id, 53], [94, 27, 30, 85, 31]])
SOURCE = inspect.getsource(generation_utils)


def install_mixin(monkeypatch, source):
    """Put the methods of a changed copy of transformers' mixin in the place of its own."""
    module = types.ModuleType("transformers.generation.changed_utils")
    module.__package__ = "transformers.generation"
    exec(compile(source, "changed_utils.py", "exec"), vars(module))  # noqa: S102, transformers' own text
    for name, method in vars(module.GenerationMixin).items():
        if not name.startswith("__"):
            monkeypatch.setattr(GenerationMixin, name, method, raising=False)


HOOK = r"(def prepare_inputs_for_generation\([^)]*)"
OF_POSITIONS = "_prepare_position_ids_for_generation"
RENAMED = {
    "the cache, everywhere": (rf"\b{CACHE}\b(?!_)", "kv_store"),
    "the cache, where it is kept": (rf'model_kwargs\[(cache_name|"{CACHE}")\] = ', 'model_kwargs["kv_store"] = '),
    "the first iteration": (r"\bis_first_iteration\b", "is_prefill"),
    "the length of what comes next": (r"\bnext_sequence_length\b", "num_next"),
    "the padding mask of the hook": (HOOK + "attention_mask: torch.LongTensor", r"\1padding: torch.LongTensor"),
    "the hook of inputs": (r"\bprepare_inputs_for_generation\b", "prepare_forward"),
    "the call of the hook of inputs": (
        r"self\.prepare_inputs_for_generation\(",
        "GenerationMixin.prepare_inputs_for_generation(self, ",
    ),
    "the hook of positions": (OF_POSITIONS, "_count_positions"),
    "the call of the hook of positions": (rf"self\.{OF_POSITIONS}\(", f"GenerationMixin.{OF_POSITIONS}(self, "),
    "the hook of masks": (r'getattr\(self, "create_masks_for_generate"', 'getattr(self, "renamed"'),
}


@pytest.mark.parametrize("what", RENAMED)
def test_renaming_is_an_error_that_names_the_versions(what, monkeypatch):
    pattern, name = RENAMED[what]
    options = {"cache_implementation": "static"} if what == "the hook of masks" else {}
    source, count = re.subn(pattern, name, SOURCE)
    assert count, f"{what} is called otherwise in transformers {transformers.__version__}"
    install_mixin(monkeypatch, source)
    with pytest.raises(RuntimeError, match=rf"transformers {transformers.__version__}.*transformers {SUPPORTED}"):
        MODEL.generate(TEXTS, max_new_tokens=4, min_new_tokens=4, **options)


def test_an_unchanged_copy_generates_the_same(monkeypatch):
    expected = MODEL.generate(TEXTS, max_new_tokens=4).tolist()
    install_mixin(monkeypatch, SOURCE)
    assert MODEL.generate(TEXTS, max_new_tokens=4).tolist() == expected


def test_forgotten_padding_is_an_error(monkeypatch):
    prepare = type(MODEL).prepare_inputs_for_generation

    def without_mask(self, input_ids, attention_mask=None, **kwargs):
        return prepare(self, input_ids, **kwargs)

    monkeypatch.setattr(type(MODEL), "prepare_inputs_for_generation", without_mask)
    with pytest.raises(RuntimeError, match="the padding mask was not handed"):
        MODEL.generate(TEXTS, max_new_tokens=2)


def test_left_out_tokens_are_an_error(monkeypatch):
    prepare = type(MODEL).prepare_inputs_for_generation

    def last_only(self, input_ids, next_sequence_length=None, **kwargs):
        return prepare(self, input_ids, next_sequence_length=1, **kwargs)

    monkeypatch.setattr(type(MODEL), "prepare_inputs_for_generation", last_only)
    with pytest.raises(RuntimeError, match="tokens were left out"):
        MODEL.generate(TEXTS, max_new_tokens=2)


def test_a_cache_under_an_unknown_name_is_an_error():
    cache = transformers.DynamicCache(config=CONFIG)
    with pytest.raises(RuntimeError, match="handed to the model as kv_store"):
        MODEL(TEXTS, kv_store=cache)
    with pytest.raises(RuntimeError, match="handed to generate as kv_store"):
        MODEL.generate(TEXTS, kv_store=cache)
