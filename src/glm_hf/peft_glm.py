"""What PEFT has to know of GLM: where adapters go by default, and how learned prompts reach context and blanks.

Nothing here imports peft: entries are added to its tables as soon as somebody else has imported it.
"""

import sys
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

LAYER_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
METHODS = ("fill_blanks", "propose_blanks", "score_blanks", "_propose", "_num_new_tokens")


class PrefixCache(DynamicCache):
    """
    Cache whose first `prefix_length` tokens are learned and were never read.

    PEFT makes one in prefix tuning (P-tuning v2), through its table of functions that finish a prefix. The attribute
    is what tells a learned prefix from earlier text: tokens behind it are a whole sample with a context of its own,
    and all of them see the prefix, whereas tokens behind earlier text may not bring a context.

    Args:
        prefix: `(2, B, H, P, K)` keys, not rotated, and values of every layer.

    Raises:
        ValueError: If the prefix is one for an encoder and a decoder.
    """

    def __init__(self, prefix: Iterable[torch.Tensor]) -> None:
        layers = [tuple(states) for states in prefix]
        if any(len(states) != 2 for states in layers):
            raise ValueError('the prefix is one for an encoder and a decoder; GLM takes one of task_type="CAUSAL_LM"')
        super().__init__(layers)
        self.prefix_length = self.get_seq_length()


class PromptLearningMethod:
    """
    Method of the model that a `PeftModel` with a learned prompt runs on itself, so that its answers heed the prompt.

    PEFT hands unknown names on to the model inside, which knows nothing of a prompt. That is left as it is for all
    other adapters and models: a name that is missing here is looked up there.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, peft_model: Any, owner: type | None = None) -> Any:
        """Return the method, bound to the `PeftModel`."""
        if peft_model is None:
            return self
        if not peft_model.active_peft_config.is_prompt_learning or peft_model.config.model_type != "glm130b":
            raise AttributeError(self.name)
        return getattr(type(peft_model.get_base_model()), self.name).__get__(peft_model)


class PeftImportFinder(MetaPathFinder):
    """Registers GLM at the end of the import of peft, whichever finder finds it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of peft that the other finders have, whose loader registers GLM when it is done."""
        if name != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register_with_peft()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_with_peft() -> None:
    """Add GLM to PEFT's tables, now or at the end of the import of peft; harmless when repeated."""
    constants, peft_model = (sys.modules.get(name) for name in ("peft.utils.constants", "peft.peft_model"))
    if constants is None or peft_model is None or not hasattr(peft_model, "PeftModelForCausalLM"):
        if not any(isinstance(finder, PeftImportFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, PeftImportFinder())
        return
    for name, table in vars(constants).items():
        if name.endswith("_MODULES_MAPPING") and "gpt_neox" in table:
            table.setdefault("glm130b", table["gpt_neox"])  # its linears have the same names as ours
    constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING.setdefault("glm130b", list(LAYER_NORMS))
    constants.TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING.setdefault("glm130b", PrefixCache)
    for name in METHODS:
        if name not in vars(peft_model.PeftModel):
            setattr(peft_model.PeftModel, name, PromptLearningMethod(name))


def num_virtual_tokens(model: Any) -> int:
    """Return how many learned tokens a `PeftModel` puts in front of every text; 0 for any other model."""
    if getattr(model, "_adapters_disabled", False):
        return 0
    return getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0


register_with_peft()
