"""How many bytes weights, KV cache and activations of a GLM take on one device.

`B` batch, `L` context, `T = B * L` tokens, `D` hidden, `F` inner width of the MLP, `V` vocabulary, `n` tensor-parallel
ranks (1 without), `e` bytes of an element in the model's dtype. What is counted:

weights      Every parameter and buffer, exactly.
KV cache     `2 * layers * T * D/n * e`: the context is full; and the room that caches keep for tokens to come, up to
             the window of the model.
activations  An upper estimate of what a prefill of the whole context holds at its widest moment, with fused attention
             kernels (not "eager") and logits of the last token, as `generate` asks for. In elements per token:
                 rotary   3D + 9D/n   embeddings, states, normed states; qkv, and three of query and key
                 up       4D + 4F/n   the same and attention's output; 2F, gelu and product
                 down     6D + 3F/n   the same, output and sum; 2F and product
             and four heads of cosines and sines. A padding mask takes `B * L * L` bytes, and two copies in the model's
             dtype. While a quantized linear of `N` rows and `K` columns runs, GPU kernels decode at most 64 MiB of
             it at once, `R` rows, and hold their products in fp32: `R * (K * e + 4 * T)` bytes, beside what is held
             until then. (Without Triton, the reference in plain torch takes more.)
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch

from glm_hf.configuration_glm import GLMConfig
from glm_hf.growing_cache_glm import capacity_for
from glm_hf.planning.devices import Device
from glm_hf.quantization.configuration import GLMQuantizationConfig
from glm_hf.sharding.rules import ROW_PARALLEL

DECODED_BYTES = 64 * 2**20  # by kernels_triton.py


@dataclass(frozen=True)
class Request:
    """What is to be planned; the arguments are those of `plan_devices`."""

    config: GLMConfig
    devices: tuple[Device, ...]
    quantization: GLMQuantizationConfig | None
    dtype: torch.dtype
    context: int
    batch: int
    tp_size: int | None
    reserve: int

    @property
    def bits(self) -> int:
        """Bits of the weights of the layers, 16 where they are not quantized."""
        return 16 if self.quantization is None else self.quantization.bits

    @property
    def group_size(self) -> int | None:
        """Input features per scale, None for whole rows."""
        return None if self.quantization is None else self.quantization.group_size

    @property
    def quantize_embeddings(self) -> bool:
        """Whether the embedding is stored in INT8 rows."""
        return self.quantization is not None and self.quantization.quantize_embeddings

    def quantized(self, **changes: Any) -> "Request":
        """Return the request with some settings of the quantization changed."""
        fields = {"group_size": self.group_size, "quantize_embeddings": self.quantize_embeddings, "bits": self.bits}
        return replace(self, quantization=GLMQuantizationConfig(**{**fields, **changes}))


def stored_quantization(
    config: GLMConfig, bits: int | None, group_size: int | None, quantize_embeddings: bool
) -> GLMQuantizationConfig | None:
    """
    Return how weights are quantized: as the config says, which arguments must not contradict, or as these say.

    Raises:
        ValueError: If the arguments do not fit together, or the model is quantized by something else.
    """
    saved = getattr(config, "quantization_config", None)
    if saved is None:
        if bits in (None, 16):
            if group_size is not None or quantize_embeddings:
                raise ValueError("group_size and quantize_embeddings belong to bits of 4 or 8")
            return None
        if bits not in (4, 8):
            raise ValueError(f"bits must be 4, 8 or 16, got {bits}")
        return GLMQuantizationConfig(bits, group_size, quantize_embeddings=quantize_embeddings)
    saved = saved if isinstance(saved, dict) else saved.to_dict()
    if saved.get("quant_method") != GLMConfig.model_type:
        raise ValueError(f"the model must be quantized by glm_hf, got quant_method {saved.get('quant_method')!r}")
    stored = GLMQuantizationConfig.of(saved)
    asked = {"bits": bits, "group_size": group_size, "quantize_embeddings": quantize_embeddings or None}
    for name, value in asked.items():
        if value is not None and value != getattr(stored, name):
            raise ValueError(f"the model is stored with {name}={getattr(stored, name)}, got {value}; leave it out")
    return stored


def require_valid(request: Request) -> None:
    """Raise ValueError unless the sizes of a request fit together."""
    config = request.config
    if not 1 <= request.context <= config.max_position_embeddings:
        raise ValueError(f"context must be from 1 to {config.max_position_embeddings} tokens, got {request.context}")
    if request.batch < 1:
        raise ValueError(f"batch must be at least 1, got {request.batch}")
    if request.reserve < 0:
        raise ValueError(f"reserve must not be negative, got {request.reserve}")
    if not any(device.num_bytes is not None for device in request.devices):
        raise ValueError("devices must hold a GPU or the cpu to compute on")
    size = request.group_size
    for name, (_, columns) in linear_shapes(config).items():
        if size is not None and (size < 1 or columns % size or (request.bits == 4 and size % 2)):
            even = " and be even" if request.bits == 4 else ""
            raise ValueError(f"group_size must divide the {columns} input features of {name}{even}, got {size}")
    if request.tp_size is not None:
        require_divisible(request, request.tp_size)


def require_divisible(request: Request, tp_size: int) -> None:
    """Raise ValueError unless the model can be sharded over `tp_size` ranks, which the devices are."""
    config = request.config
    parts = {"num_attention_heads": config.num_attention_heads, "intermediate_size": config.intermediate_size}
    if request.bits == 4:
        parts |= {"the bytes of a row of attention.dense": config.hidden_size // 2}
        parts |= {"the bytes of a row of mlp.dense_4h_to_h": config.intermediate_size // 2}
    for name in ROW_PARALLEL:
        if (groups := num_groups(request, name)) > 1:
            parts[f"the groups of a row of {name}"] = groups
    for name, count in parts.items():
        if tp_size < 1 or count % tp_size:
            raise ValueError(f"tp_size must divide {name} ({count}), got {tp_size}")
    if len(request.devices) != tp_size or any(isinstance(device.name, str) for device in request.devices):
        raise ValueError(
            f"tp_size of {tp_size} needs as many GPUs and nothing else, got {len(request.devices)} devices"
        )


def linear_shapes(config: GLMConfig) -> dict[str, tuple[int, int]]:
    """Return rows and columns of the linears of a layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "attention.query_key_value": (3 * hidden, hidden),
        "attention.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (2 * inner, hidden),
        "mlp.dense_4h_to_h": (hidden, inner),
    }


