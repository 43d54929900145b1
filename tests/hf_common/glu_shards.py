"""Tells transformers' tensor-parallel tests, which know styles by name, how `glu_colwise` cuts: as a packed style."""

from typing import Any
from unittest import mock

import torch
from transformers_tests import test_tensor_parallel_mixin as mixin

reference_grad_shard = mixin._reference_grad_shard
compare_gradients = mixin._test_tp_backward_impl


def reference_grad_shard_of_glu(
    name: str, grad: torch.Tensor, local_grad: torch.Tensor, rank: int, world_size: int, tp_plan: dict[str, str]
) -> torch.Tensor:
    plan = {module: "packed_colwise" if style == "glu_colwise" else style for module, style in tp_plan.items()}
    return reference_grad_shard(name, grad, local_grad, rank, world_size, plan)


def compare_gradients_with_glu(rank: int, *args: Any) -> None:
    """Stand in for `_test_tp_backward_impl`; it lives here because the ranks import it."""
    with mock.patch.object(mixin, "_reference_grad_shard", reference_grad_shard_of_glu):
        compare_gradients(rank, *args)
