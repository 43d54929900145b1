import pytest
import torch
from golden import CONFIGS, TOLERANCE, golden_arrays, golden_model, read_json


def greedy_entries(function: str) -> list:
    entries = [(name, entry) for name in CONFIGS for entry in read_json(name, "generation.json")[function]]
    chosen = [(name, entry) for name, entry in entries if entry["strategy"] == "greedy"]
    return [pytest.param(name, entry, id=f"{name}-{entry['case']}") for name, entry in chosen]


@pytest.mark.parametrize(("name", "entry"), greedy_entries("batch_filling_sequence"))
def test_generate_equals_batch_filling_sequence(name, entry):
    input_ids = torch.tensor([entry["input_ids"]])
    outputs = golden_model(name).generate(
        input_ids, max_new_tokens=entry["max_gen_length"], return_dict_in_generate=True, output_logits=True
    )
    assert outputs.sequences.tolist() == entry["output"][0]
    expected = golden_arrays(name, "generation_logits.npz")[f"{entry['case']}.greedy.step_logits"]
    torch.testing.assert_close(torch.cat(outputs.logits), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("name", "entry"), greedy_entries("fill_blanks"))
def test_fill_blanks_equals_the_original(name, entry):
    model = golden_model(name)
    special = {"[MASK]": model.config.mask_token_id, "[gMASK]": model.config.gmask_token_id}
    special["[sMASK]"] = model.config.smask_token_id
    ids = [special[word] if word in special else int(word) for word in entry["text"].split()]
    filled = model.fill_blanks([ids], max_length=entry["out_seq_length"])
    assert filled.sequences == entry["answers"]
    assert filled.blanks == entry["blanks"]


@pytest.mark.parametrize(("name", "entry"), greedy_entries("generate_text"))
def test_left_padded_batch_equals_generate_text(name, entry):
    model = golden_model(name)
    config = model.config
    contexts = entry["contexts"]
    input_ids, attention_mask = model._pad_left(contexts)
    sequences = model.generate(input_ids, attention_mask=attention_mask, max_new_tokens=entry["max_gen_length"])
    ends = (config.eop_token_id, config.eos_token_id)
    answers = []
    for ids in sequences[:, input_ids.shape[1] :].tolist():
        end = next((index for index, token_id in enumerate(ids) if token_id in ends), len(ids))
        answers.append(ids[:end])
    assert answers == entry["output"]
