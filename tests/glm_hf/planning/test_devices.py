import pytest
import torch

from glm_hf.planning.devices import Device, describe_devices, parse_devices, parse_size

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB", [24 * GIB]),
        ("24GB*2", [24 * 10**9] * 2),
        (" 1.5GiB * 2 , 40GB ", [GIB + GIB // 2] * 2 + [40 * 10**9]),
        ("25769803776", [25769803776]),
        ("1TiB,1TB,1MiB,1MB,1KiB,1KB", [2**40, 10**12, 2**20, 10**6, 2**10, 10**3]),
    ],
)
def test_sizes_are_those_of_gpus_in_order(text, expected):
    assert parse_devices(text) == tuple(Device(index, size) for index, size in enumerate(expected))


def test_host_and_disk_come_last():
    expected = (Device(0, GIB), Device(1, GIB), Device("cpu", 64 * GIB), Device("disk", None))
    assert parse_devices("disk,1GiB,cpu=64GiB,1GiB") == expected


def test_auto_is_what_torch_sees(monkeypatch):
    class Properties:
        total_memory = 12345678

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties())
    expected = (Device(0, 12345678), Device(1, 12345678), Device("cpu", GIB))
    assert parse_devices("auto,cpu=1GiB") == expected


def test_auto_without_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"auto found no GPU that torch can use; write sizes"):
        parse_devices("auto")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a size must be like 24GiB"),
        (",", "a size must be like 24GiB"),
        ("24GiB,", "a size must be like 24GiB"),
        ("24*4", "a size needs a unit, as in 24GiB, got '24'"),
        ("1.5", "a size needs a unit, as in 1.5GiB"),
        ("-24GiB", "a size must be like 24GiB"),
        ("24gib", "a size must be like 24GiB"),
        ("24 parsecs", "a size must be like 24GiB"),
        ("0GiB*4", "a device must have more than 0 bytes"),
        ("cpu=0", "a device must have more than 0 bytes"),
        ("24GiB*0", "devices must be like 24GiB.4, with a count of 1 to 9999"),
        ("24GiB*-1", "with a count of 1 to 9999"),
        ("24GiB*", "with a count of 1 to 9999"),
        ("24GiB*2*2", "with a count of 1 to 9999"),
        ("cpu", "cpu=SIZE once and disk once"),
        ("cpu=1GiB,cpu=1GiB", "cpu=SIZE once and disk once"),
        ("disk=1GiB", "cpu=SIZE once and disk once"),
        ("gpu=24GiB", "a size must be like 24GiB"),
    ],
)
def test_nonsense_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_devices(text)


@pytest.mark.parametrize("text", ["24GiB*4", "24GB*2,10.7GiB", "123456789,cpu=64GiB,disk", "1GiB,2GiB,1GiB"])
def test_devices_are_written_as_they_were_read(text):
    assert describe_devices(parse_devices(text)) == text
    assert parse_size("0") == 0
