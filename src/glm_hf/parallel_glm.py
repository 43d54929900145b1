"""How tensor-parallel ranks share a GLU, which transformers' own styles do not know."""

from torch import nn
from torch.distributed.tensor import DeviceMesh, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, PackedColwiseParallel


class GLUColwiseParallel(PackedColwiseParallel):
    """
    Split each half of a GLU's up-projection over the ranks, weight and bias alike.

    transformers' `packed_colwise` cuts a bias in one piece, so that the first rank gets the bias of the first half.
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
