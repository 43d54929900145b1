"""Run an exported graph in onnxruntime, as a model of transformers.

What tokens see and where they stand is derived as for the torch model, by the same code; the graph computes the
layers. Keys and values of a cache are handed to it as they lie in memory, and new ones are written behind them.

Shapes: `B` batch, `L` new tokens, `S` all tokens with those in the cache, `C` tokens that a cache has room for, `H`
heads, `K` head dim, `V` vocabulary.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput
from transformers.utils import can_return_tuple

from glm_hf.configuration_glm import GLMConfig
from glm_hf.folders.validation import find_folder
from glm_hf.infilling_glm import masked_lm_layout, pad_left
from glm_hf.masking_glm import infilling_attention
from glm_hf.modeling_glm import GLMForBlankInfilling, GLMPreTrainedModel
from glm_hf.onnx.configuration import GLMONNXConfig
from glm_hf.onnx.rooms import forget_last, length_with, make_rooms
from glm_hf.onnx.session import GraphSession, read_graph_config
from glm_hf.positions_glm import Mask, is_padding_mask, kept_states, remember_layout, require_known_packing
from glm_hf.versions_glm import CACHE, one_cache, require_known_cache

NOT_IN_GRAPH = "an exported graph takes input_ids and gives logits and the cache; use the torch model for"
GRAPH_FILES = ("*.json", "*.jinja", "model.onnx", "model.onnx.data")
"""What is downloaded of an exported folder."""
LEAST_VISIBLE = -1e4
"""Below it a number of an additive mask hides a token, as it does in fp16 and fp32 alike."""
PLAIN_SETTINGS: dict[str, tuple[Any, ...]] = {
    "device_map": ("auto", "cpu", torch.device("cpu"), {"": "cpu"}),
    "attn_implementation": ("sdpa",),
    "use_safetensors": (True,),
    "low_cpu_mem_usage": (True,),
    "trust_remote_code": (True,),
}
"""Settings of `from_pretrained`, and their values besides None and False, that change nothing of a graph."""
OF_DOWNLOADS = ("revision", "cache_dir", "local_files_only", "force_download", "token")
OF_AUTO_CLASSES = ("code_revision", "adapter_kwargs")
FIXED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("max_position_embeddings", "layer_norm_eps", "rope_parameters", "rope_dtype", "tie_word_embeddings"),
)
"""Fields of the configuration that an export has written into the graph."""


class ORTGLMForBlankInfilling(GLMForBlankInfilling):
    """
    An exported graph in the place of `GLMForBlankInfilling`: `generate`, `fill_blanks`, pipelines and servers.

    It computes on the CPU, has no weights that torch knows, and cannot be trained.

    Args:
        config: Configuration of the model.
        session: The graph.
    """

    config_class = GLMONNXConfig
    config: GLMONNXConfig

    def __init__(self, config: GLMONNXConfig, session: GraphSession) -> None:
        for name in FIXED:
            if getattr(config, name) != getattr(session.config, name):
                raise ValueError(f"{name} is fixed in the graph; export the model again with another")
        GLMPreTrainedModel.__init__(self, config)
        self.session = session
        self.loss_type = "ForCausalLM"
        self.stop_at_end_of_blank()
        self.eval()

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> "ORTGLMForBlankInfilling":
        """Raise ValueError: a graph cannot be made from a configuration alone."""
        raise ValueError("an exported graph is opened by from_pretrained; a configuration has no weights to export")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, config: Any = None, **kwargs: Any
    ) -> "ORTGLMForBlankInfilling":
        """
        Open a folder that `export_onnx` has written.

        Args:
            pretrained_model_name_or_path: Folder, or name on the Hub.
            config: Configuration or its folder, by default that of the graph's folder.
            **kwargs: Of the settings of transformers those that leave the model as it is.

        Raises:
            ModuleNotFoundError: If onnxruntime is missing.
            FileNotFoundError: If a file is missing.
            ValueError: If the folder holds no such graph, this onnxruntime cannot run it, or a setting asks for
                another device, dtype or quantization than that of the graph.
        """
        dtypes = [kwargs.pop(name, None) for name in ("dtype", "torch_dtype")]
        downloads = {name: kwargs.pop(name) for name in OF_DOWNLOADS if name in kwargs}
        for name, value in kwargs.items():
            is_plain = value is None or value is False or value in PLAIN_SETTINGS.get(name, ())
            if not (is_plain or name in OF_AUTO_CLASSES or name.startswith("_")):
                raise ValueError(f"{name}={value} is no setting of an exported graph, which runs on the CPU as it is")
        folder = find_folder(pretrained_model_name_or_path, GRAPH_FILES, **downloads)
        if not isinstance(config, GLMConfig):
            config = read_graph_config(folder if config is None else Path(config))
        model = cls(config, GraphSession(folder))
        for dtype in dtypes:
            if dtype not in (None, "auto", model.dtype, str(model.dtype).removeprefix("torch.")):
                raise ValueError(f"the graph computes in {model.dtype}; leave out dtype={dtype}, or export again")
        model.name_or_path = str(folder)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """
        Copy the graph with its weights and settings to another folder.

        Args:
            save_directory: The folder.
            **kwargs: Settings of transformers, of which `is_main_process` is heeded; others are for other files.

        Raises:
            ValueError: If the folder is to be uploaded.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("an exported folder is not uploaded from here; use `hf upload REPO FOLDER`")
        if not kwargs.get("is_main_process", True):
            return
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.session.copy_to(Path(save_directory))
        self.config.save_pretrained(save_directory)
        self.generation_config.save_pretrained(save_directory)

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the logits and the cache."""
        return self.session.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ORTGLMForBlankInfilling":
        """Return the model; ValueError if it is to go to another device or dtype, by whichever method of torch."""
        moved = fn(torch.empty(0, dtype=self.dtype))
        if moved.device.type != "cpu" or moved.dtype != self.dtype:
            raise ValueError(
                f"an exported graph runs on the CPU in {self.dtype}; use the torch model, or export again"
            )
        return self

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of weights in the graph, of which none is trainable."""
        if only_trainable:
            return 0
        with torch.device("meta"):
            model = GLMForBlankInfilling(self.session.config)
        return model.num_parameters(exclude_embeddings=exclude_embeddings)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes of the weights in the graph."""
        return self.session.num_bytes

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Tie nothing: weights lie in the graph."""

    def get_input_embeddings(self) -> nn.Module:
        """Raise ValueError: weights lie in the graph."""
        raise ValueError(f"{NOT_IN_GRAPH} embeddings")

    def _pad_left(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        return pad_left(rows, self.config.pad_token_id)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Generate as `GLMForBlankInfilling` does; ValueError for what is not in the graph."""
        for name in ("inputs_embeds", "assistant_early_exit"):
            if kwargs.get(name, getattr(generation_config, name, None)) is not None:
                raise ValueError(f"{NOT_IN_GRAPH} {name}")
        return super().generate(inputs, generation_config, **kwargs)

    @can_return_tuple
    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Mask = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        segment_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """
        Predict the token after each, as `GLMForBlankInfilling.forward` does.

        Args:
            input_ids: `(B, L)` token ids.
            attention_mask: As there; of additive masks, numbers up to -10,000 hide a token and 0 shows it.
            position_ids: As there, below `max_position_embeddings`.
            past_key_values: A `DynamicCache`, or the decoder's cache of slots.
            segment_ids: As there.
            inputs_embeds: None; the graph begins with ids.
            labels: As there; no gradient flows from the loss.
            use_cache: As there.
            logits_to_keep: As there.
            cache: Name of `past_key_values` from transformers 5.24 on.
            **kwargs: Arguments of the loss.

        Raises:
            ValueError: If something is asked for that the graph does not hold, or a position lies beyond its tables.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError(f"{NOT_IN_GRAPH} inputs_embeds")
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name, getattr(self.config, name, False)):
                raise ValueError(f"{NOT_IN_GRAPH} {name}")
        if self.training and (labels is not None or kwargs.get("shift_labels") is not None):
            raise ValueError(f"{NOT_IN_GRAPH} training")
        require_known_cache(kwargs, "the model")
        require_known_packing(kwargs, position_ids, segment_ids)
        used = one_cache(past_key_values, cache)
        if used is None and (self.config.use_cache if use_cache is None else use_cache):
            used = DynamicCache()
        given = (input_ids, attention_mask, position_ids, segment_ids)
        if any(isinstance(tensor, Tensor) and tensor.device.type != "cpu" for tensor in given):
            raise ValueError("an exported graph runs on the CPU; move the inputs there")
        fixed = self.session.config
        input_ids = valid_ids(input_ids, fixed.vocab_size)
        batch, length = input_ids.shape
        sizes = torch.empty(batch, length, 0, dtype=self.dtype)  # as embeddings have them
        attention = infilling_attention(self.config, input_ids, sizes, attention_mask, position_ids, used, segment_ids)
        positions = attention.position_ids.expand(batch, length).long()
        if is_padding_mask(attention_mask):
            positions = positions.masked_fill(attention_mask[:, -length:] == 0, 0)
        lowest, highest = int(positions.min()), int(positions.max())
        if not 0 <= lowest <= highest < fixed.max_position_embeddings:
            raise ValueError(
                f"position {lowest if lowest < 0 else highest} lies beyond the "
                f"{fixed.max_position_embeddings} of the graph"
            )
        num_tokens = length if used is None else length_with(used, length)
        visible = visible_tokens(attention.mask, attention.context_length, length, num_tokens)
        allowed = ((1, batch), (1,), (1, length), (num_tokens,))
        if any(size not in sizes for size, sizes in zip(visible.shape, allowed, strict=True)):
            raise ValueError(
                f"the mask must be of shape ({batch} or 1, 1, {length}, {num_tokens}), got {tuple(visible.shape)}"
            )
        rooms = make_rooms(used, fixed, batch, length, self.dtype)
        num_logits = logits_to_keep if isinstance(logits_to_keep, int) and 0 < logits_to_keep < length else length
        visible = nn.functional.pad(visible, (0, rooms.capacity - num_tokens)).expand(batch, -1, length, -1)
        try:
            logits = self.session.run(input_ids, positions, visible, rooms, num_logits)
        except BaseException:
            forget_last(used, length)
            raise
        if used is not None and attention.fills_cache:
            remember_layout(used, input_ids, attention.position_ids, attention.in_context, self.config)
        logits = logits if isinstance(logits_to_keep, int) else kept_states(logits, logits_to_keep)
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=fixed.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: used})


