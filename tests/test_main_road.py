"""From a SAT checkpoint to filled blanks through the public API alone, against the numbers of the original code."""

import pytest
import torch
from golden import CONFIGS, DATA, TOLERANCE, golden_arrays, golden_config, read_json
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from glm_hf.conversion import convert_sat_checkpoint


@pytest.mark.parametrize("tp_size", [1, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_converted_checkpoint_fills_blanks_as_the_original_did(name, tp_size, tmp_path):
    config = golden_config(name)
    convert_sat_checkpoint(DATA / name / f"sat_tp{tp_size}", tmp_path / "model", config=config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    golden = golden_arrays(name)
    with torch.no_grad():
        logits = model(golden["mask_infill.input_ids"]).logits
    assert (logits - golden["mask_infill.logits"]).abs().max() < TOLERANCE

    masks = {"[MASK]": config.mask_token_id, "[gMASK]": config.gmask_token_id, "[sMASK]": config.smask_token_id}
    entries = [entry for entry in read_json(name, "generation.json")["fill_blanks"] if entry["strategy"] == "greedy"]
    for entry in entries:
        ids = [masks[word] if word in masks else int(word) for word in entry["text"].split()]
        assert model.fill_blanks([ids], max_length=entry["out_seq_length"]).sequences == entry["answers"]

    masked_lm = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    context = golden["mask_infill.input_ids"][
        :, : golden["mask_infill.input_ids"][0].tolist().index(config.sop_token_id)
    ]
    with torch.no_grad():
        scored = masked_lm(context).logits
    is_mask = context == config.mask_token_id
    first = golden["mask_infill.logits"][:, context.shape[1]]
    assert (scored[is_mask] - first).abs().max() < TOLERANCE
