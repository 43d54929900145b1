import copy
import math
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    FillMaskPipeline,
    GPT2Config,
    GPT2LMHeadModel,
    TextGenerationPipeline,
    pipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY

from glm_hf import BlankInfillingPipeline, GLMForBlankInfilling, GLMForMaskedLM
from glm_hf.filling_glm import Blank
from glm_hf.pipelines.fill_mask import best_first
from glm_hf.pipelines.text_generation import GLMTextGenerationPipeline, continuation

ONE = "the people [MASK] the time"
TWO = "the [MASK] people have [MASK] time"
OPTIONS = {"max_new_tokens": 5}


@pytest.fixture(scope="module")
def fill(model_folder):
    return pipeline("fill-mask", model=str(model_folder), dtype=torch.float32)


@pytest.fixture(scope="module")
def infilling(model_folder):
    return GLMForBlankInfilling.from_pretrained(model_folder).eval()


def test_pipeline_of_the_task_is_ours(fill):
    assert type(fill) is BlankInfillingPipeline
    assert type(fill.model) is GLMForMaskedLM
    assert fill.infiller.model is fill.model.model


def test_result_has_the_standard_format(fill):
    results = fill(ONE, **OPTIONS)
    assert len(results) == 5
    for result in results:
        assert result.keys() == {"score", "token", "token_str", "sequence"}
        assert fill.tokenizer.decode(result["token"]) == result["token_str"]
        assert result["sequence"].startswith("the people")
        assert result["sequence"].endswith("the time")
    scores = [result["score"] for result in results]
    assert scores == sorted(scores, reverse=True)
    assert 0 < sum(scores) <= 1


def test_score_is_the_probability_of_the_whole_blank(fill, infilling):
    config = infilling.config
    context = [*fill.tokenizer(ONE)["input_ids"], config.eos_token_id]
    for result in fill(ONE, top_k=3, **OPTIONS):
        ids = result["token"] if isinstance(result["token"], list) else [result["token"]]
        with torch.no_grad():
            log_probs = infilling(torch.tensor([[*context, config.sop_token_id, *ids]])).logits[0].log_softmax(-1)
        start = len(context)
        of_tokens = sum(log_probs[start + index, token].item() for index, token in enumerate(ids))
        ends = [log_probs[-1, end].item() for end in (config.eop_token_id, config.eos_token_id)]
        finished = [math.exp(of_tokens + end) for end in ends]
        assert any(result["score"] == pytest.approx(p, rel=1e-3) for p in [*finished, math.exp(of_tokens)])


def test_blank_of_several_tokens_is_a_list(fill):
    lengths = {len(r["token"]) if isinstance(r["token"], list) else 1 for r in fill(ONE, top_k=8, **OPTIONS)}
    assert lengths - {1}


@pytest.mark.parametrize(
    "text", [ONE, "the people,  [MASK]!", "People\n[MASK]\tyear", "天地[MASK]。", "a </s> [sMASK]b"]
)
def test_sequence_keeps_the_text_to_the_letter(fill, text):
    for result in fill(text, top_k=2, **OPTIONS):
        assert result["sequence"] == re.sub(r"\[s?MASK\]", lambda _, r=result: r["token_str"], text)


def test_truncation_that_drops_a_mask_is_refused(fill):
    with pytest.raises(ValueError, match="must keep all 1 masks"):
        fill("[MASK] the people time", tokenizer_kwargs={"truncation": True, "max_length": 3})


def test_one_proposal_is_still_a_list(fill):
    assert len(fill(ONE, top_k=1, **OPTIONS)) == 1


def test_several_masks_give_a_list_each_and_fill_from_the_left(fill):
    first, second = fill(TWO, top_k=2, **OPTIONS)
    assert all("[MASK]" in result["sequence"] for result in first)
    assert not any("[MASK]" in result["sequence"] for result in second)
    again = fill(first[0]["sequence"], top_k=2, **OPTIONS)
    assert [result["token_str"] for result in again] == [result["token_str"] for result in second]


def test_targets_are_ranked_by_their_probability(fill, infilling):
    targets = ["people", "the time", "soporific"]
    results = fill(ONE, targets=targets)
    assert {result["token_str"] for result in results} == set(targets)
    context = [*fill.tokenizer(ONE)["input_ids"], infilling.config.eos_token_id]
    ids = [fill.tokenizer(target)["input_ids"] for target in targets]
    expected = dict(zip(targets, infilling.score_blanks([context] * 3, ids), strict=True))
    for result in results:
        assert result["score"] == pytest.approx(math.exp(expected[result["token_str"]]), rel=1e-3)
    scores = [result["score"] for result in results]
    assert scores == sorted(scores, reverse=True)
    assert len(fill(ONE, targets=targets, top_k=1)) == 1
    assert len(fill(ONE, targets="people")) == 1


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batch_equals_single_texts(fill, batch_size):
    texts = [ONE, TWO, "the work of [gMASK]", "the only word"]
    batch = fill(texts, top_k=2, batch_size=batch_size, **OPTIONS)
    for text, results in zip(texts, batch, strict=True):
        alone = fill(text, top_k=2, **OPTIONS)
        assert strip_scores(results) == strip_scores(alone)


