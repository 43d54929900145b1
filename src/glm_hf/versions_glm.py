"""What differs between the versions of transformers that this package runs on, and what all of them lack.

Generation is transformers' own loop, which calls methods of the model, its hooks. GLM's positions and two-way contexts
enter through them, so a hook that is renamed, or loses an argument, must end in an error instead of another text.
"""

import inspect
from typing import Any

import transformers
from torch import nn
from torch.distributed.tensor import DeviceMesh, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from transformers.cache_utils import Cache
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, PackedColwiseParallel
from transformers.modeling_outputs import BaseModelOutputWithPast

SUPPORTED = "5.17 to 5.24"

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Name of the cache in generation, its hooks and outputs: `cache` from 5.24 on."""

CACHE_NAMES = ("cache", "past_key_values")
"""Under which callers may hand over a cache."""

AutoModelForDecision = getattr(transformers, "AutoModelForDecision", None)
"""Where `transformers serve` looks for a class first, from 5.20 on."""

HOOKS = {
    "prepare_inputs_for_generation": {
        *("input_ids", "next_sequence_length", CACHE, "attention_mask", "inputs_embeds"),
        *("is_first_iteration", "kwargs"),
    },
    "_prepare_position_ids_for_generation": {"inputs_tensor", "model_kwargs"},
}
"""Methods of `GenerationMixin` that GLM overrides, and what they are given."""


def hook_error(what: str) -> RuntimeError:
    """Return the error of a generation loop that has changed, in one sentence."""
    return RuntimeError(
        f"{what} by transformers {transformers.__version__}, so that answers would be wrong; this version of glm_hf "
        f"generates with transformers {SUPPORTED}: install one of these, or a newer glm_hf"
    )


def require_known_hooks(model: Any) -> None:
    """Raise RuntimeError unless the hooks of `model`, or of a `super()` of it, take what they are known to take."""
    for name, known in HOOKS.items():
        hook = getattr(model, name, None)
        given = set() if hook is None else set(inspect.signature(hook).parameters)
        if given != known:
            changed = ", ".join(sorted(given ^ known))
            raise hook_error(f"the hook {name} of generation was changed ({changed})")


def require_known_cache(arguments: dict[str, Any], where: str) -> None:
    """Raise RuntimeError if a cache comes under a name that nothing here reads."""
    if unknown := [name for name, value in arguments.items() if isinstance(value, Cache) and name != CACHE]:
        raise hook_error(f"the cache was handed to {where} as {unknown[0]}")


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """Return the cache, given by the name of some versions or of others; ValueError if by both."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("give one cache, as past_key_values or as cache")
    return past_key_values if cache is None else cache


def require_known_reader(module: str | None) -> None:
    """Raise RuntimeError if a module takes over a model that reads every text from left to right."""
    if module == "lm_eval.models.huggingface":
        raise RuntimeError(
            "lm-evaluation-harness' class hf reads GLM from left to right, so its scores would be wrong; use "
            "`glm-hf evaluate`, or the class glm after `import glm_hf.evaluation.harness`"
        )


class GLUColwiseParallel(PackedColwiseParallel):
    """
    Split each half of a GLU's up-projection over the ranks, weight and bias alike.

    transformers' `packed_colwise` shards a bias as one block, so that the first rank gets the bias of the first half.
    """

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        """Replace a parameter `(2F, D)` or `(2F,)` by its shard of both halves."""
        tensor = module._parameters[param]
        if tensor is not None:
            placement = _StridedShard(dim=0, split_factor=self.split_factor)
            sharded = distribute_tensor(tensor, mesh, [placement], src_data_rank=None)
            module._parameters[param] = nn.Parameter(sharded, requires_grad=tensor.requires_grad)


def register_parallel_styles() -> None:
    """Make the styles of GLM's tensor-parallel plan known to transformers; harmless when repeated."""
    ALL_PARALLEL_STYLES.register("glu_colwise", GLUColwiseParallel())
