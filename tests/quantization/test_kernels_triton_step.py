"""A step of a layer by Triton kernels, in the interpreter where there is no GPU, against the layer's own `forward`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from glm_hf import GLMConfig, GLMForBlankInfilling, GLMQuantizationConfig

pytest.importorskip("triton")

from glm_hf.quantization import kernels_triton_step as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPECIAL = ("eos", "mask", "gmask", "smask", "eod", "sop", "eop")
# Of the largest state: sums in another order, or numbers that were rounded the other way.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SIZES = {
    "powers of two": {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96},
    "odd sizes": {"hidden_size": 72, "num_attention_heads": 3, "intermediate_size": 50},
}


def make_layer(folder, sizes: str, dtype: torch.dtype, **quantization) -> GLMForBlankInfilling:
    special = {f"{name}_token_id": 50 + index for index, name in enumerate(SPECIAL)}
    model = GLMForBlankInfilling(GLMConfig(vocab_size=64, num_hidden_layers=1, **SIZES[sizes], **special))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.dim() == 2 else 1)
    model.save_pretrained(folder)
    config = GLMQuantizationConfig(**{"bits": 4} | quantization)
    model = GLMForBlankInfilling.from_pretrained(folder, dtype=dtype, quantization_config=config)
    return model.to(DEVICE).eval()


def arguments_of(model: GLMForBlankInfilling) -> kernels.Layer:
    layer = model.model.layers[0]

    def linear(module: nn.Module) -> kernels.Linear:
        return kernels.Linear(module._parameters["weight"].data, module.weight_scale.data, module.bits, module.bias)

    attention, mlp = layer.attention, layer.mlp
    norms = [(norm.weight, norm.bias, norm.eps) for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    return kernels.Layer(
        *map(linear, (attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h)),
        norms=(norms[0], norms[1]),
        num_heads=model.config.num_attention_heads,
        alpha=layer.alpha,
        scaling=attention.scaling,
    )


@torch.no_grad()
def check(model: GLMForBlankInfilling, lengths: list[int], room: int = 150, has_tensor_cores: bool = True) -> None:
    """Compare states, keys and values of rows that hold so many tokens with those of each row by itself."""
    config, layer, dtype = model.config, model.model.layers[0], model.dtype
    num_rows, heads, size = len(lengths), config.num_attention_heads, config.head_dim
    x = torch.randn(num_rows, config.hidden_size).to(DEVICE, dtype)
    keys, values = torch.randn(2, num_rows, heads, room, size).to(DEVICE, dtype)
    positions = torch.randint(0, 2000, (num_rows, 1), device=DEVICE)
    tables = model.model.rotary_emb(x[:, None], positions)
    ours = keys.clone(), values.clone()
    out = kernels.decode_layer(
        arguments_of(model), x, *(table[:, 0].contiguous() for table in tables), *ours,
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE), has_tensor_cores=has_tensor_cores,
    )  # fmt: skip
    for row, length in enumerate(lengths):
        own = slice(row, row + 1)
        cache = DynamicCache()
        if length > 1:
            cache.update(keys[own, :, : length - 1], values[own, :, : length - 1], 0)
        expected = layer(x[own, None], cache, position_embeddings=tuple(table[own] for table in tables))[0, 0]
        tolerance = TOLERANCES[dtype] * expected.abs().max()
        assert (out[row] - expected).abs().max() <= tolerance
        for found, stored, before in zip(
            ours, (cache.layers[0].keys, cache.layers[0].values), (keys, values), strict=True
        ):
            assert (found[row, :, :length] - stored[0]).abs().max() <= tolerance
            assert torch.equal(found[row, :, length:], before[row, :, length:])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("sizes", "dtype"), [("powers of two", torch.float32), ("odd sizes", torch.float16)])
def test_step_is_that_of_the_layer(tmp_path, sizes, bits, dtype):
    model = make_layer(tmp_path, sizes, dtype, bits=bits)
    for lengths in ([1], [150], [65, 3, 64]):
        check(model, lengths)


@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter cuts numbers off for bf16 instead of rounding them")
def test_bf16(tmp_path):
    check(make_layer(tmp_path, "powers of two", torch.bfloat16), [70, 3])


@pytest.mark.parametrize("bits", [4, 8])
def test_groups(tmp_path, bits):
    model = make_layer(tmp_path, "powers of two", torch.float32, bits=bits, group_size=32)
    check(model, [9, 30])


@pytest.mark.parametrize(("bits", "has_tensor_cores", "num_rows"), [(4, True, 19), (8, True, 19), (4, False, 11)])
def test_many_rows_are_multiplied_in_tiles(tmp_path, bits, has_tensor_cores, num_rows):
    model = make_layer(tmp_path, "odd sizes", torch.float16, bits=bits)
    check(model, torch.randint(1, 30, (num_rows,)).tolist(), room=40, has_tensor_cores=has_tensor_cores)


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels were compiled for this GPU by the tests above")
def test_kernels_compile_without_a_gpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    table = Path(__file__).parents[2] / "benchmarks" / "step_kernels.py"
    command = [sys.executable, table, "--capabilities", "86"]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    rows = done.stdout.splitlines()[2:]
    assert len(rows) == 15
    assert all(re.fullmatch(r"[\w ,]+?( +(\d+ / 0|-))", row) for row in rows), done.stdout


def test_groups_that_are_too_short_are_refused(tmp_path):
    model = make_layer(tmp_path, "powers of two", torch.float32, group_size=16)
    with pytest.raises(ValueError, match="groups of 32 input features or multiples of it are needed"):
        check(model, [3])
