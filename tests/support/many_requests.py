"""Mixed requests to the decoder, and whether their answers are those that each gets alone.

Run: python tests/support/many_requests.py 1000
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator

import torch
from golden import golden_model

from glm_hf import GLMConfig, GLMForBlankInfilling, GLMQuantizationConfig
from glm_hf.decoding import Decoder, Request, Sampling
from glm_hf.decoding.engine import Engine
from glm_hf.decoding.fill import Filling
from glm_hf.infilling_glm import prepare_context

LONGEST, NEW_TOKENS = 400, 12


def texts(config: GLMConfig, count: int, seed: int = 0, longest: int = LONGEST) -> list[list[int]]:
    """Return ids of texts with one to three blanks of any kind, or none, of 1 to `longest` tokens."""
    rng = random.Random(seed)
    masks = (config.mask_token_id, config.gmask_token_id, config.smask_token_id)
    rows = []
    for _ in range(count):
        row = [rng.randrange(3, 140) for _ in range(int(longest ** rng.random()))]
        mask = rng.choice(masks)
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            row.insert(rng.randrange(len(row) + 1), mask)
        rows.append(row)
    return rows


def samplings(count: int, seed: int = 0) -> list[Sampling]:
    """Return settings of all kinds, each with a seed, every third of them greedy."""
    rng = random.Random(seed)
    kinds = (
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 20, "repetition_penalty": 1.2},
        {"temperature": 0.9, "min_p": 0.05, "logit_bias": {7: 2.0, 8: -3.0}},
        {"repetition_penalty": 1.5},
    )
    return [Sampling(seed=rng.randrange(2**40), **rng.choice(kinds)) for _ in range(count)]


def quantized(model: GLMForBlankInfilling, bits: int = 4) -> GLMForBlankInfilling:
    """Return the model with quantized weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return GLMForBlankInfilling.from_pretrained(
            folder, quantization_config=GLMQuantizationConfig(bits=bits)
        ).eval()


def one_by_one(
    model: GLMForBlankInfilling, rows: list[list[int]], num_new: int = NEW_TOKENS
) -> list[tuple[list[list[int]], list[float]]]:
    """Return blanks and scores of every text alone, by `fill_blanks`."""
    filled = [model.fill_blanks([row], max_new_tokens=num_new, do_sample=False) for row in rows]
    return [(answer.blanks[0], answer.scores[0]) for answer in filled]


def decode(
    decoder: Decoder, rows: list[list[int]], settings: list[Sampling]
) -> list[tuple[list[list[int]], list[float]]]:
    """Return blanks and scores of texts that come while others are decoded."""
    fillings: list[Filling] = []
    waiting: Iterator[tuple[list[int], Sampling]] = zip(rows, settings, strict=True)
    rng = random.Random(1)
    while True:
        for row, sampling in [pair for _, pair in zip(range(rng.randrange(6)), waiting, strict=False)]:
            request = Request((), NEW_TOKENS, sampling, num_logprobs=len(fillings) % 3)
            fillings.append(Filling(decoder, prepare_context(row, decoder.engine.config), request))
        decoder.advance()
        if len(fillings) == len(rows) and all(filling.is_finished for filling in fillings):
            return [
                ([answer.ids for answer in filling.answers], [answer.score for answer in filling.answers])
                for filling in fillings
            ]


def main() -> None:
    """Compare answers of many requests, and print how many are equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=1000)
    count = parser.parse_args().count
    torch.set_num_threads(1)
    for name in ("fp32", "INT4", "INT8"):
        model = golden_model("cfg1")
        if name != "fp32":
            model = quantized(model, int(name[3:]))
        rows = texts(model.config, count)
        greedy, mixed = [Sampling()] * count, samplings(count)
        expected = one_by_one(model, rows)
        alone = decode(Decoder(Engine(model, 1)), rows, mixed)
        for slots in (1, 8, 32):
            answers = decode(Decoder(Engine(model, slots)), rows, greedy)
            equal = sum(a[0] == b[0] for a, b in zip(answers, expected, strict=True))
            sampled = decode(Decoder(Engine(model, slots)), rows, mixed)
            same = sum(a[0] == b[0] for a, b in zip(sampled, alone, strict=True))
            far = max(
                abs(x - y)
                for a, b in zip(answers, expected, strict=True)
                if a[0] == b[0]
                for x, y in zip(a[1], b[1], strict=True)
            )
            sys.stdout.write(
                f"{name:5} {slots:2} slots: greedy {equal} of {count} as fill_blanks (scores within {far:.1e}), "
                f"sampled {same} of {count} as in one slot\n"
            )


if __name__ == "__main__":
    main()
