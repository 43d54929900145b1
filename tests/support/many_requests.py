"""Mixed requests to the decoder, and whether their answers are those that each gets alone.

Run: python tests/support/many_requests.py 1000
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from forked import run_ranks
from golden import golden_model

from glm_hf import GLMConfig, GLMForBlankInfilling, GLMQuantizationConfig
from glm_hf.decoding import Decoder, Request, Sampling
from glm_hf.decoding.engine import Engine
from glm_hf.decoding.fill import Filling
from glm_hf.decoding.ranks import RankedEngine
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


def decode_on_ranks(
    folder: Path, is_quantized: bool, rows: list[list[int]], settings: list[list[Sampling]]
) -> list[list[tuple[list[list[int]], list[float]]]]:
    """Return blanks and scores of texts for each list of settings, by two tensor-parallel ranks in eight slots."""
    golden_model("cfg1").save_pretrained(folder)

    def run_rank(rank: int) -> None:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        options = {"quantization_config": GLMQuantizationConfig(bits=4)} if is_quantized else {}
        shared = {"tp_size": 2, "tp_plan": "auto"}
        model = GLMForBlankInfilling.from_pretrained(folder, distributed_config=shared, dtype=torch.float32, **options)
        engine = RankedEngine(model.eval(), num_slots=8)
        if rank:
            engine.follow()
        else:
            answers = [decode(Decoder(engine), rows, each) for each in settings]
            engine.stop()
            torch.save(answers, folder / "result.pt")
        torch.distributed.destroy_process_group()

    run_ranks(run_rank, 2, folder)
    return torch.load(folder / "result.pt", weights_only=True)


def report(name: str, count: int) -> None:
    """Print of how many requests to a model in fp32, INT4 or INT8 the answers are equal."""
    model = golden_model("cfg1")
    if name != "fp32":
        model = quantized(model, int(name[3:]))
    rows, greedy, mixed = texts(model.config, count), [Sampling()] * count, samplings(count)
    expected, alone = one_by_one(model, rows), decode(Decoder(Engine(model, 1)), rows, mixed)

    def compare(way: str, answers: list, sampled: list) -> None:
        equal = [a[0] == b[0] for a, b in zip(answers, expected, strict=True)]
        same = [a[0] == b[0] for a, b in zip(sampled, alone, strict=True)]
        sys.stdout.write(
            f"{name:5} {way:18} greedy {sum(equal)} of {count} as fill_blanks, "
            f"sampled {sum(same)} of {count} as in one slot\n"
        )
        sys.stdout.flush()

    ways = {f"{slots} slots": {"num_slots": slots} for slots in (1, 8, 32)}
    ways["8 slots, compiled"] = {"num_slots": 8, "max_length": 512, "is_static": True, "backend": "aot_eager"}
    for way, options in ways.items():
        compare(way, *(decode(Decoder(Engine(model, **options)), rows, each) for each in (greedy, mixed)))
    if name != "INT8":
        with tempfile.TemporaryDirectory() as folder:
            compare("8 slots, 2 ranks", *decode_on_ranks(Path(folder), name == "INT4", rows, [greedy, mixed]))


def main() -> None:
    """Compare the answers to many requests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=1000)
    torch.set_num_threads(1)
    for name in ("fp32", "INT4", "INT8"):
        report(name, parser.parse_args().count)


if __name__ == "__main__":
    main()
