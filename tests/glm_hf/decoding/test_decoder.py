"""Requests that are decoded together get the tokens that each gets alone, by `fill_blanks` and `generate`."""

import copy
import random

import many_requests
import peft
import pytest
import torch
from golden import golden_model

from glm_hf import GLMForBlankInfilling
from glm_hf.decoding import Answer, Decoder, Request, Sampling, fill_texts
from glm_hf.decoding.engine import Engine
from glm_hf.decoding.fill import Filling
from glm_hf.infilling_glm import prepare_context
from glm_hf.quantization import fused_step
from glm_hf.quantization.quantizer import CASTS_BEFORE_CONVERTING

COUNT = 40  # more than there are slots
NOISE = 1e-4  # of sums of fp32 log-probabilities
GREEDY = [Sampling()] * COUNT
MIXED = many_requests.samplings(COUNT)


@pytest.fixture(scope="module", params=["fp32", "INT4"])
def model(request) -> GLMForBlankInfilling:
    model = golden_model("cfg1")
    return model if request.param == "fp32" else many_requests.quantized(model)


@pytest.fixture(scope="module")
def plain() -> GLMForBlankInfilling:
    return golden_model("cfg1")


@pytest.fixture(scope="module")
def rows(plain) -> list[list[int]]:
    return many_requests.texts(plain.config, COUNT)


@pytest.fixture(scope="module")
def expected_of_plain(plain, rows) -> list:
    return many_requests.one_by_one(plain, rows)


@pytest.fixture(scope="module")
def expected(model, plain, rows, expected_of_plain) -> list:
    return expected_of_plain if model is plain else many_requests.one_by_one(model, rows)


@pytest.fixture(scope="module")
def sampled_alone(model, rows) -> list:
    return many_requests.decode(Decoder(Engine(model, 1)), rows, MIXED)


def endless(model: GLMForBlankInfilling) -> Sampling:
    """Return settings by which no answer ends by itself."""
    return Sampling(logit_bias=dict.fromkeys(model.generation_config.eos_token_id, -100.0))


def ids_of(answers: list) -> list[list[list[int]]]:
    return [blanks for blanks, _ in answers]


def request_for(model: GLMForBlankInfilling, text: list[int], **settings) -> Request:
    settings.setdefault("max_new_tokens", 8)
    return Request([*prepare_context(text, model.config), model.config.sop_token_id], **settings)


@pytest.mark.parametrize("num_slots", [1, 8, 32])
def test_answers_are_those_of_fill_blanks(model, rows, expected, num_slots):
    answers = many_requests.decode(Decoder(Engine(model, num_slots)), rows, GREEDY)
    assert ids_of(answers) == ids_of(expected)
    for (_, scores), (_, of_one) in zip(answers, expected, strict=True):
        assert scores == pytest.approx(of_one, abs=NOISE)


@pytest.mark.parametrize("num_slots", [8, 32])
def test_drawn_tokens_do_not_depend_on_the_company(model, rows, sampled_alone, num_slots):
    answers = many_requests.decode(Decoder(Engine(model, num_slots)), rows, MIXED)
    assert ids_of(answers) == ids_of(sampled_alone)
    assert ids_of(many_requests.decode(Decoder(Engine(model, num_slots)), rows[::-1], MIXED[::-1]))[::-1] == ids_of(
        sampled_alone
    )


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_steps_of_fixed_shape_give_the_same_tokens(model, rows, expected, sampled_alone, backend):
    torch.compiler.reset()
    decoder = Decoder(Engine(model, 8, max_length=512, is_static=True, backend=backend))
    assert ids_of(many_requests.decode(decoder, rows, GREEDY)) == ids_of(expected)
    assert ids_of(many_requests.decode(decoder, rows, MIXED)) == ids_of(sampled_alone)


