"""What fits where: a plan of devices, what to change if it does not fit, and how to load the model as planned.

Sizes of everything: memory.py; where layers go: placement.py. Every device in use keeps a reserve for CUDA's context,
workspaces of libraries and fragmentation.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch

from glm_hf.configuration_glm import GLMConfig
from glm_hf.planning.devices import Device, describe_devices
from glm_hf.planning.memory import Request, kv_cache_bytes, layer_bytes, require_valid, stored_quantization
from glm_hf.planning.placement import DeviceUse, place, smallest_free
from glm_hf.planning.table import GIB, format_table, gib

DEFAULT_RESERVE = GIB // 2
PARTS = ("weights", "kv_cache", "activations", "reserve")
SHOWN = {"model.embed_tokens": "embedding", "lm_head": "LM head"}
TITLES = ("device", "size", "layers", "weights", "KV cache", "activations", "reserve", "free", "")


@dataclass(frozen=True)
class Plan:
    """Where everything goes and whether it fits."""

    request: Request
    uses: tuple[DeviceUse, ...]

    @property
    def smallest_free(self) -> int:
        """Free bytes of the fullest device in use."""
        return smallest_free(self.uses)

    @property
    def fits(self) -> bool:
        """Whether no device is too small."""
        return self.smallest_free >= 0

    @property
    def device_map(self) -> dict[str, int | str]:
        """What `from_pretrained` takes: the device of every module; empty with tensor parallelism."""
        if self.request.tp_size is not None:
            return {}
        return {module: use.device.name for use in self.uses for module in use.modules}

    @property
    def max_memory(self) -> dict[int | str, int]:
        """Bytes for weights on every device in use; layers in what is left there would have room for their cache."""
        request = self.request
        layer = min(layer_bytes(request, layer) for layer in range(request.config.num_hidden_layers))
        used = [use for use in self.uses if use.modules and use.free is not None]
        more = {use.device.name: max(0, use.free or 0) // (layer + kv_cache_bytes(request)) for use in used}
        return {use.device.name: use.weights + more[use.device.name] * layer for use in used}

    def advice(self) -> str:
        """Return in one line what is missing and what to change, each change planned anew; empty if it fits."""
        if self.fits:
            return ""
        lacking = {use.device.name: -use.free for use in self.uses if use.free is not None and use.free < 0}
        fullest = max(lacking, key=lacking.__getitem__)
        others = f", the fullest of {len(lacking)}" if len(lacking) > 1 else ""
        missing = f"needs {ceil(lacking[fullest] / GIB * 100) / 100:.2f} GiB more on device {fullest}{others}"
        options = fitting_options(self.request)
        return f"{missing}; " + (f"fits with {', or with '.join(options)}" if options else "no option makes it fit")

    def describe(self) -> str:
        """Return a table of what every device holds, in GiB."""
        rows = [TITLES, *(row_of(use) for use in self.uses)]
        layers = sum(len(use.layers) for use in self.uses) // (self.request.tp_size or 1)
        size = sum(use.device.num_bytes or 0 for use in self.uses)
        sums = [sum(getattr(use, name) or 0 for use in self.uses) for name in (*PARTS, "free")]
        rows.append(("all", gib(size), str(layers), *map(gib, sums), ""))
        return "\n".join((self.title(), *format_table(rows, notes=True)))

    def title(self) -> str:
        """Return in one line what is planned."""
        request = self.request
        weights = dtype_name(request) if request.bits == 16 else f"INT{request.bits}"
        groups = f" in groups of {request.group_size}" if request.group_size else ""
        embedding = "INT8" if request.quantize_embeddings else dtype_name(request)
        ranks = f", {request.tp_size} tensor-parallel ranks" if request.tp_size else ""
        return (
            f"{request.config.num_hidden_layers} layers in {weights}{groups}, embedding in {embedding}, context "
            f"{request.context}, batch {request.batch}{ranks}; sizes in GiB"
        )

    def usage(self, folder: str) -> str:
        """Return the Python code that loads the model of `folder` as planned."""
        stored = getattr(self.request.config, "quantization_config", None) is not None
        lines = ["import glm_hf", "from transformers import AutoModelForCausalLM"]
        if self.request.bits < 16 and not stored:
            folder = "QUANTIZED"
            lines.append(
                "# QUANTIZED is made by `glm-hf quantize`; quantizing while loading takes more memory than planned."
            )
        load = f'from_pretrained({json.dumps(folder)}, dtype="{dtype_name(self.request)}", '
        if self.request.tp_size is not None:
            lines.insert(2, "from transformers.distributed import DistributedConfig")
            lines += [
                f"# torchrun --nproc-per-node {self.request.tp_size} THIS_SCRIPT",
                f'parallel = DistributedConfig(tp_size={self.request.tp_size}, tp_plan="auto")',
                f"model = AutoModelForCausalLM.{load}distributed_config=parallel)",
            ]
            return "\n".join(lines)
        names = [name for use in self.uses for name in use.modules if not name.startswith("model.layers.")]
        lines += ["device_map = {", *(f'    "{name}": {json.dumps(self.device_map[name])},' for name in names)]
        for use in self.uses:
            if use.layers:
                lines.append(f'    **{{f"model.layers.{{n}}": {json.dumps(use.device.name)} for n in {use.layers}}},')
        lines += ["}", f'max_memory = {self.max_memory}  # instead, with device_map="auto"']
        lines += [f"model = AutoModelForCausalLM.{load}device_map=device_map)"]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan in the types of JSON, sizes in bytes; there, `max_memory` has strings for GPUs."""
        request = self.request
        return {
            "fits": self.fits,
            "advice": self.advice(),
            "context": request.context,
            "batch": request.batch,
            "tp_size": request.tp_size,
            "dtype": dtype_name(request),
            "bits": request.bits,
            "group_size": request.group_size,
            "quantize_embeddings": request.quantize_embeddings,
            "devices": [
                {"device": use.device.name, "size": use.device.num_bytes, "layers": list(use.layers)}
                | {name: getattr(use, name) for name in (*PARTS, "free")}
                for use in self.uses
            ],
            "device_map": self.device_map,
            "max_memory": self.max_memory,
        }


