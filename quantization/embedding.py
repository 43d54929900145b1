"""A token embedding whose rows are stored as INT8 codes with a scale each, as functional.py lays them out."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from glm_hf.quantization.functional import EMBEDDING_BITS
from glm_hf.quantization.stored_parameter import StoredWeight


class QuantizedEmbedding(StoredWeight, nn.Embedding):
    """
    Embedding that dequantizes the rows it looks up, and only these; no gradients flow to the weight.

    It is an `nn.Embedding`, so that PEFT puts adapters on it. A linear may share weight and scale.

    Args:
        num_embeddings: Tokens `V`.
        embedding_dim: Features `D`.
        dtype: Dtype of the result.
        device: Device of all tensors.

    Attributes:
        weight: `(V, D)` int8.
        weight_scale: `(V, 1)` fp16.
        output_dtype_like: `(0)`; its dtype is that of the result, which casts of the model change.
    """

    bits = EMBEDDING_BITS
    output_dtype_like: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        codes = torch.empty(num_embeddings, embedding_dim, dtype=torch.int8, device=device)
        super().__init__(num_embeddings, embedding_dim, _weight=codes, _freeze=True)
        self.scale_shape = num_embeddings, 1
        scale = torch.empty(self.scale_shape, dtype=torch.float16, device=device)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.register_buffer("output_dtype_like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows `(..., D)` of the tokens `input` `(...)`; on a rank with other rows than theirs, zeros."""
        weight, weight_scale = self._parameters["weight"], self._parameters["weight_scale"]
        assert weight is not None
        assert weight_scale is not None
        if not isinstance(weight, DTensor):
            return self._rows(input, weight, weight_scale)
        assert isinstance(weight_scale, DTensor)
        ids = input.to_local() if isinstance(input, DTensor) else input
        shape, (first, _) = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
        is_here = (ids >= first) & (ids < first + shape[0])
        rows = self._rows(torch.where(is_here, ids - first, 0), weight.to_local(), weight_scale.to_local())
        return rows * is_here[..., None]

    def _rows(self, ids: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
        rows = nn.functional.embedding(ids, weight).float() * nn.functional.embedding(ids, weight_scale).float()
        return rows.to(getattr(self.weight_scale, "cast_dtype", None) or self.output_dtype_like.dtype)
