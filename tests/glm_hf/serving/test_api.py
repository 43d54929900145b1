"""The API, as OpenAI's own client and plain HTTP see it; answers are compared with `fill_blanks` and the model."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from running_server import Running, load, serving

FRANCE, CHINESE = "The capital of France is [MASK].", "法国的首都是[MASK]。"
TWO = "The currency of Thailand is the [MASK] and its capital is [MASK]."


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load()


@pytest.fixture(scope="module")
def server(loaded) -> Iterator[Running]:
    with serving(*loaded) as running:
        yield running


@pytest.fixture
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def complete(client: openai.OpenAI, prompt: Any, **options: Any) -> Any:
    return client.completions.create(model="glm", prompt=prompt, **{"temperature": 0, **options})


def filled(loaded: tuple[Any, Any], text: str, **options: Any) -> list[str]:
    """Return the answers of the model itself for the blanks of a text."""
    model, tokenizer = loaded
    [blanks] = model.fill_blanks([tokenizer(text)["input_ids"]], do_sample=False, **options).blanks
    return [tokenizer.decode(blank) for blank in blanks]


def post(server: Running, body: Any, path: str = "/v1/completions", **options: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, **{"timeout": 60, **options})


@pytest.mark.parametrize("text", [FRANCE, CHINESE])
def test_blanks_are_filled(client, loaded, text):
    answer = complete(client, text)
    assert [answer.choices[0].text] == filled(loaded, text)
    assert answer.choices[0].finish_reason == "stop"


def test_a_suffix_is_read_before_the_blank_is_filled(client, loaded):
    answer = complete(client, "", suffix=" is the capital of Japan.")
    assert [answer.choices[0].text] == filled(loaded, "[MASK] is the capital of Japan.")
    assert answer.choices[0].text == "Tokyo"


def test_a_text_is_continued_with_its_blanks_kept(client):
    answer = complete(client, "The opposite of hot is")
    assert answer.choices[0].text == " cold."


def test_several_blanks_are_answered_one_by_one_and_echoed_in_place(client, loaded):
    first, second = filled(loaded, TWO)
    answer = complete(client, TWO, max_tokens=64)
    assert answer.choices[0].blanks == [first, second]
    assert answer.choices[0].text == f"{first}\n{second}"
    echoed = complete(client, TWO, max_tokens=64, echo=True)
    assert echoed.choices[0].text == f"The currency of Thailand is the {first} and its capital is {second}."


@pytest.mark.parametrize(
    ("text", "echo"), [(TWO, False), (TWO, True), (FRANCE, True), ("The opposite of hot is", True)]
)
def test_a_stream_adds_up_to_the_whole(client, text, echo):
    whole = complete(client, text, echo=echo, max_tokens=64).choices[0]
    events = list(complete(client, text, echo=echo, max_tokens=64, stream=True))
    assert "".join(event.choices[0].text for event in events) == whole.text
    assert [event.choices[0].finish_reason for event in events] == [None] * (len(events) - 1) + ["stop"]


def test_usage_ends_a_stream_when_asked_for(client):
    events = list(complete(client, FRANCE, stream=True, stream_options={"include_usage": True}))
    whole = complete(client, FRANCE)
    assert events[-1].choices == []
    assert events[-1].usage == whole.usage
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (9, 2)


def test_prompts_may_be_lists_and_ids(client, loaded):
    tokenizer = loaded[1]
    texts = [FRANCE, CHINESE]
    expected = [filled(loaded, text)[0] for text in texts]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    for prompt in (texts, ids):
        assert [choice.text for choice in complete(client, prompt).choices] == expected
    assert complete(client, ids[0]).choices[0].text == expected[0]


def test_ids_with_sop_are_taken_as_they_are(client, loaded):
    model, tokenizer = loaded
    ids = tokenizer("The opposite of hot is")["input_ids"]
    row = [model.config.gmask_token_id, model.config.sop_token_id, *ids]
    output = model.generate(torch.tensor([row]), max_new_tokens=6, do_sample=False)[0, len(row) :].tolist()
    text = tokenizer.decode([*ids, *(token for token in output if token not in tokenizer.all_special_ids)])
    assert complete(client, row, max_tokens=6).choices[0].text == text[len("The opposite of hot is") :]


def test_log_probabilities_are_those_of_the_model(client, loaded):
    model, tokenizer = loaded
    logprobs = complete(client, "The opposite of hot is", logprobs=3).choices[0].logprobs
    assert "".join(logprobs.tokens) == " cold."
    ids = tokenizer("The opposite of hot is")["input_ids"]
    row = [*ids, model.config.gmask_token_id, model.config.sop_token_id]
    answer = tokenizer("The opposite of hot is cold.")["input_ids"][len(ids) :]
    with torch.no_grad():
        expected = model(torch.tensor([row + answer])).logits[0, len(row) - 1 :].log_softmax(-1)
    for step, token_id in enumerate(answer):
        assert logprobs.token_logprobs[step] == pytest.approx(float(expected[step, token_id]), abs=1e-3)
        assert max(logprobs.top_logprobs[step].values()) == pytest.approx(float(expected[step].max()), abs=1e-3)
    assert logprobs.text_offset == [0, *[len("".join(logprobs.tokens[:n])) for n in range(1, len(answer))]]
    streamed = [
        event.choices[0].logprobs.tokens
        for event in complete(client, "The opposite of hot is", logprobs=3, stream=True)
    ]
    assert [token for tokens in streamed for token in tokens] == logprobs.tokens


def test_choices_are_drawn_by_the_seed(client):
    drawn = [complete(client, "The", temperature=1.0, n=3, seed=7, max_tokens=8) for _ in range(2)]
    texts = [[choice.text for choice in answer.choices] for answer in drawn]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1
    assert texts[0] != [
        choice.text for choice in complete(client, "The", temperature=1.0, n=3, seed=8, max_tokens=8).choices
    ]


def test_the_best_of_several_is_the_most_probable_on_average(client, loaded):
    never_ends = {str(token_id): -100 for token_id in loaded[0].generation_config.eos_token_id}
    options = {"temperature": 1.0, "seed": 3, "max_tokens": 8, "logit_bias": never_ends}
    every = complete(client, "The", n=6, logprobs=0, **options).choices
    best = complete(client, "The", n=2, best_of=6, **options).choices
    ranked = sorted(every, key=lambda choice: sum(choice.logprobs.token_logprobs), reverse=True)
    assert [choice.text for choice in best] == [choice.text for choice in ranked[:2]]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer_and_is_left_out(client, stream):
    options = {"prompt": "The opposite of hot is", "stop": ["ld", "zzz"], "max_tokens": 20}
    if stream:
        events = list(complete(client, **options, stream=True))
        text, reason = "".join(event.choices[0].text for event in events), events[-1].choices[0].finish_reason
    else:
        [choice] = complete(client, **options).choices
        text, reason = choice.text, choice.finish_reason
    assert (text, reason) == (" co", "stop")


def test_a_bias_bans_or_forces_a_token(client, loaded):
    token_id = loaded[1]("Berlin", add_special_tokens=False)["input_ids"][0]
    assert complete(client, FRANCE, logit_bias={str(token_id): 100}, max_tokens=1).choices[0].text == "Berlin"
    paris = loaded[1]("Paris", add_special_tokens=False)["input_ids"][0]
    assert complete(client, FRANCE, logit_bias={str(paris): -100}).choices[0].text != "Paris"


def test_alternatives_come_with_their_probabilities(client, loaded):
    model, tokenizer = loaded
    answer = complete(client, TWO, max_tokens=64, extra_body={"alternatives": 3}).choices[0]
    assert len(answer.alternatives) == 2
    context = tokenizer(TWO.replace("[MASK]", answer.blanks[0], 1))["input_ids"]
    for number, (text, probability) in enumerate(each.values() for each in answer.alternatives[1]):
        blank = tokenizer(text)["input_ids"]
        [score] = model.score_blanks([[*context, model.config.eos_token_id]], [blank])
        if number == 0:
            assert probability == pytest.approx(2.718281828**score, rel=0.02)
        assert probability > 0.98 * 2.718281828**score - 1e-6  # an unlikely text may come in other pieces
    shares = [each["probability"] for each in answer.alternatives[1]]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) == 4
    streamed = {  # in the order in which they are found
        event.choices[0].blank: event.choices[0].alternatives
        for event in complete(client, TWO, max_tokens=64, extra_body={"alternatives": 3}, stream=True)
        if hasattr(event.choices[0], "alternatives")
    }
    assert {blank: [each["text"] for each in found] for blank, found in streamed.items()} == {
        blank: [each["text"] for each in found] for blank, found in enumerate(answer.alternatives)
    }


def test_alternatives_of_a_single_token_are_whole(client):
    answer = complete(client, FRANCE, max_tokens=1, extra_body={"alternatives": 2}).choices[0]
    assert [len(of_blank) for of_blank in answer.alternatives] == [3]
    assert answer.alternatives[0][0]["text"] == answer.text == "Paris"


def test_chats_are_laid_out_by_the_template(client, loaded):
    messages: list[Any] = [{"role": "user", "content": "The capital of Kenya is [MASK]."}]
    answer = client.chat.completions.create(
        model="glm", messages=messages, temperature=0, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].message.content == "Nairobi" == filled(loaded, messages[0]["content"])[0]
    content = answer.choices[0].logprobs.content
    assert "".join(token.token for token in content) == "Nairobi"
    assert content[0].logprob == content[0].top_logprobs[0].logprob
    events = list(client.chat.completions.create(model="glm", messages=messages, temperature=0, stream=True))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == "Nairobi"
    assert events[-1].choices[0].finish_reason == "stop"


def test_the_async_client_is_answered_many_times_at_once(server, loaded):
    countries = ("France", "Japan", "Kenya", "Thailand", "Italy", "Spain") * 4
    texts = [f"The capital of {country} is [MASK]." for country in countries]

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            answers = await asyncio.gather(
                *(client.completions.create(model="glm", prompt=text, temperature=0) for text in texts)
            )
            return [answer.choices[0].text for answer in answers]

    assert asyncio.run(ask_all()) == [filled(loaded, text)[0] for text in texts]


def test_models_health_and_metrics(client, server):
    assert [model.id for model in client.models.list()] == ["glm"]
    assert client.models.retrieve("glm").max_model_len == 512
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    complete(client, FRANCE)
    text = httpx.get(f"{server.url}/metrics").text
    for name in ("generated_tokens_total", "prompt_tokens_total", "time_to_first_token_seconds_bucket", "slots 4.0"):
        assert f"glm_hf_{name}" in text
    assert 'glm_hf_requests_total{path="/v1/completions",status="200"}' in text


GOOD = {"model": "glm", "prompt": FRANCE}
CHAT = {"model": "glm", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 100}, "n", "at most 68 choices"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"best_of": 1, "n": 2}, "best_of", "at least n"),
        ({"best_of": 3, "stream": True}, "stream", "best of several"),
        ({"echo": True, "logprobs": 1}, "logprobs", "both ways"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"seed": 2**70}, "seed", "less than or equal to"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "less than or equal to 100"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "token id of logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty", "less than or equal to 0"),
        ({"tools": []}, "tools", "unknown or unsupported"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "from 1 to 64 prompts"),
        ({"prompt": ["a"] * 65}, "prompt", "from 1 to 64 prompts"),
        ({"prompt": "[MASK]"}, "prompt", "nothing but masks"),
        ({"prompt": "a [MASK] b [gMASK]"}, "prompt", "mixes"),
        ({"prompt": [-1]}, "prompt", "every token id"),
        ({"prompt": [10**12]}, "prompt", "every token id"),
        ({"prompt": "word " * 700}, "prompt", "512 tokens"),
        ({"prompt": 5}, "prompt", "prompt"),
        ({"prompt": FRANCE, "suffix": "x"}, "prompt", "blank between them"),
        ({"prompt": [5, 6], "suffix": "x"}, "prompt", "must be a text"),
        ({"model": "gpt"}, "model", "does not exist"),
    ],
)
def test_errors_name_the_field_that_is_wrong(server, change, param, words):
    response = post(server, {**GOOD, **change})
    assert response.status_code == (404 if param == "model" else 400)
    error = response.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"]
    server.wait_until_idle()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_errors_of_chats_name_the_field(server, change, param):
    response = post(server, {**CHAT, **change}, "/v1/chat/completions")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'"text"', b"[" * 100000, b'{"model": NaN}', b"null"])
def test_bodies_that_are_no_request_are_errors(server, body):
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_bodies_that_are_too_large_are_refused_before_they_are_read(server):
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.url}/v1/completions", content=b" " * (2**20 + 1), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 2**16

    response = httpx.post(f"{server.url}/v1/completions", content=chunks(), headers=headers)
    assert response.status_code == 413


@pytest.mark.parametrize("path", ["/v1/nothing", "/secret", "/../setup.cfg", "/page.py"])
def test_other_paths_are_errors(server, path):
    response = httpx.get(server.url + path)
    assert response.status_code == 404
    assert "error" in response.json()


def test_a_key_is_asked_for(loaded):
    with serving(*loaded, api_key="secret-key") as running:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            response = post(running, GOOD, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{running.url}/metrics").status_code == 401
        assert httpx.get(f"{running.url}/health").status_code == 200
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="secret-key")
        assert complete(client, FRANCE).choices[0].text == "Paris"


def slow_down(running: Running, seconds: float) -> None:
    """Let every step of the decoder take so much longer."""
    advance = running.decoder.advance

    def advance_slowly() -> None:
        time.sleep(seconds)
        advance()

    running.decoder.advance = advance_slowly


def test_a_full_queue_says_when_to_come_again(loaded):
    with serving(*loaded, num_slots=1, queue_size=1) as running:
        slow_down(running, 0.05)
        body = {**GOOD, "prompt": "The", "max_tokens": 100, "logit_bias": {"0": -100}}
        results: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: results.append(post(running, body))) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = sorted(response.status_code for response in results)
        assert statuses == [200, 200, 429, 429, 429]
        refused = next(response for response in results if response.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        running.wait_until_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(loaded, stream):
    with serving(*loaded) as running:
        slow_down(running, 0.02)
        never_ends = {str(token_id): -100 for token_id in loaded[0].generation_config.eos_token_id}
        body = {**GOOD, "prompt": "The", "max_tokens": 500, "stream": stream, "logit_bias": never_ends}
        if stream:
            with httpx.stream("POST", f"{running.url}/v1/completions", json=body) as response:
                for _ in zip(range(4), response.iter_lines(), strict=False):
                    pass
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{running.url}/v1/completions", json=body, timeout=0.5)
        running.wait_until_idle(5)
        assert running.metrics.registry.get_sample_value("glm_hf_generated_tokens_total") < 200


def test_a_request_may_take_only_so_long(loaded):
    with serving(*loaded, timeout=0.3) as running:
        slow_down(running, 0.05)
        body = {**GOOD, "prompt": "The", "max_tokens": 500, "temperature": 1, "logit_bias": {"0": -100}}
        body["logit_bias"] = {str(token_id): -100 for token_id in loaded[0].generation_config.eos_token_id}
        response = post(running, body)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        *_, last = post(running, {**body, "stream": True}).text.strip().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        running.wait_until_idle(5)


def test_a_step_that_fails_is_an_error_and_the_next_request_is_answered(loaded):
    with serving(*loaded) as running:
        engine = running.decoder.engine
        step, failures = engine.step, iter([True])

        def fail_once(*args: Any) -> Any:
            if next(failures, False):
                raise RuntimeError("out of memory")
            return step(*args)

        engine.step = fail_once
        assert post(running, GOOD).status_code == 500
        response = post(running, {**GOOD, "temperature": 0})
        assert response.json()["choices"][0]["text"] == "Paris"
        running.wait_until_idle(5)


def test_a_server_that_cannot_decode_any_more_says_so(loaded):
    with serving(*loaded) as running:
        running.worker.stop()
        response = httpx.get(f"{running.url}/health")
        assert (response.status_code, response.json()) == (503, {"status": "failed"})
        assert post(running, GOOD).status_code == 503


def test_slots_are_counted_when_clients_have_left(loaded):
    with serving(*loaded) as running:
        slow_down(running, 0.02)
        never_ends = {str(token_id): -100 for token_id in loaded[0].generation_config.eos_token_id}
        with pytest.raises(httpx.ReadTimeout):
            post(running, {**GOOD, "prompt": "The", "max_tokens": 500, "logit_bias": never_ends}, timeout=0.5)
        running.wait_until_idle(5)
        time.sleep(0.1)
        assert running.metrics.registry.get_sample_value("glm_hf_slots_in_use") == 0