def plan_devices(
    config: GLMConfig,
    devices: Sequence[Device],
    *,
    bits: int | None = None,
    group_size: int | None = None,
    quantize_embeddings: bool = False,
    context: int | None = None,
    batch: int = 1,
    tp_size: int | None = None,
    reserve: int = DEFAULT_RESERVE,
) -> Plan:
    """
    Plan a model on devices so that the fullest one keeps as much memory free as possible.

    Layers keep their order. Those that do not fit the GPUs go to the host and then to the disk, where these are given.

    Args:
        config: Configuration of the model; its `quantization_config` and `dtype`, where it has them, say how weights
            are stored.
        devices: GPUs, then host and disk, as `parse_devices` returns them. Without a GPU the host computes.
        bits: Bits of the weights of the layers: 4, 8, or 16 for fp16; by default as the config says, else fp16.
        group_size: Input features per scale, None for whole rows.
        quantize_embeddings: Whether the embedding is stored in INT8 rows.
        context: Tokens of prompt and answer together; by default the longest sequence of the model.
        batch: Number of sequences at once, times beams.
        tp_size: Number of tensor-parallel ranks, one per device, instead of whole layers.
        reserve: Bytes per device that are left to CUDA, libraries and fragmentation.

    Raises:
        ValueError: If the arguments do not fit together or contradict the config.
    """
    quantization = stored_quantization(config, bits, group_size, quantize_embeddings)
    dtype = torch.float16 if bits == 16 or config.dtype is None else config.dtype
    context = config.max_position_embeddings if context is None else context
    return plan(Request(config, tuple(devices), quantization, dtype, context, batch, tp_size, reserve))


def plan(request: Request) -> Plan:
    """Plan a request; ValueError if its sizes do not fit together."""
    require_valid(request)
    return Plan(request, place(request))


def dtype_name(request: Request) -> str:
    """Return the name of the model's dtype, such as float16."""
    return str(request.dtype).removeprefix("torch.")


def row_of(use: DeviceUse) -> tuple[str, ...]:
    """Return the cells of a device's row."""
    span = f"{use.layers.start}-{use.layers.stop - 1}" if use.layers else "-"
    kept = [text for module, text in SHOWN.items() if module in use.modules]
    parts = (gib(getattr(use, name)) for name in PARTS)
    return (str(use.device.name), gib(use.device.num_bytes), span, *parts, gib(use.free), ", ".join(kept))


def fitting_options(request: Request) -> list[str]:
    """Return the options with which a request fits; if none does alone, together with fewer bits for all weights."""
    prefix = ""
    while True:
        options = [prefix + found for kind in changes(request) if (found := first_fitting(kind))]
        savings = [list(kind) for kind in changes(request)]
        smaller = [kind[-1] for kind in savings if kind and kind[-1][0].startswith(("--bits", "--quantize"))]
        if options or not smaller:
            return options
        prefix, request = f"{prefix}{smaller[0][0]} ", smaller[0][1]


def changes(request: Request) -> Iterator[Iterator[tuple[str, Request]]]:
    """Yield the kinds of changes that save memory, each from the smallest on, with the option that makes it."""
    step = 64
    if getattr(request.config, "quantization_config", None) is None:
        fewer = [bits for bits in (8, 4) if bits < request.bits]
        yield ((f"--bits {bits}", request.quantized(bits=bits)) for bits in fewer)
        if request.bits < 16 and not request.quantize_embeddings:
            yield iter([("--quantize-embeddings", request.quantized(quantize_embeddings=True))])
    contexts = range((request.context - 1) // step * step, 0, -step)
    yield ((f"--context {context}", replace(request, context=context)) for context in contexts)
    yield ((f"--batch {batch}", replace(request, batch=batch)) for batch in range(request.batch - 1, 0, -1))
    if request.tp_size is None and len(request.devices) > 1:
        tp_size = len(request.devices)
        yield iter([(f"--tp {tp_size}", replace(request, tp_size=tp_size))])
    yield more_devices(request)


def more_devices(request: Request) -> Iterator[tuple[str, Request]]:
    """Yield requests with more GPUs of the largest size."""
    gpus = [device.num_bytes or 0 for device in request.devices if isinstance(device.name, int)]
    others = [device for device in request.devices if isinstance(device.name, str)]
    limit = request.config.num_attention_heads if request.tp_size else len(gpus) + request.config.num_hidden_layers + 1
    for count in range(len(gpus) + 1, limit + 1) if gpus else ():
        sizes = gpus + [max(gpus)] * (count - len(gpus))
        devices = (*(Device(index, size) for index, size in enumerate(sizes)), *others)
        tp = f"--tp {count} " if request.tp_size else ""
        changed = replace(request, devices=devices, tp_size=count if request.tp_size else None)
        yield f"{tp}--devices {describe_devices(devices)}", changed


def first_fitting(candidates: Iterator[tuple[str, Request]]) -> str | None:
    """Return the option of the first candidate that fits; one that cannot be planned does not."""
    for option, request in candidates:
        try:
            if plan(request).fits:
                return option
        except ValueError:
            continue
    return None
