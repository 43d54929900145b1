import threading
import time

import pytest
import torch

from glm_hf.conversion.streaming.blocks import read_ahead, split_block
from glm_hf.sharding.rules import COLUMN, GATED, REPLICATED, ROW

MATRIX = torch.arange(96).view(16, 6)


@pytest.mark.parametrize("num_rows", [1, 3, 5, 16])
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("rule", [COLUMN, ROW, GATED, REPLICATED])
def test_blocks_give_every_rank_its_part(rule, tp_size, num_rows):
    ranks = [[] for _ in range(tp_size)]
    start = 0
    for block in MATRIX.split(num_rows):
        for rank, part in split_block(rule, len(MATRIX), tp_size, start, block):
            assert part.is_contiguous()
            ranks[rank].append(part)
        start += len(block)
    parts = [torch.cat(rank) for rank in ranks]
    assert all(map(torch.equal, parts, rule.split(MATRIX, tp_size)))


def test_reading_ahead_keeps_order_and_uses_another_thread():
    threads = []

    def numbers():
        for number in range(5):
            threads.append(threading.current_thread())
            yield number

    assert list(read_ahead(numbers())) == list(range(5))
    assert threading.current_thread() not in threads


def test_next_item_is_made_while_the_last_is_used():
    made = []

    def numbers():
        for number in range(3):
            made.append(number)
            yield number

    items = read_ahead(numbers())
    assert next(items) == 0
    deadline = time.monotonic() + 10
    while made != [0, 1] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert made == [0, 1]  # one, and not more
    items.close()


def test_errors_of_the_reader_arrive_in_their_turn():
    def numbers():
        yield 1
        raise ValueError("damaged")

    items = read_ahead(numbers())
    assert next(items) == 1
    with pytest.raises(ValueError, match="damaged"):
        next(items)


def test_leaving_early_ends_the_thread():
    num_threads = threading.active_count()
    items = read_ahead(iter(range(100)))
    next(items)
    items.close()
    assert threading.active_count() == num_threads


def test_reading_ahead_leaves_a_core_to_the_caller():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        ahead = read_ahead(torch.get_num_threads() for _ in range(3))
        assert next(ahead) == 2
        ahead.close()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
