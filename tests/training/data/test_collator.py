"""What the collator returns: hand-written rows, statistics of the recipe, and what a model makes of it."""

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden import golden_config, golden_model
from torch.nn.functional import cross_entropy

from glm_hf.infilling_glm import infilling_layout
from glm_hf.training import DataCollatorForBlankInfilling, InfillingRecipe, sentence_ends
from glm_hf.training.data import collator as data_collator
from glm_hf.training.data.packing.rows import Row

CONFIG = golden_config("cfg1")
SMALL = InfillingRecipe(row_length=64, window_length=32)


def collator(**changes) -> DataCollatorForBlankInfilling:
    recipe = InfillingRecipe(**{"row_length": 64, "window_length": 32, **changes})
    return DataCollatorForBlankInfilling(CONFIG, recipe, sentence_end_ids=[5])


def text_row(objective: str, lengths: list[int], sample_id: int = 0, is_end: bool = True) -> Row:
    tokens = np.random.default_rng(sample_id).integers(3, 140, sum(lengths))
    return Row(objective, tokens, np.array(lengths), np.full(len(lengths), is_end), sample_id)


def split(batch: dict[str, torch.Tensor], row: int) -> list[dict[str, list[int]]]:
    """The samples of a row."""
    segments = batch["segment_ids"][row]
    names = ("input_ids", "position_ids", "shift_labels")
    return [
        {name: batch[name][row][segments == number].tolist() for name in names}
        for number in range(1, int(segments.max()) + 1)
    ]


def test_one_instruction_and_one_text_look_as_by_hand():
    mask, gmask, eos = CONFIG.mask_token_id, CONFIG.gmask_token_id, CONFIG.eos_token_id
    sop, eop, pad = CONFIG.sop_token_id, CONFIG.eop_token_id, CONFIG.pad_token_id
    features = [{"inputs": [7, mask, 8], "targets": [9, 10]}, {"inputs": [11], "targets": [12]}]
    batch = collator()(features)
    no = -100
    assert list(batch) == ["input_ids", "position_ids", "segment_ids", "shift_labels", "labels"]
    assert batch["input_ids"].tolist() == [[7, mask, 8, eos, sop, 9, 10, pad], [11, gmask, sop, 12, *[pad] * 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 1, 1, 1, 0], [0, 1, 2, 3, 0, 0, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1] * 7 + [0], [1] * 4 + [0] * 4]
    assert batch["shift_labels"].tolist() == [[no] * 4 + [9, 10, eop, no], [no] * 2 + [12, eop] + [no] * 4]
    assert batch["labels"].tolist() == [[no] * 5 + [9, 10, eop], [no] * 3 + [12, eop] + [no] * 3]


def test_a_column_of_padding_is_only_added_where_a_label_needs_it():
    recipe = InfillingRecipe(row_length=64, window_length=32)
    without = DataCollatorForBlankInfilling(CONFIG, recipe, with_labels=False)
    for row in (text_row("gmask", [62], is_end=False), text_row("gmask", [62], is_end=True)):
        predicts_last = int(row.is_end[0])
        batch, plain = collator()([row]), without([row])
        assert batch["input_ids"].shape == (1, 64 + predicts_last)
        assert "labels" not in plain
        assert all(torch.equal(plain[name], batch[name][:, :64]) for name in plain)


def test_rows_can_be_padded_to_the_length_of_a_row():
    features = [{"inputs": [11], "targets": [12]}]
    for with_labels, length in ((True, 65), (False, 64)):
        made = DataCollatorForBlankInfilling(CONFIG, SMALL, with_labels=with_labels, padding="max_length")
        assert made(features)["input_ids"].shape == (1, length)
    with pytest.raises(ValueError, match="padding must be longest or max_length, got 'most'"):
        DataCollatorForBlankInfilling(CONFIG, SMALL, padding="most")


