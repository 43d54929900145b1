import inspect
import json
import random
import shutil
from pathlib import Path

import pytest
from corpus import KINDS, generate, runs
from jinja2 import TemplateError
from sentencepiece import SentencePieceTrainer
from tiny_model import config_for
from transformers import AutoTokenizer, TokenizersBackend

from glm_hf import GLMTokenizer
from glm_hf.infilling_glm import prepare_context

DEMO = Path(__file__).parents[2] / "examples" / "world_facts" / "model"
EOS, SOP, EOP = "<| </s> |>", "<|startofpiece|>", "<|endofpiece|>"
SYMBOLS = {"user_defined_symbols": ["<n>", "<|tab|>", *(f"<|blank_{k}|>" for k in range(2, 81))]}
MODELS = {
    "demo": None,
    "blanks are symbols": SYMBOLS,
    "blanks are kept": SYMBOLS
    | {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True},
    "no dummy prefix": {"add_dummy_prefix": False},
}
ENDS = ["", " ", "  ", "\n", " \n ", "\t", "\u200b", "\u3000", EOS, f"{EOS} "]
QUESTIONS = [
    "The capital of France is [MASK].",
    "[MASK] is the capital of [MASK]",
    "The capital of France is",
    "法国的首都是[MASK]",
    "法国的首都是，",
    "A story. [sMASK] The end.",
    "Once upon a time [gMASK]",
    "  two words\n\nand a line [MASK",
    f"a text{EOS} and another",
]


def user(text) -> dict:
    return {"role": "user", "content": text}


def assistant(text) -> dict:
    return {"role": "assistant", "content": text}


def system(text) -> dict:
    return {"role": "system", "content": text}


@pytest.fixture(scope="module", params=MODELS)
def tokenizer(request, tmp_path_factory) -> GLMTokenizer:
    if request.param == "demo":
        return AutoTokenizer.from_pretrained(DEMO)
    folder = tmp_path_factory.mktemp("chat")
    SentencePieceTrainer.train(
        sentence_iterator=iter(line.replace("\n", " ") for line in generate([*KINDS, runs], 200, seed=0)),
        model_prefix=str(folder / "text"),
        vocab_size=1200,
        minloglevel=2,
        num_threads=1,
        **MODELS[request.param],
    )
    return GLMTokenizer.from_sentencepiece(folder / "text.model", num_image_tokens=10)


@pytest.fixture(scope="module")
def demo() -> GLMTokenizer:
    return AutoTokenizer.from_pretrained(DEMO)


def chat_ids(tokenizer, chat, **options) -> list[int]:
    return tokenizer.apply_chat_template(chat, return_dict=False, **options)


def prompt_ids(tokenizer, text: str) -> list[int]:
    """The ids that generation and training start an answer with."""
    return [*prepare_context(tokenizer(text)["input_ids"], config_for(tokenizer)), tokenizer.sop_token_id]


@pytest.mark.parametrize("question", QUESTIONS)
def test_ids_of_a_question_are_its_context_and_sop(tokenizer, question):
    for text in (question + end for end in ENDS):
        assert chat_ids(tokenizer, [user(text)], add_generation_prompt=True) == prompt_ids(tokenizer, text), repr(text)
        assert chat_ids(tokenizer, [user(text)]) == prompt_ids(tokenizer, text)[:-1], repr(text)


def test_ids_of_random_questions_are_their_context_and_sop(tokenizer):
    draw = random.Random(0)
    parts = ["[MASK]", "[sMASK]", "[gMASK]", EOS, " ", "\n", "people", "时间", ".", "</s>", "\u200b", "MASK]", "<|"]
    numbers = {"equal": 0, "refused": 0}
    for _ in range(600):
        text = "".join(draw.choices(parts, k=draw.randint(1, 6)))
        try:
            expected = prompt_ids(tokenizer, text)
        except ValueError:
            numbers["refused"] += 1
            with pytest.raises(TemplateError, match="mixes|nothing but masks|not empty"):
                chat_ids(tokenizer, [user(text)], add_generation_prompt=True)
        else:
            if text.strip():
                numbers["equal"] += 1
                assert chat_ids(tokenizer, [user(text)], add_generation_prompt=True) == expected, repr(text)
    assert min(numbers.values()) > 100


