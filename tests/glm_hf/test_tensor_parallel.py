from pathlib import Path

import pytest
import torch
from forked import run_ranks
from golden import TOLERANCE, golden_arrays, golden_model

from glm_hf import GLMForBlankInfilling

CASE = "mask_infill"


def run_rank(rank: int, world_size: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    model = GLMForBlankInfilling.from_pretrained(
        folder, distributed_config={"tp_size": world_size, "tp_plan": "auto"}, dtype=torch.float32
    )
    input_ids = torch.load(folder / "input_ids.pt", weights_only=True)
    logits = model(input_ids, labels=input_ids).logits
    logits.square().mean().backward()
    layer = model.model.layers[0]
    parameters = {
        "up": layer.mlp.dense_h_to_4h,
        "qkv": layer.attention.query_key_value,
        "down": layer.mlp.dense_4h_to_h,
    }
    gradients = {
        f"{name}.{kind}": getattr(module, kind).grad.full_tensor()
        if hasattr(getattr(module, kind).grad, "full_tensor")
        else getattr(module, kind).grad
        for name, module in parameters.items()
        for kind in ("weight", "bias")
    }
    tokens = model.generate(input_ids, max_new_tokens=4)
    if rank == 0:
        torch.save({"logits": logits.detach(), "tokens": tokens, **gradients}, folder / "result.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [2])
def test_two_ranks_compute_what_one_does(tmp_path, world_size):
    model = golden_model("cfg1")
    model.save_pretrained(tmp_path)
    input_ids = golden_arrays("cfg1")[f"{CASE}.input_ids"]
    torch.save(input_ids, tmp_path / "input_ids.pt")
    run_ranks(lambda rank: run_rank(rank, world_size, tmp_path), world_size, tmp_path)
    result = torch.load(tmp_path / "result.pt", weights_only=True)

    golden = golden_arrays("cfg1")[f"{CASE}.logits"]
    assert (result["logits"] - golden).abs().max() < TOLERANCE
    assert result["tokens"].tolist() == model.generate(input_ids, max_new_tokens=4).tolist()
    model.zero_grad()
    model(input_ids).logits.square().mean().backward()
    layer = model.model.layers[0]
    parameters = {
        "up": layer.mlp.dense_h_to_4h,
        "qkv": layer.attention.query_key_value,
        "down": layer.mlp.dense_4h_to_h,
    }
    for name, module in parameters.items():
        for kind in ("weight", "bias"):
            torch.testing.assert_close(result[f"{name}.{kind}"], getattr(module, kind).grad, atol=1e-4, rtol=1e-3)
    model.zero_grad()
