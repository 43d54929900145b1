import pytest
import torch
from golden import golden_config

from glm_hf.infilling_glm import infilling_layout, next_blank, prepare_context, splice_blank

CONFIG = golden_config("cfg1")
MASK, GMASK, SMASK = CONFIG.mask_token_id, CONFIG.gmask_token_id, CONFIG.smask_token_id
SOP, EOS, EOP = CONFIG.sop_token_id, CONFIG.eos_token_id, CONFIG.eop_token_id


def layout(*rows, **kwargs):
    position_ids, in_context = infilling_layout(torch.tensor(rows), CONFIG, **kwargs)
    return position_ids.tolist(), in_context.int().tolist()


def test_positions_stay_at_the_first_mask_from_sop_on():
    positions, context = layout([11, 12, MASK, 13, MASK, EOS, SOP, 14, 15])
    assert positions == [[0, 1, 2, 3, 4, 5, 2, 2, 2]]
    assert context == [[1, 1, 1, 1, 1, 1, 0, 0, 0]]


def test_positions_count_on_behind_gmask():
    positions, context = layout([11, 12, GMASK, SOP, 13, 14])
    assert positions == [[0, 1, 2, 3, 4, 5]]
    assert context == [[1, 1, 1, 0, 0, 0]]


def test_mask_wins_over_an_earlier_smask():
    assert layout([SMASK, MASK, SOP, 11])[0] == [[0, 1, 1, 1]]


def test_masks_behind_sop_do_not_move_positions():
    assert layout([11, GMASK, SOP, MASK, 12])[0] == [[0, 1, 2, 3, 4]]


def test_padding_that_looks_like_a_special_token_is_padding():
    padding = torch.tensor([[0, 0, 1, 1, 1, 1]])
    plain = layout([0, 0, 11, MASK, SOP, 12], segment_ids=padding)
    assert layout([SOP, MASK, 11, MASK, SOP, 12], segment_ids=padding) == plain


def test_smask_behind_sop_does_not_move_positions():
    assert layout([11, GMASK, SOP, SMASK, 12])[0] == [[0, 1, 2, 3, 4]]


def test_second_sop_changes_nothing():
    positions, context = layout([11, MASK, SOP, 12, SOP, 13])
    assert positions == [[0, 1, 1, 1, 1, 1]]
    assert context == [[1, 1, 0, 0, 0, 0]]


def test_text_without_sop_has_no_context():
    assert layout([11, MASK, 12]) == ([[0, 1, 2]], [[0, 0, 0]])


def test_padding_on_either_side_takes_no_position():
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    positions, context = layout([0, 0, 11, MASK, SOP, 12], [11, MASK, SOP, 12, 0, 0], segment_ids=padding)
    assert positions == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0]]
    assert context == [[0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]


def test_packed_samples_have_contexts_and_positions_of_their_own():
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 0]])
    positions, context = layout([11, MASK, SOP, 12, 13, GMASK, SOP, 14, 15, 16, 0], segment_ids=segments)
    assert positions == [[0, 1, 1, 1, 0, 1, 2, 3, 0, 1, 0]]
    assert context == [[1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("text", "context"),
    [
        ([11, MASK, 12], [11, MASK, 12, EOS]),
        ([11, MASK], [11, MASK]),
        ([11, MASK, 12, EOS], [11, MASK, 12, EOS]),
        ([11, 12], [11, 12, GMASK]),
        ([11, GMASK], [11, GMASK]),
        ([SMASK, 11], [SMASK, 11, EOS]),
    ],
)
def test_context_is_completed_by_the_rule(text, context):
    assert prepare_context(text, CONFIG) == context


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([], "the text is empty"),
        ([MASK], "nothing but masks"),
        ([GMASK, EOS], "nothing but masks"),
        ([11, MASK, SMASK], "mixes"),
        ([11, MASK, GMASK], "mixes"),
        ([11, MASK, SOP], "already contains the start-of-blank token"),
        ([11] * 2046, "leaves no room"),
    ],
)
def test_bad_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        prepare_context(text, CONFIG)


def test_longest_text_leaves_one_token_for_the_answer():
    assert len(prepare_context([11] * 2045, CONFIG)) + 1 + 1 == CONFIG.max_position_embeddings


def test_blanks_are_spliced_in_from_the_left():
    context = [11, MASK, 12, MASK]
    assert next_blank(context, CONFIG) == 1
    context = splice_blank(context, [13, 14], CONFIG)
    assert context == [11, 13, 14, 12, MASK]
    context = splice_blank(context, [], CONFIG)
    assert context == [11, 13, 14, 12]
    assert next_blank(context, CONFIG) is None
    with pytest.raises(ValueError, match="no mask"):
        splice_blank(context, [15], CONFIG)
