"""Rows with all choices against one row per choice, by the model's own layout."""

import copy
import random

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from glm_hf.evaluation.samples import Rule, choice_sample, single_token_sample
from glm_hf.evaluation.scoring import TOKENS_AT_ONCE, Scorer

RULES = [
    Rule("[MASK]", max_length=512),
    Rule("[gMASK]", max_length=512),
    Rule("[MASK]", adds_eos=True, max_length=512),
]


def questions(config, count=12, seed=0):
    """Random texts with a mask, or none, and choices of any lengths."""
    rng = random.Random(seed)
    for _ in range(count):
        text = [rng.randrange(100, 3000) for _ in range(rng.randint(1, 60))]
        if rng.random() < 0.5:
            text[rng.randrange(len(text))] = config.mask_token_id
        yield text, [[rng.randrange(100, 3000) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(1, 6))]


@torch.no_grad()
def alone(model, context, choice):
    """Log-probabilities of a choice's tokens in a row of its own, whose layout the model finds itself."""
    row = torch.tensor([[*context, model.config.sop_token_id, *choice[:-1]]])
    scores = model(row).logits[0, len(context) :].log_softmax(-1)
    return scores.gather(1, torch.tensor(choice)[:, None])[:, 0]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.mask} {rule.adds_eos}")
def test_choices_in_one_row_score_as_each_in_its_own(rule, loaded):
    model, _ = loaded
    cases = (
        list(questions(model.config))
        if rule.mask == "[MASK]"
        else [
            ([token for token in text if token != model.config.mask_token_id] or [100], choices)
            for text, choices in questions(model.config)
        ]
    )
    samples = [choice_sample(text, choices, rule, model.config) for text, choices in cases]
    for sample, (_, choices), scores in zip(samples, cases, Scorer(model).score(samples), strict=True):
        context = sample.input_ids[: sample.num_context]
        for choice, found in zip(choices, scores, strict=True):
            torch.testing.assert_close(torch.tensor(found), alone(model, context, choice), atol=2e-4, rtol=1e-5)


def test_one_sop_serves_choices_of_one_token(loaded):
    model, _ = loaded
    rule = RULES[0]
    cases = [(text, [choice[:1] for choice in choices]) for text, choices in questions(model.config)]
    apart = Scorer(model).score([choice_sample(text, choices, rule, model.config) for text, choices in cases])
    together = Scorer(model).score([single_token_sample(text, choices, rule, model.config) for text, choices in cases])
    for first, second in zip(apart, together, strict=True):
        torch.testing.assert_close(torch.tensor(first), torch.tensor(second), atol=2e-4, rtol=1e-5)


def test_the_end_of_a_choice_counts_if_asked_for(loaded):
    model, _ = loaded
    text, choices = next(questions(model.config))
    plain = choice_sample(text, choices, RULES[0], model.config)
    ended = choice_sample(text, choices, Rule("[MASK]", scores_eop=True), model.config)
    (without,), (with_end,) = Scorer(model).score([plain]), Scorer(model).score([ended])
    context = plain.input_ids[: plain.num_context]
    for choice, first, second in zip(choices, without, with_end, strict=True):
        assert second[:-1] == pytest.approx(first, abs=2e-4)
        ended_alone = alone(model, context, [*choice, model.config.eop_token_id])
        assert second[-1] == pytest.approx(ended_alone[-1].item(), abs=2e-4)


@pytest.mark.parametrize("batch_size", [None, 1, 5])
def test_rows_score_the_same_in_any_batch(batch_size, loaded):
    model, _ = loaded
    samples = [choice_sample(*case, RULES[0], model.config) for case in questions(model.config, 20)]
    scorer, expected = Scorer(model, batch_size), Scorer(model, 1).score(samples)
    assert sorted(number for batch in scorer.batches(samples) for number in batch) == list(range(20))
    found: dict[int, list] = {}
    returned = scorer.score(samples, lambda number, scores, is_greedy: found.setdefault(number, scores))
    for scores, other in zip(returned, expected, strict=True):
        for choice, same in zip(scores, other, strict=True):
            assert choice == pytest.approx(same, abs=2e-4)
    assert sorted(found) == list(range(20))


