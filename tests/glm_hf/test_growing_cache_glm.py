"""Every check is against transformers' own layer of a cache, which is changed in the same way."""

import copy
import pickle
import random

import pytest
import torch
from golden import golden_config
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache

from glm_hf.growing_cache_glm import GrowingLayer, keep_room

NUM_LAYERS = 2


def states(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, length, 4), torch.randn(batch, 3, length, 4)


def filled(length: int = 5, batch: int = 2) -> tuple[DynamicCache, DynamicCache]:
    """Return a cache that keeps room and one that does not, of the same tokens."""
    ours, stock = DynamicCache(), DynamicCache()
    keep_room(ours)
    for index in range(NUM_LAYERS):
        update((ours, stock), index, length, batch)
    return ours, stock


def update(caches: tuple[DynamicCache, DynamicCache], index: int, length: int, batch: int) -> None:
    new = states(batch, length)
    with torch.no_grad():
        returned = [cache.update(*new, index) for cache in caches]
    for ours, stock in zip(*returned, strict=True):
        assert torch.equal(ours, stock)


def assert_same(ours: DynamicCache, stock: DynamicCache) -> None:
    assert ours.get_seq_length() == stock.get_seq_length()
    for own, other in zip(ours.layers, stock.layers, strict=True):
        assert torch.equal(own.keys, other.keys)
        assert torch.equal(own.values, other.values)


def test_new_tokens_are_written_behind_the_others():
    ours, stock = filled()
    room = ours.layers[0].room
    for _ in range(16):
        for index in range(NUM_LAYERS):
            update((ours, stock), index, 1, 2)
    assert ours.layers[0].room is room
    assert ours.layers[0].keys.data_ptr() == room.keys.data_ptr()
    assert_same(ours, stock)


def test_memory_grows_by_a_sixteenth_up_to_the_window():
    ours, stock = filled(length=800)
    for window, length, capacity in (
        (None, 1, 850),
        (None, 50, 904),
        (900, 60, 911),
        (2000, 1, 969),
        (1000, 60, 1000),
    ):
        ours.layers[0].window = window
        update((ours, stock), 0, length, 2)
        assert ours.layers[0].room.keys.shape[2] == capacity
    assert torch.equal(ours.layers[0].keys, stock.layers[0].keys)


CHANGES = {
    "cropped": lambda cache: cache.crop(-2),
    "repeated": lambda cache: cache.batch_repeat_interleave(2),
    "chosen": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "reset": lambda cache: cache.reset(),
    "moved": lambda cache: [setattr(layer, "keys", layer.keys.clone()) for layer in cache.layers],
    "first row": lambda cache: [narrow(layer) for layer in cache.layers],
    "pickled": lambda cache: cache.__dict__.update(pickle.loads(pickle.dumps(cache)).__dict__),
}


def narrow(layer: DynamicLayer) -> None:
    layer.keys, layer.values = layer.keys[:1], layer.values[:1]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_caches_go_on_as_transformers_do(change):
    ours, stock = filled()
    for cache in (ours, stock):
        CHANGES[change](cache)
    batch = len(ours.layers[0].keys) if ours.layers[0].is_initialized else 2
    for length in (1, 3, 70, 1):
        for index in range(NUM_LAYERS):
            update((ours, stock), index, length, batch)
    assert_same(ours, stock)


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_changes_and_tokens(seed):
    rng = random.Random(seed)
    caches = [filled()]
    for _ in range(30):
        pair = rng.choice(caches)
        action = rng.choice(["add", "add", "add", "crop", "deep", "shallow"])
        if action == "add":
            length = rng.choice([1, 1, 2, 65])
            for index in range(NUM_LAYERS):
                update(pair, index, length, 2)
        elif action == "crop" and pair[0].get_seq_length() > 2:
            removed = rng.choice([1, 2])
            for cache in pair:
                cache.crop(-removed)
        elif action == "deep":
            caches.append(copy.deepcopy(pair))
        elif action == "shallow":
            caches.append(tuple(map(shallow, pair)))
        for ours, stock in caches:
            assert_same(ours, stock)


def shallow(cache: DynamicCache) -> DynamicCache:
    """Return a cache whose layers share their memory with those of another."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def test_gradients_flow_through_keys_and_values():
    ours, _ = filled()
    new = [tensor.requires_grad_() for tensor in states(2, 1)]
    keys, values = ours.update(*new, 0)
    later, _ = ours.update(*states(2, 1), 0)
    (keys.sum() + values.sum() + later.sum()).backward()
    assert (new[0].grad == 2).all()
    assert (new[1].grad == 1).all()


def test_tokens_of_inference_mode_are_added_to_outside_of_it():
    ours, stock = DynamicCache(), DynamicCache()
    keep_room(ours)
    with torch.inference_mode():
        new = states(1, 3)
        ours.update(*new, 0)
        stock.update(*new, 0)
    update((ours, stock), 0, 1, 1)
    assert_same(ours, stock)


def test_filled_caches_of_others_keep_room_from_now_on():
    cache = DynamicCache()
    keys, _ = cache.update(*states(2, 5), 0)
    keep_room(cache)
    new = states(2, 1)
    with torch.no_grad():
        again, _ = cache.update(*new, 0)
    assert type(cache.layers[0]) is GrowingLayer
    assert torch.equal(again, torch.cat((keys, new[0]), dim=2))


def test_other_kinds_of_caches_stay_as_they_are(monkeypatch):
    class Own(DynamicCache):
        pass

    own = Own()
    own.update(*states(1, 2), 0)
    keep_room(own)
    keep_room(None)
    assert type(own.layers[0]) is DynamicLayer
    static = StaticCache(config=golden_config("cfg1"), max_cache_len=8)
    before = [type(layer) for layer in static.layers]
    keep_room(static)
    assert [type(layer) for layer in static.layers] == before
