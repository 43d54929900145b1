"""How fast a run is, in tokens and in the share of a device's peak that the model's own operations take."""

import torch

from glm_hf.configuration_glm import GLMConfig

# Dense matrix products in 16 bits with sums in 32, 10^12 operations per second, from the vendor's data sheets.
PEAK_TFLOPS = {"V100": 125, "A100": 312, "H100": 989, "H200": 989, "RTX 3090": 71, "RTX 4090": 165, "2080 Ti": 54}


def flops_per_token(config: GLMConfig, num_parameters: int, row_length: int) -> float:
    """
    Return the operations of forward and backward pass per token: 6 per parameter, and those of full attention.

    Args:
        config: Sizes.
        num_parameters: Of the model, a tied matrix counted once.
        row_length: Tokens that attend to each other.
    """
    return 6 * num_parameters + 12 * config.num_hidden_layers * config.hidden_size * row_length


def peak_tflops(device: torch.device) -> float | None:
    """Return the known peak of a device in 16 bits, None for others."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(peak) for part, peak in PEAK_TFLOPS.items() if part in name), None)
