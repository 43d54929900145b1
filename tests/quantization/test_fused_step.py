"""A step of a whole layer in C gives what the layer's own `forward` gives, or leaves it to that."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from glm_hf import GLMConfig, GLMForBlankInfilling, GLMQuantizationConfig
from glm_hf.quantization import fused_step as module
from glm_hf.quantization import kernels_cpu

SPECIAL = ("eos", "mask", "gmask", "smask", "eod", "sop", "eop")
NAMES = ["plain C", "AVX2", "AVX-512", "AVX-512 VNNI"]
# Of the largest state after two layers: sums in another order, or numbers that were rounded the other way.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SIZES = {
    "whole vectors": {"hidden_size": 256, "num_attention_heads": 2, "intermediate_size": 384},
    "odd sizes": {"hidden_size": 36, "num_attention_heads": 3, "intermediate_size": 50},
    "small heads": {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 96},
    "several chunks": {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 2304},
}


@pytest.fixture(autouse=True)
def _library() -> None:
    if kernels_cpu.kernel_library() is None:
        pytest.skip("the C kernels were not built here")


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Function that returns a random quantized model, whose parameters are all different from one another."""
    known: dict[str, object] = {}

    def model(sizes: str = "whole vectors", dtype=torch.float32, **quantization) -> GLMForBlankInfilling:
        folder = tmp_path_factory.getbasetemp() / f"fused {sizes}"
        if sizes not in known:
            special = {f"{name}_token_id": 50 + index for index, name in enumerate(SPECIAL)}
            plain = GLMForBlankInfilling(GLMConfig(vocab_size=64, num_hidden_layers=2, **SIZES[sizes], **special))
            for parameter in plain.parameters():
                nn.init.normal_(parameter, std=0.1 if parameter.dim() == 2 else 1)
            plain.save_pretrained(folder)
            known[sizes] = folder
        config = GLMQuantizationConfig(**{"bits": 4} | quantization)
        return GLMForBlankInfilling.from_pretrained(folder, dtype=dtype, quantization_config=config).eval()

    return model


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """Numbers of tokens that went through a layer at once in C, of each layer."""
    tokens: list[int] = []
    decode_layers = kernels_cpu.KernelLibrary.decode_layers

    def note(self, layers):
        tokens.extend(layer.num_tokens for layer in layers)
        decode_layers(self, layers)

    monkeypatch.setattr(kernels_cpu.KernelLibrary, "decode_layers", note)
    return tokens


@pytest.fixture
def at_level(monkeypatch):
    """Function that lets the kernels use an instruction set, if this CPU has it."""

    def use(level: int) -> None:
        library = kernels_cpu.kernel_library()
        if level > library.level:
            pytest.skip("this CPU does not have these instructions")
        monkeypatch.setattr(library, "level", level)

    return use


def own_forward(model: GLMForBlankInfilling) -> GLMForBlankInfilling:
    """Return a copy whose layers compute everything by themselves."""
    twin = copy.deepcopy(model)
    twin.model.fused_step = None
    return twin


