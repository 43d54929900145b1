"""The choice of tokens, against the logits processors of transformers and against counts of many draws."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from glm_hf.decoding import Sampling
from glm_hf.decoding.sampling import SlotSettings

VOCAB, NEVER, SEEN = 400, [3, 4, 5], [7, 8, 9, 50]
SETTINGS = {
    "plain": Sampling(temperature=1.0),
    "cold": Sampling(temperature=0.3),
    "top-k": Sampling(temperature=0.8, top_k=7),
    "top-k of all": Sampling(temperature=0.8, top_k=10**6),
    "top-p": Sampling(temperature=1.1, top_p=0.8),
    "small top-p": Sampling(temperature=1.0, top_p=1e-6),
    "min-p": Sampling(temperature=1.5, min_p=0.1),
    "all": Sampling(
        temperature=0.9, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.4, logit_bias={7: 2.0, 11: -1.0}
    ),
    "greedy": Sampling(),
    "greedy penalty": Sampling(repetition_penalty=3.0),
}


def expected_scores(sampling: Sampling, logits: torch.Tensor) -> torch.Tensor:
    """Return what transformers' processors make of `(1, V)`, in the order in which `generate` calls them."""
    processors = LogitsProcessorList()
    if sampling.logit_bias:
        processors.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in sampling.logit_bias.items()}))
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(SuppressTokensLogitsProcessor(NEVER))
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            processors.append(MinPLogitsWarper(sampling.min_p))
    return processors(torch.tensor([SEEN]), logits.clone())


@pytest.mark.parametrize("at_once", [8, VOCAB])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_share_draws_the_token_that_transformers_would_give_it(name, at_once):
    """Draw by evenly spaced numbers: each token as often as its probability says, to one."""
    sampling, num_draws = SETTINGS[name], 2000
    settings = SlotSettings(num_draws, VOCAB, NEVER, torch.device("cpu"))
    for slot in range(num_draws):
        settings.assign(slot, sampling, 0, SEEN)
    logits = 3 * torch.randn(1, VOCAB)
    numbers = (torch.arange(num_draws) + 0.5) / num_draws
    rows = torch.arange(num_draws)
    choice = settings.choose(logits.expand(num_draws, -1), rows, numbers, settings.kinds(range(num_draws)), at_once)
    counts = torch.bincount(choice.ids, minlength=VOCAB)
    scores = expected_scores(sampling, logits)[0]
    if sampling.temperature == 0:
        assert counts[scores.argmax()] == num_draws
        return
    assert (counts - num_draws * scores.softmax(0)).abs().max() < 1.01
    log_probs = logits.log_softmax(1)[0, choice.ids]
    assert torch.allclose(choice.log_probs, log_probs, atol=1e-5)


def test_slots_of_all_settings_keep_to_their_own():
    settings = SlotSettings(len(SETTINGS), VOCAB, NEVER, torch.device("cpu"))
    logits, rows = 3 * torch.randn(len(SETTINGS), VOCAB), torch.arange(len(SETTINGS))
    for slot, sampling in enumerate(SETTINGS.values()):
        settings.assign(slot, sampling, 0, SEEN)
    numbers = torch.rand(len(SETTINGS))
    together = settings.choose(logits, rows, numbers, settings.kinds(range(len(SETTINGS)))).ids
    for slot, sampling in enumerate(SETTINGS.values()):
        settings.assign(slot, sampling, 0, SEEN)
        alone = settings.choose(
            logits[slot : slot + 1], rows[slot : slot + 1], numbers[slot : slot + 1], settings.kinds([slot])
        )
        assert alone.ids.tolist() == [int(together[slot])]


def test_a_slot_forgets_the_request_before():
    settings = SlotSettings(2, VOCAB, NEVER, torch.device("cpu"))
    logits = torch.zeros(1, VOCAB)
    logits[0, [20, 21]] = torch.tensor([2.0, 1.0])
    rows, one = torch.tensor([0]), torch.ones(1)
    settings.assign(0, Sampling(logit_bias={30: 50.0}, repetition_penalty=9.0), 0, [20])
    assert settings.choose(logits, rows, one, settings.kinds([0])).ids.tolist() == [30]
    settings.move(0, 1)
    settings.assign(0, Sampling(logit_bias={21: 3.0}), 0, [21])
    assert settings.choose(logits, rows, one, settings.kinds([0])).ids.tolist() == [21]
    settings.assign(0, Sampling(repetition_penalty=9.0), 0, [21])
    assert settings.choose(logits, rows, one, settings.kinds([0])).ids.tolist() == [20]
    assert settings.choose(logits, torch.tensor([1]), one, settings.kinds([1])).ids.tolist() == [30]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"min_p": 1.1}, "min_p must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias must be a finite number"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
