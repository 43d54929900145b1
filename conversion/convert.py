"""Convert a SAT checkpoint to a Hugging Face folder: plan, check everything, then stream block by block.

The folder holds config.json, generation_config.json, safetensors shards with their index, and the tokenizer. Weights
can be quantized on the way; those that are quantized already keep their codes and scales.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from glm_hf.configuration_glm import GLMConfig
from glm_hf.conversion.checkpoint_config import checkpoint_config, stored_quantization
from glm_hf.conversion.formats.model_tensors import model_tensors
from glm_hf.conversion.formats.safetensors_writer import ShardFile, plan_shards
from glm_hf.conversion.formats.sat_checkpoint import SatCheckpoint
from glm_hf.conversion.streaming.segments import write_in_segments
from glm_hf.folders.atomic import destination, free_space
from glm_hf.folders.finite import FiniteWeights
from glm_hf.folders.model_folder import write_index, write_model_files
from glm_hf.folders.validation import load_tokenizer, reading, require_matching_tokenizer, require_regular
from glm_hf.quantization.configuration import GLMQuantizationConfig
from glm_hf.quantization.functional import quantize_weight
from glm_hf.tokenization_glm import GLMTokenizer

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
QUANTIZATIONS = {"int8": 8, "int4": 4}
PEAK_MEMORY_BYTES = 500 * 10**6  # measured by benchmarks/conversion.py: some blocks of rows and the list of tensors


@dataclass(frozen=True)
class ConversionPlan:
    """
    A conversion that has been checked and only needs to be carried out.

    Attributes:
        checkpoint: The source.
        config: Configuration of the model to write.
        tokenizer: Tokenizer to write, None for none.
        shards: Files to write, in order.
        quantization: Quantization of the weights to write, None for none.
    """

    checkpoint: SatCheckpoint
    config: GLMConfig
    tokenizer: PreTrainedTokenizerBase | None
    shards: list[ShardFile]
    quantization: GLMQuantizationConfig | None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors to write."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def quantizes(self) -> bool:
        """Whether weights are to be quantized that are not."""
        return self.quantization is not None and self.checkpoint.bits is None

    def describe(self, dst: Path) -> str:
        """Return what a conversion to `dst` will do, in lines of words and numbers."""
        source_bytes = sum(tensor.nbytes for tensor in self.checkpoint.tensors.values())
        config, stored = self.config, str(self.config.dtype).removeprefix("torch.")
        rows = {
            "source": f"{self.checkpoint.tp_size} ranks, {source_bytes:,} bytes in {self.checkpoint.folder}",
            "model": f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
            f"{config.num_attention_heads} heads, vocabulary of {config.vocab_size}",
            "tensors": f"{sum(len(shard.tensors) for shard in self.shards):,} in {stored}"
            + (f", the linears of the layers in int{self.quantization.bits}" if self.quantization else ""),
            "shards": f"{len(self.shards)}, the largest of {max(shard.num_bytes for shard in self.shards):,} bytes",
            "memory": f"at most {PEAK_MEMORY_BYTES:,} bytes beside the interpreter's own",
            "disk": f"{self.num_bytes:,} bytes needed, {free_space(dst):,} free",
        }
        return "\n".join(f"{name:9}{value}" for name, value in rows.items())

    def write_small_files(self, folder: Path) -> None:
        """Write what belongs to the model besides its weights: index, configuration, tokenizer."""
        tokenizer = copy.copy(self.tokenizer)  # the caller's keeps its own window
        if tokenizer is not None:
            tokenizer.model_max_length = self.config.max_position_embeddings
        config = GLMConfig.from_dict(self.config.to_dict())
        if self.quantization is not None:
            config.quantization_config = self.quantization.to_dict()
        write_index(folder, {shard.label: shard.tensors for shard in self.shards})
        write_model_files(folder, config, tokenizer=tokenizer)


def convert_sat_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    config: GLMConfig | dict[str, Any] | str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    quantization: str | None = None,
    resume: bool = True,
    overwrite: bool = False,
    strict: bool = False,
) -> None:
    """
    Convert a SAT checkpoint of any tensor-parallel size to a folder that `from_pretrained` loads.

    Memory holds a few blocks of rows, not a tensor. The bytes written do not depend on the tensor-parallel size of a
    checkpoint that is not quantized. Interrupted at any moment, the same call resumes; once it is complete, it does
    nothing.

    Args:
        src: Folder with `latest` and an iteration folder of `mp_rank_RR_model_states.pt`, or that iteration folder.
        dst: Folder to create; may exist if it is empty.
        config: Configuration, for what weights cannot tell (special ids; heads, where no rotary buffer does): a
            GLMConfig, a dict of its fields or a JSON file; that of GLM-130B by default.
        tokenizer: SentencePiece model file, tokenizer folder or tokenizer to save with the model.
        dtype: float16, bfloat16 or float32 for all that is not quantized; the checkpoint's own by default.
        max_shard_size: Largest shard in bytes, or a string such as `"5GB"`.
        quantization: `"int8"` or `"int4"` to quantize the linears of the layers by the released rule, one scale per
            row. A checkpoint that is quantized already stays as it is.
        resume: Whether to resume an interrupted conversion rather than to discard what it has written.
        overwrite: Whether to replace a folder at `dst`, once the new one is complete.
        strict: Whether NaN and infinity among the weights are an error rather than a warning.

    Raises:
        FileNotFoundError: If a file of the checkpoint, the config or the tokenizer is missing.
        FileExistsError: If `dst` holds something else already.
        ValueError: If the checkpoint is damaged or incomplete, or does not fit `config` or `tokenizer`, if it has
            changed since an interrupted conversion, if an argument is not what is expected, or a weight is not finite
            and is to be quantized or must be finite (`strict`).
        OSError: If the disk has too little space, or another process is converting to `dst`.
    """
    plan = plan_conversion(
        src, config=config, tokenizer=tokenizer, dtype=dtype, max_shard_size=max_shard_size, quantization=quantization
    )
    plan.checkpoint.check_values()
    finite = FiniteWeights(strict or plan.quantizes)
    source_dtypes = {name: tensor.dtype for name, tensor in plan.checkpoint.tensors.items()}

    def blocks_of(shard: ShardFile) -> Iterator[tuple[str, Tensor]]:
        for name, unit in shard.units.items():
            blocks = finite.watch(name, plan.checkpoint.read(name))
            yield from converted(name, blocks, source_dtypes[name], unit)

    sources = plan.checkpoint.sources
    dst = destination(dst)
    write_in_segments(
        dst,
        plan.shards,
        blocks_of,
        plan.write_small_files,
        sources=sources,
        options={"strict": strict},
        resume=resume,
        overwrite=overwrite,
    )


def plan_conversion(
    src: str | Path,
    *,
    config: GLMConfig | dict[str, Any] | str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    quantization: str | None = None,
) -> ConversionPlan:
    """Check what `convert_sat_checkpoint` is given, with its arguments and errors; read no values, write nothing."""
    checkpoint = SatCheckpoint(src)
    model_config = checkpoint_config(checkpoint, config)
    if not checkpoint.dtypes:
        raise ValueError(f"{checkpoint.folder} holds integers only; expected the tensors of GLM-130B")
    model_config.dtype = _output_dtype(checkpoint, dtype)
    stored_as = stored_quantization(checkpoint)
    tensors = model_tensors(model_config, model_config.dtype, stored_as)
    checkpoint.require(tensors)
    bits = _output_bits(checkpoint, quantization)
    if bits is not None and bits != checkpoint.bits:
        stored_as = GLMQuantizationConfig(bits=bits)
        tensors = model_tensors(model_config, model_config.dtype, stored_as)
    loaded = None if tokenizer is None else _load_tokenizer(tokenizer)
    if loaded is not None:
        require_matching_tokenizer(loaded, model_config)
    units = made_together(tensors) if checkpoint.bits is None else {name: {name: tensors[name]} for name in tensors}
    return ConversionPlan(checkpoint, model_config, loaded, plan_shards(units, max_shard_size), stored_as)


def made_together(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return tensors by name in the groups that are made together: a weight with the scale that is made from it."""
    units: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        units.setdefault(name.removesuffix("_scale"), {})[name] = tensor
    return units


