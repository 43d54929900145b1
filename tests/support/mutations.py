"""Damage done to files at random: to bytes as disks and networks do it, and to values as people do."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEP = "[" * 3000 + "]" * 3000
HOSTILE = (
    *(None, True, False, 0, -1, 1, 2, 10**18, -(10**18), 1e308, 0.5, float("nan"), float("inf")),
    *("", "x", "[", "((((", "\0", "../../x", "/etc/passwd", "A" * 10_000, "模型", "True", "float99"),
    *([], {}, [[]], [None], ["x"], ["(((("], {"a": 1}, [10**18], {"": {}}),
)


def flip_a_bit(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def flip_many(content: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randrange(2, 50)):
        flip_a_bit(content, rng)


def put_zeros(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice((1, 16, 512, 4096)))
    content[start:end] = bytes(end - start)


def put_noise(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice((1, 16, 512)))
    content[start:end] = rng.randbytes(end - start)


def truncate(content: bytearray, rng: random.Random) -> None:
    del content[rng.choice((0, 1, rng.randrange(len(content)), len(content) - 1)) :]


def extend(content: bytearray, rng: random.Random) -> None:
    content += rng.choice((b"\0", b"\n", rng.randbytes(100), bytes(5000)))


def lose_a_part(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content))
    del content[start : start + rng.choice((1, 64, 4096))]


def repeat_a_part(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content))
    content[start:start] = content[start : start + rng.choice((1, 64, 4096))]


def swap_blocks(content: bytearray, rng: random.Random) -> None:
    size = min(512, len(content) // 2) or 1
    first, second = (rng.randrange(0, max(1, len(content) - size)) for _ in range(2))
    block = content[first : first + size]
    content[first : first + size] = content[second : second + size]
    content[second : second + size] = block


BYTE_DAMAGES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    *(flip_a_bit, flip_a_bit, flip_many, put_zeros, put_noise, truncate),
    *(extend, lose_a_part, repeat_a_part, swap_blocks),
)


def damage_bytes(path: Path, rng: random.Random, within: int | None = None) -> str:
    """Damage a file in one way, within its first bytes if told so, and return the name of that way."""
    content = bytearray(path.read_bytes())
    damage = rng.choice(BYTE_DAMAGES) if content else extend
    head = content if within is None else content[:within]
    tail = b"" if within is None else content[within:]
    damage(head, rng)
    path.write_bytes(bytes(head) + tail)
    return f"{damage.__name__} {path.name}"


def replace_file(path: Path, rng: random.Random) -> str:
    """Put something else in the place of a file, and return what."""
    kinds = ("nothing", "folder", "pipe", "loop", "dangling", "empty", "zeros", "device")
    kind = rng.choice(kinds)
    size = path.stat().st_size
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(path.with_name("nowhere"))
    elif kind == "empty":
        path.touch()
    elif kind == "zeros":
        path.write_bytes(bytes(size))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    return f"{kind} for {path.name}"


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Return the paths of all values in a JSON value, its own excepted."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, inner in items:
        found += [(*path, key), *places(inner, (*path, key))]
    return found


def damage_json(path: Path, rng: random.Random, added: tuple[str, ...] = ()) -> tuple[str, bool]:
    """
    Damage a JSON file.

    Args:
        path: The file, of an object.
        rng: Source of randomness.
        added: Keys that may be added.

    Returns:
        What was done, and whether the result may be meant: another value of the same kind, or none.
    """
    content = json.loads(path.read_text())
    if rng.random() < 0.15:
        text = rng.choice(("null", "5", '"x"', "[]", "{}", "", "{", DEEP, '{"a":' + DEEP + "}", "\ufeff{}", "NaN"))
        path.write_text(text)
        return f"{path.name} = {text[:20]}", False
    if added and rng.random() < 0.3:
        key, value = rng.choice(added), rng.choice(HOSTILE)
        content[key] = value
        path.write_text(json.dumps(content))
        return f"{path.name}: {key} = {str(value)[:40]}", True
    found = places(content)
    shallow = [place for place in found if len(place) == 1]
    place = rng.choice(shallow if rng.random() < 0.7 or len(found) > 5000 else found)
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    old = holder[place[-1]]
    if rng.random() < 0.15:
        del holder[place[-1]]
        path.write_text(json.dumps(content))
        return f"{path.name}: no {place}", True
    value = rng.choice(HOSTILE)
    holder[place[-1]] = value
    path.write_text(json.dumps(content))
    is_number = isinstance(old, (int, float)) and isinstance(value, (int, float))
    same_kind = value is None or old is None or is_number or type(old) is type(value)
    return f"{path.name}: {place} = {str(value)[:40]}", same_kind