def test_batches_have_as_many_rows_as_fit(loaded):
    model, _ = loaded
    samples = [choice_sample([100] * (1 + number % 60), [[100]], RULES[0], model.config) for number in range(300)]
    lengths = [len(sample.input_ids) for sample in samples]
    batches = list(Scorer(model).batches(samples))
    assert all(len(batch) * max(lengths[number] for number in batch) <= TOKENS_AT_ONCE for batch in batches)
    assert len(batches) < 2 * sum(lengths) / TOKENS_AT_ONCE
    assert max(map(len, Scorer(model, 7).batches(samples))) == 7
    longest = [choice_sample([100] * 3000, [[100]], Rule(max_length=4000), model.config)] * 2
    assert list(map(len, Scorer(model).batches(longest))) == [1, 1]


def test_a_choice_is_greedy_if_the_model_would_write_it(loaded):
    model, tokenizer = loaded
    text = tokenizer("The capital of France is [MASK].")["input_ids"]
    written = model.fill_blanks([text], max_new_tokens=8, do_sample=False).blanks[0][0]
    sample = choice_sample(text, [written, [100, 200]], Rule("[MASK]", adds_eos=True), model.config)
    known: list[bool] = []
    Scorer(model).score([sample], lambda number, scores, is_greedy: known.extend(is_greedy))
    assert known == [True, False]


def test_adapters_score_but_for_learned_tokens_in_front(loaded):
    model, _ = loaded
    samples = [choice_sample(*case, RULES[0], model.config) for case in questions(model.config, 3)]
    expected = Scorer(model).score(samples)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["query_key_value"])
    adapted = get_peft_model(copy.deepcopy(model), lora)
    assert Scorer(adapted.eval()).score(samples) == expected  # B is zero at first
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    prompted = get_peft_model(copy.deepcopy(model), prompts)
    with pytest.raises(ValueError, match="learned tokens"):
        Scorer(prompted)


def test_a_row_beyond_the_window_is_refused(loaded):
    model, _ = loaded
    sample = choice_sample([100] * 600, [[100]], Rule(max_length=700), model.config)
    with pytest.raises(ValueError, match="window 512; lower max_seq_length"):
        Scorer(model).score([sample])


def test_damaged_weights_are_no_score(loaded):
    model, _ = loaded
    sample = choice_sample([100] * 6, [[100]], RULES[0], model.config)
    kept = model.model.norm.weight.data.clone()
    try:
        model.model.norm.weight.data.fill_(float("nan"))
        with pytest.raises(ValueError, match="not finite"):
            Scorer(model).score([sample])
    finally:
        model.model.norm.weight.data.copy_(kept)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"mask": "[sMASK]"}, "mask must be"),
        ({"is_unidirectional": True}, "unidirectional needs"),
        ({"max_length": 3}, "at least 4"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        Rule(**arguments)


def test_of_tokens_that_are_equally_likely_the_first_is_the_most_likely(loaded):
    model = copy.deepcopy(loaded[0])
    context = [100, model.config.mask_token_id, 200]
    with torch.no_grad():
        best = int(model(torch.tensor([[*context, model.config.sop_token_id]])).logits[0, -1].argmax())
        other = best + 1 if best < 3000 else best - 1
        model.get_input_embeddings().weight[other] = model.get_input_embeddings().weight[best]
        model.lm_head.weight[other] = model.lm_head.weight[best]
    sample = choice_sample(context, [[min(best, other)], [max(best, other)], [300]], RULES[0], model.config)
    greedy = []
    Scorer(model).score([sample], lambda number, scores, is_greedy: greedy.extend(is_greedy))
    assert greedy == [True, False, False]
