"""Small SAT checkpoints, made and cut by hand: nothing here uses the code under test."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden import DATA
from torch import Tensor

SPECIAL_IDS = {
    "eos_token_id": 2,
    "mask_token_id": 3,
    "gmask_token_id": 4,
    "smask_token_id": 5,
    "eod_token_id": 6,
    "sop_token_id": 7,
    "eop_token_id": 8,
}
LAYER_PREFIX = "transformer.layers.{}."


@pytest.fixture
def special_ids() -> dict[str, int]:
    """Special ids that fit into any small vocabulary."""
    return dict(SPECIAL_IDS)


@pytest.fixture
def golden_special_ids() -> dict[str, int]:
    """Special ids of golden cfg1."""
    names = ("mask", "gmask", "smask", "eod", "sop", "eop")
    return {"eos_token_id": 2} | {f"{name}_token_id": 144 + i for i, name in enumerate(names)}


@pytest.fixture
def golden_ranks() -> list[dict]:
    """Contents of the two rank files of golden cfg1, free to be changed."""
    folder = DATA / "cfg1" / "sat_tp2" / "49300"
    return [torch.load(folder / f"mp_rank_0{rank}_model_states.pt", weights_only=True) for rank in range(2)]


@pytest.fixture
def write_sat(tmp_path: Path) -> Callable[..., Path]:
    """Function that writes the contents of rank files as a SAT checkpoint and returns its folder."""

    def write(contents: list[dict], iteration: str = "49300") -> Path:
        src = tmp_path / "sat"
        (src / iteration).mkdir(parents=True)
        (src / "latest").write_text(f"{iteration}\n")
        for rank, content in enumerate(contents):
            torch.save(content, src / iteration / f"mp_rank_{rank:02d}_model_states.pt")
        return src

    return write


@pytest.fixture
def random_module() -> Callable[..., dict[str, Tensor]]:
    """Function that returns a random SAT state dict, not cut and without rotary frequencies."""

    def make(hidden: int, inner: int, vocab: int, layers: int = 1) -> dict[str, Tensor]:
        shapes = {"transformer.word_embeddings.weight": (vocab, hidden)}
        for layer in range(layers):
            prefix = LAYER_PREFIX.format(layer)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes |= {f"{prefix}{norm}.weight": (hidden,), f"{prefix}{norm}.bias": (hidden,)}
            linears = {
                "attention.query_key_value": (3 * hidden, hidden),
                "attention.dense": (hidden, hidden),
                "mlp.dense_h_to_4h": (2 * inner, hidden),
                "mlp.dense_4h_to_h": (hidden, inner),
            }
            for linear, shape in linears.items():
                shapes |= {f"{prefix}{linear}.weight": shape, f"{prefix}{linear}.bias": shape[:1]}
        shapes |= {f"transformer.final_layernorm.{kind}": (hidden,) for kind in ("weight", "bias")}
        return {name: torch.randn(shape).half() for name, shape in shapes.items()}

    return make


@pytest.fixture
def cut_module() -> Callable[[dict[str, Tensor], int], list[dict]]:
    """Function that cuts a SAT state dict over ranks as the original code does and returns their contents."""

    def cut(module: dict[str, Tensor], tp_size: int) -> list[dict]:
        ranks: list[dict] = [{"module": {}} for _ in range(tp_size)]
        for name, tensor in module.items():
            if "h_to_4h" in name:
                first, second = tensor.chunk(2)
                pairs = zip(first.chunk(tp_size), second.chunk(tp_size), strict=True)
                parts = [torch.cat(pair) for pair in pairs]
            elif "word_embeddings" in name or "query_key_value" in name:
                parts = list(tensor.chunk(tp_size))
            elif name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight")):
                parts = list(tensor.chunk(tp_size, dim=1))
            else:
                parts = [tensor] * tp_size
            for rank, part in zip(ranks, parts, strict=True):
                rank["module"][name] = part.clone()
        return ranks

    return cut
