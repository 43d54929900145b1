"""Files larger than 4 GB, and a rehearsal with GLM-130B's own sizes, on sparse files that take no space."""

import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from glm_hf import GLMConfig
from glm_hf.cli import main
from glm_hf.conversion import convert
from glm_hf.conversion.export import _rank_part
from glm_hf.conversion.formats.model_tensors import model_tensors
from glm_hf.conversion.formats.names import to_sat_name
from glm_hf.conversion.formats.torch_zip import TorchZip


def on_meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16, device="meta")


def write_sparse(path: Path, tensors: dict[str, torch.Tensor]) -> TorchZip:
    """Write a rank file whose weights are holes, with checksums for small ones only."""
    layout = TorchZip(path.stem, tensors, {}, {})
    crcs = {}
    with open(path, "wb") as file:
        file.write(layout.beginning)
        for name, member in layout.members.items():
            crcs[name] = zlib.crc32(bytes(member.nbytes)) if member.nbytes < 10**6 else 0
            file.seek(member.start)
            file.write(member.header(crcs[name]))
        file.seek(layout.directory_start)
        file.write(layout.directory(crcs))
    return layout


def test_file_with_tensors_beyond_4_gb(tmp_path):
    tensors = {"a": on_meta(3 * 2**30), "b": on_meta(2**30, 3), "c": on_meta(5)}
    layout = write_sparse(tmp_path / "rank.pt", tensors)
    with open(tmp_path / "rank.pt", "r+b") as file:
        file.seek(layout.members["c"].start + layout.members["c"].header_size)
        file.write(torch.arange(5).half().numpy().tobytes())
    assert (tmp_path / "rank.pt").stat().st_size > 12 * 2**30
    with zipfile.ZipFile(tmp_path / "rank.pt") as archive:
        sizes = {info.filename: (info.file_size, info.header_offset) for info in archive.infolist()}
    assert sizes["rank/data/0"][0] == 6 * 2**30
    assert sizes["rank/data/2"][1] > 12 * 2**30
    module = torch.load(tmp_path / "rank.pt", weights_only=True, mmap=True)["module"]
    assert {name: tensor.shape for name, tensor in module.items()} == {n: t.shape for n, t in tensors.items()}
    assert module["c"].tolist() == [0, 1, 2, 3, 4]
    assert module["b"][-1].tolist() == [0, 0, 0]


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """All files of a checkpoint with GLM-130B's shapes in 8 ranks, 260 GB of holes."""
    folder = tmp_path_factory.mktemp("sat")
    tensors = model_tensors(GLMConfig(), torch.float16)
    parts = {to_sat_name(name): _rank_part(name, tensor, 8) for name, tensor in tensors.items()}
    (folder / "49300").mkdir()
    (folder / "latest").write_text("49300")
    for rank in range(8):
        write_sparse(folder / "49300" / f"mp_rank_{rank:02d}_model_states.pt", parts)
    return folder


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (
            [],
            [
                "source   8 ranks, 257,",
                "model    70 layers, hidden size 12288, 96 heads, vocabulary of 150528",
                "tensors  843 in float16",
                "shards   ",
                "memory   at most 500,000,000 bytes beside the interpreter's own",
            ],
        ),
        (["--quantization", "int4"], ["tensors  1,123 in float16, the linears of the layers in int4"]),
        (["--dtype", "float32"], ["tensors  843 in float32"]),
    ],
)
def test_dry_run_with_the_released_sizes_prints_the_plan(options, lines, released, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert, "free_space", lambda dst: 123)
    monkeypatch.setattr("glm_hf.folders.atomic.free_space", lambda dst: 10**13)
    assert main(["convert", str(released), str(tmp_path / "hf"), "--dry-run", *options]) == 0
    out = capsys.readouterr().out
    for line in lines:
        assert line in out
    assert not any(tmp_path.iterdir())


def test_dry_run_refuses_a_disk_that_is_too_small(released, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("glm_hf.folders.atomic.free_space", lambda dst: 10**9)
    assert main(["convert", str(released), str(tmp_path / "hf"), "--dry-run"]) == 1
    captured = capsys.readouterr()
    assert "needed" in captured.out
    assert "needs 257,395,589,120 free bytes, but has 1,000,000,000; free some space" in captured.err