def converted(
    name: str, blocks: Iterator[Tensor], source_dtype: torch.dtype, unit: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """
    Yield blocks of a tensor as they are to be stored: cast once, quantized, or as they are.

    Args:
        name: Name of the tensor.
        blocks: Rows of the tensor, in order.
        source_dtype: Their dtype.
        unit: Tensors to store, on meta by name: the tensor, and its scale if it becomes quantized.

    Yields:
        (name of a stored tensor, its next rows); the scale comes after the weight.

    Raises:
        ValueError: If a value is too large for the dtype to store.
    """
    dtype = unit[name].dtype
    if source_dtype.is_floating_point and not dtype.is_floating_point:
        yield from _quantized(name, blocks, 4 if dtype == torch.uint8 else 8, unit[f"{name}_scale"].shape[1])
        return
    for block in blocks:
        stored = block.to(dtype) if dtype.is_floating_point else block.view(dtype)
        if source_dtype.itemsize >= dtype.itemsize and source_dtype != dtype:
            if not torch.equal(stored.isinf(), block.isinf()):
                raise ValueError(f"{name} has values beyond the largest {dtype}; choose another dtype")
        yield name, stored


def _quantized(name: str, blocks: Iterator[Tensor], bits: int, num_groups: int) -> Iterator[tuple[str, Tensor]]:
    scales = []
    for block in blocks:
        try:
            weight, weight_scale = quantize_weight(block, bits=bits, group_size=block.shape[1] // num_groups)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        scales.append(weight_scale)
        yield name, weight
    yield f"{name}_scale", torch.cat(scales)


def _output_dtype(checkpoint: SatCheckpoint, dtype: torch.dtype | str | None) -> torch.dtype:
    """Return the dtype to write, which is the checkpoint's own if `dtype` is None."""
    if dtype is None:
        if len(checkpoint.dtypes) > 1:
            names = ", ".join(sorted(map(str, checkpoint.dtypes)))
            raise ValueError(f"the checkpoint mixes {names}; pass dtype= to choose one of {', '.join(DTYPES)}")
        dtype = next(iter(checkpoint.dtypes))
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name}")
    return DTYPES[name]


def _output_bits(checkpoint: SatCheckpoint, quantization: str | None) -> int | None:
    """Return the bits of the quantized weights to write, None for weights that are not quantized."""
    if quantization is None:
        return checkpoint.bits
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization}")
    if checkpoint.bits not in (None, QUANTIZATIONS[quantization]):
        raise ValueError(
            f"{checkpoint.folder} is quantized to int{checkpoint.bits} already and cannot become {quantization}; "
            "convert the checkpoint that is not quantized"
        )
    return QUANTIZATIONS[quantization]


def _load_tokenizer(tokenizer: PreTrainedTokenizerBase | str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a SentencePiece model or of a folder, or the one that is given."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if Path(tokenizer).is_dir():
        return load_tokenizer(tokenizer)
    require_regular(Path(tokenizer))
    with reading(tokenizer, "is no SentencePiece model"):
        return GLMTokenizer.from_sentencepiece(tokenizer)
