"""Codes and scales of a quantized layer: moved and copied like others, but neither cast, changed nor misread.

Whoever casts a model takes its scales for weights, whoever merges an adapter takes codes for weights, and so do many
kinds of adapters when they read the weight of a layer. Casts reach a layer in two ways, through `_apply` (`to`, `half`
and the like) and by assigning to `data` of a parameter (`prepare_model_for_kbit_training`, DeepSpeed); both leave
dtypes as they are. What others read as `layer.weight` are `Codes`, which are not taken for numbers in silence.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_map

from glm_hf.quantization.functional import fp16_scale

WEIGHTS_PER_BYTE = {torch.int8: 1, torch.uint8: 2}  # of codes; scales are no weights
CODE_DTYPES = tuple(WEIGHTS_PER_BYTE)
DATA_SETTER = Tensor.data.__set__  # type: ignore[attr-defined]
HARMLESS = ("requires_grad_", "share_memory_", "detach_", "__index__", "__int__", "__invert__", "__init__")
# What adapters of PEFT, which take codes for weights, shape and cast their own parameters by.
SEEN_BY_ADAPTERS: dict[Any, Callable[[Tensor], Any]] = {
    Tensor.shape.__get__: lambda codes: torch.Size(dense_shape(codes)),  # type: ignore[attr-defined]
    Tensor.dtype.__get__: lambda codes: torch.float32,  # type: ignore[attr-defined]
}
WAY_OUT = "call model.dequantize() first, load the model without quantization, or use plain LoRA"
NOT_SHARDED = "ZeRO stage 3 cannot shard quantized weights; use stage 2 or below, or the fully_shard of torch"
CHANGED = (
    "codes of a quantized weight cannot be changed; to merge adapters, call model.dequantize() first, and load the "
    "model again if a merge has been tried"
)
MISREAD = (
    "codes of a quantized weight were taken for weights; make weights of them by dequantize_weight, or call "
    "model.dequantize() first"
)


class Codes(Tensor):
    """
    Codes as others see them: they can be moved, copied, sliced, compared and saved, but not read as floating point.

    `codes.as_subclass(torch.Tensor)` are plain; `dequantize_weight` makes weights of them.
    """

    stored: "StoredParameter"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run what leaves codes codes; ValueError for what changes them or makes floating-point numbers of them."""
        kwargs = kwargs or {}
        if func == DATA_SETTER:
            args[0].stored.data = args[1]
            return None
        if func in SEEN_BY_ADAPTERS and sys._getframe(1).f_globals.get("__name__", "").startswith("peft.tuners."):
            return SEEN_BY_ADAPTERS[func](plain(args[0]))
        if changes_in_place(func):
            raise ValueError(refusal(CHANGED))
        given = [value for value in tree_flatten((args, dict(kwargs)))[0] if isinstance(value, Tensor)]
        is_new = getattr(func, "__name__", "").startswith("new_") or getattr(func, "__name__", "").endswith("_like")
        with torch._C.DisableTorchFunctionSubclass():
            if not is_new and any(value.is_floating_point() for value in given):
                raise ValueError(refusal(MISREAD))
            try:
                result = func(*args, **kwargs)
            except (RuntimeError, TypeError) as error:  # for floating point only, such as norms
                raise ValueError(refusal(MISREAD)) from error
            if func is Tensor.as_subclass or is_new:
                return result
            if any(isinstance(value, Tensor) and value.is_floating_point() for value in tree_flatten(result)[0]):
                raise ValueError(refusal(MISREAD))
            return tree_map(guarded, result)


def dense_shape(codes: Tensor) -> tuple[int, int]:
    """Return the shape `(N, K)` of the weight that codes stand for."""
    return codes.shape[0], codes.shape[1] * WEIGHTS_PER_BYTE[codes.dtype]


def changes_in_place(func: Callable) -> bool:
    """Tell whether a function of torch writes into its first argument, such as `add_` and `__iadd__`."""
    name = getattr(func, "__name__", "")
    is_written = name.endswith("_") and not name.endswith("__") and name not in HARMLESS
    return is_written or name == "__setitem__" or (name.startswith("__i") and name not in HARMLESS)


def guarded(value: Any) -> Any:
    """Return codes as others see them, and everything else as it is."""
    is_plain = isinstance(value, Tensor) and not isinstance(value, (Codes, DTensor))
    return value.as_subclass(Codes) if is_plain and value.dtype in CODE_DTYPES else value


