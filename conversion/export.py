"""Write SAT checkpoints, as the original code loads them: from Hugging Face folders, or at another number of ranks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm_hf.configuration_glm import GLMConfig
from glm_hf.conversion.checkpoint_config import require_model
from glm_hf.conversion.formats.names import rotary_buffer_name, to_sat_name
from glm_hf.conversion.formats.rank_writer import RankSegment, plan_segments
from glm_hf.conversion.formats.safetensors_reader import ModelFolder
from glm_hf.conversion.formats.sat_checkpoint import SatCheckpoint
from glm_hf.conversion.formats.torch_zip import TorchZip
from glm_hf.conversion.streaming.segments import write_in_segments
from glm_hf.folders.atomic import destination
from glm_hf.folders.finite import FiniteWeights
from glm_hf.rotary_glm import inverse_frequencies
from glm_hf.sharding.rules import ROW, shard_rule


def export_sat_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    tp_size: int,
    resume: bool = True,
    overwrite: bool = False,
    strict: bool = False,
) -> None:
    """
    Write the weights of a model folder as a SAT checkpoint, which the original code loads.

    Weights keep their dtype; quantized ones their codes and scales. Interrupted, the same call resumes; once it is
    complete, it does nothing.

    Args:
        src: Folder of `GLMForBlankInfilling`, as the converter and `save_pretrained` write it.
        dst: Folder to create, with `latest` and `release/mp_rank_RR_model_states.pt`; may exist if it is empty.
        tp_size: Number of tensor-parallel ranks; must divide the heads.
        resume: Whether to resume an interrupted export rather than to discard what it has written.
        overwrite: Whether to replace a folder at `dst`, once the new one is complete.
        strict: Whether NaN and infinity among the weights are an error rather than a warning.

    Raises:
        FileNotFoundError: If `src` lacks a file.
        FileExistsError: If `dst` holds something else already.
        ValueError: If `src` is not such a model or is damaged, or cannot be sharded over `tp_size` ranks.
        OSError: If the disk has too little space, or another process is writing to `dst`.
    """
    source = ModelFolder(src)
    _require_original(source)
    _require_heads(source.config.num_attention_heads, tp_size)
    options = {"resume": resume, "overwrite": overwrite, "strict": strict}
    _write_sat(source, Path(dst), tp_size, source.config, "release", {}, **options)


def reshard_sat_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    tp_size: int,
    resume: bool = True,
    overwrite: bool = False,
    strict: bool = False,
) -> None:
    """
    Write a SAT checkpoint again for another number of tensor-parallel ranks.

    Weights keep every bit. Rotary frequencies, which the original code never loads, are computed anew; of what else a
    rank file may hold, only its iteration is kept.

    Interrupted, the same call resumes; once it is complete, it does nothing.

    Args:
        src: Folder with `latest` and an iteration folder of `mp_rank_RR_model_states.pt`, or that iteration folder.
        dst: Folder to create, with `latest` and an iteration folder of the same name; may exist if it is empty.
        tp_size: Number of tensor-parallel ranks to write; must divide the heads. Of a quantized checkpoint, a
            multiple of its own number, since every rank has scales for its own columns.
        resume: Whether to resume an interrupted run rather than to discard what it has written.
        overwrite: Whether to replace a folder at `dst`, once the new one is complete.
        strict: Whether NaN and infinity among the weights are an error rather than a warning.

    Raises:
        FileNotFoundError: If a file of `src` is missing.
        FileExistsError: If `dst` holds something else already.
        ValueError: If `src` is damaged or incomplete, or cannot be sharded over `tp_size` ranks.
        OSError: If the disk has too little space, or another process is writing to `dst`.
    """
    source = SatCheckpoint(src)
    config = require_model(source)
    if source.head_dim:
        _require_heads(config.num_attention_heads, tp_size)
    elif config.hidden_size == GLMConfig().hidden_size:
        _require_heads(GLMConfig().num_attention_heads, tp_size)
    elif tp_size < 1 or source.tp_size % tp_size:
        raise ValueError(
            f"{source.folder} does not tell how many heads it has, as it holds no rotary frequencies; tp_size must "
            f"divide its own number of ranks ({source.tp_size}), got {tp_size}"
        )
    rotary_config = config if source.head_dim else None
    options = {"resume": resume, "overwrite": overwrite, "strict": strict}
    _write_sat(source, Path(dst), tp_size, rotary_config, source.folder.name, source.iteration, **options)


def _require_original(source: ModelFolder) -> None:
    """Raise ValueError unless the original code, where all of this is fixed, computes what the model computes."""
    config = source.config
    if not config.tie_word_embeddings:
        raise ValueError("the model has an LM head of its own, which SAT checkpoints of GLM-130B cannot hold")
    for name in ("layer_norm_eps", "rope_parameters"):
        value, fixed = getattr(config, name), getattr(GLMConfig(), name)
        if value != fixed:
            raise ValueError(f"the model has {name} = {value}, but the original code always computes with {fixed}")
    released = {"group_size": None, "modules_to_not_convert": None, "quantize_embeddings": False}
    for name, fixed in released.items() if source.quantization else ():
        if (value := getattr(source.quantization, name)) != fixed:
            raise ValueError(
                f"the model is quantized with {name} = {value}, but SAT checkpoints have the linears of the layers "
                "quantized and nothing else, by whole rows; export the model that is not quantized"
            )


def _require_heads(num_heads: int, tp_size: int) -> None:
    if tp_size < 1 or num_heads % tp_size:
        raise ValueError(f"tp_size must divide num_attention_heads ({num_heads}), got {tp_size}")


def _write_sat(
    source: ModelFolder | SatCheckpoint,
    dst: Path,
    tp_size: int,
    rotary_config: GLMConfig | None,
    iteration: str,
    content: dict[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    strict: bool,
) -> None:
    """Write all tensors of `source`, and the rotary frequencies of `rotary_config` if it is given."""
    tensors = source.tensors
    parts = {to_sat_name(name): _rank_part(name, tensor, tp_size) for name, tensor in tensors.items()}
    rotary = {}
    if rotary_config is not None:
        frequencies = inverse_frequencies(rotary_config)[0].half()
        rotary = {rotary_buffer_name(layer): frequencies for layer in range(rotary_config.num_hidden_layers)}
    roots = [f"mp_rank_{rank:02d}_model_states" for rank in range(tp_size)]
    files = {f"{iteration}/{root}.pt": TorchZip(root, parts, rotary, content) for root in roots}
    segments = plan_segments(files, tensors)
    finite = FiniteWeights(strict)

    def blocks_of(segment: RankSegment) -> Iterator[tuple[str, Tensor]]:
        for name in segment.names:
            for block in finite.watch(name, source.read(name)):
                yield name, block

    def finish(folder: Path) -> None:
        (folder / "latest").write_text(f"{iteration}\n", encoding="utf-8")

    write_in_segments(
        destination(dst),
        segments,
        blocks_of,
        finish,
        sources=source.sources,
        options={"strict": strict},
        resume=resume,
        overwrite=overwrite,
    )


def _rank_part(name: str, tensor: Tensor, tp_size: int) -> Tensor:
    """Return what every rank holds of a tensor, on meta; a scale `(rows, groups)` has one column, which is dropped."""
    if not name.endswith("_scale"):
        return torch.empty(shard_rule(name).shard_shape(tensor.shape, tp_size), dtype=tensor.dtype, device="meta")
    num_rows, num_groups = tensor.shape
    if tp_size % num_groups:
        raise ValueError(
            f"tp_size must be a multiple of {num_groups}, the number of ranks that quantized the model, so that every "
            f"rank has one scale per row, got {tp_size}"
        )
    if shard_rule(name) != ROW:
        [num_rows, _] = shard_rule(name).shard_shape(tensor.shape, tp_size)
    return torch.empty(num_rows, dtype=tensor.dtype, device="meta")