def test_a_text_of_two_tokens_has_one_possible_gmask():
    batch = collator(mask_probability=0.0)([{"input_ids": [7, 8]}])
    assert batch["input_ids"].tolist() == [[7, CONFIG.gmask_token_id, CONFIG.sop_token_id, 8, CONFIG.pad_token_id]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0]]
    assert batch["shift_labels"].tolist() == [[-100, -100, 8, CONFIG.eop_token_id, -100]]


def test_padding_is_no_text():
    padded = [{"input_ids": [7, 8, 0, 0], "attention_mask": [1, 1, 0, 0]}, {"input_ids": [7, 8]}]
    first, second = collator(mask_probability=0.0)(padded)["input_ids"].tolist()
    assert first == second


@pytest.mark.parametrize("objective", ["mask", "smask", "gmask"])
def test_every_token_is_either_context_or_predicted_once(objective):
    row = text_row(objective, [20, 9], sample_id=3)
    samples = split(collator(smask_probability=0.1)([row]), 0)
    for sample, tokens in zip(samples, np.split(row.tokens, [20]), strict=True):
        end = sample["input_ids"].index(CONFIG.sop_token_id)
        special = {CONFIG.mask_token_id, CONFIG.smask_token_id, CONFIG.gmask_token_id, CONFIG.eos_token_id}
        context = [token for token in sample["input_ids"][:end] if token not in special]
        targets = [label for label in sample["shift_labels"] if label not in (-100, CONFIG.eop_token_id)]
        assert sorted(context + targets) == sorted(tokens.tolist())


@pytest.mark.parametrize("objective", ["mask", "gmask"])
def test_filling_the_blanks_gives_the_text_back(objective):
    row = text_row(objective, [25], sample_id=5)
    [sample] = split(collator()([row]), 0)
    ids, positions, labels = (sample[name] for name in ("input_ids", "position_ids", "shift_labels"))
    first = ids.index(CONFIG.sop_token_id)
    mask = getattr(CONFIG, f"{objective}_token_id")
    blanks = {}
    for start in [index for index, token in enumerate(ids) if token == CONFIG.sop_token_id]:
        end = labels.index(CONFIG.eop_token_id, start)
        place = positions[start] if objective == "mask" else first - 1
        assert ids[place] == mask
        assert ids[start + 1 : end + 1] == labels[start:end]
        blanks[place] = labels[start:end]
    filled = [token for place, old in enumerate(ids[:first]) for token in blanks.get(place, [old])]
    assert filled[:25] == row.tokens.tolist()
    assert filled[25:] in ([], [CONFIG.eos_token_id])


@pytest.mark.parametrize("objective", ["mask", "gmask"])
def test_positions_and_contexts_are_those_of_the_infilling_layout(objective):
    """Where a sample has one blank, the model derives the same from ids and segments alone."""
    batch = collator(span_share=0.01)([text_row(objective, [14, 9, 3], sample_id=n) for n in range(20)])
    position_ids, in_context = infilling_layout(batch["input_ids"], CONFIG, batch["segment_ids"])
    assert torch.equal(position_ids, batch["position_ids"])
    assert not (in_context & (batch["shift_labels"] != -100)).any()


def test_kinds_of_blanks_have_the_shares_of_the_recipe():
    texts = [{"input_ids": list(range(1, 30)), "sample_id": n} for n in range(10_000)]
    recipe = InfillingRecipe(row_length=64, window_length=64)
    batch = DataCollatorForBlankInfilling(CONFIG, recipe, seed=1, with_origin=True)(texts)
    share = (batch["objectives"] == 0).double().mean().item()
    assert share == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 10_000) ** 0.5)
    has_mask = (batch["input_ids"] == CONFIG.mask_token_id).any(1)
    has_gmask = (batch["input_ids"] == CONFIG.gmask_token_id).sum(1)
    assert torch.equal(has_mask, batch["objectives"] == 0)
    assert torch.equal(has_gmask == 1, batch["objectives"] == 2)


