"""Positions and packing as callers of causal models hand them over, beside a stock model in the same call."""

import copy

import pytest
import torch
from golden import golden_model
from transformers import DataCollatorWithFlattening, GPTNeoXConfig, GPTNeoXForCausalLM

MODEL = golden_model("cfg1")
CONFIG = MODEL.config
MASK, GMASK, SMASK = CONFIG.mask_token_id, CONFIG.gmask_token_id, CONFIG.smask_token_id
SOP, EOS, EOP, PAD = CONFIG.sop_token_id, CONFIG.eos_token_id, CONFIG.eop_token_id, CONFIG.pad_token_id
SAMPLES = [
    [83, 23, MASK, 53, 71, EOS, SOP, 21, 22, EOP],
    [94, 27, 30, GMASK, SOP, 31, 32, 33, EOP],
    [MASK, 11, EOS, SOP, 41, EOP],
    [55, SMASK, 120, EOS, SOP, 51, EOP],
]
NOISE = 2e-4


def alone(row, model=MODEL):
    with torch.no_grad():
        return model(torch.tensor([row]), use_cache=False).logits[0]


def labels_of(row):
    start = row.index(SOP) + 1
    return [-100] * start + row[start:]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 3), (3, 2, 0), (1, 1), (2,), (0,)], ids=str)
def test_flattened_samples_are_kept_apart(order):
    rows = [SAMPLES[number] for number in order]
    batch = DataCollatorWithFlattening()([{"input_ids": row, "labels": labels_of(row)} for row in rows])
    with torch.no_grad():
        outputs = MODEL(**batch)
    torch.testing.assert_close(outputs.logits[0], torch.cat([alone(row) for row in rows]), atol=NOISE, rtol=0)
    losses = [
        torch.nn.functional.cross_entropy(alone(row)[:-1], torch.tensor(labels_of(row)[1:]), reduction="sum")
        for row in rows
    ]
    count = sum(label != -100 for row in rows for label in labels_of(row))
    assert outputs.loss.item() == pytest.approx(sum(losses).item() / count, abs=1e-4)


def test_a_stock_model_keeps_them_apart_in_the_same_call():
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    stock = GPTNeoXForCausalLM(config).eval()
    batch = DataCollatorWithFlattening()([{"input_ids": row} for row in SAMPLES])
    with torch.no_grad():
        logits = stock(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
    torch.testing.assert_close(logits, torch.cat([alone(row, stock) for row in SAMPLES]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager", "flex_attention"])
def test_packed_rows_of_a_batch_with_padding(attn_implementation):
    model = golden_model("cfg1", attn_implementation)
    rows = [[SAMPLES[0], SAMPLES[1]], [SAMPLES[2], SAMPLES[3]]]
    length = max(sum(map(len, row)) for row in rows)
    ids, positions, mask = (torch.zeros(2, length, dtype=torch.long) for _ in range(3))
    for number, row in enumerate(rows):
        tokens = torch.tensor(sum(row, []))
        ids[number, : len(tokens)] = tokens
        positions[number, : len(tokens)] = torch.cat([torch.arange(len(sample)) for sample in row])
        mask[number, : len(tokens)] = 1
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # flex attention's own reference
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    for row, own in zip(rows, logits, strict=True):
        expected = torch.cat([alone(sample) for sample in row])
        torch.testing.assert_close(own[: len(expected)], expected, atol=NOISE, rtol=0)


@pytest.mark.parametrize("row", SAMPLES, ids=str)
def test_counted_positions_of_one_sample_give_those_of_the_layout(row):
    with torch.no_grad():
        for options in ({}, {"attention_mask": torch.ones(1, len(row))}):
            logits = MODEL(torch.tensor([row]), position_ids=torch.arange(len(row))[None], **options).logits[0]
            torch.testing.assert_close(logits, alone(row), atol=NOISE, rtol=0)


def test_unclear_positions_are_refused():
    ids = torch.tensor([[*SAMPLES[0], *SAMPLES[1]]])
    positions = torch.cat((torch.tensor([0, 1, 2, 3, 4, 5, 2, 2, 2, 2]), torch.arange(9)))[None]
    with pytest.raises(ValueError, match="pass segment_ids to keep samples apart"):
        MODEL(ids, position_ids=positions)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "seq_idx"])
def test_packing_for_flash_attention_alone_is_refused(name):
    with pytest.raises(ValueError, match="does not keep packed samples apart"):
        MODEL(torch.tensor([SAMPLES[0]]), **{name: torch.tensor([0, 10])})


@pytest.mark.parametrize("head", [True, False])
def test_training_without_sop_is_warned_of(head, monkeypatch):
    warnings = []
    monkeypatch.setattr("glm_hf.positions_glm.logger.warning_once", warnings.append)
    model = copy.deepcopy(MODEL).train()
    model = model if head else model.model
    model(torch.tensor([SAMPLES[0], SAMPLES[1] + [PAD]]))
    assert warnings == []
    model(torch.tensor([SAMPLES[0][:4], [11, 12, 13, 14]]))
    assert "rows without sop are trained on" in warnings[0]


def test_a_loss_without_sop_is_warned_of(monkeypatch):
    warnings = []
    monkeypatch.setattr("glm_hf.positions_glm.logger.warning_once", warnings.append)
    MODEL(torch.tensor([[11, 12]]))
    assert warnings == []
    MODEL(torch.tensor([[11, 12]]), labels=torch.tensor([[11, 12]]))
    assert "rows without sop are trained on" in warnings[0]


def test_labels_on_the_context_are_warned_of(monkeypatch):
    warnings = []
    monkeypatch.setattr("glm_hf.positions_glm.logger.warning_once", warnings.append)
    row = torch.tensor([SAMPLES[0]])
    MODEL(row, labels=torch.tensor([labels_of(SAMPLES[0])]))
    MODEL(torch.tensor([[GMASK, SOP, 41, 42]]), labels=torch.tensor([[-100, -100, 41, 42]]))
    assert warnings == []
    MODEL(row, labels=row)
    assert "labels stand on the context" in warnings[0]


JOINED = {
    "two samples": sum(SAMPLES[:2], []),
    "the end of one and another": SAMPLES[0][-3:] + SAMPLES[1],
    "one and the beginning of another": SAMPLES[0] + SAMPLES[1][:4],
}


@pytest.mark.parametrize("case", JOINED)
def test_samples_that_share_a_row_without_a_mark_are_warned_of(case, monkeypatch):
    warnings = []
    monkeypatch.setattr("glm_hf.positions_glm.logger.warning_once", warnings.append)
    model = copy.deepcopy(MODEL).train()
    several_blanks = [14, MASK, 17, MASK, EOS, SOP, 23, EOP, SOP, 24, 25, EOP]
    model.model(torch.tensor([several_blanks]))
    assert warnings == []
    model.model(torch.tensor([JOINED[case]]))
    assert "another sample behind an eop" in warnings[0]
