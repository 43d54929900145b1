"""Compare the time of the forward pass with transformers' GPTNeoX of the same layers, hidden size and linear FLOPs.

GPTNeoX reads a prompt causally, GLM both ways, which is up to twice the work inside attention. Rows of the table:
    prefill     a prompt with a prefix mask, with the logits of its last token only: what `generate` begins with
    all logits  the same prompt with the logits of every token, so that no layer can leave anything out
    decode      one token of `generate`, with everything `generate` does between tokens
Models take turns; every figure is a median over the rounds. Run: python benchmarks/forward.py
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel, StoppingCriteria

from glm_hf import GLMConfig, GLMForBlankInfilling

LAYERS, HIDDEN, HEADS, VOCAB = 6, 1024, 16, 4096
SPECIAL = ("eos", "mask", "gmask", "smask", "eod", "sop", "eop")
NEW_TOKENS = 17


def build_models() -> tuple[GLMForBlankInfilling, GPTNeoXForCausalLM]:
    """Return both models with random weights; the GeGLU's three matrices match the MLP's two."""
    special = {f"{name}_token_id": VOCAB - 16 + index for index, name in enumerate(SPECIAL)}
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    glm = GLMForBlankInfilling(GLMConfig(**sizes, intermediate_size=2736, **special))  # 8/3 x hidden, as in GLM-130B
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=4 * HIDDEN, rotary_pct=1.0))
    for model in (glm, neox):
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return glm.eval(), neox.eval()


def prompt(length: int, config: GLMConfig) -> dict[str, torch.Tensor]:
    """Return a context that ends in `[gMASK]`, and `sop`: `(1, length)`."""
    input_ids = torch.randint(1, VOCAB - 16, (1, length))
    input_ids[0, -2:] = torch.tensor([config.gmask_token_id, config.sop_token_id])
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def seconds(run: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Stopwatch(StoppingCriteria):
    """Note the time after every generated token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """Stop no row, and note the time."""
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def seconds_per_token(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> float:
    """Return the median time between two generated tokens."""
    watch = Stopwatch()
    model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, stopping_criteria=[watch])
    return statistics.median(after - before for before, after in zip(watch.times, watch.times[1:], strict=False))


def compare(name: str, length: int, rounds: int, measure: Callable[[PreTrainedModel], float]) -> None:
    """Print one row, of models that take turns."""
    pairs = [(measure(glm), measure(neox)) for _ in range(rounds + 1)][1:]  # the first round warms up
    ours, theirs = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(first / second for first, second in pairs)
    print(f"{name:<11} {length:>6} {ours:>9.1f} {theirs:>11.1f} {ratio:>7.3f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    glm, neox = build_models()
    size = f"{LAYERS} layers x {HIDDEN}, fp32, {options.threads} threads, median of {options.rounds}"
    print(f"{date.today()}, {platform.machine()}, torch {torch.__version__}: {size}")
    print(f"{'':<11} {'tokens':>6} {'GLM ms':>9} {'GPTNeoX ms':>11} {'ratio':>7}")
    with torch.no_grad():
        for length in (512, 2048 - NEW_TOKENS):
            inputs = prompt(length, glm.config)
            last = {"logits_to_keep": 1, "use_cache": True}
            compare("prefill", length, options.rounds, lambda m: seconds(lambda: m(**inputs, **last)))  # noqa: B023
            compare("all logits", length, options.rounds, lambda m: seconds(lambda: m(**inputs)))  # noqa: B023
            compare("decode", length, options.rounds // 3, lambda m: seconds_per_token(m, inputs))  # noqa: B023
