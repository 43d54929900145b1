"""Requests with a layout of their own, beside others."""

import copy
import random
from dataclasses import replace

import many_requests
import peft
import pytest
import torch
from golden import golden_model

from glm_hf.decoding import Decoder, Engine, Layout, Request, Sampling
from glm_hf.decoding.engine import layout_of
from glm_hf.infilling_glm import prepare_context

COUNT = 24


@pytest.fixture(scope="module", params=["fp32", "INT4"])
def model(request):
    model = golden_model("cfg1")
    return model if request.param == "fp32" else many_requests.quantized(model)


def requests_for(model, count=COUNT):
    texts = many_requests.texts(model.config, count)
    rows = [[*prepare_context(text, model.config), model.config.sop_token_id] for text in texts]
    return [Request(row, max_new_tokens=8) for row in rows]


def odd_layout(row, rng):
    """A layout that the ids do not have."""
    positions = tuple(rng.randrange(60) for _ in row)
    return Layout(positions, rng.randrange(1, len(row)), rng.randrange(60), rng.choice((0, 1)))


@torch.no_grad()
def greedy(model, request):
    """The answer to a request, each token from a forward pass over all before it."""
    ids, positions = list(request.input_ids), list(request.layout.position_ids)
    new, end_ids = [], (model.config.eop_token_id, model.config.eos_token_id)
    for step in range(request.max_new_tokens):
        visible = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        visible[:, : request.layout.num_context] = True
        logits = model(
            torch.tensor([ids]), attention_mask=visible[None, None], position_ids=torch.tensor([positions])
        ).logits[0, -1]
        token = int(logits.argmax())
        if token in end_ids:
            break
        new.append(token)
        ids.append(token)
        positions.append(request.layout.next_position + step * request.layout.increment)
    return new


@pytest.mark.parametrize("num_slots", [1, 8])
def test_a_layout_that_the_ids_have_changes_nothing(model, num_slots):
    plain = requests_for(model)
    told = [replace(request, layout=layout_of(request.input_ids, model.config)) for request in plain]
    mixed = [pair[number % 2] for number, pair in enumerate(zip(plain, told, strict=True))]
    expected = [answer.ids for answer in Decoder(Engine(model, num_slots)).run(plain)]
    for requests in (told, mixed):
        assert [answer.ids for answer in Decoder(Engine(model, num_slots)).run(requests)] == expected


@pytest.mark.parametrize("num_slots", [1, 8])
def test_a_layout_of_its_own_is_followed(num_slots):
    model, rng = golden_model("cfg1"), random.Random(0)
    sampling = Sampling(allows_blanks=True)
    requests = [
        replace(request, layout=odd_layout(request.input_ids, rng), sampling=sampling)
        for request in requests_for(model)
    ]
    answers = Decoder(Engine(model, num_slots)).run(requests)
    assert [answer.ids for answer in answers] == [greedy(model, request) for request in requests]


def test_equal_rows_of_different_layouts_are_read_apart():
    model = golden_model("cfg1")
    request, rng = requests_for(model, 1)[0], random.Random(1)
    sampling = Sampling(allows_blanks=True)
    same = [replace(request, layout=odd_layout(request.input_ids, rng), sampling=sampling) for _ in range(6)]
    answers = Decoder(Engine(model, 6)).run(same)
    assert [answer.ids for answer in answers] == [greedy(model, each) for each in same]


def test_blanks_come_only_where_they_are_allowed():
    model = golden_model("cfg1")
    config = model.config
    bias = {config.mask_token_id: 1000.0}
    request = requests_for(model, 1)[0]
    asked = [
        replace(request, sampling=Sampling(logit_bias=bias, allows_blanks=allows)) for allows in (False, True, False)
    ]
    refused, allowed, again = Decoder(Engine(model, 3)).run(asked)
    assert config.mask_token_id not in refused.ids
    assert refused.ids == again.ids
    assert set(allowed.ids) == {config.mask_token_id}


def test_rows_without_sop_need_a_layout():
    model = golden_model("cfg1")
    decoder = Decoder(Engine(model, 1))
    with pytest.raises(ValueError, match="sop"):
        decoder.submit(Request([1, 2, 3]))
    decoder.submit(Request([1, 2, 3], layout=Layout((0, 1, 2), 1, 3, 1)))


def test_learned_tokens_in_front_leave_no_place_for_a_layout():
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(copy.deepcopy(golden_model("cfg1")), settings).eval()
    decoder = Decoder(Engine(model, 1))
    with pytest.raises(ValueError, match="learned tokens of an adapter"):
        decoder.submit(Request([1, 2, 3], layout=Layout((0, 1, 2), 1, 3, 1)))
