"""Tokens per second of a whole random GLM-130B in INT4 on one GPU, and the time of its prefill.

The model fills the card: 70 layers of INT4 weights with a scale per row, and an fp16 LM head, 67 GB. Columns:
`decode` one token of each row of a batch behind texts of 64, as a CUDA graph of all layers, LM head and the choice of
the token; `GB/s` bytes of the weights that one step reads over its time, and their share of the bandwidth of a copy,
measured in the same run. `prefill` reads one text, and `to dense` is the time of a layer over that of a dense one in
fp16, which take turns. Figures are medians over the rounds.
Run: python benchmarks/decode_gpu.py (one GPU of 80 GB; fewer layers fit smaller ones: --layers)
"""

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
from torch import Tensor, nn

from glm_hf import GLMConfig, GLMForBlankInfilling
from glm_hf.quantization import QuantizedLinear
from glm_hf.quantization import kernels_triton_step as step
from glm_hf.quantization.kernels_triton import traits_of
from glm_hf.rotary_glm import GLMRotaryEmbedding

PROMPT, STEPS = 64, 16
COPY_BYTES = 2**31


def random_model(config: GLMConfig, device: torch.device) -> GLMForBlankInfilling:
    """Return a model of random codes, which are written on the device itself."""
    with torch.device("meta"):
        model = GLMForBlankInfilling(config).half()
        for name, linear in list(model.model.layers.named_modules()):
            if type(linear) is nn.Linear:
                sizes = linear.in_features, linear.out_features
                model.model.layers.set_submodule(name, QuantizedLinear(*sizes, bits=4, dtype=torch.float16))
    model = model.to_empty(device=device)
    model.model.rotary_emb = GLMRotaryEmbedding(config).to(device)
    for parameter in model.parameters():
        if parameter.dtype == torch.uint8:
            parameter.data.random_(0, 256)
        else:
            parameter.data.fill_(0.002) if parameter.dim() > 1 else parameter.data.fill_(0.5)
    return model.eval()


def layers_of(model: GLMForBlankInfilling) -> list[step.Layer]:
    """Return where the layers lie, for the kernels of a step."""

    def linear(module: nn.Module) -> step.Linear:
        return step.Linear(module._parameters["weight"].data, module.weight_scale.data, module.bits, module.bias.data)

    def norm(module: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
        return module.weight.data, module.bias.data, module.eps

    return [
        step.Layer(
            *map(linear, (layer.attention.query_key_value, layer.attention.dense)),
            *map(linear, (layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h)),
            norms=(norm(layer.input_layernorm), norm(layer.post_attention_layernorm)),
            num_heads=model.config.num_attention_heads,
            alpha=layer.alpha,
            scaling=layer.attention.scaling,
        )
        for layer in model.model.layers
    ]


class Decoder:
    """
    A step for a batch over memory of fixed size, captured as a graph where there is a GPU.

    Args:
        model: The model.
        batch: Rows, each of which holds a text of PROMPT random tokens.
    """

    def __init__(self, model: GLMForBlankInfilling, batch: int) -> None:
        self.model, self.layers = model, layers_of(model)
        config, device = model.config, model.model.norm.weight.device
        room = batch, config.num_attention_heads, PROMPT + STEPS, config.head_dim
        self.caches = [torch.randn(2, *room, dtype=torch.float16, device=device) for _ in self.layers]
        self.ids = torch.ones(batch, dtype=torch.long, device=device)
        self.lengths = torch.full((batch,), PROMPT + 1, dtype=torch.int32, device=device)
        self.has_tensor_cores = device.type == "cuda" and traits_of(device)[1]
        self.run: Callable[[], object] = self.step
        if device.type == "cuda":
            self.step()  # kernels are compiled here
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
            self.run = graph.replay

    @torch.no_grad()
    def step(self) -> None:
        """Add a token to every row, and let the next step begin with it."""
        states = self.model.model.embed_tokens(self.ids)
        tables = self.model.model.rotary_emb(states[:, None], (self.lengths - 1)[:, None])
        cos, sin = (table[:, 0].contiguous() for table in tables)
        for layer, cache in zip(self.layers, self.caches, strict=True):
            states = step.decode_layer(
                layer, states, cos, sin, *cache, self.lengths, has_tensor_cores=self.has_tensor_cores
            )
        self.ids.copy_(self.model.lm_head(self.model.model.norm(states)).argmax(-1))
        self.lengths.add_(1)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of one call, with what it has queued."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Return the bytes per second that a copy reads and writes."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(11)]
    return 2 * num_bytes / statistics.median(times)