class ORTGLMForMaskedLM(ORTGLMForBlankInfilling):
    """An exported graph in the place of `GLMForMaskedLM`: scores one token for every `[MASK]` in a single pass."""

    def as_blank_infilling(self) -> ORTGLMForBlankInfilling:
        """Return what generates, over the same graph."""
        model = ORTGLMForBlankInfilling(self.config, self.session)
        model.generation_config = self.generation_config
        return model

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as `ORTGLMForBlankInfilling` does."""
        return self.as_blank_infilling().generate(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Mask = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Score the tokens of a text, with the arguments and errors of `GLMForMaskedLM.forward`."""
        source = None
        if input_ids is not None and (attention_mask is None or is_padding_mask(attention_mask)):
            input_ids, attention_mask, position_ids, source = masked_lm_layout(
                input_ids, self.config, attention_mask, position_ids
            )
        outputs = super().forward(input_ids, attention_mask, position_ids, use_cache=False, **kwargs)
        logits = outputs.logits if source is None else outputs.logits.take_along_dim(source[..., None], dim=1)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)


def valid_ids(input_ids: Tensor, vocab_size: int) -> Tensor:
    """Return ids `(B, L)` as int64; ValueError if there are none, or some are not of the vocabulary."""
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"input_ids must be of shape (batch, length) and hold tokens, got {tuple(input_ids.shape)}")
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if not 0 <= lowest <= highest < vocab_size:
        raise ValueError(f"input_ids must be from 0 to {vocab_size - 1}, got some from {lowest} to {highest}")
    return input_ids.long()


def visible_tokens(mask: Mask, context_length: int | None, length: int, num_tokens: int) -> Tensor:
    """
    Return what each new token sees, `(B or 1, 1, L, S)`.

    A token that sees nothing, such as padding, sees all here: its logits mean nothing, but must not be NaN.

    Args:
        mask: Mask of the attention implementation sdpa, of the rows behind the context only where that is given.
        context_length: Tokens in front that see exactly each other.
        length: New tokens `L`.
        num_tokens: All tokens `S`.
    """
    if mask is None:
        visible = torch.ones(1, 1, length - (context_length or 0), num_tokens, dtype=torch.bool)
        visible = visible.tril(num_tokens - visible.shape[2])
    elif isinstance(mask, Tensor) and mask.dtype == torch.bool:
        visible = mask
    elif isinstance(mask, Tensor) and bool(((mask == 0) | (mask <= LEAST_VISIBLE)).all()):
        visible = mask == 0
    else:
        raise ValueError("an exported graph takes masks that show a token or hide it; pass 1 and 0, or True and False")
    if context_length:
        context = torch.arange(num_tokens).expand(len(visible), 1, context_length, -1) < context_length
        visible = torch.cat((context, visible), dim=2)
    return visible | ~visible.any(-1, keepdim=True)
