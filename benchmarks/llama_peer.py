"""llama.cpp as a peer of benchmarks/decode.py: a GGUF of random weights in the shapes of ours, and its own benchmarks.

Build them with: cmake -B build -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON && cmake --build build --target llama-bench
--target llama-batched-bench; install the package `gguf` to write the file.
"""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np

Q4_0, Q8_0 = ("Q4_0", 18), ("Q8_0", 34)
"""ggml's names, and bytes of a block of 32 weights that begins with its fp16 scale."""


def write_gguf(path: Path, hidden: int, inner: int, heads: int, vocab: int, layers: int) -> None:
    """Write a model of llama's layers, whose linears have the shapes and biases of ours: Q4_0, but a Q8_0 LM head."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(0)

    def add(name: str, rows: int, columns: int, kind: tuple[str, int]) -> None:
        blocks = rng.integers(0, 256, (rows, columns // 32, kind[1]), dtype=np.uint8)
        blocks[..., :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        data = blocks.reshape(rows, -1)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind[0]])

    add("token_embd", vocab, hidden, Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for index in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{index}.{name}", hidden, hidden, Q4_0)
            writer.add_tensor(f"blk.{index}.{name}.bias", np.zeros(hidden, np.float32))
        for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            add(f"blk.{index}.ffn_{name}", rows, columns, Q4_0)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{index}.{name}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokens_per_second(programs: Path, model: Path, batch: int, prompt: int, new: int, threads: int) -> float:
    """Return how many tokens llama.cpp reads per second, or with `new` generates behind prompts."""
    common = ["-m", str(model), "-t", str(threads)]
    if batch == 1:
        sizes = ["-p", "0", "-n", str(new)] if new else ["-p", str(prompt), "-n", "0"]
        [result] = _run(programs, ["llama-bench", *common, *sizes, "-r", "1", "-o", "jsonl"])
        return float(result["avg_ts"])
    sizes = ["-npp", str(prompt), "-ntg", str(new), "-npl", str(batch), "-c", str(batch * (prompt + new))]
    options = ["-tb", str(threads), "--output-format", "jsonl"]
    result = _run(programs, ["llama-batched-bench", *common, *sizes, *options])[-1]
    return float(result["speed_tg"])


def _run(programs: Path, command: list[str]) -> list[Mapping]:
    """Return the lines of JSON that a program prints."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(programs)}
    done = subprocess.run(
        [str(programs / command[0]), *command[1:]], check=True, capture_output=True, text=True, env=environment
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