def strip_scores(results):
    if isinstance(results, list):
        return [strip_scores(result) for result in results]
    return results["sequence"]


@pytest.mark.parametrize("text", ["the work of [gMASK]", "the work of"])
def test_long_blank_continues_the_text(fill, text):
    (result,) = fill(text, top_k=1, **OPTIONS)
    assert result["sequence"].startswith("the work of")
    assert "MASK" not in result["sequence"]


def test_generating_model_object_works_as_well(model_folder, fill):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    other = pipeline("fill-mask", model=model, tokenizer=fill.tokenizer)
    assert other(ONE, top_k=2, **OPTIONS) == fill(ONE, top_k=2, **OPTIONS)


def test_stock_pipeline_scores_single_tokens(fill):
    stock = FillMaskPipeline(model=fill.model, tokenizer=fill.tokenizer)
    results = stock(ONE, top_k=3)
    assert all(isinstance(result["token"], int) for result in results)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "the text is empty"),
        ("[MASK]", {}, "nothing but masks"),
        ("the [MASK] and [gMASK]", {}, "mixes"),
        ("people " * 3000, {}, "leaves no room"),
        (ONE, {"top_k": 0}, "top_k must be at least 1"),
        (ONE, {"targets": []}, "targets must hold"),
        (ONE, {"targets": ["people", ""]}, "targets must hold"),
    ],
)
def test_bad_input_is_refused(fill, text, options, message):
    with pytest.raises(ValueError, match=message):
        fill(text, **options)


@pytest.fixture
def bert(model_folder, fill):
    config = BertConfig(
        vocab_size=600, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return pipeline("fill-mask", model=BertForMaskedLM(config), tokenizer=fill.tokenizer)


def test_other_models_keep_their_pipelines(bert, fill, tmp_path):
    assert type(bert) is FillMaskPipeline
    assert len(bert(ONE)) == 5
    bert.save_pretrained(tmp_path)
    assert "custom_pipelines" not in (tmp_path / "config.json").read_text()
    assert PIPELINE_REGISTRY.supported_tasks["fill-mask"]["default"]["model"]
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=600, n_embd=16, n_layer=1, n_head=2))
    generator = pipeline("text-generation", model=gpt2, tokenizer=fill.tokenizer)
    assert type(generator) is TextGenerationPipeline


def test_saved_pipeline_asks_for_no_remote_code(fill, tmp_path):
    fill.save_pretrained(tmp_path)
    assert "custom_pipelines" not in (tmp_path / "config.json").read_text()
    assert pipeline("fill-mask", model=str(tmp_path))(ONE, top_k=1, **OPTIONS) == fill(ONE, top_k=1, **OPTIONS)


def test_text_generation_continues_with_the_prompt_read_both_ways(model_folder, infilling):
    generator = pipeline("text-generation", model=str(model_folder), dtype=torch.float32)
    assert type(generator) is GLMTextGenerationPipeline
    prompts = ["the work of", "people time year 天地人"]
    expected = [
        generator.tokenizer.decode(
            infilling.fill_blanks([generator.tokenizer(prompt)["input_ids"]], max_new_tokens=6).sequences[0]
        )
        for prompt in prompts
    ]
    options = {"max_new_tokens": 6, "do_sample": False}
    assert [result[0]["generated_text"] for result in generator(prompts, **options)] == expected
    assert [r[0]["generated_text"] for r in generator(prompts, batch_size=2, **options)] == expected
    answer = generator(prompts[0], return_full_text=False, **options)[0]["generated_text"]
    assert prompts[0] + answer == expected[0]


def test_text_generation_sends_masks_to_fill_mask(model_folder):
    generator = pipeline("text-generation", model=str(model_folder))
    with pytest.raises(ValueError, match="fill-mask"):
        generator(ONE)


@pytest.mark.parametrize("wrap", ["peft", "compile"])
def test_wrapped_model_is_still_filled_by_our_pipeline(model_folder, fill, wrap):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    if wrap == "peft":
        model = get_peft_model(model, LoraConfig(target_modules=["query_key_value"]))
    else:
        model = torch.compile(model, backend="eager")
    wrapped = pipeline("fill-mask", model=model, tokenizer=fill.tokenizer)
    assert type(wrapped) is BlankInfillingPipeline
    results = wrapped(ONE, top_k=2, **OPTIONS)
    assert [r["sequence"] for r in results] == [r["sequence"] for r in fill(ONE, top_k=2, **OPTIONS)]


def test_sampled_proposals_come_best_first_without_repeats(fill):
    results = fill(ONE, top_k=8, do_sample=True, temperature=0.3, max_new_tokens=1)
    scores = [result["score"] for result in results]
    assert scores == sorted(scores, reverse=True)
    assert len({result["token_str"] for result in results}) == len(results)


