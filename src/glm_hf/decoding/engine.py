"""What runs on the devices: contexts read into slots, and one token of all slots in a step.

Positions stay at the mask behind `[MASK]` and `[sMASK]` and count on behind `[gMASK]`; where the next token of a row
stands follows from the layout rule, by two more tokens behind it.

Shapes: `R` slots, `B` slots that take part, `L` length of the longest context, `V` vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from glm_hf.decoding.cache import SlotCache, round_up
from glm_hf.decoding.requests import Layout, Sampling
from glm_hf.decoding.sampling import CANDIDATES, Choice, Kinds, SlotSettings
from glm_hf.infilling_glm import infilling_layout, mask_token_ids
from glm_hf.peft_glm import num_virtual_tokens
from glm_hf.versions_glm import CACHE

FIRST_CAPACITY = 256
GREEDY = Kinds(draws=False, filters=False, penalizes=False, is_biased=False, num_top=0)
ALL_KINDS = Kinds(draws=True, filters=True, penalizes=True, is_biased=True, num_top=20)
"""The two that steps of fixed shapes are made for."""
MOST_GRAPHS = 64


class Engine:
    """
    The slots of a model, and the three things that are done to them.

    Slots that are in use stand in front, as the caller keeps them by `move`.

    Args:
        model: A `GLMForBlankInfilling`, or a PEFT model of one, in evaluation mode.
        num_slots: Requests at once `R`.
        max_length: Most tokens of a slot, context and answer; by default the model's window.
        is_static: Whether a step has one of few shapes, for 1, 2, 4, 8 ... slots of full length, each of which is
            captured as a CUDA graph on a GPU; otherwise steps are as short as the longest request allows.
        backend: Backend by which `torch.compile` makes whole graphs of such steps, None for no compilation.

    Raises:
        ValueError: If `num_slots` or `max_length` are out of range, or a backend comes without fixed shapes.
    """

    def __init__(
        self,
        model: Any,
        num_slots: int = 32,
        max_length: int | None = None,
        is_static: bool = False,
        backend: str | None = None,
    ) -> None:
        self.model = model
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = self.base.config
        self.num_virtual = num_virtual_tokens(model)
        window = self.config.max_position_embeddings
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, got {num_slots}")
        if max_length is not None and not self.num_virtual + 2 < max_length <= window:
            raise ValueError(f"max_length must be from {self.num_virtual + 3} to {window}, got {max_length}")
        if backend is not None and not is_static:
            raise ValueError("steps are compiled with fixed shapes only; pass is_static=True")
        self.max_length = max_length or window
        self.is_static = is_static
        self.device = self.base._pad_left([[self.config.pad_token_id]])[0].device
        self.cache = SlotCache(
            self.config.num_hidden_layers,
            num_slots,
            self.max_length if is_static else FIRST_CAPACITY,
            self.max_length,
            self.device,
        )
        suppressed = self.base.generation_config.suppress_tokens or ()
        never = {*mask_token_ids(self.config), self.config.sop_token_id, *suppressed}
        self.settings = SlotSettings(num_slots, self.config.vocab_size, sorted(never), self.device)
        self.tokens = torch.full((num_slots,), self.config.pad_token_id, device=self.device)
        self.positions, self.increments, self.in_use = torch.zeros(3, num_slots, dtype=torch.long, device=self.device)
        self.rows = torch.arange(num_slots, device=self.device)
        self._lengths = [0] * num_slots
        self._run: Callable[..., Choice] = self._decode
        if backend is not None:
            compiled = torch.compile(self._decode, fullgraph=True, dynamic=False, backend=backend)
            self._run = torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS)(compiled)
        self._graphs: dict[tuple[int, Kinds], tuple[Any, Tensor, Choice]] = {}

    @torch.no_grad()
    def prefill(
        self,
        rows: Sequence[Sequence[int]],
        slots: Sequence[int],
        sampling: Sequence[Sampling],
        num_top: Sequence[int],
        uniforms: Sequence[float],
        layouts: Sequence[Layout | None] | None = None,
    ) -> Choice:
        """
        Read rows that hold `sop`, whole and both ways, into slots, and choose their first tokens.

        Args:
            rows: Ids of the rows; equal ones are read once.
            slots: Numbers of free slots, one for each row.
            sampling: Settings of each row.
            num_top: Number of most likely tokens to report of each row.
            uniforms: Random number of each row, above 0 and up to 1.
            layouts: Of the rows that have one of their own.
        """
        samples = [(tuple(row), layout) for row, layout in zip(rows, layouts or [None] * len(rows), strict=True)]
        distinct = {sample: index for index, sample in enumerate(dict.fromkeys(samples))}
        padded, attention_mask = self.base._pad_left([row for row, _ in distinct])
        position_ids = None
        if any(layout is not None for _, layout in distinct):
            attention_mask, position_ids = self._lay_out([*distinct], padded.shape[1])
        outputs = self.model(
            padded, attention_mask=attention_mask, position_ids=position_ids, use_cache=True, logits_to_keep=1
        )
        self.cache.reserve(self.num_virtual + padded.shape[1] + 1)
        for sample, slot, settings, number in zip(samples, slots, sampling, num_top, strict=True):
            (row, layout), source = sample, distinct[sample]
            self.cache.admit(slot, outputs[CACHE], source, self.num_virtual, len(row))
            self._lengths[slot] = self.num_virtual + len(row)
            self.settings.assign(slot, settings, number, row)
            layout = layout or layout_of(row, self.config)
            self.positions[slot] = self.num_virtual + layout.next_position
            self.increments[slot], self.in_use[slot] = layout.increment, 1
        index = torch.tensor([distinct[sample] for sample in samples], device=outputs.logits.device)
        where = torch.tensor(slots, device=self.device)
        logits = outputs.logits[index, -1].to(self.device)
        chances = torch.tensor(uniforms, dtype=torch.float, device=self.device)
        choice = self.settings.choose(logits, where, chances, self.settings.kinds(slots))
        self.tokens[where] = choice.ids
        return choice

    def _lay_out(self, samples: Sequence[tuple[tuple[int, ...], Layout | None]], length: int) -> tuple[Tensor, Tensor]:
        """Return a mask `(B, 1, L, L)` and positions `(B, L)` of rows padded on the left, by their layouts."""
        visible = torch.zeros(len(samples), 1, length, length, dtype=torch.bool)
        position_ids = torch.zeros(len(samples), length, dtype=torch.long)
        for index, (row, layout) in enumerate(samples):
            layout, first = layout or layout_of(row, self.config), length - len(row)
            visible[index, 0, first:, first:] = torch.ones(len(row), len(row), dtype=torch.bool).tril()
            visible[index, 0, first:, first : first + layout.num_context] = True
            visible[index, 0, :first, first] = True  # padding has to see something
            position_ids[index, first:] = torch.tensor(layout.position_ids)
        return visible.to(self.device), position_ids.to(self.device)

    @torch.no_grad()
    def step(self, count: int, uniforms: Sequence[float]) -> Choice:
        """
        Decode one token of the first `count` slots.

        Args:
            count: Slots in use.
            uniforms: Random number of each, above 0 and up to 1.
        """
        kinds, batch = self.settings.kinds(range(count)), count
        if self.is_static:
            batch = min(self.cache.num_slots, 1 << (count - 1).bit_length())
            kinds = kinds if kinds == GREEDY else ALL_KINDS
        else:
            longest = max(self._lengths[:count])
            self.cache.reserve(longest + 1)
            self.cache.span = min(self.cache.capacity, round_up(longest + 1))
        padded = torch.tensor([*uniforms, *[1.0] * (batch - count)], dtype=torch.float)
        if self.is_static and self.device.type == "cuda":
            choice = self._graph(batch, kinds, padded)
        else:
            choice = self._run(padded.to(self.device), kinds)
        for slot in range(count):
            self._lengths[slot] += 1
        return Choice(*(part[:count] for part in choice))

    def _decode(self, uniforms: Tensor, kinds: Kinds) -> Choice:
        """Decode one token of as many slots as there are random numbers `(B,)`."""
        rows = self.rows[: len(uniforms)]
        lengths, in_use = self.cache.lengths[rows], self.in_use[rows]
        visible = torch.arange(self.cache.span, device=self.device) <= lengths[:, None]  # (B, S)
        outputs = self.base(
            self.tokens[rows, None],
            attention_mask=visible[:, None, None],
            position_ids=self.positions[rows, None],
            logits_to_keep=1,
            **{CACHE: self.cache},
        )
        logits = outputs.logits[:, -1].to(self.device)
        at_once = self.config.vocab_size if self.is_static else CANDIDATES
        choice = self.settings.choose(logits, rows, uniforms, kinds, at_once)
        self.tokens[rows] = choice.ids
        self.positions[rows] += self.increments[rows] * in_use
        self.cache.lengths[rows] += in_use
        return choice

    def move(self, source: int, target: int) -> None:
        """Move a request to another slot."""
        self.cache.move(source, target, self._lengths[source])
        self.settings.move(source, target)
        for values in (self.tokens, self.positions, self.increments, self.in_use):
            values[target] = values[source]
        self._lengths[target] = self._lengths[source]

    def release(self, slot: int) -> None:
        """Forget the request of a slot."""
        self.cache.release(slot)
        self._lengths[slot] = 0
        self.in_use[slot] = 0

    def _graph(self, batch: int, kinds: Kinds, uniforms: Tensor) -> Choice:
        """Replay the CUDA graph of a step, which is captured when it is first needed."""
        if (batch, kinds) not in self._graphs:
            static = uniforms.to(self.device)
            saved = [values.clone() for values in self._state()]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._run(static, kinds)  # compiles, and lets libraries allocate
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                choice = self._run(static, kinds)
            for values, before in zip(self._state(), saved, strict=True):
                values.copy_(before)
            self._graphs[batch, kinds] = (graph, static, choice)
        graph, static, choice = self._graphs[batch, kinds]
        static.copy_(uniforms, non_blocking=True)
        graph.replay()
        return choice

    def _state(self) -> list[Tensor]:
        """Return what a step changes besides keys and values, which it writes again."""
        return [self.tokens, self.positions, self.cache.lengths, self.settings.is_seen]


def layout_of(row: Sequence[int], config: Any) -> Layout:
    """Return the layout of a row that holds `sop`, by the layout rule."""
    ids = torch.tensor([[*row, config.pad_token_id, config.pad_token_id]])
    position_ids, in_context = infilling_layout(ids, config)
    *positions, position, following = position_ids[0].tolist()
    return Layout(tuple(positions), int(in_context.sum()), position, following - position)
