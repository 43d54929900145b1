"""Quantized models on two tensor-parallel ranks give what one process gives, in training too."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from forked import run_ranks
from golden import DATA, TOLERANCE, golden_arrays, golden_config
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from glm_hf import GLMForBlankInfilling, GLMQuantizationConfig
from glm_hf.conversion import convert_sat_checkpoint, quantize_checkpoint
from glm_hf.quantization.quantizer import CASTS_BEFORE_CONVERTING

pytestmark = pytest.mark.skipif(
    CASTS_BEFORE_CONVERTING, reason="ranks share quantized weights from transformers 5.23 on"
)

# how a model comes to be quantized: folder, and settings for quantizing while loading
WAYS: dict[str, tuple[str, dict[str, Any] | None]] = {
    f"{name}-int{bits}": (folder.format(bits=bits), None if settings is None else {"bits": bits, **settings})
    for bits in (8, 4)
    for name, folder, settings in (
        ("quantized by one rank", "sat_int{bits}_tp1", None),
        ("quantized by two ranks", "sat_int{bits}_tp2", None),
        ("while loading", "sat_tp1", {}),
        ("while loading, by two groups", "sat_tp1", {"row_parallel_groups": 2}),
        ("while loading, by groups of ten", "sat_tp1", {"group_size": 10}),
        ("while loading, by groups as long as some rows", "sat_tp1", {"group_size": 80}),
        ("while loading, with the embedding", "sat_tp1", {"quantize_embeddings": True}),
        ("with the embedding", "int{bits}_embeddings", None),
    )
}
TRAINED = [way for way in WAYS if way.startswith(("quantized by", "with the embedding"))]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "groups": ({"bits": 8, "group_size": 16}, "the 5 groups of a row of model.layers.0.attention.dense, got 2"),
    "ranks": ({"bits": 8, "row_parallel_groups": 5}, "the 5 groups of a row of model.layers.0.attention.dense, got 2"),
}
ADAPTED = {
    "int8 query_key_value": (8, "query_key_value"),
    "int4 query_key_value": (4, "query_key_value"),
    "int8 dense": (8, "dense"),
    "int8 dense_h_to_4h": (8, "dense_h_to_4h"),
    "int4 dense_4h_to_h": (4, "dense_4h_to_h"),
    "int8 dense_4h_to_h": (8, "dense_4h_to_h"),
}
ROW_PARALLEL: dict[str, Any] = {"target_modules": ["dense_4h_to_h"]}
OTHER_KINDS = {  # whose logits would be off by up to 0.09, without a word
    "MISS": peft.MissConfig(r=4, **ROW_PARALLEL),
    "VERA": peft.VeraConfig(r=4, **ROW_PARALLEL),
    "ADALORA": peft.AdaLoraConfig(total_step=10, **ROW_PARALLEL),
    "LOHA": peft.LoHaConfig(r=4, **ROW_PARALLEL),
}


def load(folder: Path, way: str, **options: Any) -> GLMForBlankInfilling:
    name, settings = WAYS[way]
    if settings is not None:
        options["quantization_config"] = GLMQuantizationConfig(**settings)
    return GLMForBlankInfilling.from_pretrained(folder / name, dtype=torch.float32, **options)


def answer(model: GLMForBlankInfilling, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model(ids).logits, model.generate(ids, max_new_tokens=4)


def gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradients of all trainable parameters, as a whole."""
    model(ids, labels=ids).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def adapted(folder: Path, name: str, config: Any = None, **options: Any) -> nn.Module:
    bits, target = ADAPTED[name]
    adapter = config or peft.LoraConfig(target_modules=[target], r=4)
    quantization = GLMQuantizationConfig(bits=bits)
    model = GLMForBlankInfilling.from_pretrained(
        folder / "sat_tp1", dtype=torch.float32, quantization_config=quantization, **options
    )
    model = peft.get_peft_model(model, adapter)
    generator = torch.Generator().manual_seed(1)
    for parameter in [p for p in model.parameters() if p.requires_grad]:
        values = torch.randn(parameter.shape, generator=generator) * 0.05
        if isinstance(parameter, DTensor):
            values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
        parameter.data.copy_(values)
    return model