def test_blanks_of_gmask_rows_have_uniform_lengths():
    rows = [text_row("gmask", [21], sample_id=n) for n in range(10_000)]
    lengths = (collator()(rows)["shift_labels"] != -100).sum(1) - 1  # without eop
    counts = torch.bincount(lengths, minlength=21)[1:].double()
    statistic = ((counts - 500) ** 2 / 500).sum().item()
    assert 5 < statistic < 45  # 19 degrees of freedom


def test_blanks_come_in_random_order():
    recipe = InfillingRecipe(row_length=512, window_length=512)
    rows = [text_row("mask", [400], sample_id=n) for n in range(200)]
    batch = DataCollatorForBlankInfilling(CONFIG, recipe)(rows)
    falls = []
    for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
        places = positions[ids == CONFIG.sop_token_id]
        falls.append((places[1:] < places[:-1]).double().mean().item())
    assert np.mean(falls) == pytest.approx(0.5, abs=0.03)


def test_draws_depend_on_seed_and_sample_only():
    rows = [text_row("mask", [25, 8], sample_id=n) for n in range(6)]
    together = collator()(rows)
    alone = [collator()([row]) for row in reversed(rows)][::-1]
    for name, values in together.items():
        assert torch.equal(values, torch.cat([batch[name] for batch in alone]))
    other = DataCollatorForBlankInfilling(CONFIG, SMALL, seed=1)(rows)
    assert not torch.equal(other["input_ids"], together["input_ids"])


def test_a_text_without_sample_id_has_the_same_blanks_again():
    texts = [{"input_ids": [*range(1, 40)]}]
    first, second = collator()(texts), collator()(texts)
    assert torch.equal(first["input_ids"], second["input_ids"])
    with_id = [collator()([{**texts[0], "sample_id": n}])["input_ids"].tolist() for n in range(8)]
    assert len({str(ids) for ids in with_id}) > 1


@pytest.mark.parametrize("mask_probability", [0.0, 1.0])
def test_a_text_too_long_for_a_row_gives_one_of_its_parts(mask_probability, caplog):
    """So that a batch has as many rows as features; over many keys, every part comes equally often."""
    tokens = list(range(3, 140))
    features = [{"input_ids": tokens, "sample_id": n} for n in range(600)]
    data_collator.logger.warning_once.cache_clear()
    batch = collator(mask_probability=mask_probability)(features)
    assert batch["input_ids"].shape[0] == 600
    assert caplog.text.count("a text is too long for a row, so that one of its parts is drawn") == 1
    assert batch["input_ids"].shape[1] <= 65
    parts = Counter()
    for row, labels in enumerate(batch["shift_labels"]):
        found = [label for label in labels.tolist() if label not in (-100, CONFIG.eop_token_id)]
        for sample in split(batch, row):
            context = sample["input_ids"][: sample["input_ids"].index(CONFIG.sop_token_id)]
            found += [token for token in context if token in tokens]
        found.sort()
        assert found == [*range(found[0], found[-1] + 1)]
        parts[found[0], found[-1]] += 1
    edges = sorted(parts)
    assert (edges[0][0], edges[-1][1]) == (3, 139)
    assert all(end + 1 == start for (_, end), (start, _) in pairwise(edges))
    expected = 600 / len(parts)
    assert len(parts) > 2
    assert all(abs(count - expected) < 4 * expected**0.5 for count in parts.values())


