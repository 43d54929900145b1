"""Beams against all continuations there are, and in any company."""

import math
import random
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch

from glm_hf import GLMConfig, GLMForBlankInfilling
from glm_hf.evaluation.beams import BeamSearch, BeamSettings, RunningRow, search_beams
from glm_hf.evaluation.samples import Rule, generation_row

SETTINGS = BeamSettings(num_beams=3, no_repeat_ngram_size=0, max_gen_length=3)


@pytest.fixture(scope="module")
def tiny():
    """A model of 12 tokens, so that all continuations can be counted."""
    torch.manual_seed(3)
    ids = {"pad": 0, "eos": 4, "mask": 5, "gmask": 6, "smask": 7, "eod": 8, "sop": 9, "eop": 10}
    config = GLMConfig(
        vocab_size=12,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        **{f"{name}_token_id": number for name, number in ids.items()},
    )
    model = GLMForBlankInfilling(config).double().eval()
    for parameter in model.parameters():
        parameter.data.mul_(4)
    return model


def rows(model, count, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        text = [rng.choice((1, 2, 3, 11)) for _ in range(rng.randint(1, 12))]
        mask = rng.choice(("[MASK]", "[gMASK]"))
        yield generation_row(text, 8, Rule(mask, max_length=100), model.config)


@torch.no_grad()
def log_prob(model, row, layout, beam):
    """Log-probability of a continuation, read whole."""
    ids = torch.tensor([[*row, *beam]])
    positions = [*layout.position_ids, *(layout.next_position + step * layout.increment for step in range(len(beam)))]
    visible = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    visible[:, : layout.num_context] = True
    logits = model(ids, attention_mask=visible[None, None], position_ids=torch.tensor([positions])).logits[0]
    scores = logits[len(row) - 1 : -1].log_softmax(-1)
    return scores.gather(1, torch.tensor(beam)[:, None]).sum().item()


@pytest.fixture(scope="module")
def continuations(tiny):
    """Two rows, each with the log-probabilities of all continuations of at most three tokens."""
    end_ids = {tiny.config.eop_token_id, tiny.config.eos_token_id}
    every = [
        beam
        for length in (1, 2, 3)
        for beam in product(range(tiny.config.vocab_size), repeat=length)
        if not set(beam[:-1]) & end_ids and (length == 3 or beam[-1] in end_ids)
    ]
    return [
        (row, layout, {beam: log_prob(tiny, row, layout, beam) for beam in every}) for row, layout in rows(tiny, 2)
    ]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("counts_context", [True, False])
def test_enough_beams_find_the_best_of_all_continuations(tiny, continuations, penalty, counts_context):
    end_ids = (tiny.config.eop_token_id, tiny.config.eos_token_id)
    settings = replace(SETTINGS, num_beams=144, length_penalty=penalty, penalizes_context=counts_context)
    for row, layout, log_probs in continuations:
        (beams,) = search_beams(tiny, [(row, layout)], [32], settings, end_ids)

        def score(beam, log_probs=log_probs):
            length = len(beam) + (32 if counts_context else 0)
            return log_probs[beam] / ((5 + length) / 6) ** penalty

        best = max(log_probs, key=score)
        assert beams[0].ids == list(best)
        assert beams[0].score == pytest.approx(score(best), abs=1e-6)
        assert beams[0].length == len(best) + (32 if counts_context else 0)
        assert [beam.score for beam in beams] == sorted((beam.score for beam in beams), reverse=True)


@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, no_repeat_ngram_size=2, max_gen_length=9)])
def test_beams_do_not_depend_on_company(tiny, settings):
    cases = list(rows(tiny, 30))
    padded = [32] * len(cases)
    end_ids = (tiny.config.eop_token_id,)
    together = search_beams(tiny, cases, padded, settings, end_ids)
    for case, found in zip(cases, together, strict=True):
        (expected,) = search_beams(tiny, [case], [32], settings, end_ids)
        assert [beam.ids for beam in found] == [beam.ids for beam in expected]
        for beam, other in zip(found, expected, strict=True):
            assert beam.score == pytest.approx(other.score, abs=1e-6)
            assert math.isfinite(beam.score)


def test_of_equal_scores_the_later_beam_comes_first(tiny):
    row = RunningRow(*next(rows(tiny, 1)), 32)
    search = BeamSearch(tiny, [row], replace(SETTINGS, length_penalty=0.0), ())
    for ids, score in (([1], -1.0), ([2], -2.0), ([3], -1.0), ([11], -3.0)):
        search._end(row, ids, score)
    assert [beam.ids for beam in row.ended] == [[3], [1], [2]]


def test_a_score_is_that_of_its_tokens(tiny):
    end_ids = (tiny.config.eop_token_id,)
    for row, layout in rows(tiny, 5, seed=1):
        for beam in search_beams(tiny, [(row, layout)], [32], SETTINGS, end_ids)[0]:
            total = log_prob(tiny, row, layout, beam.ids)
            assert beam.score == pytest.approx(total / ((5 + beam.length) / 6), abs=1e-6)


def test_bans(tiny):
    end_ids = (tiny.config.eop_token_id,)
    settings = replace(
        SETTINGS, max_gen_length=6, min_gen_length=4, banned_tokens=(1,), banned_prefixes=((2,), (3, 3)), num_beams=4
    )
    for beams in search_beams(tiny, list(rows(tiny, 20)), [32] * 20, settings, end_ids):
        for beam in beams:
            assert 1 not in beam.ids
            assert beam.ids[0] != 2
            assert beam.ids[:2] != [3, 3]
            assert not set(beam.ids[:4]) & set(end_ids)


def test_no_group_of_tokens_comes_twice(tiny):
    settings = replace(SETTINGS, max_gen_length=20, no_repeat_ngram_size=2)
    for beams in search_beams(tiny, list(rows(tiny, 8)), [32] * 8, settings, (tiny.config.eop_token_id,)):
        for beam in beams:
            pairs = list(pairwise(beam.ids))
            assert len(pairs) == len(set(pairs))