def refusal(function: Any, *arguments: Any, **options: Any) -> str:
    try:
        function(*arguments, **options)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def load_refused(folder: Path, name: str, **options: Any) -> GLMForBlankInfilling:
    options["quantization_config"] = GLMQuantizationConfig(**REFUSED[name][0])
    return GLMForBlankInfilling.from_pretrained(folder / "sat_tp1", **options)


def run_rank(rank: int, folder: Path, ids: torch.Tensor) -> None:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    parallel = {"distributed_config": {"tp_size": 2, "tp_plan": "auto"}}
    results: dict[str, Any] = {
        "answers": {way: answer(load(folder, way, **parallel), ids) for way in WAYS},
        "gradients": {way: gradients(load(folder, way, **parallel), ids) for way in TRAINED},
        "refused": {name: refusal(load_refused, folder, name, **parallel) for name in REFUSED},
        "adapters": gradients(adapted(folder, "int8 query_key_value", **parallel), ids),
        "refused adapters": {
            name: refusal(adapted, folder, name, **parallel) for name in ADAPTED if name != "int8 query_key_value"
        },
        "counts": {way: load(folder, way, **parallel).num_parameters() for way in WAYS},
        "refused kinds": {
            f"{kind} {bits}": refusal(adapted, folder, f"int{bits} dense_4h_to_h", config=config, **parallel)
            for kind, config in OTHER_KINDS.items()
            for bits in (8, 4)
        },
        "dequantize": refusal(load(folder, "while loading-int8", **parallel).dequantize),
    }
    if rank == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("quantized")


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    ids = golden_arrays("cfg2")["mask_infill.input_ids"].clone()
    middle = golden_config("cfg2").vocab_size // 2
    ids[:, :2] = torch.tensor([middle - 1, middle])  # the last row of the first rank, and the first of the second
    return ids


@pytest.fixture(scope="module")
def results(folder, ids) -> dict[str, Any]:
    """What the first of two ranks has found."""
    for name in sorted({name for name, _ in WAYS.values() if name.startswith("sat")}):
        convert_sat_checkpoint(DATA / "cfg2" / name, folder / name, config=golden_config("cfg2"))
    for bits in (4, 8):
        quantize_checkpoint(folder / "sat_tp1", folder / f"int{bits}_embeddings", bits=bits, quantize_embeddings=True)
    run_ranks(lambda rank: run_rank(rank, folder, ids), 2, folder)
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_answer_as_one_does(way, results, folder, ids):
    logits, tokens = answer(load(folder, way), ids)
    assert (results["answers"][way][0] - logits).abs().max() < TOLERANCE
    assert torch.equal(results["answers"][way][1], tokens)


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("way", TRAINED)
def test_gradients_through_quantized_layers_are_those_of_one_process(way, results, folder, ids):
    assert_same_gradients(results["gradients"][way], gradients(load(folder, way), ids))


def test_adapters_get_the_gradients_of_one_process(results, folder, ids):
    expected = gradients(adapted(folder, "int8 query_key_value"), ids)
    assert len(expected) == 10
    assert_same_gradients(results["adapters"], expected)


@pytest.mark.parametrize("name", [name for name in ADAPTED if name != "int8 query_key_value"])
def test_adapters_that_cannot_be_cut_are_refused(name, results):
    message = results["refused adapters"][name]
    assert message.startswith("adapters on quantized weights work under tensor parallelism on INT8 query_key_value")


@pytest.mark.parametrize("name", [f"{kind} {bits}" for kind in OTHER_KINDS for bits in (8, 4)])
def test_other_kinds_of_adapters_are_refused_by_name(name, results):
    start = f"{name.split()[0]} does not work on quantized weights under tensor parallelism; use LoRA"
    assert results["refused kinds"][name].startswith(start)


@pytest.mark.parametrize("way", WAYS)
def test_ranks_count_the_weights_of_the_dense_model(way, results, folder):
    assert results["counts"][way] == GLMForBlankInfilling.from_pretrained(folder / "sat_tp1").num_parameters()


@pytest.mark.parametrize("name", REFUSED)
def test_groups_that_cannot_be_cut_are_refused_before_loading(name, results):
    assert results["refused"][name] == f"tp_size must divide {REFUSED[name][1]}"


def test_ranks_cannot_dequantize(results):
    assert "is spread over devices, ranks or the disk; load the model on one device first" in results["dequantize"]