@pytest.mark.parametrize("answer", ["Paris", "，好。", "\nand so on", "a b  c ", " Paris"])
def test_answer_follows_the_prompt_and_ends_with_eop(tokenizer, answer):
    for question in QUESTIONS:
        ids = chat_ids(tokenizer, [user(question), assistant(answer)])
        answer_ids = [*tokenizer(answer)["input_ids"], tokenizer.eop_token_id]
        assert ids == prompt_ids(tokenizer, question) + answer_ids
        marked = tokenizer.apply_chat_template(
            [user(question), assistant(answer)], return_assistant_tokens_mask=True, return_dict=True
        )
        assert marked["assistant_masks"] == [0] * (len(ids) - len(answer_ids)) + [1] * len(answer_ids)


def test_earlier_turns_stand_as_text_in_the_context(tokenizer):
    chat = [system("Answer [MASK] briefly."), user("The capital of France is [MASK]."), assistant("Paris")]
    text = (
        "Answer ___ briefly.\n\nUser: The capital of France is ___.\nAssistant: Paris\nUser: And of Spain?\nAssistant:"
    )
    ids = chat_ids(tokenizer, [*chat, user("And of Spain?")], add_generation_prompt=True)
    assert ids == prompt_ids(tokenizer, text)
    answered = chat_ids(tokenizer, [*chat, user("And of Spain?"), assistant("Madrid")])
    assert answered == [*ids, *tokenizer("Madrid")["input_ids"], tokenizer.eop_token_id]


def test_mask_of_the_last_question_is_the_blank(tokenizer):
    chat = [user("The capital of France is [MASK]."), assistant("[MASK] is Paris"), user("That of [MASK] is Rome.")]
    text = "User: The capital of France is ___.\nAssistant: ___ is Paris\nUser: That of [MASK] is Rome."
    assert chat_ids(tokenizer, chat, add_generation_prompt=True) == prompt_ids(tokenizer, text)


def test_system_turn_stands_in_front_of_a_single_question(tokenizer):
    chat = [system("Be brief."), user("The capital of France is [MASK].")]
    text = "Be brief.\n\nThe capital of France is [MASK]."
    assert chat_ids(tokenizer, chat, add_generation_prompt=True) == prompt_ids(tokenizer, text)


def test_final_message_is_continued_behind_sop(tokenizer):
    ids = chat_ids(tokenizer, [user("The capital of France is"), assistant("the city")], continue_final_message=True)
    assert ids == [*prompt_ids(tokenizer, "The capital of France is"), *tokenizer("the city")["input_ids"]]


def test_batches_and_padding_are_those_of_transformers(demo):
    chats = [[user("The capital of France is [MASK].")], [user("The opposite of hot is")]]
    batch = demo.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(*batch.values(), strict=True)]
    assert rows == [prompt_ids(demo, chat[0]["content"]) for chat in chats]
    assert batch["input_ids"][:, -1].tolist() == [demo.sop_token_id] * 2