def texts(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows that end in gMASK and sop, padded on the left, and their mask."""
    ids = torch.randint(1, 50, (batch, length))
    ids[:, -2:] = torch.tensor([52, 55])
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : row % (length - 3)] = 0
    return ids * mask, mask


def answers(model: GLMForBlankInfilling, batch: int = 1, length: int = 9, steps: int = 6, **options) -> torch.Tensor:
    """Return the scores `(B, steps, V)` of tokens that are given, after texts that are the same in every call."""
    torch.manual_seed(1)
    ids, mask = texts(batch, length)
    new = torch.randint(1, 50, (batch, steps))
    cache = DynamicCache(config=model.config)
    scores = []
    with torch.no_grad():
        model(ids, attention_mask=mask if batch > 1 else None, past_key_values=cache)
        for step in range(steps):
            seen = torch.cat((mask, torch.ones(batch, step + 1, dtype=torch.long)), dim=1)
            outputs = model(
                new[:, step : step + 1], attention_mask=seen if batch > 1 else None, past_key_values=cache, **options
            )
            scores.append(outputs.logits[:, -1].float())
    return torch.stack(scores, dim=1)


def assert_same(model: GLMForBlankInfilling, **options) -> None:
    dtype = model.dtype
    expected = answers(own_forward(model), **options)
    difference = (answers(model, **options) - expected).abs().max()
    assert difference <= TOLERANCES[dtype] * expected.abs().max()


@pytest.mark.parametrize("level", range(4), ids=NAMES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_layers_give_what_they_give_by_themselves(make, at_level, taken, sizes, dtype, level):
    at_level(level)
    model = make(sizes, dtype)
    for batch in (1, 2, 5):
        taken.clear()
        assert_same(model, batch=batch)
        assert taken == [batch] * 12


@pytest.mark.parametrize("settings", [{"bits": 8}, {"group_size": 128}, {"bits": 8, "group_size": 64}])
@pytest.mark.parametrize("level", range(4), ids=NAMES)
def test_other_bits_and_groups(make, at_level, taken, settings, level):
    at_level(level)
    assert_same(make(**settings), batch=3)
    assert len(taken) == 12


@pytest.mark.parametrize("batch", [17, 40])
def test_many_rows(make, taken, batch):
    assert_same(make(), batch=batch, length=24)
    assert len(taken) == 12


def test_long_texts(make, taken):
    assert_same(make(dtype=torch.bfloat16), length=700, batch=2)
    assert len(taken) == 12


def test_several_threads_give_the_same_to_the_last_bit(make):
    model = make()
    expected = answers(model, batch=3)
    for num_threads in (2, 3, 8):
        torch.set_num_threads(num_threads)
        try:
            assert torch.equal(answers(model, batch=3), expected)
        finally:
            torch.set_num_threads(1)


def test_generated_tokens_are_the_same(make, taken):
    model = make("small heads")
    ids, mask = texts(4, 12)
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "temperature": 2.0}):
        results = []
        for one in (model, own_forward(model)):
            torch.manual_seed(0)
            results.append(one.generate(ids, attention_mask=mask, max_new_tokens=20, eos_token_id=None, **options))
        assert torch.equal(*results)
    assert taken


def test_states_that_are_not_finite_stay_so(make, taken):
    model = make()
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            model.model.norm.weight[0] = 1  # leaves states alone, which come from the embedding
            kept = model.model.embed_tokens.weight[3].clone()
            model.model.embed_tokens.weight[3, 5] = value
            cache = DynamicCache(config=model.config)
            model(torch.tensor([[5, 6, 52, 55]]), past_key_values=cache)
            assert not model(torch.tensor([[3]]), past_key_values=cache).logits.isfinite().any()
            model.model.embed_tokens.weight[3] = kept
    assert len(taken) == 4


def plus_hook(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output * 2)


def plus_pre_hook(model):
    model.model.layers[0].attention.dense.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def plus_forward(model):
    norm = model.model.layers[0].input_layernorm
    forward = norm.forward
    norm.forward = lambda states: forward(states) * 2


def plus_norm(model):
    class Twice(nn.LayerNorm):
        def forward(self, states):
            return super().forward(states) * 2

    old = model.model.layers[0].post_attention_layernorm
    new = Twice(old.normalized_shape, old.eps)
    new.load_state_dict(old.state_dict())
    model.model.layers[0].post_attention_layernorm = new


def plus_linear(model):
    old = model.model.layers[0].mlp.dense_4h_to_h
    linear = nn.Linear(old.in_features, old.out_features)
    model.model.layers[0].mlp.dense_4h_to_h = linear


def plus_adapter(model):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False))
    adapted.eval()


CHANGED = [plus_hook, plus_pre_hook, plus_forward, plus_norm, plus_linear, plus_adapter]


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize("after_use", [False, True])
def test_changed_layers_are_left_to_themselves(make, taken, change, after_use):
    model = make()
    before = answers(model)
    if not after_use:
        model = make()
    taken.clear()
    change(model)
    after = answers(model)
    assert not torch.allclose(after, before, atol=1e-2)
    torch.testing.assert_close(after, answers(own_forward(model)), rtol=0, atol=1e-5)
    assert not taken


def new_bias(model):
    bias = model.model.layers[0].attention.dense.bias
    model.model.layers[0].attention.dense.bias = nn.Parameter(bias * 3)


def new_bias_data(model):
    model.model.layers[0].mlp.dense_h_to_4h.bias.data = model.model.layers[0].mlp.dense_h_to_4h.bias.data * 3


def bias_in_place(model):
    with torch.no_grad():
        model.model.layers[1].attention.query_key_value.bias.mul_(3)


def new_norm(model):
    model.model.layers[1].input_layernorm.weight = nn.Parameter(model.model.layers[1].input_layernorm.weight * 3)


def other_alpha(model):
    model.model.layers[0].alpha *= 3


def other_scaling(model):
    model.model.layers[0].attention.scaling *= 5


def other_epsilon(model):
    model.model.layers[0].input_layernorm.eps = 1e3


def swapped_layers(model):
    first, second = model.model.layers
    first.mlp, second.mlp = second.mlp, first.mlp


@pytest.mark.parametrize(
    "change",
    [new_bias, new_bias_data, bias_in_place, new_norm, other_alpha, other_scaling, other_epsilon, swapped_layers],
)
def test_changed_numbers_are_used(make, taken, change):
    model = make()
    before = answers(model)
    change(model)
    assert_same(model)
    assert not torch.allclose(answers(model), before, atol=1e-2)
    assert len(taken) == 36


@pytest.mark.parametrize("attention", ["eager", "own"])
def test_other_attention_is_not_replaced(make, taken, attention):
    AttentionInterface.register("own", lambda *args, **kwargs: (sdpa_attention_forward(*args, **kwargs)[0] * 2, None))
    model = make()
    before = answers(model)
    model.set_attn_implementation(attention)
    taken.clear()
    after = answers(model)
    assert torch.allclose(after, before, atol=1e-3) == (attention == "eager")
    assert not taken


def test_attention_that_was_registered_in_the_place_of_torchs_is_used(make, taken, monkeypatch):
    model = make()
    before = answers(model)
    taken.clear()
    twice = lambda *args, **kwargs: (sdpa_attention_forward(*args, **kwargs)[0] * 2, None)  # noqa: E731
    monkeypatch.setitem(module.ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", twice)
    assert not torch.allclose(answers(model), before, atol=1e-2)
    assert not taken


def test_probabilities_and_states_are_given_when_asked_for(make):
    model = make("small heads")
    ids, _ = texts(1, 8)
    options = {"max_new_tokens": 4, "eos_token_id": None, "return_dict_in_generate": True}
    states = model.generate(ids, output_hidden_states=True, **options).hidden_states
    expected = own_forward(model).generate(ids, output_hidden_states=True, **options).hidden_states
    for own, other in zip(states[2], expected[2], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    model.set_attn_implementation("eager")
    attentions = model.generate(ids, output_attentions=True, **options).attentions
    assert attentions[2][0].shape == (1, 8, 1, 10)


def test_gradients_autocast_and_training_are_left_to_torch(make, taken):
    model = make()
    cache = DynamicCache(config=model.config)
    model(torch.tensor([[5, 6, 52, 55]]), past_key_values=cache)
    logits = model(torch.tensor([[7]]), past_key_values=cache).logits
    logits.sum().backward()
    assert model.model.layers[0].mlp.dense_4h_to_h.bias.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(torch.tensor([[7]]), past_key_values=cache)
    with torch.no_grad():
        model.train()(torch.tensor([[7]]), past_key_values=cache)
    assert not taken


def test_global_hooks_see_every_module(make, taken):
    model, seen = make(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        answers(model, steps=1)
    finally:
        handle.remove()
    assert seen.count("GLMMLP") == 4
    assert not taken


def test_modes_of_torch_see_every_operator(make, taken):
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    model, seen = make(), []
    with Watching():
        answers(model, steps=1)
    assert seen.count("glm_hf.quantized_linear.default") == 16  # four in each of two layers, twice
    assert not taken


def test_other_caches_work_as_before(make, taken):
    model = make()
    expected = answers(model)
    taken.clear()
    torch.manual_seed(1)
    ids, _ = texts(1, 9)
    new = torch.randint(1, 50, (1, 6))
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        scores = [model(new[:, step : step + 1], past_key_values=cache).logits[:, -1] for step in range(6)]
    torch.testing.assert_close(torch.stack(scores, dim=1), expected, rtol=0, atol=1e-4)
    assert not taken


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_addresses_of_their_own(make, taken, again):
    model = make()
    before = answers(model)
    twin = again(model)
    with torch.no_grad():
        twin.model.layers[0].mlp.dense_4h_to_h.bias.mul_(3)
    assert torch.equal(answers(model), before)
    assert not torch.allclose(answers(twin), before, atol=1e-2)
    assert len(taken) == 36


def test_dequantized_models_have_no_step(make, taken):
    model = make()
    before = answers(model)
    taken.clear()
    torch.testing.assert_close(answers(model.dequantize()), before, rtol=0, atol=1e-3)
    assert not taken


def test_models_that_are_gone_leave_nothing(make):
    model = make()
    answers(model)
    layers = list(map(weakref.ref, model.model.layers))
    del model
    gc.collect()
    assert [layer() for layer in layers] == [None, None]


def test_memory_that_is_missing_is_told(make, monkeypatch):
    model = make()
    monkeypatch.setattr(kernels_cpu.kernel_library(), "_decode_layers", lambda *arguments: 0)
    with pytest.raises(MemoryError, match="no memory for 1 tokens"):
        answers(model)
