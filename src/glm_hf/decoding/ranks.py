"""The decoder under tensor parallelism: rank 0 hands out what is to be done, and every rank does it."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import distributed

from glm_hf.decoding.engine import Engine
from glm_hf.decoding.requests import Layout, Sampling
from glm_hf.decoding.sampling import Choice


class RankedEngine(Engine):
    """
    The engine of one rank: that of rank 0 is used as any other, the others follow it by `follow`.

    Logits are gathered on all ranks and random numbers come from rank 0, so that all choose the same tokens.

    Args:
        model: The rank's shard of a model.
        **options: Arguments of `Engine`, the same on all ranks.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, **options)
        self._group = distributed.new_group(backend="gloo")  # for numbers on the CPU, whatever the model's devices

    def prefill(
        self,
        rows: Sequence[Sequence[int]],
        slots: Sequence[int],
        sampling: Sequence[Sampling],
        num_top: Sequence[int],
        uniforms: Sequence[float],
        layouts: Sequence[Layout | None] | None = None,
    ) -> Choice:
        """Read rows into slots, on all ranks."""
        settings = [asdict(each) for each in sampling]
        own = None if layouts is None else [layout and asdict(layout) for layout in layouts]
        self._tell("prefill", [list(row) for row in rows], list(slots), settings, list(num_top), list(uniforms), own)
        return super().prefill(rows, slots, sampling, num_top, uniforms, layouts)

    def step(self, count: int, uniforms: Sequence[float]) -> Choice:
        """Decode one token of the first `count` slots, on all ranks."""
        self._tell("step", count, list(uniforms))
        return super().step(count, uniforms)

    def move(self, source: int, target: int) -> None:
        """Move a request to another slot, on all ranks."""
        self._tell("move", source, target)
        super().move(source, target)

    def release(self, slot: int) -> None:
        """Forget the request of a slot, on all ranks."""
        self._tell("release", slot)
        super().release(slot)

    def stop(self) -> None:
        """Let the other ranks return from `follow`."""
        self._tell("stop")

    def follow(self) -> None:
        """Do what rank 0 does until it stops."""
        while (heard := self._hear())[0] != "stop":
            name, *arguments = heard
            if name == "prefill":
                arguments[2] = [sampling_of(settings) for settings in arguments[2]]
                arguments[5] = arguments[5] and [layout and layout_from(layout) for layout in arguments[5]]
            getattr(super(), name)(*arguments)

    def _tell(self, *words: Any) -> None:
        """Send a call to all ranks; what is sent is JSON, so that nothing is unpickled."""
        if distributed.get_rank() == 0:
            message = torch.frombuffer(bytearray(json.dumps(words).encode()), dtype=torch.uint8)
            distributed.broadcast(torch.tensor(len(message)), 0, group=self._group)
            distributed.broadcast(message, 0, group=self._group)

    def _hear(self) -> list[Any]:
        """Receive a call of rank 0."""
        size = torch.tensor(0)
        distributed.broadcast(size, 0, group=self._group)
        message = torch.empty(int(size), dtype=torch.uint8)
        distributed.broadcast(message, 0, group=self._group)
        return json.loads(message.numpy().tobytes())


def sampling_of(settings: dict[str, Any]) -> Sampling:
    """Return the settings that `asdict` and JSON have made a dictionary."""
    bias = {int(token_id): value for token_id, value in settings["logit_bias"].items()}
    return Sampling(**{**settings, "logit_bias": bias})


def layout_from(fields: dict[str, Any]) -> Layout:
    """Return the layout that `asdict` and JSON have made a dictionary."""
    return Layout(**{**fields, "position_ids": tuple(fields["position_ids"])})