def print_decoding(model: GLMForBlankInfilling, batches: list[int], bandwidth: float) -> None:
    """Print a row for each batch."""
    device = model.model.norm.weight.device
    weights = sum(parameter.nbytes for parameter in model.parameters())
    print(f"weights {weights / 1e9:.1f} GB, copy {bandwidth / 1e9:.0f} GB/s")
    print(f"{'decode':<8} {'ms':>8} {'tokens/s':>9} {'GB/s':>7} {'of copy':>8}")
    for batch in batches:
        decoder = Decoder(model, batch)
        times = [seconds(decoder.run, device) for _ in range(STEPS - 1)]
        median = statistics.median(times[1:])
        rate = weights / median
        print(f"{batch:<8} {median * 1e3:>8.2f} {batch / median:>9.1f} {rate / 1e9:>7.0f} {rate / bandwidth:>8.1%}")
        del decoder
        if device.type == "cuda":
            torch.cuda.empty_cache()


@torch.no_grad()
def print_prefill(model: GLMForBlankInfilling, lengths: list[int], rounds: int) -> None:
    """Print a row for each length; the dense layer takes turns."""
    config, device = model.config, model.model.norm.weight.device
    with torch.device(device):
        dense = type(model.model.layers[0])(config, 0).half().eval()
    print(f"{'prefill':<8} {'ms':>8} {'tokens/s':>9} {'to dense':>9}")
    for length in lengths:
        ids = torch.ones(1, length, dtype=torch.long, device=device)
        ids[0, -2:] = torch.tensor([config.gmask_token_id, config.sop_token_id])
        states = torch.randn(1, length, config.hidden_size, dtype=torch.float16, device=device)
        tables = model.model.rotary_emb(states, torch.arange(length, device=device)[None])
        quantized = model.model.layers[0]
        pairs = []
        for _ in range(rounds + 1):
            own, other = (
                seconds(lambda: layer(states, None, position_embeddings=tables), device)  # noqa: B023
                for layer in (quantized, dense)
            )
            pairs.append((seconds(lambda: model(ids, logits_to_keep=1), device), own / other))  # noqa: B023
        median, ratio = (statistics.median(values) for values in zip(*pairs[1:], strict=True))
        print(f"{length:<8} {median * 1e3:>8.1f} {length / median:>9.0f} {ratio:>9.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=70)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="other sizes and Triton's interpreter, to try the script")
    options = parser.parse_args()
    device = torch.device("cpu" if options.tiny else "cuda")
    special = {
        f"{name}_token_id": 90 + i for i, name in enumerate(("eos", "mask", "gmask", "smask", "eod", "sop", "eop"))
    }
    sizes = {"vocab_size": 100, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96, **special}
    config = GLMConfig(num_hidden_layers=options.layers, **(sizes if options.tiny else {}))
    name = "CPU, interpreted" if options.tiny else torch.cuda.get_device_name()
    print(f"{date.today()}, {name}, torch {torch.__version__}: {options.layers} layers")
    model = random_model(config, device)
    bandwidth = copy_bandwidth(device, 2**20 if options.tiny else COPY_BYTES)
    print_decoding(model, options.batches, bandwidth)
    print_prefill(model, options.lengths, options.rounds)
