"""Micro-batches of equal sizes."""

import pytest
import torch

from glm_hf.training.measurements import LossMeter
from glm_hf.training.pipeline.micro_batches import common_shape, empty_batch, micro_batches, pad_batch, require_names

ROW = torch.tensor([[5, 6]])
BATCH = {
    "input_ids": ROW,
    "position_ids": ROW + 1,
    "segment_ids": torch.ones_like(ROW),
    "shift_labels": ROW + 2,
    "objectives": torch.tensor([1]),
    "corpora": torch.tensor([3]),
    "sample_ids": torch.tensor([7]),
}
LABELS = ("shift_labels", "segment_ids", "objectives", "corpora", "sample_ids")


def test_padding_is_neither_seen_nor_predicted_nor_counted():
    padded = pad_batch(BATCH, 2, 3, pad_token_id=9)
    assert {name: values.tolist() for name, values in padded.items()} == {
        "input_ids": [[5, 6, 9], [9, 9, 9]],
        "position_ids": [[6, 7, 0], [0, 0, 0]],
        "segment_ids": [[1, 1, 0], [0, 0, 0]],
        "shift_labels": [[7, 8, -100], [-100, -100, -100]],
        "objectives": [1, 0],
        "corpora": [3, 0],
        "sample_ids": [7, -1],
    }
    meter = LossMeter(torch.device("cpu"))
    meter.add(torch.tensor([1.0, 3.0]), *(padded[name] for name in LABELS))
    assert meter.losses_of_rows() == [(7, 2.0)]
    assert int(meter.take()[-1]) == 2


def test_all_pieces_have_the_shape_that_the_largest_need():
    assert common_shape([{"input_ids": torch.zeros(1, 5)}, {"input_ids": torch.zeros(2, 3)}]) == (2, 5)
    long = {name: values.repeat(1, 3) if values.ndim > 1 else values for name, values in BATCH.items()}
    pieces = list(micro_batches([(BATCH, 0.5), (long, 2.0)], pad_token_id=9))
    assert [tuple(layout.shape) for (layout,), _ in pieces] == [(3, 1, 6), (3, 1, 6)]
    (layout,), (labels, factor, segments, objectives, corpora, sample_ids) = pieces[0]
    assert layout[:, 0].tolist() == [[5, 6, 9, 9, 9, 9], [6, 7, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert (float(factor), objectives.tolist(), corpora.tolist(), sample_ids.tolist()) == (0.5, [1], [3], [7])
    assert labels.tolist() == [[7, 8, -100, -100, -100, -100]]
    assert torch.equal(segments, layout[2])


def test_an_empty_batch_has_no_token():
    batch = empty_batch(pad_token_id=9)
    require_names(batch)
    assert batch["input_ids"].tolist() == [[9]]
    assert (batch["segment_ids"].tolist(), batch["shift_labels"].tolist()) == ([[0]], [[-100]])


def test_batches_of_another_collator_are_refused():
    with pytest.raises(ValueError, match="these have no position_ids, objectives"):
        require_names({name: value for name, value in BATCH.items() if name not in ("position_ids", "objectives")})