def test_a_blank_that_the_window_cuts_off_has_no_end():
    whole = collator()([text_row("gmask", [20], is_end=True)])["shift_labels"]
    cut = collator()([text_row("gmask", [20], is_end=False)])["shift_labels"]
    assert (whole == CONFIG.eop_token_id).sum() == 1
    assert (cut == CONFIG.eop_token_id).sum() == 0
    assert (whole != cut).sum() == 1


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_no_token_of_a_sample_reaches_another(attn_implementation):
    model = golden_model("cfg1", attn_implementation)
    batch = collator()([text_row("mask", [14, 10, 12], sample_id=8)])
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    segments = batch["segment_ids"][0]
    for number in (1, 2, 3):
        hidden = model.model(
            inputs_embeds=embeds,
            position_ids=batch["position_ids"],
            attention_mask=visible(batch),
        ).last_hidden_state
        [gradient] = torch.autograd.grad(hidden[0, segments == number].square().sum(), embeds)
        reached = gradient[0].abs().sum(1) > 0
        assert torch.equal(reached, segments == number)
        logits = model(batch["input_ids"], position_ids=batch["position_ids"], segment_ids=batch["segment_ids"]).logits
        changed = batch["input_ids"].clone()
        changed[0, segments == number] = 3
        again = model(changed, position_ids=batch["position_ids"], segment_ids=batch["segment_ids"]).logits
        differs = (logits != again).any(-1)[0]
        assert not differs[(segments != number) & (segments > 0)].any()


