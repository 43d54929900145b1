import pytest
import torch

from glm_hf import GLMConfig
from glm_hf.training.measurements import flops_per_token, peak_tflops


def test_the_run_of_the_paper_has_its_utilization():
    """4224 sequences of 2048 tokens in 88.5 s on 768 A100: 32.5% by the authors' count."""
    flops = flops_per_token(GLMConfig(), 130e9, 130e9, 2048)
    utilization = flops * 4224 * 2048 / 88.5 / (768 * 312e12)
    assert utilization == pytest.approx(0.325, abs=0.003)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA GeForce RTX 2080 Ti", 54), ("NVIDIA GeForce GTX 1080", None)],
)
def test_peaks_are_known_by_the_names_of_devices(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda", 0)) == peak
    assert peak_tflops(torch.device("cpu")) is None
