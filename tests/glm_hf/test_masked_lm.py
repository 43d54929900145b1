import pytest
import torch
from golden import CONFIGS, golden_model

from glm_hf import GLMForMaskedLM

MODEL = golden_model("cfg1")
CONFIG = MODEL.config
MASK, SOP = CONFIG.mask_token_id, CONFIG.sop_token_id
NOISE = 1e-4  # of fp32 logits of these weights, as measured for the golden data


@pytest.mark.parametrize("name", CONFIGS)
def test_masked_lm_scores_each_mask_as_blank_infilling_begins_it(name):
    infilling = golden_model(name)
    config = infilling.config
    masked_lm = GLMForMaskedLM(config).eval()
    masked_lm.load_state_dict(infilling.state_dict())
    mask, eos, sop = config.mask_token_id, config.eos_token_id, config.sop_token_id
    rows = [[11, mask, 12, 13], [14, 15, 16, mask], [0, mask, 17, eos]]
    padding = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    with torch.no_grad():
        logits = masked_lm(torch.tensor(rows), attention_mask=padding).logits
    assert logits.shape == (3, 4, config.vocab_size)
    for row, at, context in [(0, 1, [*rows[0], eos]), (1, 3, rows[1]), (2, 1, rows[2][1:])]:
        with torch.no_grad():
            first = infilling(torch.tensor([[*context, sop]])).logits[0, -1]
        torch.testing.assert_close(logits[row, at], first, atol=NOISE, rtol=0)


def test_masked_lm_scores_several_masks_apart_in_one_pass():
    masked_lm = GLMForMaskedLM(CONFIG).eval()
    masked_lm.load_state_dict(MODEL.state_dict())
    row = [11, MASK, 12, MASK]
    with torch.no_grad():
        logits = masked_lm(torch.tensor([row, [21, 22, 23, 24]])).logits
    context, length = torch.tensor([[*row, SOP]]), 5
    for mask_at in (1, 3):
        positions = torch.tensor([[0, 1, 2, 3, mask_at]])
        visible = torch.ones(length, length, dtype=torch.bool)
        visible[:4, 4] = False
        with torch.no_grad():
            alone = MODEL(context, attention_mask=visible[None, None], position_ids=positions).logits[0, 4]
        torch.testing.assert_close(logits[0, mask_at], alone, atol=NOISE, rtol=0)


def test_masked_lm_loss_counts_masks_only():
    masked_lm = GLMForMaskedLM(CONFIG).eval()
    masked_lm.load_state_dict(MODEL.state_dict())
    outputs = masked_lm(torch.tensor([[11, MASK, 12]]), labels=torch.tensor([[-100, 13, -100]]))
    assert outputs.loss.item() == pytest.approx(-outputs.logits[0, 1].log_softmax(-1)[13].item(), abs=1e-6)
