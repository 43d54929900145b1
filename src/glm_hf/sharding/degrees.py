"""How a model is spread over processes: tensor x pipeline x data, and which process holds what.

Ranks are numbered so that the tensor-parallel ranks of a layer are neighbours, on one machine, and stages lie farthest
apart: `rank = (stage * data + data_rank) * tensor + tensor_rank`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from glm_hf.configuration_glm import GLMConfig


@dataclass(frozen=True)
class Parallel:
    """
    Degrees of 3D parallelism.

    Args:
        tensor: Ranks over which every layer is cut.
        pipeline: Stages over which the layers are spread.
        data: Copies of the model, each with its own samples.
        partition: Layers of every stage, by default balanced: the embedding in front of the first stage and the head
            behind the last count as a layer each.

    Raises:
        ValueError: If a degree is not positive, or `partition` is no list of as many numbers as there are stages.

    Source: GLM-130B (arXiv 2210.02414), section 3 and appendix B.3: tensor 4, pipeline 8, 70 = 9 * 8 - 2 layers.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    partition: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the degrees."""
        for name in ("tensor", "pipeline", "data"):
            degree = getattr(self, name)
            if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
                raise ValueError(f"{name} must be a number of at least 1, got {degree!r}")
        if self.partition is not None:
            if not all(isinstance(count, int) and count >= 1 for count in self.partition):
                raise ValueError(f"partition must give every stage at least 1 layer, got {self.partition}")
            if len(self.partition) != self.pipeline:
                raise ValueError(
                    f"partition must tell the layers of each of the {self.pipeline} stages, got {len(self.partition)}"
                )

    @classmethod
    def of(cls, given: "Parallel | Mapping[str, Any]") -> "Parallel":
        """Return the degrees of a mapping such as `{"tensor": 4, "pipeline": 8, "data": 24}`."""
        if isinstance(given, Parallel):
            return given
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or set(given) - set(known):
            raise ValueError(f"parallel takes {', '.join(known)}, got {given!r}")
        partition = given.get("partition")
        if partition is not None and not isinstance(partition, (list, tuple)):
            raise ValueError(f"partition must be a list of the layers of every stage, got {partition!r}")
        return cls(**{**given, "partition": None if partition is None else tuple(partition)})

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tensor * self.pipeline * self.data

    def describe(self) -> str:
        """Return the degrees in words."""
        return f"tensor {self.tensor} x pipeline {self.pipeline} x data {self.data}"

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """Return the stage of a rank, its place among the copies, and its place among the ranks of a layer."""
        rest, tensor_rank = divmod(rank, self.tensor)
        stage, data_rank = divmod(rest, self.data)
        return stage, data_rank, tensor_rank

    def stage_layers(self, num_layers: int) -> tuple[range, ...]:
        """
        Return the layers of every stage.

        Raises:
            ValueError: If there are more stages than layers, or `partition` has another number of layers.
        """
        if self.pipeline > num_layers:
            raise ValueError(f"pipeline must be at most the number of layers ({num_layers}), got {self.pipeline}")
        if self.partition is not None and sum(self.partition) != num_layers:
            raise ValueError(f"partition must hold the {num_layers} layers of the model, got {sum(self.partition)}")
        counts = self.partition or self._balanced(num_layers)
        ends = [sum(counts[: stage + 1]) for stage in range(self.pipeline)]
        return tuple(range(end - count, end) for end, count in zip(ends, counts, strict=True))

    def _balanced(self, num_layers: int) -> tuple[int, ...]:
        """Return as even a share of the layers as there is, where embedding and head weigh a layer each."""
        counts, last = [1] * self.pipeline, self.pipeline - 1
        for _ in range(num_layers - self.pipeline):
            loads = [count + (stage == 0) + (stage == last) for stage, count in enumerate(counts)]
            counts[loads.index(min(loads))] += 1
        return tuple(counts)

    def require_fits(self, config: GLMConfig) -> None:
        """Raise ValueError unless a model of this configuration can be spread in this way."""
        sizes = {name: getattr(config, name) for name in ("num_attention_heads", "intermediate_size", "vocab_size")}
        for name, size in sizes.items():
            if size % self.tensor:
                raise ValueError(f"tensor must divide {name} ({size}), got {self.tensor}")
        self.stage_layers(config.num_hidden_layers)

    def require_world(self, world_size: int) -> None:
        """Raise ValueError unless there are as many processes as this takes."""
        if world_size != self.world_size:
            raise ValueError(
                f"{self.describe()} takes {self.world_size} processes, but {world_size} were started; "
                f"start as many, such as by torchrun --nproc-per-node {self.world_size} on one machine"
            )
