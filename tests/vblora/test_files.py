"""The small form of logits gives back the mixture that the logits gave."""

import pytest
import torch

from vblora_triton.ops import reference
from vblora_triton.vblora.files import TopkLogits, decode_topk, encode_topk, index_dtype, topk_problem


@pytest.mark.parametrize("topk", [1, 2, 3, 9])
def test_the_small_form_mixes_the_same_vectors(topk):
    logits = torch.randn(3, 4, 9)
    bank = torch.randn(9, 5)
    indices, weights = decode_topk(*encode_topk(logits, topk))
    assert (indices.dtype, weights.dtype) == (torch.int32, torch.float32)
    mixed = reference.compose_selected(indices, weights, bank)
    torch.testing.assert_close(mixed, reference.compose(logits, bank, topk))


def test_ties_go_to_the_lowest_index():
    indices, _ = encode_topk(torch.tensor([[1.0, 7.0, 7.0, 7.0, 7.0]]), 2)
    assert indices.tolist() == [[1, 2]]


@pytest.mark.parametrize("last", [0.0, 1e-9, -1e-7])
def test_a_nearly_one_hot_row_never_reads_as_nan(last):
    # What is missing to 1 is rounding: 1 - sum may come out below zero.
    stored = torch.tensor([[1.0 - 3e-8, 1e-7 - last]])
    indices, weights = decode_topk(torch.tensor([[4, 2, 0]]), stored)
    assert (weights >= 0).all()
    mixed = reference.compose_selected(indices, weights, torch.eye(6))
    torch.testing.assert_close(mixed[0], torch.tensor([0.0, 0, 0, 0, 1, 0]), rtol=0, atol=1e-6)


def test_weights_that_rounding_brought_above_one_are_scaled_back():
    _, weights = decode_topk(torch.tensor([[4, 2, 0]]), torch.tensor([[0.61, 0.4]]))
    torch.testing.assert_close(weights, torch.tensor([[0.61 / 1.01, 0.4 / 1.01, 0.0]]))


@pytest.mark.parametrize("change", [torch.nn.Module.half, torch.nn.Module.double, lambda m: m.to(torch.bfloat16)])
def test_a_selection_stays_exact_when_the_model_is_cast(change):
    pair = decode_topk(*encode_topk(torch.randn(2, 3, 9), 2))
    own = TopkLogits(*pair, *pair)
    changed = change(own)
    assert changed is own
    for tensor, before in zip(own.selection(), pair * 2, strict=True):
        assert tensor.dtype == before.dtype
        assert torch.equal(tensor, before)
    assert all(tensor.is_meta for tensor in own.to("meta").selection())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_float32_whatever_the_logits_are(dtype):
    _, weights = encode_topk(torch.randn(2, 3, 8).to(dtype), 3)
    assert weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("num_vectors", "dtype"),
    [
        (1, torch.uint8),
        (255, torch.uint8),
        (256, torch.int16),
        (2**15 - 1, torch.int16),
        (2**15, torch.int32),
        (2**31, torch.int64),
    ],
)
def test_indices_have_the_smallest_dtype_that_files_use(num_vectors, dtype):
    assert index_dtype(num_vectors) == dtype


@pytest.mark.parametrize(
    ("indices", "weights", "word"),
    [
        ([[0, 6]], [[0.5]], "6"),
        ([[-1, 2]], [[0.5]], "-1"),
        ([[2, 2]], [[0.5]], "twice"),
        ([[0, 1]], [[float("nan")]], "finite"),
        ([[0, 1]], [[-0.1]], "negative"),
        ([[0, 1]], [[1.5]], "more than 1"),
        ([[0.0, 1.0]], [[0.5]], "dtype"),
        ([[0, 1]], [[1]], "dtype"),
    ],
)
def test_what_is_no_small_form_is_named(indices, weights, word):
    assert word in topk_problem(torch.tensor(indices), torch.tensor(weights), 6)


def test_a_small_form_has_no_problem():
    assert topk_problem(*encode_topk(torch.randn(2, 3, 6), 2), 6) is None