def plain(weight: Tensor) -> Tensor:
    """Return codes without their guard."""
    return weight.as_subclass(Tensor) if isinstance(weight, Codes) else weight


def refusal(sentence: str) -> str:
    """Return why codes are not to be used in such a way: `sentence`, or one that names the adapter that would."""
    for frame in callers():
        if "merge" in frame.f_code.co_name:
            return CHANGED
        if kind := adapter_of(frame):
            return f"{kind} with these settings computes with the weight of a layer, which is quantized; {WAY_OUT}"
        if frame.f_globals.get("__name__", "").startswith("trl."):
            return "TRL computes with the weight of the LM head, which is quantized; leave quantize_embeddings out"
    return sentence


def adapter_of(frame: FrameType) -> str | None:
    """Return the kind of adapter that a function of PEFT belongs to, None for any other function."""
    name = frame.f_globals.get("__name__", "")
    kind = name.removeprefix("peft.tuners.").partition(".")[0]
    if not name.startswith("peft.tuners.") or kind.endswith("_utils"):  # which several kinds share
        return None
    return "DoRA" if name.endswith(".dora") else kind.upper()


def callers() -> Iterator[FrameType]:
    """Yield the frames of the functions that are running, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


class StoredParameter(nn.Parameter):
    """
    Codes or scales of a quantized layer.

    Assigning to `data` moves them to another device. The same values in another dtype are a cast, which is left out.
    Anything else raises a ValueError, since INT8 codes plus a rounded adapter would be another model without a word.

    Args:
        data: The tensor, whose memory is shared.
        requires_grad: Must be False.

    Attributes:
        cast_dtype: Dtype of the last cast by assigning that was left out, None if there was none.
    """

    cast_dtype: torch.dtype | None = None

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> "StoredParameter":
        """Return a parameter on the memory of `data`."""
        return Tensor._make_subclass(cls, data.detach(), False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "StoredParameter":
        """Return a copy that remembers its cast."""
        if id(self) not in memo:
            memo[id(self)] = stored_again(self.detach().clone(), self.cast_dtype)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the values and the cast, so that what is loaded is a stored parameter again."""
        return stored_again, (self.detach(), self.cast_dtype)

    def requires_grad_(self, requires_grad: bool = True) -> "StoredParameter":
        """Raise ValueError when asked for gradients, which codes and scales do not have."""
        if requires_grad:
            raise ValueError(
                "a quantized weight cannot be trained; train an adapter on it, or call model.dequantize() first"
            )
        return self

    def numel(self) -> int:
        """Return how many weights these are, which counts of parameters add up; `nelement` counts elements."""
        return self.nelement() * WEIGHTS_PER_BYTE.get(self.dtype, 0)

    @property
    def ds_id(self) -> int:
        """Number that DeepSpeed gives to what it shards; ValueError where it looks for what to shard next."""
        if any(frame.f_code.co_name == "_convert_to_zero_parameters" for frame in callers()):
            raise ValueError(NOT_SHARDED)
        raise AttributeError("ds_id")

    @property
    def ds_numel(self) -> int:
        """Number of values that DeepSpeed shards, which it notes on every parameter; there is none here."""
        raise AttributeError("ds_numel")

    @ds_numel.setter
    def ds_numel(self, number: int) -> None:
        """Raise ValueError where DeepSpeed is about to shard them."""
        raise ValueError(NOT_SHARDED)

    def seen(self) -> Codes:
        """Return codes as others see them, always the same object, so that it can be seen what is tied."""
        if "as_seen" not in self.__dict__:
            seen = self.detach().as_subclass(Codes)
            seen._is_param = True  # torch and others look for parameters by this
            seen.stored = self
            self.as_seen = seen
        return self.as_seen

    @property
    def data(self) -> Tensor:
        """The values as a plain tensor."""
        return super().data

    @data.setter
    def data(self, value: Tensor) -> None:
        value = plain(value)
        if value.dtype != self.dtype:
            kept = self.detach().to(value.device)
            if value.shape != kept.shape or not (value.is_meta or torch.equal(value, kept.to(value.dtype))):
                raise ValueError(CHANGED)
            self.cast_dtype, value = value.dtype, kept
        elif value.device == self.device and not is_same(value, self.detach()):
            raise ValueError(CHANGED)
        self.__dict__.pop("as_seen", None)
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]


