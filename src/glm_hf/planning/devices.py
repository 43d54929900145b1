"""Devices and their sizes, as they are written on the command line: `24GiB*4,40GB,cpu=64GiB,disk`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

SMALLEST_BARE_SIZE = 2**20
UNITS = {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}
UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)}


@dataclass(frozen=True)
class Device:
    """
    A place for layers.

    Attributes:
        name: Name in a device_map: the index of a GPU, "cpu" or "disk".
        num_bytes: Size of its memory, None for no limit.
    """

    name: int | str
    num_bytes: int | None


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 24GiB, 24GB or 25769803776; ValueError if it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)?", text.strip())
    if match is None:
        raise ValueError(f"a size must be like 24GiB, 24GB or a number of bytes, got {text!r}")
    number, unit = match.groups()
    num_bytes = int(float(number) * UNITS.get(unit, 1))
    if unit is None and ("." in number or 0 < num_bytes < SMALLEST_BARE_SIZE):
        raise ValueError(f"a size needs a unit, as in {number}GiB, got {text!r}")
    return num_bytes


def parse_devices(text: str) -> tuple[Device, ...]:
    """
    Return the devices of a list such as `24GiB*4,40GiB,cpu=64GiB,disk`; `auto` stands for the GPUs that torch sees.

    Raises:
        ValueError: If the list is not of that form or names no device.
    """
    sizes: list[int] = []
    others: dict[str, int | None] = {}
    for item in text.split(","):
        name, _, size = (part.strip() for part in item.partition("="))
        if name == "auto":
            sizes += sizes_of_gpus()
        elif name in ("cpu", "disk"):
            if name in others or bool(size) != (name == "cpu"):
                raise ValueError(f"devices may hold cpu=SIZE once and disk once, got {text!r}")
            others[name] = parse_size(size) if size else None
        else:
            size, star, count = (part.strip() for part in item.partition("*"))
            if star and not re.fullmatch(r"[1-9]\d{0,3}", count):
                raise ValueError(f"devices must be like 24GiB*4, with a count of 1 to 9999, got {item!r}")
            sizes += [parse_size(size)] * int(count or 1)
    if 0 in (*sizes, *others.values()):
        raise ValueError(f"a device must have more than 0 bytes, got {text!r}")
    gpus = [Device(index, size) for index, size in enumerate(sizes)]
    return (*gpus, *(Device(name, others[name]) for name in ("cpu", "disk") if name in others))


def sizes_of_gpus() -> list[int]:
    """Return the memory of every GPU that torch sees; ValueError without any."""
    import torch  # which a list of sizes does not need

    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError("auto found no GPU that torch can use; write sizes, as in --devices 24GiB*4")
    return [torch.cuda.get_device_properties(index).total_memory for index in range(count)]


def describe_size(num_bytes: int) -> str:
    """Return the shortest text that `parse_size` reads as `num_bytes`."""
    for unit in ("GiB", "GB"):
        text = f"{num_bytes / UNITS[unit]:.2f}".rstrip("0").rstrip(".") + unit
        if parse_size(text) == num_bytes:
            return text
    return str(num_bytes)


def describe_devices(devices: Sequence[Device]) -> str:
    """Return the text that `parse_devices` reads as `devices`."""
    items = []
    gpus = (device.num_bytes or 0 for device in devices if isinstance(device.name, int))
    for size, group in groupby(gpus):
        count = len(list(group))
        items.append(describe_size(size) + (f"*{count}" if count > 1 else ""))
    for device in devices:
        if isinstance(device.name, str):
            items.append(
                device.name if device.num_bytes is None else f"{device.name}={describe_size(device.num_bytes)}"
            )
    return ",".join(items)