@pytest.mark.parametrize(
    ("chat", "options", "message"),
    [
        (
            [user("x"), {"role": "tool", "content": "x"}],
            {},
            "role of a turn must be system, user or assistant, got tool",
        ),
        ([user("x"), user("y")], {}, "alternate between user and assistant, beginning with the user"),
        ([assistant("x")], {}, "beginning with the user"),
        ([user("x"), system("y")], {}, "alternate"),
        ([system("x")], {}, "must hold a turn of the user"),
        ([user(" ")], {}, "text that is not empty"),
        ([user("x"), assistant("")], {}, "text that is not empty"),
        ([user(None)], {}, "text that is not empty"),
        ([{"role": "user"}], {}, "text that is not empty"),
        ([user([{"type": "text", "text": "x"}])], {}, "text that is not empty"),
        ([user(f"x{SOP}")], {}, "no turn may hold"),
        ([user("x"), assistant(f"y{EOP}")], {}, "no turn may hold"),
        ([user("x"), assistant("y [MASK]")], {}, "must not hold a mask"),
        ([user("x [MASK] [gMASK]")], {}, r"mixes \[MASK\] and \[gMASK\]"),
        ([user("[MASK]")], {}, "nothing but masks"),
        ([user("x"), assistant("y")], {"add_generation_prompt": True}, "chat ends in an answer"),
        ([user("x")], {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools and documents"),
    ],
)
def test_what_is_no_chat_is_refused_in_one_sentence(demo, chat, options, message):
    with pytest.raises(TemplateError, match=message):
        demo.apply_chat_template(chat, **options)


def test_sanitized_masks_are_text(demo):
    if "sanitize_control_tokens" not in inspect.signature(TokenizersBackend.apply_chat_template).parameters:
        pytest.skip("this version of transformers does not sanitize")
    options = {"add_generation_prompt": True, "sanitize_control_tokens": True}
    ids = chat_ids(demo, [user(f"a [MASK] {SOP} b [gMASK]")], **options)
    special = [token_id for token_id in ids if token_id in demo.all_special_ids and token_id != demo.unk_token_id]
    assert special == [demo.gmask_token_id, demo.sop_token_id]


def test_plain_tokenizer_of_a_saved_folder_lays_chats_out_alike(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    plain = TokenizersBackend.from_pretrained(tmp_path)
    assert type(plain) is TokenizersBackend
    assert (plain.padding_side, plain.truncation_side) == ("left", "left")
    assert plain.model_max_length == tokenizer.model_max_length < 4096
    for question in QUESTIONS:
        chat = [user(question), assistant("Paris")]
        assert chat_ids(plain, chat) == chat_ids(tokenizer, chat)


def test_a_folder_of_old_gets_template_and_window(demo, tmp_path):
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    fields = json.loads((DEMO / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields | {"model_max_length": int(1e30)}))
    old = GLMTokenizer.from_pretrained(tmp_path)
    assert old.model_max_length == 2048
    assert chat_ids(old, [user("x [MASK]")]) == chat_ids(demo, [user("x [MASK]")])


def test_demonstration_model_carries_its_window(demo):
    assert demo.model_max_length == json.loads((DEMO / "config.json").read_text())["max_position_embeddings"]


def test_truncation_keeps_the_end_of_a_text(tokenizer):
    text = "the people [MASK] the time " * 1500
    ids = tokenizer(text, verbose=False)["input_ids"]
    assert tokenizer(text, truncation=True)["input_ids"] == ids[-tokenizer.model_max_length :]
    assert tokenizer(text, truncation=True, max_length=7)["input_ids"] == ids[-7:]


def test_truncated_text_leaves_the_room_that_max_length_leaves(demo):
    config = config_for(demo, max_position_embeddings=demo.model_max_length)
    ids = demo("the people and the time " * 200, truncation=True, max_length=demo.model_max_length - 10)["input_ids"]
    context = prepare_context(ids, config)
    assert demo.model_max_length - len(context) - 1 == 8  # [gMASK] and sop take two of the ten


def test_truncated_chat_keeps_its_blank_or_is_refused(demo, monkeypatch):
    long = "the people and the time " * 20
    whole = chat_ids(demo, [user(f"{long} [MASK] of")], add_generation_prompt=True)
    options = {"add_generation_prompt": True, "truncation": True, "max_length": 9}
    assert chat_ids(demo, [user(f"{long} [MASK] of")], **options) == whole[-9:]
    tensors = demo.apply_chat_template([[user(long)], [user("x")]], padding=True, return_tensors="pt", **options)
    assert tensors["input_ids"][:, -2:].tolist() == [[demo.gmask_token_id, demo.sop_token_id]] * 2
    for chat in ([user(f"[MASK] of {long}")], [user("x"), assistant(long)]):
        with pytest.raises(ValueError, match="would lose its mask or sop when truncated to 9"):
            chat_ids(demo, chat, **options | {"add_generation_prompt": len(chat) == 1})
    monkeypatch.setattr(demo, "truncation_side", "right")
    with pytest.raises(ValueError, match="would lose"):
        chat_ids(demo, [user(f"{long} [MASK] of")], **options)