def stored_again(data: Tensor, cast_dtype: torch.dtype | None) -> StoredParameter:
    """Return a stored parameter that was copied or pickled."""
    parameter = StoredParameter(data)
    parameter.cast_dtype = cast_dtype
    return parameter


def is_same(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors of a dtype, on one device, have the same values; those on meta have none."""
    if one.shape != other.shape or one.is_meta:
        return one.shape == other.shape
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)


class StoredWeight(nn.Module):
    """What the quantized layers share: `weight` and `weight_scale`, which no cast and no reading takes for others."""

    @property
    def weight(self) -> Any:
        """Codes, of which nobody makes floating-point numbers in silence; part of a rank under tensor parallelism."""
        stored = self.__dict__.get("_parameters", {}).get("weight")
        if stored is None:
            raise AttributeError("weight")
        kind = next(filter(None, map(adapter_of, callers())), None) if isinstance(stored, DTensor) else None
        if kind not in (None, "LORA", "DoRA"):
            raise ValueError(
                f"{kind} does not work on quantized weights under tensor parallelism; use LoRA on INT8 "
                "query_key_value, or train without tensor parallelism"
            )
        return stored.seen() if isinstance(stored, StoredParameter) else stored

    @weight.setter
    def weight(self, value: nn.Parameter | None) -> None:
        self.register_parameter("weight", value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register what others have seen as the parameter behind it, and in the place of a stored one a stored one."""
        param = getattr(param, "stored", param)
        if isinstance(self.__dict__["_parameters"].get(name), StoredParameter) and type(param) is nn.Parameter:
            param = StoredParameter(param)
        if name == "weight":  # which is a property here, and so known to have an attribute of this name
            self.__dict__["_parameters"][name] = param
        else:
            super().register_parameter(name, param)

    def protect(self, known: dict[nn.Parameter, StoredParameter]) -> None:
        """Make stored parameters of codes and scales, unless ranks share them; `known` keeps tied ones tied."""
        for name in ("weight", "weight_scale"):
            parameter = self._parameters[name]
            assert parameter is not None, "a quantized layer has both"
            parameter.requires_grad_(False)  # loading turns it on for whatever is floating point
            if not isinstance(parameter, (DTensor, StoredParameter)):
                self._parameters[name] = known.setdefault(parameter, StoredParameter(parameter))

    def require_loaded(self, model: nn.Module) -> None:
        """Raise ValueError if not all parameters were loaded into this layer of `model`; those on meta lie on disk."""
        for name, parameter in self.named_parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False) and not parameter.is_meta:
                path = next(path for path, module in model.named_modules() if module is self)
                raise ValueError(f"{path}.{name} of a quantized model was not loaded; make the folder again")

    def uncounted_weights(self) -> list[tuple[nn.Parameter, int]]:
        """Return by how much parameters that ranks share stand for more weights than elements, or for fewer."""
        weight, weight_scale = self._parameters["weight"], self._parameters["weight_scale"]
        assert weight is not None, "a quantized layer has both"
        assert weight_scale is not None, "a quantized layer has both"
        if not isinstance(weight, DTensor):
            return []
        return [(weight, weight.numel() * (weight.dtype == torch.uint8)), (weight_scale, -weight_scale.numel())]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Apply `fn` to all tensors, but of codes and scales keep dtype and values."""
        stored = {id(self._parameters[name]) for name in ("weight", "weight_scale")}

        def moving(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if id(tensor) not in stored or applied.dtype == tensor.dtype:
                return applied
            if isinstance(tensor, StoredParameter):
                tensor.cast_dtype = applied.dtype
            return tensor.detach().to(applied.device)

        return super()._apply(moving, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load as modules do; ValueError for what are no codes or no scales, which torch would round to some."""
        weight, scale = (state_dict.get(prefix + name) for name in ("weight", "weight_scale"))
        dtype = self._parameters["weight"].dtype  # type: ignore[union-attr]
        if weight is not None and weight.dtype != dtype:
            raise ValueError(
                f"{prefix}weight must be {dtype} codes, got {weight.dtype}; to quantize weights, load them by "
                "from_pretrained with a quantization_config"
            )
        if scale is not None and scale.dtype != torch.float16:
            state_dict[f"{prefix}weight_scale"] = fp16_scale(scale)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
