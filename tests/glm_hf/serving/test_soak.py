"""A few seconds of clients that behave badly; `make soak` is the same for ten minutes."""

from soak import soak


def test_no_slot_is_lost_and_every_valid_request_is_answered_rightly():
    clients, _, left = soak(8, seed=1)
    assert clients.problems == []
    assert left == (0, 0, 0)
    assert min(clients.done[kind] for kind in ("ask", "draw", "stream", "leave", "wrong", "garbage", "large")) > 0
