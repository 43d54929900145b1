"""Convert a SAT checkpoint to a Hugging Face folder: plan, check everything, then stream tensor by tensor.

The folder holds config.json, generation_config.json, safetensors shards with their index, and the tokenizer. It is
written beside its destination under a hidden name and renamed at the end: it is there either whole or not at all.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from glm_hf.configuration_glm import GLMConfig
from glm_hf.conversion.checkpoint_config import checkpoint_config
from glm_hf.conversion.name_map import to_sat_name
from glm_hf.conversion.safetensors_writer import DTYPE_NAMES, plan_shards, write_index, write_shard
from glm_hf.conversion.sat_checkpoint import SatCheckpoint
from glm_hf.conversion.shard_rules import REPLICATED, shard_rule
from glm_hf.modeling_glm import GLMForBlankInfilling
from glm_hf.new_folder import new_folder, require_vacant
from glm_hf.tokenization_glm import GLMTokenizer


def convert_sat_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    config: GLMConfig | dict[str, Any] | str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """
    Convert a SAT checkpoint of any tensor-parallel size to a folder that `from_pretrained` loads.

    Memory holds the largest tensor, not the model. The bytes written do not depend on the tensor-parallel size.

    Args:
        src: Folder with `latest` and an iteration folder of `mp_rank_RR_model_states.pt`, or that iteration folder.
        dst: Folder to create; may exist if it is empty.
        config: What weights cannot tell (special ids; heads, where no rotary buffer tells the head size): a config, a
            dict of its fields or a JSON file. GLM-130B's own by default.
        tokenizer: SentencePiece model file, tokenizer folder or tokenizer to save with the model.
        dtype: float16, bfloat16 or float32; the checkpoint's own by default.
        max_shard_size: Largest shard in bytes, or a string such as `"5GB"`.

    Raises:
        FileNotFoundError: If a file of the checkpoint, the config or the tokenizer is missing.
        FileExistsError: If `dst` holds something already.
        ValueError: If the checkpoint is damaged or incomplete, or does not fit `config` or `tokenizer`, or if an
            argument is not what is expected.
        OSError: If the disk has too little space.
    """
    dst = Path(dst).resolve()
    require_vacant(dst)
    checkpoint = SatCheckpoint(src)
    model_config = checkpoint_config(checkpoint, config)
    model_config.dtype = torch_dtype = _output_dtype(checkpoint, dtype)
    with torch.device("meta"):
        model = GLMForBlankInfilling(model_config)
    tensors = _planned_tensors(model, torch_dtype)
    _validate(checkpoint, tensors)
    loaded = None if tokenizer is None else _load_tokenizer(tokenizer)
    if loaded is not None:
        _check_tokenizer(loaded, model_config)
    shards = plan_shards(tensors, max_shard_size)

    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    with new_folder(dst, num_bytes) as folder, _progress(num_bytes) as progress:
        read = _merging_reader(checkpoint, tensors, progress)
        for file, shard in shards.items():
            write_shard(folder / file, shard, read)
        write_index(folder, shards)
        if loaded is not None:
            loaded.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        model_config.save_pretrained(folder)


def _output_dtype(checkpoint: SatCheckpoint, dtype: torch.dtype | str | None) -> torch.dtype:
    """Return the dtype to write, which is the checkpoint's own if `dtype` is None."""
    known = {str(known).removeprefix("torch."): known for known in DTYPE_NAMES}
    if dtype is None:
        if len(checkpoint.dtypes) > 1:
            names = ", ".join(sorted(map(str, checkpoint.dtypes)))
            raise ValueError(f"the checkpoint mixes {names}; pass dtype= to choose one of {', '.join(known)}")
        dtype = next(iter(checkpoint.dtypes))
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}, got {name}")
    return known[name]


def _planned_tensors(model: GLMForBlankInfilling, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return all tensors to write, on meta, by their name and in the order of `model`."""
    return {
        name: torch.empty(parameter.shape, dtype=dtype, device="meta")
        for name, parameter in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }


def _validate(checkpoint: SatCheckpoint, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless `checkpoint` holds exactly `tensors`, cut by the rules and alike where not cut."""
    path = checkpoint.paths[0]
    if unknown := sorted(set(checkpoint.names) - {to_sat_name(name) for name in tensors}):
        raise ValueError(f"{path}: {unknown[0]} is unknown; expected the tensors of GLM-130B only")
    for name, tensor in tensors.items():
        sat_name = to_sat_name(name)
        rule = shard_rule(name)
        shape = rule.shard_shape(tensor.shape, checkpoint.tp_size)
        if checkpoint.shape(sat_name) != shape:
            raise ValueError(f"{path}: {sat_name} has shape {tuple(checkpoint.shape(sat_name))}, expected {shape}")
        if rule == REPLICATED:
            parts = checkpoint.parts(sat_name)
            if differing := [rank for rank, part in enumerate(parts) if not _have_equal_bytes(part, parts[0])]:
                raise ValueError(
                    f"{path.parent}: {sat_name} must be equal on all ranks, but rank 0 and ranks {differing} differ; "
                    "the files do not belong together or are damaged"
                )


def _have_equal_bytes(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def _load_tokenizer(tokenizer: PreTrainedTokenizerBase | str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a SentencePiece model or of a folder, or the one that is given."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if Path(tokenizer).is_dir():
        return GLMTokenizer.from_pretrained(tokenizer)
    return GLMTokenizer.from_sentencepiece(tokenizer)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: GLMConfig) -> None:
    """Raise ValueError unless the vocabulary has a row for every token and both agree on the special ids."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the checkpoint's vocabulary {config.vocab_size} rows; "
            "pass the tokenizer that the model was trained with"
        )
    for name, token_id in config.to_dict().items():
        known_id = getattr(tokenizer, name, None) if name.endswith("_token_id") else None
        if known_id not in (None, token_id):
            raise ValueError(
                f"the tokenizer has {name} = {known_id}, but the config has {token_id}; "
                "pass config= with the tokenizer's special ids, or another tokenizer"
            )


def _merging_reader(checkpoint: SatCheckpoint, tensors: dict[str, Tensor], progress: tqdm) -> Callable[[str], Tensor]:
    """Return a function from a name in `tensors` to the merged tensor, which the next call overwrites."""
    buffer = torch.empty(max(tensor.nbytes for tensor in tensors.values()), dtype=torch.uint8)

    def read(name: str) -> Tensor:
        planned = tensors[name]
        out = buffer[: planned.nbytes].view(planned.dtype).view(planned.shape)
        shard_rule(name).merge(checkpoint.parts(to_sat_name(name)), out)
        progress.update(planned.nbytes)
        return out

    return read


def _progress(num_bytes: int) -> tqdm:
    """Return a progress bar in bytes on stderr, silent where stderr is not a terminal."""
    return tqdm(total=num_bytes, desc="Converting", unit="B", unit_scale=True, disable=None)