def num_groups(request: Request, name: str) -> int:
    """Return the scales per row of a linear, 1 if nothing is quantized."""
    if request.quantization is None:
        return 1
    return request.quantization.num_groups(name, linear_shapes(request.config)[name][1])


def linear_bytes(request: Request, layer: int, name: str) -> int:
    """Return the bytes of a linear, or of the part that one rank holds."""
    rows, columns = linear_shapes(request.config)[name]
    groups, ranks = num_groups(request, name), request.tp_size or 1
    if name in ROW_PARALLEL:
        columns, groups = columns // ranks, max(1, groups // ranks)
    else:
        rows //= ranks
    bias = rows * request.dtype.itemsize
    if request.quantization is None or not request.quantization.quantizes(f"model.layers.{layer}.{name}"):
        return rows * columns * request.dtype.itemsize + bias
    return rows * columns * request.bits // 8 + rows * groups * 2 + bias


def layer_bytes(request: Request, layer: int) -> int:
    """Return the bytes of a layer's parameters on one device; norms are whole on every rank."""
    linears = sum(linear_bytes(request, layer, name) for name in linear_shapes(request.config))
    return linears + 4 * request.config.hidden_size * request.dtype.itemsize


def embedding_bytes(request: Request, rank: int = 0) -> int:
    """Return the bytes of the embedding, whose rows are sharded over the ranks, the last of which may get fewer."""
    rows = ceil(request.config.vocab_size / (request.tp_size or 1))
    rows = max(0, min(rows, request.config.vocab_size - rank * rows))
    width = request.config.hidden_size
    return rows * (width + 2 if request.quantize_embeddings else width * request.dtype.itemsize)


def kv_cache_bytes(request: Request) -> int:
    """Return the bytes of keys and values of one layer on one device, at full length."""
    length = capacity_for(request.context, request.config.max_position_embeddings)
    tokens, width = request.batch * length, request.config.hidden_size // (request.tp_size or 1)
    return 2 * tokens * width * request.dtype.itemsize


def decoding_bytes(num_tokens: int, rows: int, columns: int, size: int) -> int:
    """Return the temporary bytes of a quantized linear, with elements of `size` bytes (module docstring)."""
    at_once = min(rows, max(64, DECODED_BYTES // (columns * size)))
    return at_once * (columns * size + 4 * num_tokens)


def activation_bytes(request: Request) -> int:
    """Return the upper estimate of what a prefill holds at once on a device with layers (module docstring)."""
    config, tokens, ranks = request.config, request.batch * request.context, request.tp_size or 1
    width, part, inner = config.hidden_size, config.hidden_size // ranks, config.intermediate_size // ranks
    size = request.dtype.itemsize
    moments = [(3 * width + 9 * part, 0), (4 * width + 4 * inner, 0), (6 * width + 3 * inner, 0)]
    if request.bits < 16:
        moments += [
            (3 * width + 3 * part, decoding_bytes(tokens, 3 * part, width, size)),
            (4 * width + 6 * part, decoding_bytes(tokens, width, part, size)),
            (4 * width + 2 * inner, decoding_bytes(tokens, 2 * inner, width, size)),
            (5 * width + 3 * inner, decoding_bytes(tokens, width, inner, size)),
        ]
    mask = (1 + 2 * size) * request.batch * request.context**2
    return mask + max(tokens * (held + 4 * config.head_dim) * size + decoding for held, decoding in moments)


def head_bytes(request: Request) -> int:
    """Return the temporary bytes of the embedding and of the last tokens' logits, in several copies of fp32."""
    config, batch = request.config, request.batch
    decoding = decoding_bytes(batch, config.vocab_size, config.hidden_size, request.dtype.itemsize)
    states = 2 * batch * request.context * config.hidden_size * request.dtype.itemsize
    return states + 16 * batch * config.vocab_size + decoding * request.quantize_embeddings