def test_two_ranks_give_the_tokens_of_one(model, rows, expected, sampled_alone, tmp_path):
    is_quantized = hasattr(model, "hf_quantizer")
    if is_quantized and CASTS_BEFORE_CONVERTING:
        pytest.skip("ranks share quantized weights from transformers 5.23 on")
    greedy, mixed = many_requests.decode_on_ranks(tmp_path, is_quantized, rows, [GREEDY, MIXED])
    assert ids_of(greedy) == ids_of(expected)
    equal = [a == b for a, b in zip(ids_of(mixed), ids_of(sampled_alone), strict=True)]
    assert sum(equal) >= COUNT - 2  # ranks add up in another order, and a number may fall between two tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_decoded(plain, dtype):
    """Near ties are decided by rounding, which depends on the batch; most answers are equal."""
    rows, model = many_requests.texts(plain.config, 20, longest=60), copy.deepcopy(plain).to(dtype)
    answers = fill_texts(Decoder(Engine(model, 8)), [prepare_context(row, model.config) for row in rows], 6)
    alone = many_requests.one_by_one(model, rows, 6)
    equal = [[blank.ids for blank in blanks] == one for blanks, (one, _) in zip(answers, alone, strict=True)]
    assert sum(equal) > len(rows) / 2


TASK = {"task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    "adapter",
    [
        peft.LoraConfig(r=4, **TASK),
        peft.PromptTuningConfig(num_virtual_tokens=4, **TASK),
        peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=24, **TASK),
        peft.PrefixTuningConfig(num_virtual_tokens=4, **TASK),
    ],
    ids=lambda adapter: adapter.peft_type.name,
)
def test_adapters_and_learned_prompts_count(rows, plain, expected_of_plain, adapter):
    adapted = peft.get_peft_model(copy.deepcopy(plain), adapter).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    alone = many_requests.one_by_one(adapted, rows)
    assert ids_of(alone) != ids_of(expected_of_plain), "the adapter must change what the model says"
    assert ids_of(many_requests.decode(Decoder(Engine(adapted, 8)), rows, GREEDY)) == ids_of(alone)


@pytest.mark.parametrize(
    ("sampling", "options"),
    [
        (Sampling(repetition_penalty=1.7), {"repetition_penalty": 1.7}),
        (Sampling(logit_bias={9: 6.0, 12: -4.0}), {"sequence_bias": [[[9], 6.0], [[12], -4.0]]}),
    ],
)
def test_settings_are_those_of_generate(plain, sampling, options):
    rows = many_requests.texts(plain.config, 20, longest=60)
    requests = [request_for(plain, row, sampling=sampling) for row in rows]
    answers = Decoder(Engine(plain, 8)).run(requests)
    for answer, request in zip(answers, requests, strict=True):
        ids = torch.tensor([list(request.input_ids)])
        suppressed = {"suppress_tokens": Engine(plain, 1).settings.never.tolist()}
        output = plain.generate(ids, max_new_tokens=8, do_sample=False, **options, **suppressed)[0, ids.shape[1] :]
        assert answer.ids == [token for token in output.tolist() if token not in plain.generation_config.eos_token_id]


def test_log_probabilities_are_those_of_the_model(plain):
    request = request_for(plain, [11, 12, plain.config.mask_token_id, 13], num_logprobs=5)
    others = [request_for(plain, [20 + index, 30], sampling=Sampling(temperature=1.0)) for index in range(3)]
    answer = Decoder(Engine(plain, 4)).run([*others, request])[-1]
    row = torch.tensor([[*request.input_ids, *answer.ids]])
    log_probs = plain(row).logits[0].log_softmax(-1)[len(request.input_ids) - 1 :]
    for step, (top, token_id) in enumerate(zip(answer.top, answer.ids, strict=False)):
        values, ids = log_probs[step].topk(5)
        assert [token for token, _ in top] == ids.tolist()
        assert [value for _, value in top] == pytest.approx(values.tolist(), abs=NOISE)
        assert answer.log_probs[step] == pytest.approx(float(log_probs[step, token_id]), abs=NOISE)


