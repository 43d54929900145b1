"""How a model is spread over processes: tensor x pipeline x data, and which process holds what.

Ranks are numbered so that the tensor-parallel ranks of a layer are neighbours, on one machine, and stages lie farthest
apart: `rank = (stage * dp_size + data_rank) * tp_size + tensor_rank`.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from glm_hf.configuration_glm import GLMConfig

OLD_NAMES = {"tensor": "tp_size", "pipeline": "pp_size", "data": "dp_size"}
"""Names of the degrees in mappings and checkpoints of glm_hf 0.1."""


@dataclass(frozen=True)
class ParallelDegrees:
    """
    Degrees of 3D parallelism.

    Args:
        tp_size: Number of ranks that every layer is sharded over.
        pp_size: Number of stages that the layers are spread over.
        dp_size: Number of replicas of the model, each with samples of its own.
        partition: Layers of every stage, by default balanced: the embedding in front of the first stage and the head
            behind the last count as a layer each.
        sequence_parallel: Whether norms, dropout and residuals have `1 / tp_size` of a row's tokens on every rank
            instead of all, which takes less memory and sends as much.

    Raises:
        ValueError: If a degree is not positive, or `partition` does not have as many values as there are stages.

    Source: GLM-130B (arXiv 2210.02414), section 3 and appendix B.3: tensor 4, pipeline 8, 70 = 9 * 8 - 2 layers;
        sequence parallelism: Korthikanti et al. (arXiv 2205.05198).
    """

    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    partition: tuple[int, ...] | None = None
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        """Check the degrees."""
        for name in ("tp_size", "pp_size", "dp_size"):
            degree = getattr(self, name)
            if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {degree!r}")
        if self.partition is not None:
            if not all(isinstance(count, int) and count >= 1 for count in self.partition):
                raise ValueError(f"partition must give every stage at least 1 layer, got {self.partition}")
            if len(self.partition) != self.pp_size:
                raise ValueError(f"partition must have a value per stage ({self.pp_size}), got {len(self.partition)}")
        if not isinstance(self.sequence_parallel, bool):
            raise ValueError(f"sequence_parallel must be true or false, got {self.sequence_parallel!r}")

    @classmethod
    def of(cls, given: "ParallelDegrees | Mapping[str, Any]") -> "ParallelDegrees":
        """Return the degrees of a mapping such as `{"tp_size": 4, "pp_size": 8, "dp_size": 24}`."""
        if isinstance(given, ParallelDegrees):
            return given
        if isinstance(given, Mapping) and (old := [name for name in OLD_NAMES if name in given]):
            new = ", ".join(OLD_NAMES[name] for name in old)
            warnings.warn(
                f"parallel: {', '.join(old)} became {new}; the old names go with glm_hf 0.3", DeprecationWarning, 2
            )
            given = {OLD_NAMES.get(name, name): value for name, value in given.items()}
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or set(given) - set(known):
            raise ValueError(f"parallel takes {', '.join(known)}, got {given!r}")
        partition = given.get("partition")
        if partition is not None and not isinstance(partition, (list, tuple)):
            raise ValueError(f"partition must list the layers of every stage, got {partition!r}")
        return cls(**{**given, "partition": None if partition is None else tuple(partition)})

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tp_size * self.pp_size * self.dp_size

    @property
    def sequence_multiple(self) -> int:
        """Divisor of the length of rows."""
        return self.tp_size if self.sequence_parallel else 1

    def describe(self) -> str:
        """Return the degrees in words."""
        return f"tensor {self.tp_size} x pipeline {self.pp_size} x data {self.dp_size}"

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """Return the stage of a rank, its place among the replicas, and its place among the ranks of a layer."""
        rest, tensor_rank = divmod(rank, self.tp_size)
        stage, data_rank = divmod(rest, self.dp_size)
        return stage, data_rank, tensor_rank

    def stage_layers(self, num_layers: int) -> tuple[range, ...]:
        """
        Return the layers of every stage.

        Raises:
            ValueError: If there are more stages than layers, or `partition` has another number of layers.
        """
        if self.pp_size > num_layers:
            raise ValueError(f"pp_size must be at most the number of layers ({num_layers}), got {self.pp_size}")
        if self.partition is not None and sum(self.partition) != num_layers:
            raise ValueError(f"partition must hold the {num_layers} layers of the model, got {sum(self.partition)}")
        counts = self.partition or self._balanced(num_layers)
        ends = [sum(counts[: stage + 1]) for stage in range(self.pp_size)]
        return tuple(range(end - count, end) for end, count in zip(ends, counts, strict=True))

    def _balanced(self, num_layers: int) -> tuple[int, ...]:
        """Return as even a share of the layers as there is, where embedding and head weigh a layer each."""
        counts, last = [1] * self.pp_size, self.pp_size - 1
        for _ in range(num_layers - self.pp_size):
            loads = [count + (stage == 0) + (stage == last) for stage, count in enumerate(counts)]
            counts[loads.index(min(loads))] += 1
        return tuple(counts)

    def require_fits(self, config: GLMConfig) -> None:
        """Raise ValueError unless a model of this configuration can be spread in this way."""
        sizes = {name: getattr(config, name) for name in ("num_attention_heads", "intermediate_size", "vocab_size")}
        for name, size in sizes.items():
            if size % self.tp_size:
                raise ValueError(f"tp_size must divide {name} ({size}), got {self.tp_size}")
        self.stage_layers(config.num_hidden_layers)

    def require_world(self, world_size: int) -> None:
        """Raise ValueError unless there are as many processes as this takes."""
        if world_size != self.world_size:
            raise ValueError(
                f"{self.describe()} takes {self.world_size} processes, but {world_size} were started; "
                f"start as many, such as by torchrun --nproc-per-node {self.world_size} on one machine"
            )
