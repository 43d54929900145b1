"""Time of one quantized linear layer of GLM-130B on the CPU, beside that of its peers, all in one run.

Columns: time, stored bytes per second, time over ours (above 1: ours is faster), and the largest error against the
fp32 product of the same activations with the dequantized weight, over the largest output. `read` adds up the bytes of
our weight. Peers take turns; times are medians over the rounds. bitsandbytes and ggml hold other codes than symmetric
INT4, so their errors are not told; they appear where they are installed (`--ggml`: the folder of its libraries). As
all linears of GLM, ours, the dense one and bitsandbytes' add a bias; torch's and ggml's for quantized weights cannot.
Run: make bench-int4
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import torch
from ggml_peer import GgmlLinear

from glm_hf.quantization import dequantize_weight, quantize_weight, quantized_linear, unpack_int4
from glm_hf.quantization.kernels_cpu import kernel_library

SHAPES = {"QKV": (36864, 12288), "attention out": (12288, 12288), "GLU in": (65536, 12288), "FFN out": (12288, 32768)}
PIECE = 1024  # rows that are made; the others repeat them in memory of their own
MANY_ROWS = 8192  # at most for many tokens, where time does not depend on memory
GROUP = 256
OTHER_BYTES = 128 * 2**20
PAUSE = 0.03

Run = Callable[[torch.Tensor], torch.Tensor | None]


class Peer:
    """
    A way to compute the product.

    Args:
        name: What the table says.
        num_bytes: Bytes of the stored weight.
        run: Takes bf16 activations `(M, K)`, returns the product or None.
        dtype: Dtype of the activations that it takes.
        has_our_codes: Whether its weight is the same, so that its error can be told.
    """

    def __init__(
        self, name: str, num_bytes: int, run: Run, dtype: torch.dtype = torch.bfloat16, has_our_codes: bool = False
    ) -> None:
        self.name, self.num_bytes, self.run, self.dtype, self.has_our_codes = (
            name,
            num_bytes,
            run,
            dtype,
            has_our_codes,
        )
        self.prepare: Callable[[torch.Tensor], None] = lambda x: None


def peers_of(piece: torch.Tensor, copies: int, bits: int, ggml: Path | None) -> Iterator[Peer]:
    """Yield all peers for the matrix that repeats `piece` `(PIECE, K)`."""
    codes, scale = quantize_weight(piece, bits=bits)
    weight, scales = codes.repeat(copies, 1), scale.repeat(copies, 1)
    num_bytes = weight.nbytes
    bias = torch.zeros(len(weight), dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = f"ours, {str(dtype).removeprefix('torch.')}"
        yield Peer(name, num_bytes, lambda x: quantized_linear(x, weight, scales, bits, bias), dtype, True)
    flat = weight.view(torch.float32)
    yield Peer("read", num_bytes, lambda x: flat.sum())
    yield from torch_peers(codes, scale, copies, bits)
    dense = dequantize_weight(codes, scale, bits).bfloat16().repeat(copies, 1)
    yield Peer("dense bf16", dense.nbytes, lambda x: torch.nn.functional.linear(x, dense, bias))
    if bits == 4:
        yield from bitsandbytes_peers(piece, copies)
        yield from ggml_peers(piece, copies, ggml)


def torch_peers(codes: torch.Tensor, scale: torch.Tensor, copies: int, bits: int) -> Iterator[Peer]:
    """Yield torch's own weight-only kernel."""
    if bits == 8:
        weight, scales = codes.repeat(copies, 1), scale.repeat(copies, 1)[:, 0].bfloat16()
        yield Peer("torch int8pack", weight.nbytes, lambda x: torch._weight_int8pack_mm(x, weight, scales))
        return
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_int4(codes).int() + 8, 1).repeat(copies, 1)
    per_group = scale.bfloat16().T.expand(codes.shape[1] * 2 // GROUP, -1).repeat(1, copies)  # (K/GROUP, N)
    scale_and_zero = torch.stack((per_group, torch.zeros_like(per_group)), dim=-1)
    operator = torch.ops.aten._weight_int4pack_mm_for_cpu
    yield Peer(
        "torch int4pack", packed.nbytes, lambda x: operator(x, packed, GROUP, scale_and_zero), has_our_codes=True
    )


def bitsandbytes_peers(piece: torch.Tensor, copies: int) -> Iterator[Peer]:
    """Yield bitsandbytes' NF4 and FP4, in its layout for CPUs with bf16 instructions."""
    try:
        from bitsandbytes import functional, matmul_4bit
    except ImportError:
        return
    bias = torch.zeros(len(piece) * copies, dtype=torch.bfloat16)
    for kind in ("nf4", "fp4"):
        packed, state = functional.quantize_4bit(piece.bfloat16(), quant_type=kind, blocksize=64)
        if functional.has_avx512bf16():
            packed, state = functional._convert_weight_packed_for_cpu(packed, state)
            state.absmax = state.absmax.repeat(1, copies)
        else:
            state.absmax = state.absmax.repeat(copies)
        packed = packed.repeat(copies, 1)
        state.shape = torch.Size((len(piece) * copies, piece.shape[1]))
        run = lambda x, packed=packed, state=state: matmul_4bit(x, packed, state, bias=bias)  # noqa: E731
        yield Peer(f"bitsandbytes {kind}", packed.nbytes + state.absmax.nbytes, run)


def ggml_peers(piece: torch.Tensor, copies: int, folder: Path | None) -> Iterator[Peer]:
    """Yield llama.cpp's kinds of 4 bits, plain and in its layout for this CPU."""
    for kind in ("Q4_0", "Q4_K") if folder else ():
        for repacked in (False, True):
            layer = GgmlLinear(folder, piece, copies, kind, repacked)
            name = f"ggml {kind}{' repacked' * repacked}"
            num_bytes = int(layer.shape[0] * layer.shape[1] * (18 / 32 if kind == "Q4_0" else 144 / 256))
            peer = Peer(name, num_bytes, lambda x, layer=layer: layer.run(), torch.float32)
            peer.prepare = layer.prepare
            yield peer


def measure(peers: list[Peer], x: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every peer in every round; all take turns, after one round to warm up."""
    inputs = {peer.name: x.to(peer.dtype) for peer in peers}
    for peer in peers:
        peer.prepare(inputs[peer.name])
    others = torch.ones(OTHER_BYTES // 4)
    times: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for _ in range(rounds + 1):
        for peer in peers:
            others.sum()  # nobody finds the weight of the one before in the caches,
            time.sleep(PAUSE)  # nor its threads still spinning
            start = time.perf_counter()
            peer.run(inputs[peer.name])
            times[peer.name].append(time.perf_counter() - start)
    return {name: of_peer[1:] for name, of_peer in times.items()}


def error(peer: Peer, x: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest error of the first rows, over the largest output."""
    inputs = x.to(peer.dtype)
    expected = inputs.float() @ exact.T
    out = peer.run(inputs)[:, : len(exact)]
    return float((out.float() - expected).abs().max() / expected.abs().max())


def compare(name: str, num_rows: int, num_columns: int, options: argparse.Namespace) -> None:
    """Print the rows of one layer."""
    torch.manual_seed(0)
    piece = torch.randn(PIECE, num_columns) * 0.02
    codes, scale = quantize_weight(piece, bits=options.bits)
    exact = (unpack_int4(codes) if options.bits == 4 else codes).float() * scale.float()
    peers = list(peers_of(piece, num_rows // PIECE, options.bits, options.ggml))
    for num_tokens in options.tokens:
        x = torch.randn(num_tokens, num_columns)
        for num_threads in options.threads:
            torch.set_num_threads(num_threads)
            times = measure(peers, x, options.rounds)
            ours = times["ours, bfloat16"]
            print(f"\n{name} {num_rows} x {num_columns}, M = {num_tokens}, {num_threads} threads")
            print(f"  {'':<22} {'ms':>9} {'GB/s':>7} {'to ours':>8} {'error':>8}")
            for peer in peers:
                median = statistics.median(times[peer.name])
                ratio = statistics.median(theirs / own for theirs, own in zip(times[peer.name], ours, strict=True))
                accuracy = f"{error(peer, x, exact):8.1e}" if peer.has_our_codes else f"{'-':>8}"
                rate = peer.num_bytes / median / 1e9
                print(f"  {peer.name:<22} {median * 1e3:>9.2f} {rate:>7.1f} {ratio:>8.2f} {accuracy}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--tokens", type=int, nargs="+", default=(1, 4, 16, 512), metavar="M")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--ggml", type=Path, metavar="FOLDER", help="of libggml.so, libggml-base.so and libggml-cpu.so"
    )
    options = parser.parse_args()
    tokens = options.tokens
    library = kernel_library()
    kind = "no C kernels" if library is None else f"C kernels of level {library.level}"
    print(
        f"{date.today()}, {platform.machine()}, torch {torch.__version__}, {kind}, median of {options.rounds} rounds"
    )
    with torch.inference_mode():
        for name, (num_rows, num_columns) in SHAPES.items():
            if name in options.shapes:
                options.tokens = [number for number in tokens if number < 64]
                compare(name, num_rows, num_columns, options)
                options.tokens = [number for number in tokens if number >= 64]
                compare(name, min(num_rows, MANY_ROWS), num_columns, options)