def test_answers_that_have_begun_are_continued(plain):
    request = request_for(plain, [11, 12, plain.config.mask_token_id, 13])
    [whole] = Decoder(Engine(plain, 1)).run([request])
    begun = Request([*request.input_ids, *whole.ids[:3]], max_new_tokens=5)
    [rest] = Decoder(Engine(plain, 2)).run([begun])
    assert whole.ids[:3] + rest.ids == whole.ids


def test_slots_become_longer_than_they_were_made(plain):
    text = [int(token) for token in torch.randint(3, 140, (300,))]
    engine = Engine(plain, 4)
    before = engine.cache.capacity
    short, long = (request_for(plain, ids, max_new_tokens=80) for ids in ([11, 12], text))
    answers = Decoder(engine).run([short, long])
    assert engine.cache.capacity > before
    for answer in answers:
        ids = torch.tensor([list(answer.request.input_ids)])
        output = plain.generate(
            ids, max_new_tokens=80, do_sample=False, suppress_tokens=engine.settings.never.tolist()
        )
        tokens = output[0, ids.shape[1] :].tolist()
        assert answer.ids == [token for token in tokens if token not in plain.generation_config.eos_token_id]


def test_the_window_ends_an_answer(plain):
    request = request_for(plain, [11, 12], max_new_tokens=100, sampling=endless(plain))
    [answer] = Decoder(Engine(plain, 1, max_length=len(request.input_ids) + 3)).run([request])
    assert (len(answer.ids), answer.finish_reason) == (3, "length")


def test_a_function_of_the_caller_ends_an_answer(plain):
    request = request_for(plain, [11, 12], max_new_tokens=100, is_stopped=lambda ids: len(ids) == 2)
    [answer] = Decoder(Engine(plain, 1)).run([request])
    assert (len(answer.ids), answer.finish_reason) == (2, "stop")


def test_a_cancelled_request_frees_its_slot_at_once(plain):
    decoder = Decoder(Engine(plain, 3))
    requests = [request_for(plain, [10 + index, 30], sampling=endless(plain)) for index in range(5)]
    alone = [Decoder(Engine(plain, 1)).run([request])[0].ids for request in requests]
    answers = [decoder.submit(request) for request in requests]
    decoder.advance()
    decoder.cancel(answers[0])
    decoder.cancel(answers[4])
    assert (len(decoder.active), len(decoder.waiting)) == (2, 1)
    assert answers[0].finish_reason == answers[4].finish_reason == "cancelled"
    decoder.advance()
    assert len(decoder.active) == 3
    while not decoder.is_idle:
        decoder.advance()
    assert [answer.ids for answer in answers[1:4]] == alone[1:4]


def test_every_token_is_told(plain):
    seen: list[tuple[int, bool]] = []

    def note(answer: Answer) -> None:
        seen.append((len(answer.ids), answer.is_finished))

    [answer] = Decoder(Engine(plain, 1)).run(
        [request_for(plain, [11, 12], max_new_tokens=4, sampling=endless(plain), on_token=note)]
    )
    assert seen == [(1, False), (2, False), (3, False), (4, True)]
    assert answer.finish_reason == "length"


def test_contexts_of_like_length_are_read_together(plain, monkeypatch):
    engine = Engine(plain, 8)
    read: list[list[int]] = []
    prefill = engine.prefill
    monkeypatch.setattr(engine, "prefill", lambda rows, *rest: read.append([*map(len, rows)]) or prefill(rows, *rest))
    rng = random.Random(0)
    lengths = (20, 300, 22, 18, 290, 21)
    Decoder(engine).run([request_for(plain, [rng.randrange(3, 140) for _ in range(n)]) for n in lengths])
    assert read == [[22, 24, 20, 23], [302], [292]]


def test_quantized_models_take_one_call_a_step(monkeypatch):
    model = many_requests.quantized(golden_model("cfg1"))
    made: list[bool] = []
    step = model.model.fused_step
    assert step is fused_step.fused_step
    monkeypatch.setattr(
        model.model, "fused_step", lambda *args, **options: note(made, step(*args, **options)), raising=False
    )
    Decoder(Engine(model, 4)).run([request_for(model, [10 + index, 30 + index]) for index in range(6)])
    assert made
    assert all(made)


