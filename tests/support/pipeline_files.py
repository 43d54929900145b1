"""Checkpoints of 3D-parallel training as DeepSpeed's pipeline writes them, cut by hand: no code under test."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from glm_hf import GLMConfig, GLMForBlankInfilling

SPECIAL = ("pad", "eos", "mask", "gmask", "smask", "eod", "sop", "eop")
TAG = "global_step4"


def random_model(dtype: torch.dtype = torch.float32, **changes: object) -> GLMForBlankInfilling:
    """Return a model of which no two tensors are alike, not even biases."""
    sizes = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 40} | {f"{name}_token_id": number for number, name in enumerate(SPECIAL)}
    model = GLMForBlankInfilling(GLMConfig(**sizes | changes)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def cut(name: str, tensor: Tensor, num_ranks: int) -> list[Tensor]:
    """Return what every tensor-parallel rank holds of a tensor."""
    if "dense_h_to_4h" in name:
        linear, gate = tensor.chunk(2)
        pairs = zip(linear.chunk(num_ranks), gate.chunk(num_ranks), strict=True)
        return [torch.cat(pair) for pair in pairs]
    if any(part in name for part in ("embed_tokens", "lm_head", "query_key_value")):
        return [part.clone() for part in tensor.chunk(num_ranks)]
    if name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight")):
        return [part.clone() for part in tensor.chunk(num_ranks, dim=1)]
    return [tensor.clone() for _ in range(num_ranks)]


def part_of(name: str, num_layers: int) -> tuple[int, str]:
    """Return the number of the pipeline's part that holds a tensor, and its name there."""
    if name.startswith("model.layers."):
        _, _, layer, inner = name.split(".", 3)
        return int(layer) + 1, inner
    parts = {"model.embed_tokens": 0, "model.norm": num_layers + 1, "lm_head": num_layers + 2}
    module, inner = name.rsplit(".", 1)
    return parts[module], inner


def part_files(model: GLMForBlankInfilling, num_ranks: int) -> dict[str, dict[str, Tensor]]:
    """Return the contents of all files of a model, by their names."""
    contents: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():  # has a tied output matrix, too
        part, inner = part_of(name, model.config.num_hidden_layers)
        for rank, piece in enumerate(cut(name, tensor, num_ranks)):
            contents.setdefault(f"layer_{part:02d}-model_{rank:02d}-model_states.pt", {})[inner] = piece
    return contents


def write_checkpoint(
    folder: Path, model: GLMForBlankInfilling, contents: dict[str, dict[str, Tensor]], num_ranks: int
) -> Path:
    """Write a checkpoint with the given contents of its files, and return its folder."""
    (folder / TAG).mkdir(parents=True)
    for name, content in contents.items():
        torch.save(content, folder / TAG / name)
    config = GLMConfig.from_dict(model.config.to_dict())
    config.dtype = model.dtype
    config.save_pretrained(folder)
    degrees = {"tp_size": num_ranks, "pp_size": 2, "dp_size": 1, "partition": None}
    (folder / "parallel.json").write_text(json.dumps(degrees))
    (folder / "latest").write_text(TAG)
    return folder


def make(folder: Path, num_ranks: int = 2, **options: object) -> tuple[Path, GLMForBlankInfilling]:
    """Write the checkpoint of a random model, and return both."""
    model = random_model(**options)
    return write_checkpoint(folder, model, part_files(model, num_ranks), num_ranks), model


def change(src: Path, name: str, how: Callable[[dict], object]) -> None:
    """Change the content of a file."""
    content = torch.load(src / TAG / name, weights_only=True)
    how(content)
    torch.save(content, src / TAG / name)


def write_json(path: Path, **fields: object) -> None:
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | fields))
