"""How DeepSpeed's ZeRO-1 shards the optimizer, and what it holds while it averages gradients over replicas.

An optimizer group is flat: its parameters one behind the other, split into equal shards for the replicas. At the end
of a step gradients are averaged in buckets, group by group:

    1. A gradient moves into the bucket, or stays where it is if it is larger than that. A full bucket is averaged.
    2. Parts of it that lie apart are sent together, joined in a new tensor, as much as a bucket would hold. Parts that
       are updated by one replica are one, but in a model of 16 bits every one that the replica itself updates lies
       apart.
    3. In a model of 16 bits, what the replica itself updates is added to a place for all of its group, made before
       anything is joined. In fp32, the gradients of parameters of which it updates any part are copied to one for all
       of them.

All sizes are in elements of fp32, in which gradients add up.

Source: DeepSpeed 0.19, runtime/zero/stage_1_and_2.py.
"""

from itertools import accumulate, groupby
from math import ceil

from glm_hf.training.pipeline.engine import BUCKET_SIZE

Slices = list[tuple[int, int]]  # (replica that updates it, elements)


def optimizer_groups(parameters: list[tuple[str, int]]) -> list[list[int]]:
    """Return the elements of parameters with weight decay and of those without, which are biases and norms."""
    is_plain = [not name.endswith("bias") and "norm" not in name for name, _ in parameters]
    return [
        [numbers for (_, numbers), plain in zip(parameters, is_plain, strict=True) if plain is wanted]
        for wanted in (True, False)
    ]


def partition_size(group: list[int], dp_size: int) -> int:
    """Return the elements of a group that one replica updates, padding included."""
    return 2 * ceil(sum(group) / (2 * dp_size))


def slices_of(group: list[int], dp_size: int) -> list[Slices]:
    """Return who updates which part of every parameter of a group."""
    width, found = partition_size(group, dp_size), []
    for end, numbers in zip(accumulate(group), group, strict=True):
        start = end - numbers
        edges = [start, *range((start // width + 1) * width, end, width), end]
        found.append([(edge // width, after - edge) for edge, after in zip(edges, edges[1:], strict=False)])
    return found


def touched_elements(groups: list[list[int]], dp_size: int) -> list[int]:
    """Return, for every replica, the elements of all parameters of which it updates any part."""
    touched = [0] * dp_size
    for slices in (slices for group in groups for slices in slices_of(group, dp_size)):
        for replica, _ in slices:
            touched[replica] += _size(slices)
    return touched


def places_of(groups: list[list[int]], dp_size: int, is_16_bit: bool) -> list[int]:
    """Return, for every replica, the elements of the place of the gradients that it updates by."""
    if is_16_bit:
        return [sum(partition_size(group, dp_size) for group in groups)] * dp_size
    return touched_elements(groups, dp_size)


def reducing_elements(
    groups: list[list[int]], dp_size: int, is_16_bit: bool, bucket_size: int = BUCKET_SIZE
) -> list[int]:
    """Return, for every replica, the most that it holds while gradients are averaged, the gradients included."""
    buckets = _buckets([slices for group in groups for slices in slices_of(group, dp_size)], bucket_size)
    places = places_of(groups, dp_size, is_16_bit)
    return [_most_held(buckets, replica, places[replica], is_16_bit, bucket_size) for replica in range(dp_size)]


def _most_held(buckets: list[list[Slices]], replica: int, place: int, is_16_bit: bool, bucket_size: int) -> int:
    """Return the most elements that a replica holds while buckets are averaged, with a place for what it updates."""
    most = held = sum(_size(slices) for bucket in buckets for slices in bucket) + bucket_size
    has_place = False
    for bucket in buckets:
        is_large = _size(bucket[0]) > bucket_size
        own = [slices for slices in bucket if any(owner == replica for owner, _ in slices)]
        held -= 0 if is_large else sum(map(_size, bucket))
        added = place if own and not has_place else 0
        has_place = has_place or bool(own)
        joined = _joined(bucket, replica if is_16_bit else None, bucket_size)
        most = max(most, held + added + joined if is_16_bit else held + max(added, joined))
        held += added - (sum(map(_size, own)) if is_large else 0)
    return most


def _size(slices: Slices) -> int:
    return sum(numbers for _, numbers in slices)


def _buckets(parameters: list[Slices], bucket_size: int) -> list[list[Slices]]:
    """Return the parameters that are averaged together."""
    buckets: list[list[Slices]] = [[]]
    for slices in parameters:
        if buckets[-1] and sum(map(_size, buckets[-1])) + _size(slices) > bucket_size:
            buckets.append([])
        buckets[-1].append(slices)
    return buckets


def _joined(bucket: list[Slices], apart: int | None, bucket_size: int) -> int:
    """Return the largest tensor that is joined from parts; those of the replica `apart` are never one."""
    parts = enumerate(part for slices in bucket for part in slices)
    same = groupby(parts, key=lambda part: (part[1][0], part[0] if part[1][0] == apart else None))
    runs = [sum(numbers for _, (_, numbers) in run) for _, run in same]
    largest, joined = 0, []
    for numbers in runs:
        joined.append(numbers)
        if len(joined) > 1:
            largest = max(largest, sum(joined))
        if sum(joined) > bucket_size:
            joined = []
    return largest