def note(made: list[bool], output: torch.Tensor | None) -> torch.Tensor | None:
    made.append(output is not None)
    return output


def test_damaged_weights_are_an_error(plain):
    model = copy.deepcopy(plain)
    with torch.no_grad():
        model.model.layers[0].mlp.dense_h_to_4h.weight[0, 0] = torch.nan
    for sampling in (Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.5)):
        [answer] = Decoder(Engine(model, 2)).run([request_for(model, [11, 12], sampling=sampling)])
        assert answer.ids == []
        assert "not finite" in answer.error
    with pytest.raises(ValueError, match="not finite"):
        fill_texts(Decoder(Engine(model, 2)), [prepare_context([11, 12], model.config)])


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        ([11, 12], {}, "must hold a context and the start-of-blank token"),
        ([11, 12, "sop", 10**6], {}, "every token id must be from 0 to 159"),
        ([-1, "sop"], {}, "every token id must be from 0 to 159"),
        ([11, "sop"], {"max_new_tokens": 0}, "room for at least 1 new token"),
        ([11] * 70 + ["sop"], {}, "room for at least 1 new token"),
        ([11, "sop"], {"sampling": Sampling(logit_bias={160: 1.0})}, "token id of logit_bias"),
    ],
)
def test_requests_that_do_not_fit_are_refused(plain, ids, settings, message):
    decoder = Decoder(Engine(plain, 2, max_length=64))
    row = [plain.config.sop_token_id if token == "sop" else token for token in ids]
    with pytest.raises(ValueError, match=message):
        decoder.submit(Request(row, **settings))
    assert decoder.is_idle


@pytest.mark.parametrize("options", [{"num_slots": 0}, {"max_length": 2}, {"max_length": 10**6}, {"backend": "eager"}])
def test_engines_that_cannot_be_are_refused(plain, options):
    with pytest.raises(ValueError, match="must be|is_static"):
        Engine(plain, **options)


def test_a_full_slot_still_has_room_for_the_next_blank(plain):
    mask = plain.config.mask_token_id
    decoder = Decoder(Engine(plain, 1, max_length=9))
    filling = Filling(decoder, prepare_context([11, mask, mask, 12], plain.config), Request((), 20, endless(plain)))
    while not filling.is_finished:
        decoder.advance()
    assert [len(answer.ids) for answer in filling.answers] == [3, 1]


def test_slots_that_are_not_in_use_stay_empty(plain):
    engine = Engine(plain, 4, max_length=64, is_static=True)
    decoder = Decoder(engine)
    for index in range(3):
        decoder.submit(request_for(plain, [10 + index, 30], max_new_tokens=9, sampling=endless(plain)))
    for _ in range(5):
        decoder.advance()
    assert engine.cache.lengths.tolist()[3] == 0
    assert min(engine.cache.lengths.tolist()[:3]) > 0


def test_the_blanks_of_a_text_are_filled_before_the_next_text_begins(plain):
    config, decoder = plain.config, Decoder(Engine(plain, 1))
    texts = [[11, config.mask_token_id, 12, config.mask_token_id, 13], [21, 22]]
    first, second = (Filling(decoder, prepare_context(text, config), Request((), 4)) for text in texts)
    while not second.answers[0].ids and not second.is_finished:
        decoder.advance()
    assert first.is_finished


def test_every_blank_of_a_text_draws_numbers_of_its_own(plain):
    config = plain.config
    text = [11, config.mask_token_id, 12, config.mask_token_id, 13]
    request = Request((), 8, Sampling(temperature=2.0, seed=5))
    decoder = Decoder(Engine(plain, 1))
    filling = Filling(decoder, prepare_context(text, config), request)
    while not filling.is_finished:
        decoder.advance()
    first, second = filling.answers
    row = [*text[:1], *first.ids, *text[2:], config.eos_token_id, config.sop_token_id]
    [alone] = decoder.run([Request(row, 8, Sampling(temperature=2.0, seed=6))])
    assert alone.ids == second.ids