def visible(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mask of one row written as a loop: `(1, 1, L, L)`."""
    ids, segments = batch["input_ids"][0].tolist(), batch["segment_ids"][0].tolist()
    length = len(ids)
    first_sop = {s: min(i for i in range(length) if segments[i] == s and ids[i] == CONFIG.sop_token_id) for s in
                 set(segments) - {0}}  # fmt: skip
    mask = torch.zeros(1, 1, length, length, dtype=torch.bool)
    for query in range(length):
        for key in range(length):
            if segments[query] == segments[key]:
                both_context = segments[query] > 0 and max(query, key) < first_sop[segments[query]]
                mask[0, 0, query, key] = both_context or key <= query
    return mask


@torch.no_grad()
@pytest.mark.parametrize("objective", ["mask", "gmask"])
def test_the_loss_of_a_packed_row_is_the_sum_of_its_samples_alone(objective):
    model = golden_model("cfg1")
    batch = collator()([text_row(objective, [17, 9, 12], sample_id=9)])
    packed = loss_of(model, batch)
    alone = 0.0
    for sample in split(batch, 0):
        tensors = {name: torch.tensor([values]) for name, values in sample.items()}
        alone += loss_of(model, tensors | {"segment_ids": torch.ones_like(tensors["input_ids"])})
    assert packed == pytest.approx(alone, rel=2e-6)
    through_model = model(**batch, num_items_in_batch=torch.tensor(1)).loss.item()
    assert through_model == pytest.approx(packed, rel=2e-6)


def loss_of(model, batch: dict[str, torch.Tensor]) -> float:
    labels = batch["shift_labels"]
    inputs = {name: values for name, values in batch.items() if "labels" not in name}
    logits = model(**inputs, logits_to_keep=labels != -100).logits
    return cross_entropy(logits, labels[labels != -100], reduction="sum").item()


@torch.no_grad()
def test_logits_of_marked_tokens_are_those_of_all():
    model = golden_model("cfg1")
    batch = collator()([text_row("mask", [17, 9], sample_id=n) for n in range(2)])
    labels = batch.pop("shift_labels")
    del batch["labels"]
    everything = model(**batch).logits[labels != -100]
    torch.testing.assert_close(model(**batch, logits_to_keep=labels != -100).logits, everything, rtol=1e-5, atol=1e-5)


def test_sentence_blanks_need_to_know_where_sentences_end():
    with pytest.raises(ValueError, match="sentence_end_ids"):
        DataCollatorForBlankInfilling(CONFIG, InfillingRecipe(smask_probability=0.2))


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"text": "no ids"}, "needs input_ids, or inputs and targets, got text"),
        ({"input_ids": []}, "has no token"),
        ({"inputs": [3], "targets": []}, "has no targets"),
        ({"inputs": [3] * 60, "targets": [4] * 9}, "do not fit a row of 64"),
        ({"inputs": [], "targets": [4]}, "the text is empty"),
        ({"inputs": [CONFIG.mask_token_id, 3, CONFIG.gmask_token_id], "targets": [4]}, "one kind of mask"),
    ],
)
def test_features_that_make_no_sample_are_refused(feature, message):
    with pytest.raises(ValueError, match=message):
        collator()([feature])


def test_sentences_end_at_full_stops_of_both_languages(tokenizer):
    ends = sentence_ends(tokenizer)
    assert set(ends) >= set(tokenizer.convert_tokens_to_ids(["<n>"]))
    for text in ("It is so.", "天下。", "你好！"):
        assert tokenizer(text)["input_ids"][-1] in ends
    assert tokenizer("and so")["input_ids"][-1] not in ends


def test_an_instruction_that_just_fits_a_row_is_taken():
    batch = DataCollatorForBlankInfilling(CONFIG, SMALL)([{"inputs": [3] * 54, "targets": [4] * 8}])
    assert batch["segment_ids"].sum() == 64  # 54, [gMASK], sop and 8 targets
    with pytest.raises(ValueError, match="do not fit a row of 64"):
        DataCollatorForBlankInfilling(CONFIG, SMALL)([{"inputs": [3] * 55, "targets": [4] * 8}])
    shorter = collator(instruction_length=32)
    assert shorter([{"inputs": [3] * 22, "targets": [4] * 8}])["segment_ids"].sum() == 32
    with pytest.raises(ValueError, match="do not fit a row of 32"):
        shorter([{"inputs": [3] * 23, "targets": [4] * 8}])


@pytest.mark.parametrize("mask", [CONFIG.mask_token_id, CONFIG.smask_token_id])
def test_targets_stand_at_the_first_mask_of_an_instruction(mask):
    batch = collator()([{"inputs": [7, 8, mask, 9], "targets": [10, 11]}])
    after_sop = batch["input_ids"][0].tolist().index(CONFIG.sop_token_id)
    assert batch["position_ids"][0, after_sop:].tolist() == [2, 2, 2, 0]


def test_origins_of_instructions_and_texts_are_returned():
    features = [{"inputs": [11], "targets": [12], "sample_id": 7}, {"input_ids": [7, 8], "sample_id": 9}]
    batch = DataCollatorForBlankInfilling(CONFIG, SMALL, with_origin=True)(features)
    assert batch["sample_ids"].tolist() == [7, 9]
    assert batch["objectives"][0] == 3


def test_samples_of_one_row_have_blanks_of_their_own():
    batch = collator()([text_row("mask", [20, 20], sample_id=n) for n in range(20)])
    places = [
        [
            [i for i, token in enumerate(sample["input_ids"]) if token == CONFIG.mask_token_id]
            for sample in split(batch, n)
        ]
        for n in range(20)
    ]
    assert sum(first == second for first, second in places) < 5


def test_texts_without_sample_id_have_blanks_of_their_own():
    texts = [{"input_ids": [*range(n, n + 20)]} for n in range(1, 41)]
    lengths = (collator(mask_probability=0.0)(texts)["shift_labels"] != -100).sum(1)
    assert len({*lengths.tolist()}) > 5


def test_seeds_give_texts_other_objectives():
    texts = [{"input_ids": [*range(1, 30)], "sample_id": n} for n in range(100)]
    first, second = (
        DataCollatorForBlankInfilling(CONFIG, SMALL, seed=seed, with_origin=True)(texts)["objectives"]
        for seed in (0, 1)
    )
    assert not torch.equal(first, second)


def test_only_the_last_part_of_a_long_text_has_an_end():
    features = [{"input_ids": [*range(3, 140)], "sample_id": n} for n in range(60)]
    labels = collator(mask_probability=0.0)(features)["shift_labels"]
    has_end = (labels == CONFIG.eop_token_id).any(1)
    is_last = (labels == 139).any(1)  # the last token is always in the blank
    assert torch.equal(has_end, is_last)
    assert 0 < has_end.sum() < 60


def test_a_sentence_may_end_inside_quotes():
    vocabulary = {"so": 3, "so.": 4, 'so."': 5, "好。”": 6, '"': 7, "<n>": 8}
    assert sentence_ends(SimpleNamespace(get_vocab=lambda: vocabulary)) == [4, 5, 6, 8]
