"""Quantized models on two tensor-parallel ranks give what one process gives."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from golden import DATA, TOLERANCE, golden_arrays, golden_config

from glm_hf import GLMForBlankInfilling, GLMQuantizationConfig
from glm_hf.conversion import convert_sat_checkpoint

# how a model comes to be quantized: folder, and settings for quantizing while loading
WAYS: dict[str, tuple[str, dict[str, int] | None]] = {
    f"{name}-int{bits}": (folder.format(bits=bits), None if settings is None else {"bits": bits, **settings})
    for bits in (8, 4)
    for name, folder, settings in (
        ("quantized by one rank", "sat_int{bits}_tp1", None),
        ("quantized by two ranks", "sat_int{bits}_tp2", None),
        ("while loading", "sat_tp1", {}),
        ("while loading, by two groups", "sat_tp1", {"row_parallel_groups": 2}),
        ("while loading, by groups of ten", "sat_tp1", {"group_size": 10}),
    )
}


def load(folder: Path, way: str, **options: Any) -> GLMForBlankInfilling:
    name, settings = WAYS[way]
    if settings is not None:
        options["quantization_config"] = GLMQuantizationConfig(**settings)
    return GLMForBlankInfilling.from_pretrained(folder / name, dtype=torch.float32, **options)


def answer(model: GLMForBlankInfilling, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model(ids).logits, model.generate(ids, max_new_tokens=4)


def run_rank(rank: int, port: int, folder: str, ids: torch.Tensor) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    parallel = {"distributed_config": {"tp_size": 2, "tp_plan": "auto"}}
    answers = {way: answer(load(Path(folder), way, **parallel), ids) for way in WAYS}
    if rank == 0:
        torch.save(answers, Path(folder) / "answers.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("quantized")


@pytest.fixture(scope="module")
def answers_of_two_ranks(folder) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    for name in {name for name, _ in WAYS.values()}:
        convert_sat_checkpoint(DATA / "cfg2" / name, folder / name, config=golden_config("cfg2"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run_rank, args=(port, str(folder), golden_arrays("cfg2")["mask_infill.input_ids"]), nprocs=2)
    return torch.load(folder / "answers.pt", weights_only=True)


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_answer_as_one_does(way, answers_of_two_ranks, folder):
    logits, tokens = answer(load(folder, way), golden_arrays("cfg2")["mask_infill.input_ids"])
    assert (answers_of_two_ranks[way][0] - logits).abs().max() < TOLERANCE
    assert torch.equal(answers_of_two_ranks[way][1], tokens)
