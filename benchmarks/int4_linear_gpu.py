"""Time of one quantized linear layer of GLM-130B on a GPU, beside that of its peers, all in one run.

Columns: time, stored bytes per second, the share of the bandwidth of a copy, time over that of ours in fp16 (above 1:
ours is faster), and the largest error against the exact product of the same activations with the same codes, over the
largest output. Peers take turns, each after a sweep of other memory through the caches, during which its launches are
queued; times are medians over the rounds. bitsandbytes, where it is installed, holds other codes, so that its error is
not told.
Run: python benchmarks/int4_linear_gpu.py
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date

import torch
from torch import Tensor

from glm_hf.quantization import dequantize_weight, quantize_weight, quantized_linear, unpack_int4

SHAPES = {"QKV": (36864, 12288), "attention out": (12288, 12288), "GLU in": (65536, 12288), "FFN out": (12288, 32768)}
PIECE = 1024  # rows that are made; the others repeat them in memory of their own
GROUP = 256  # the scale of a row is repeated for torch's kernel, which has none per row
OTHER_BYTES = 512 * 2**20


@dataclass
class Peer:
    """
    A way to compute the product.

    Attributes:
        name: What the table says.
        num_bytes: Bytes of the stored weight and scales.
        run: Takes activations `(M, K)`, returns the product `(M, N)`.
        dtype: Dtype of the activations that it takes.
        has_our_codes: Whether its weight is the same, so that its error can be told.
    """

    name: str
    num_bytes: int
    run: Callable[[Tensor], Tensor]
    dtype: torch.dtype = torch.float16
    has_our_codes: bool = True


def peers_of(piece: Tensor, copies: int, bits: int) -> Iterator[Peer]:
    """Yield all peers for the matrix that repeats `piece` `(PIECE, K)`; ours in fp16 comes first."""
    codes, scale = quantize_weight(piece, bits=bits)
    weight, scales = codes.repeat(copies, 1), scale.repeat(copies, 1)
    for dtype in (torch.float16, torch.bfloat16):
        name = f"ours, {str(dtype).removeprefix('torch.')}"
        yield Peer(name, weight.nbytes + scales.nbytes, lambda x: quantized_linear(x, weight, scales, bits), dtype)
    dense = dequantize_weight(codes, scale, bits).repeat(copies, 1)
    yield Peer("dense fp16", dense.nbytes, lambda x: torch.nn.functional.linear(x, dense))
    if bits == 4:
        if torch.cuda.get_device_capability() >= (8, 0):
            yield tinygemm_peer(codes, scale, copies)
        yield from bitsandbytes_peers(piece, copies)


def tinygemm_peer(codes: Tensor, scale: Tensor, copies: int) -> Peer:
    """Return torch's own weight-only kernel, whose codes are ours plus 8."""
    packed = torch.ops.aten._convert_weight_to_int4pack((codes ^ 0x88).repeat(copies, 1), 8)
    per_group = scale.bfloat16().T.expand(codes.shape[1] * 2 // GROUP, -1).repeat(1, copies)  # (K/GROUP, N)
    scale_and_zero = torch.stack((per_group, torch.zeros_like(per_group)), dim=-1)
    run = lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scale_and_zero)  # noqa: E731
    return Peer("torch tinygemm", packed.nbytes + scale_and_zero.nbytes, run, torch.bfloat16)


def bitsandbytes_peers(piece: Tensor, copies: int) -> Iterator[Peer]:
    """Yield bitsandbytes' NF4 and FP4, where it is installed."""
    try:
        from bitsandbytes import functional, matmul_4bit
    except ImportError:
        return
    for kind in ("nf4", "fp4"):
        packed, state = functional.quantize_4bit(piece.half().repeat(copies, 1), quant_type=kind, blocksize=64)
        run = lambda x, packed=packed, state=state: matmul_4bit(x, packed, state)  # noqa: E731
        yield Peer(f"bitsandbytes {kind}", packed.nbytes + state.absmax.nbytes, run, has_our_codes=False)


def seconds(run: Callable[[], object], other: Tensor) -> float:
    """Return the seconds that the GPU works on `run`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    other.zero_()  # takes longer than launching what follows
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def copy_bandwidth(rounds: int, other: Tensor) -> float:
    """Return the bytes per second that a copy reads and writes."""
    source = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), other) for _ in range(rounds)]
    return 2 * source.nbytes / statistics.median(times)


def error(out: Tensor, x: Tensor, exact: Tensor) -> float:
    """Return the largest error of the first rows, over the largest output."""
    expected = x.double() @ exact.T
    return float((out[:, : len(exact)].double() - expected).abs().max() / expected.abs().max())


def compare(name: str, options: argparse.Namespace, bandwidth: float, other: Tensor) -> None:
    """Print the tables of one layer."""
    num_rows, num_columns = SHAPES[name]
    torch.manual_seed(0)
    piece = torch.randn(PIECE, num_columns, device="cuda") * 0.02
    codes, scale = quantize_weight(piece, bits=options.bits)
    exact = (unpack_int4(codes) if options.bits == 4 else codes).double() * scale.double()
    peers = list(peers_of(piece, num_rows // PIECE, options.bits))
    for num_tokens in options.tokens:
        x = torch.randn(num_tokens, num_columns, device="cuda")
        inputs = [x.to(peer.dtype) for peer in peers]
        errors = [error(peer.run(own), own, exact) for peer, own in zip(peers, inputs, strict=True)]
        rounds = [
            [seconds(lambda peer=peer, own=own: peer.run(own), other) for peer, own in zip(peers, inputs, strict=True)]
            for _ in range(options.rounds)
        ]
        print(f"\n{name} {num_rows} x {num_columns}, M = {num_tokens}")
        print(f"  {'':<18} {'us':>9} {'GB/s':>7} {'% copy':>7} {'to ours':>8} {'error':>8}")
        for index, peer in enumerate(peers):
            median = statistics.median(times[index] for times in rounds)
            ratio = statistics.median(times[index] / times[0] for times in rounds)
            rate = peer.num_bytes / median
            accuracy = f"{errors[index]:8.1e}" if peer.has_our_codes else f"{'-':>8}"
            print(
                f"  {peer.name:<18} {median * 1e6:>9.1f} {rate / 1e9:>7.0f} {100 * rate / bandwidth:>7.1f} "
                f"{ratio:>8.2f} {accuracy}",
                flush=True,
            )


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--tokens", type=int, nargs="+", default=(1, 4, 16, 512), metavar="M")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device, and torch found none")
    other = torch.empty(OTHER_BYTES, dtype=torch.uint8, device="cuda")
    bandwidth = copy_bandwidth(options.rounds, other)
    print(
        f"{date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}; "
        f"a copy moves {bandwidth / 1e9:.0f} GB/s; median of {options.rounds} rounds"
    )
    with torch.inference_mode():
        for name in options.shapes:
            compare(name, options, bandwidth, other)


if __name__ == "__main__":
    main()
