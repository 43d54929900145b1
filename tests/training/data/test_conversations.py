import pytest

from glm_hf.training import to_conversation

USER = [{"role": "user", "content": "The capital of France is [MASK]."}]
PARIS, ROME = [{"role": "assistant", "content": "Paris"}], [{"role": "assistant", "content": "Rome"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": USER[0]["content"], "completion": "Paris"}, {"prompt": USER, "completion": PARIS}),
        ({"inputs": USER[0]["content"], "targets": "Paris"}, {"prompt": USER, "completion": PARIS}),
        (
            {"prompt": USER[0]["content"], "chosen": "Paris", "rejected": "Rome"},
            {"prompt": USER, "chosen": PARIS, "rejected": ROME},
        ),
        ({"prompt": USER[0]["content"], "solution": "Paris"}, {"prompt": USER, "solution": "Paris"}),
        ({"messages": [*USER, *PARIS]}, {"prompt": USER, "completion": PARIS}),
        ({"prompt": USER, "completion": PARIS}, {"prompt": USER, "completion": PARIS}),
        (
            {"prompt": USER[0]["content"], "completion": "Paris", "label": True},
            {"prompt": USER, "completion": PARIS, "label": True},
        ),
    ],
)
def test_texts_become_turns(row, expected):
    before = dict(row)
    assert to_conversation(row) == expected
    assert row == before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "a row must have prompt .or inputs.*; or messages; got text"),
        ({"completion": "a"}, "got completion"),
        ({"prompt": "a", "chosen": "b"}, "got prompt, chosen"),
        ({"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}, "a row must have prompt"),
        ({"prompt": "a", "inputs": "b"}, "not both, got prompt, inputs"),
        ({"prompt": "a", "completion": ""}, "completion must be a text that is not empty, or a list of turns, got ''"),
        ({"prompt": "a", "completion": ["b"]}, "completion must be a text"),
        ({"prompt": None}, "prompt must be a text"),
        ({"messages": PARIS}, "messages must hold a question and its answer"),
        ({"messages": [*USER, *PARIS], "prompt": "a"}, "stand without a prompt"),
    ],
)
def test_other_rows_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        to_conversation(row)
