"""Configuration of the GLM-130B architecture; the defaults are GLM-130B's own sizes and special ids."""

import math
from dataclasses import field
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

# Scaled variants whose frequencies depend on the sequence length would change keys already in the cache.
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# Beyond these a number in a config.json is damage or an attack: it would be believed before a weight is seen.
LARGEST = {
    "vocab_size": 2**31,
    "hidden_size": 2**20,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**16,
    "intermediate_size": 2**22,
    "max_position_embeddings": 2**31,
}
MOST_LABELS = 10**6


@strict
class GLMConfig(PreTrainedConfig):
    r"""
    Sizes, special token ids and numerics of a GLM-130B model (arXiv 2210.02414).

    Args:
        vocab_size: Rows of the embedding, which is also the LM head. GLM-130B uses ids 0 to 150007 of 150528.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Number of layers; also sets the DeepNorm factor `alpha = sqrt(2 * num_hidden_layers)`.
        num_attention_heads: Number of heads; must divide `hidden_size` into an even head size.
        intermediate_size: Inner width of the GeGLU. The up-projection has twice as many rows.
        max_position_embeddings: Longest sequence, prompt and answer together.
        layer_norm_eps: Epsilon of every layer norm.
        rope_parameters: Rotary settings in the form of transformers; `rope_theta` is 10000 by default. Only types
            whose frequencies do not depend on the length are allowed: default, linear, llama3, yarn.
        rope_dtype: Precision in which rotary angles, cosines and sines are rounded. The released model was trained
            and run with `"float16"`, which matters near position 2000; `"float32"` keeps them exact, and is needed
            for scaled types and beyond 2048 positions, which fp16 cannot tell apart.
        hidden_dropout: Dropout of both residual branches, in `[0, 1]`.
        attention_dropout: Dropout of the attention probabilities, in `[0, 1]`.
        embedding_gradient_shrink: Share alpha in `(0, 1]` of the gradient that reaches the input embedding in
            training (paper, section 2.4). 1 leaves the gradient alone.
        tie_word_embeddings: Whether the LM head is the embedding.
        use_cache: Whether the model returns its key-value cache.
        pad_token_id: Padding; carries no meaning of its own.
        eos_token_id: `</s>`, appended to a context that does not end in a mask.
        mask_token_id: `[MASK]`, a short blank inside the text.
        gmask_token_id: `[gMASK]`, a long blank at the end of the text.
        smask_token_id: `[sMASK]`, a sentence-sized blank.
        eod_token_id: End of document.
        sop_token_id: Start of a blank's content; everything before the first one is the two-way context.
        eop_token_id: End of a blank's content.
        auto_map: Names of classes in Python files beside `config.json` of a folder on the Hub. TRL reads it of every
            model that is not one of transformers' own; saved where it is not empty.

    Raises:
        huggingface_hub.errors.StrictDataclassClassValidationError: If sizes do not fit together or a special id
            lies outside the vocabulary.
    """

    model_type = "glm130b"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {
        "layers.*.attention.query_key_value": "colwise",
        "layers.*.attention.dense": "rowwise",
        "layers.*.mlp.dense_h_to_4h": "glu_colwise",
        "layers.*.mlp.dense_4h_to_h": "rowwise",
    }
    base_model_pp_plan: ClassVar[dict[str, Any] | None] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 150528
    hidden_size: int = 12288
    num_hidden_layers: int = 70
    num_attention_heads: int = 96
    intermediate_size: int = 32768
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    rope_parameters: RopeParameters | dict[str, Any] | None = None
    rope_dtype: Literal["float16", "float32"] = "float16"
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    embedding_gradient_shrink: float | int = 1.0
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int = 0
    eos_token_id: int = 20002
    mask_token_id: int = 150000
    gmask_token_id: int = 150001
    smask_token_id: int = 150002
    eod_token_id: int = 150003
    sop_token_id: int = 150004
    eop_token_id: int = 150005
    auto_map: dict[str, Any] = field(default_factory=dict)

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, `auto_map` only if it names something."""
        fields = super().to_dict()
        return fields if fields["auto_map"] else {name: fields[name] for name in fields if name != "auto_map"}

    def __post_init__(self, **kwargs: Any) -> None:
        """Complete the fields; ValueError if there are more labels than a list of them should have."""
        num_labels = kwargs.get("num_labels")
        if num_labels is not None and not (type(num_labels) is int and 0 <= num_labels <= MOST_LABELS):
            raise ValueError(f"num_labels must be an integer from 0 to {MOST_LABELS}, got {num_labels}")
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check that sizes, ranges and special ids fit together."""
        for name, largest in LARGEST.items():
            if not 1 <= getattr(self, name) <= largest:
                state = "at least 1" if getattr(self, name) < 1 else f"at most {largest}"
                raise ValueError(f"{name} must be {state}, got {getattr(self, name)}")
        if not 0 < self.layer_norm_eps < math.inf:
            raise ValueError(f"layer_norm_eps must be positive and finite, got {self.layer_norm_eps}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size must be a multiple of 2 * num_attention_heads ({2 * self.num_attention_heads}) so that "
                f"every head has an even size, got {self.hidden_size}"
            )
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not 0 < self.embedding_gradient_shrink <= 1:
            raise ValueError(f"embedding_gradient_shrink must lie in (0, 1], got {self.embedding_gradient_shrink}")
        rope = self.rope_parameters or {}
        rope_type = rope.get("rope_type", "default")
        if rope_type not in STATIC_ROPE_TYPES:
            raise ValueError(f"rope_type must be one of {', '.join(STATIC_ROPE_TYPES)}, got {rope_type}")
        theta = rope.get("rope_theta", 10000.0)
        if not isinstance(theta, (int, float)) or not 0 < theta < math.inf:
            raise ValueError(f"rope_theta must be a positive number, got {theta!r}")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("partial_rotary_factor must be 1, since the whole head is rotated")
        if self.rope_dtype == "float16" and (rope_type != "default" or self.max_position_embeddings > 2048):
            raise ValueError('scaled rotary positions and more than 2048 positions need rope_dtype="float32"')

    def validate_token_ids(self) -> None:
        """Check that every special id has an embedding row and that those the model tells apart differ."""
        ids = {name: getattr(self, name) for name in self.__dict__ if name.endswith("_token_id")}
        for name, token_id in ids.items():
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                raise ValueError(
                    f"{name} must lie inside the vocabulary (0 to {self.vocab_size - 1}), got {token_id}; "
                    "a model with its own vocabulary needs its own special ids"
                )
        structural = ("mask_token_id", "gmask_token_id", "smask_token_id", "sop_token_id", "eop_token_id")
        if len({ids[name] for name in structural}) < len(structural):
            raise ValueError(f"{', '.join(structural)} must differ, got {[ids[name] for name in structural]}")


__all__ = ["GLMConfig"]
