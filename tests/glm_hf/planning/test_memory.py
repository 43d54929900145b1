"""The bytes that plans count, beside those of real parameters, caches and forward passes."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from golden import DATA, golden_config, golden_model
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM
from transformers import initialization as init
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from glm_hf import GLMConfig, GLMForBlankInfilling, GLMQuantizationConfig
from glm_hf.conversion import convert_sat_checkpoint
from glm_hf.planning.devices import Device
from glm_hf.planning.inference import plan_devices
from glm_hf.planning.memory import activation_bytes, kv_cache_bytes
from glm_hf.quantization import functional, ops
from glm_hf.quantization.quantizer import GLMQuantizer
from glm_hf.sharding.rules import REPLICATED, shard_rule

HOST = (Device("cpu", 10**15),)
STORED = {
    "fp16": {},
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "int4 in groups": {"bits": 4, "group_size": 128},
    "int8 of ranks": {"bits": 8, "row_parallel_groups": 4},
    "int4 with embedding": {"bits": 4, "quantize_embeddings": True},
    "int4 but for some": {"bits": 4, "modules_to_not_convert": ["dense_4h_to_h", r"model\.layers\.0"]},
}


def model_on_meta(config: GLMConfig, settings: dict) -> GLMForBlankInfilling:
    """Return the skeleton that `from_pretrained` fills, before weights are tied."""
    with init.no_tie_weights(), torch.device("meta"):
        model = GLMForBlankInfilling(config).half()
    if settings:
        quantizer = GLMQuantizer(GLMQuantizationConfig(**settings))
        quantizer.pre_quantized = True
        quantizer.preprocess_model(model)
    return model


def bytes_of(model: GLMForBlankInfilling) -> int:
    """Sum up parameters and buffers, those of shards where the model is cut; what is tied counts once."""
    tensors = [
        tensor for name, tensor in model.named_parameters() if not (name.startswith("lm_head.") and tied(model))
    ]
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(tensor.nbytes for tensor in (*local, *model.buffers()))


def tied(model: GLMForBlankInfilling) -> bool:
    return model.config.tie_word_embeddings


def config_with(settings: dict, **fields: object) -> GLMConfig:
    config = GLMConfig(**fields)
    if settings:
        config.quantization_config = GLMQuantizationConfig(**settings).to_dict()
    return config


@pytest.mark.parametrize("stored", STORED)
def test_weights_are_those_of_the_whole_model(stored):
    config = config_with(STORED[stored])
    [use] = plan_devices(config, HOST).uses
    assert use.weights == bytes_of(model_on_meta(GLMConfig(), STORED[stored]))


def test_options_store_as_a_config_does():
    for options in ({"bits": 8}, {"bits": 4, "group_size": 64}):
        assert plan_devices(GLMConfig(), HOST, **options).uses == plan_devices(config_with(options), HOST).uses


@pytest.mark.parametrize("stored", ["fp16", "int4 with embedding"])
def test_matrix_that_is_not_tied_counts_by_itself(stored):
    config = config_with(STORED[stored], tie_word_embeddings=False)
    [use] = plan_devices(config, HOST).uses
    assert use.weights == bytes_of(model_on_meta(GLMConfig(tie_word_embeddings=False), STORED[stored]))


def test_quantized_embedding_has_a_byte_per_weight_and_a_scale_per_row():
    plain, quantized = (
        plan_devices(GLMConfig(), HOST, bits=4, quantize_embeddings=choice).uses[0].weights for choice in (False, True)
    )
    assert plain - quantized == 150528 * (2 * 12288 - 12288 - 2)


@pytest.mark.parametrize("source", ["sat_tp1", "sat_int8_tp2", "sat_int4_tp1"])
def test_weights_are_those_of_a_loaded_folder(source, tmp_path):
    convert_sat_checkpoint(DATA / "cfg2" / source, tmp_path / "hf", config=golden_config("cfg2"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    [use] = plan_devices(GLMConfig.from_pretrained(tmp_path / "hf"), HOST).uses
    assert use.weights == bytes_of(model)


def test_weights_follow_the_dtype_of_the_folder(tmp_path):
    model = deepcopy(golden_model("cfg1")).float()
    model.save_pretrained(tmp_path)
    config = GLMConfig.from_pretrained(tmp_path)
    assert plan_devices(config, HOST).uses[0].weights == bytes_of(model)
    assert plan_devices(config, HOST, bits=16).uses[0].weights == bytes_of(model.half())


@pytest.mark.parametrize(("batch", "context"), [(1, 24), (3, 17)])
def test_cache_is_that_of_a_forward_pass(batch, context):
    model = deepcopy(golden_model("cfg2")).half()
    with torch.no_grad():
        cache = model(torch.full((batch, context), 9)).past_key_values
    [use] = plan_devices(model.config, HOST, bits=16, context=context, batch=batch).uses
    assert use.kv_cache == sum(layer.room.keys.nbytes + layer.room.values.nbytes for layer in cache.layers)


def test_cache_of_the_released_model():
    assert plan_devices(GLMConfig(), HOST).uses[0].kv_cache == 2 * 70 * 2048 * 12288 * 2


@pytest.fixture
def parallel_model():
    """Return a function that cuts a model as `from_pretrained` does, for one rank of many."""

    def cut(config: GLMConfig, settings: dict, tp_size: int, rank: int) -> GLMForBlankInfilling:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp_size)
        model = model_on_meta(config, settings)
        mesh = init_device_mesh("cpu", (tp_size,), mesh_dim_names=("tp",))
        plan, _, _ = model._resolve_parallel_plans(DistributedConfig(tp_size=tp_size, tp_plan="auto"))
        return apply_tensor_parallelism(model, mesh, plan)

    yield cut
    dist.destroy_process_group()


@pytest.mark.parametrize(("tp_size", "rank"), [(2, 1), (8, 0), (8, 7), (32, 31)])
@pytest.mark.parametrize("stored", ["fp16", "int8", "int4", "int4 in groups", "int4 with embedding"])
def test_weights_of_a_rank_are_those_of_its_shards(stored, tp_size, rank, parallel_model):
    sizes = {"num_hidden_layers": 2, "vocab_size": 150501 + 16}  # not a multiple of the ranks
    model = parallel_model(GLMConfig(**sizes), STORED[stored], tp_size, rank)
    gpus = tuple(Device(index, 10**12) for index in range(tp_size))
    plan = plan_devices(config_with(STORED[stored], **sizes), gpus, tp_size=tp_size)
    assert plan.uses[rank].weights == bytes_of(model)


@pytest.mark.parametrize("stored", ["fp16", "int4", "int8 of ranks"])
def test_weights_of_a_rank_follow_the_shard_rules(stored):
    expected = 0
    for name, tensor in model_on_meta(GLMConfig(num_hidden_layers=2), STORED[stored]).state_dict().items():
        if name == "lm_head.weight":
            continue
        rule = REPLICATED if tensor.shape[1:] == (1,) and shard_rule(name).dim == 1 else shard_rule(name)
        expected += torch.Size(rule.shard_shape(tensor.shape, 4)).numel() * tensor.element_size()
    plan = plan_devices(
        config_with(STORED[stored], num_hidden_layers=2), tuple(Device(index, 10**12) for index in range(4)), tp_size=4
    )
    frequencies = 4 * 128 // 2
    assert [use.weights for use in plan.uses] == [expected + frequencies] * 4
    assert [use.kv_cache for use in plan.uses] == [
        plan_devices(GLMConfig(num_hidden_layers=2), HOST).uses[0].kv_cache / 4
    ] * 4


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes that torch's allocator had out at once beyond those of the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()  # kept, since its memory is still in use
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak


def small_model(folder: Path, bits: int, dtype: torch.dtype, **sizes: int) -> GLMForBlankInfilling:
    ids = ("pad", "eos", "mask", "gmask", "smask", "eod", "sop", "eop")
    special = {f"{name}_token_id": index for index, name in enumerate(ids)}
    GLMForBlankInfilling(GLMConfig(vocab_size=50, num_hidden_layers=3, **special, **sizes)).save_pretrained(folder)
    options = {} if bits == 16 else {"quantization_config": GLMQuantizationConfig(bits=bits)}
    return GLMForBlankInfilling.from_pretrained(folder, dtype=dtype, **options)


def many_tokens_as_on_a_gpu(x, weight, weight_scale, bits, bias):
    """Do what kernels_triton.decoded_gemm does, with the memory that its kernels take."""
    kernels = pytest.importorskip("glm_hf.quantization.kernels_triton", reason="triton is not installed")

    def decode(weight, weight_scale, bits, dtype):
        out = torch.empty(len(weight), weight.shape[1] * 8 // bits, dtype=dtype)
        for row in range(len(weight)):
            codes = functional.unpack_int4(weight[row]) if bits == 4 else weight[row]
            out[row] = codes
        return out

    def product_in_fp32(x, weight):
        out = torch.empty(len(x), len(weight))
        for row in range(len(weight)):
            out[:, row] = (x @ weight[row]).float()
        return out

    def finish(parts, weight_scale, bias, *, out):
        parts[0] *= weight_scale[:, 0].float()
        parts[0] += bias.float()
        return out.copy_(parts[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "finish", finish)
        patch.setattr(kernels, "decode", decode)
        patch.setattr(kernels, "product_in_fp32", product_in_fp32)
        out = kernels.decoded_gemm(x.reshape(-1, x.shape[-1]), weight, weight_scale, bits, bias)
    return out.view(*x.shape[:-1], -1)


def measured_and_estimated(
    model: GLMForBlankInfilling, batch: int, context: int, is_padded: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, int]:
    monkeypatch.setattr(ops, "quantized_linear_cpu", many_tokens_as_on_a_gpu)
    ids = torch.randint(9, 50, (batch, context))
    ids[:, -1] = model.config.sop_token_id
    padding = torch.ones_like(ids)
    padding[0, :3] = 0 if is_padded else 1
    options = {"attention_mask": padding, "logits_to_keep": 1, "use_cache": True}
    # oneDNN packs weights anew where the processor multiplies fp16, which a GPU does not
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        model(ids, **options)  # what is made once is there
        peak = peak_bytes(lambda: model(ids, **options))
    request = plan_devices(model.config, HOST, context=context, batch=batch).request
    caches = 3 if is_padded else 2  # without padding, the last layer leaves the context out of its widest moment
    tokens = 2 * batch * context * model.config.hidden_size * request.dtype.itemsize
    room = kv_cache_bytes(request) - tokens  # of a last layer that is left out but for its tokens
    return peak - caches * kv_cache_bytes(request) - (3 - caches) * room, activation_bytes(request)


SHAPES = {
    "as the released model's": {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 4},
    "wide": {"hidden_size": 64, "intermediate_size": 1536, "num_attention_heads": 2},
    "narrow": {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4},
}


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("context", [8, 96])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("bits", "dtype"), [(16, torch.float32), (16, torch.float16), (8, torch.float16), (4, torch.float16)]
)
def test_activations_are_bounded_from_above_and_not_far(bits, dtype, shape, context, is_padded, tmp_path, monkeypatch):
    model = small_model(tmp_path, bits, dtype, **SHAPES[shape])
    measured, estimated = measured_and_estimated(model, 2, context, is_padded, monkeypatch)
    assert measured <= estimated <= 2 * measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_mask_of_a_padded_batch_is_counted(dtype, tmp_path, monkeypatch):
    model = small_model(tmp_path, 16, dtype, hidden_size=64, intermediate_size=64, num_attention_heads=2)
    measured, estimated = measured_and_estimated(model, 2, 512, True, monkeypatch)
    assert measured <= estimated <= 2 * measured
