"""The most memory that some work takes at once."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

ROUNDS = 10


def peak_of(work: Callable[[], object]) -> int:
    """
    Return the most bytes that the CPU's allocator has given out; the least of some rounds.

    The profiler does not see what gloo's own threads free, when they are the last to hold a tensor, and counts it on.
    """
    work()
    return min(_peak_of(work) for _ in range(ROUNDS))


def _peak_of(work: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
