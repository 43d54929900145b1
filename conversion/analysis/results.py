"""What an analysis finds, as analysis.json holds it."""

from typing import TypedDict

from glm_hf.conversion.analysis.tensor import Scheme, Statistics


class TensorAnalysis(Statistics):
    """One weight matrix; `layer` is None for embeddings."""

    name: str
    layer: int | None
    kind: str
    shape: list[int]
    dtype: str


class KindAnalysis(TypedDict):
    """Means over the tensors of one kind; None where a value is defined for none of them."""

    num_tensors: int
    num_weights: int
    std: float
    kurtosis: float | None
    share_beyond_6_std: float
    relative_rms_error: dict[str, float | None]


class Analysis(TypedDict):
    """What analysis.json holds, in `units`."""

    version: int
    model: str
    units: dict[str, str]
    schemes: dict[str, Scheme]
    histogram_edges: list[float]
    kinds: dict[str, KindAnalysis]
    tensors: list[TensorAnalysis]