def test_search_ranks_by_probability_and_sampling_does_not_search(fill, monkeypatch):
    seen = []
    generate = fill.infiller.generate
    monkeypatch.setattr(
        fill.infiller, "generate", lambda *args, **kwargs: seen.append(kwargs) or generate(*args, **kwargs)
    )
    fill(ONE, top_k=3, **OPTIONS)
    fill(ONE, top_k=3, do_sample=True, **OPTIONS)
    search, sample = seen
    assert (search["num_beams"], search["length_penalty"]) == (3, 0.0)  # a penalty above 0 would prefer long blanks
    assert "num_beams" not in sample


def test_equal_proposals_add_up_in_a_search_and_not_in_a_sample():
    blanks = [Blank([5], math.log(0.2)), Blank([6], math.log(0.3)), Blank([5], math.log(0.2))]
    assert [(b.ids, round(math.exp(b.score), 6)) for b in best_first(blanks, adds_up=True)] == [([5], 0.4), ([6], 0.3)]
    assert [(b.ids, round(math.exp(b.score), 6)) for b in best_first(blanks, adds_up=False)] == [
        ([6], 0.3),
        ([5], 0.2),
    ]


@pytest.mark.parametrize("target", ["[MASK]", "a [gMASK]", "<|endofpiece|>"])
def test_targets_with_special_tokens_are_refused(fill, target):
    with pytest.raises(ValueError, match="targets must be plain text"):
        fill(ONE, targets=["people", target])


def test_tokenizer_of_another_model_is_refused(fill, model_folder):
    tokenizer = copy.deepcopy(fill.tokenizer)
    tokenizer.add_tokens([f"word{number}" for number in range(50)])
    with pytest.raises(ValueError, match="use the tokenizer that belongs to the model"):
        pipeline("fill-mask", model=fill.model, tokenizer=tokenizer)


def test_continuation_keeps_the_blank_between_words_and_drops_special_tokens(fill):
    tokenizer = fill.tokenizer
    prompt, answer = (tokenizer(text)["input_ids"] for text in ("the work", "people"))
    special = [tokenizer.gmask_token_id, tokenizer.sop_token_id]
    assert continuation(tokenizer, [*prompt, *special], [*answer, tokenizer.eop_token_id]) == " people"


@pytest.mark.parametrize("task", ["fill-mask", "text-generation"])
def test_no_texts_give_no_results(model_folder, task):
    assert pipeline(task, model=str(model_folder))([]) == []


MODEL = Path(__file__).parents[3] / "examples" / "world_facts" / "model"
QUESTION = {"role": "user", "content": "The capital of France is [MASK]."}


@pytest.fixture(scope="module")
def chatting():
    return pipeline("text-generation", model=str(MODEL), dtype=torch.float32, do_sample=False, max_new_tokens=8)


def test_chats_are_answered_as_their_question_is_filled(chatting):
    filled = pipeline("fill-mask", model=str(MODEL), dtype=torch.float32)(QUESTION["content"], top_k=1)
    answer = {"role": "assistant", "content": filled[0]["token_str"]}
    assert chatting([QUESTION]) == [{"generated_text": [QUESTION, answer]}]
    assert chatting([[QUESTION], [QUESTION]], batch_size=2) == [[{"generated_text": [QUESTION, answer]}]] * 2
    assert chatting([QUESTION], return_full_text=False) == [{"generated_text": answer["content"]}]


def test_answers_that_are_begun_are_continued(chatting):
    turns = [{"role": "user", "content": "The opposite of hot is"}, {"role": "assistant", "content": "cold"}]
    (result,) = chatting(turns)
    assert result["generated_text"][0] == turns[0]
    assert result["generated_text"][1]["content"].startswith("cold")
    assert len(result["generated_text"]) == 2


def refuse(*args, **kwargs):
    raise AssertionError("generate was called")


def test_lists_are_decoded_together_to_what_generate_gives(fill, monkeypatch):
    texts = [ONE, TWO, "the people", "[MASK] people"]
    alone = [fill(text, top_k=1, num_beams=1, repetition_penalty=1.0, **OPTIONS) for text in texts]
    monkeypatch.setattr(GLMForBlankInfilling, "generate", refuse)
    together = fill(texts, top_k=1, **OPTIONS)
    for answer, one in zip(together, alone, strict=True):
        for a, b in zip(flat(answer), flat(one), strict=True):
            assert a["sequence"] == b["sequence"]
            assert a["score"] == pytest.approx(b["score"], rel=1e-4)


def flat(answer):
    return [each for part in answer for each in (part if isinstance(part, list) else [part])]


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_k": 1, "num_beams": 2}, {"top_k": 1, "do_sample": True}, {}])
def test_what_the_decoder_does_not_do_is_left_to_generate(fill, monkeypatch, options):
    monkeypatch.setattr(GLMForBlankInfilling, "generate", refuse)
    with pytest.raises(AssertionError, match="generate was called"):
        fill([ONE, TWO], **options, **OPTIONS)


def test_settings_of_the_model_are_heeded(fill, monkeypatch):
    monkeypatch.setattr(fill.infiller.generation_config, "repetition_penalty", 1.5)
    monkeypatch.setattr(GLMForBlankInfilling, "generate", refuse)
    with pytest.raises(AssertionError, match="generate was called"):
        fill([ONE, TWO], top_k=1, **OPTIONS)
