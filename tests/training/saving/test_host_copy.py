"""Copies of a state in host memory, against what `torch.save` and `deepcopy` make of the original."""

import io
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from glm_hf.training.saving.host_copy import HostBuffers, host_copy


def saved(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def adam_state() -> dict:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3).bfloat16())
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {"optimizer": optimizer.state_dict(), "model": model.state_dict(), "step": 1, "names": ("a", None)}


def test_the_file_of_a_copy_is_that_of_the_original():
    state = adam_state()
    assert saved(host_copy(state, HostBuffers())) == saved(state)


def test_a_copy_does_not_change_with_the_original():
    scaler = SimpleNamespace(scale=1024.0)
    state = {"flat": torch.arange(6.0), "history": [1, 2], "scaler": scaler}
    copied = host_copy(state, HostBuffers())
    state["flat"].zero_()
    state["history"].append(3)
    scaler.scale = 1.0
    assert torch.equal(copied["flat"], torch.arange(6.0))
    assert copied["history"] == [1, 2]
    assert copied["scaler"].scale == 1024.0


def test_tensors_that_share_memory_share_it_in_the_copy():
    weight = torch.arange(12.0).view(3, 4)
    copied = host_copy(OrderedDict(embedding=weight, head=weight.T, row=weight[1]), HostBuffers())
    assert isinstance(copied, OrderedDict)
    copied["embedding"].zero_()
    assert not copied["head"].any()
    assert not copied["row"].any()


def test_parts_of_a_large_buffer_are_copied_without_the_rest():
    """As DeepSpeed keeps layers."""
    flat = torch.randn(1_000_000)
    state = [flat[400:500].view(10, 10), flat[500:503], flat[900_001:900_003]]
    copied = host_copy(state, HostBuffers())
    assert all(map(torch.equal, copied, state))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in copied}
    assert sorted(storages.values()) == [12, 412]  # begun at a multiple of 16 bytes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.bool, torch.uint8])
def test_dtypes_views_and_shapes_stay(dtype):
    base = torch.randint(0, 2, (5, 6)).to(dtype)
    state = [base[1:, ::2], base.T, base[2, 3], torch.empty(0, 3, dtype=dtype), torch.tensor(1, dtype=dtype)]
    for found, expected in zip(host_copy(state, HostBuffers()), state, strict=True):
        assert found.dtype == expected.dtype
        assert found.stride() == expected.stride()
        assert torch.equal(found, expected)


def test_parameters_stay_parameters():
    trained, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    copied = host_copy([trained, frozen, torch.ones(2, requires_grad=True)], HostBuffers())
    assert [type(tensor) for tensor in copied] == [nn.Parameter, nn.Parameter, torch.Tensor]
    assert [tensor.requires_grad for tensor in copied] == [True, False, True]


def test_the_next_copy_is_made_in_the_same_memory():
    buffers, addresses = HostBuffers(), []
    for value in range(3):
        copied = host_copy([torch.full((1000,), value), torch.full((1000,), -value)], buffers)
        addresses.append([tensor.data_ptr() for tensor in copied])
        assert [int(tensor[0]) for tensor in copied] == [value, -value]
        buffers.reuse()
    assert addresses[0] == addresses[1] == addresses[2]
    assert len(set(addresses[0])) == 2


def test_memory_that_a_copy_has_not_taken_is_freed():
    buffers = HostBuffers()
    host_copy([torch.ones(1000), torch.ones(2000)], buffers)
    buffers.reuse()
    host_copy([torch.ones(1000)], buffers)
    buffers.reuse()
    assert [buffer.numel() for kept in buffers._buffers.values() for buffer in kept] == [4000]
