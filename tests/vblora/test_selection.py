"""Selection is the same on every backend, whatever the logits: property-based."""

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, example, given, settings

from tests.models import DEVICE
from tests.ops.linear_case import LinearCase, in_float64
from tests.tolerance import assert_as_exact_as_eager
from vblora_triton import ops
from vblora_triton.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The interpreter is slow the first time it sees a kernel; a hung test is CI's to stop.
SETTINGS = settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))
# Few values, so that ties are common; and everything that is not a number or not finite.
VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, 6e4, float("inf"), float("-inf"), float("nan")])


@st.composite
def logits(draw):
    """Rows of logits (r, t, h): drawn one by one, all equal, one-hot, or without a tie."""
    r, t, h = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 40))
    rows = []
    for _ in range(r * t):
        kind = draw(st.sampled_from(["values", "equal", "one-hot", "normal"]))
        if kind == "values":
            rows.append(draw(st.lists(VALUES, min_size=h, max_size=h)))
        elif kind == "equal":
            rows.append([draw(VALUES)] * h)
        elif kind == "one-hot":
            hot = draw(st.integers(0, h - 1))
            rows.append([0.0 if i == hot else float("-inf") for i in range(h)])
        else:
            generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
            rows.append(torch.randn(h, generator=generator).tolist())
    dtype = draw(st.sampled_from(DTYPES))
    return torch.tensor(rows).reshape(r, t, h).to(DEVICE, dtype), draw(st.integers(1, h))


def chosen_by_definition(row: list[float], topk: int) -> list[int]:
    """Sort in plain Python: NaN first, then by value, and equal values by index."""
    return sorted(range(len(row)), key=lambda i: (row[i] == row[i], -row[i] if row[i] == row[i] else 0.0, i))[:topk]


@SETTINGS
@given(logits())
@example((torch.full((1, 1, 5), float("nan")), 5))
@example((torch.full((1, 2, 300), float("-inf")), 3))
def test_every_backend_selects_by_the_definition_and_within_range(drawn):
    values, topk = drawn[0].to(DEVICE), drawn[1]
    h = values.shape[-1]
    expected = [chosen_by_definition(row, topk) for row in values.float().reshape(-1, h).tolist()]
    for backend in ("triton", "reference"):
        selection = ops.select(values, values.transpose(0, 1), topk, backend=backend)
        assert selection.indices_A.reshape(-1, topk).tolist() == expected, backend
        assert torch.equal(selection.indices_B.transpose(0, 1), selection.indices_A)
        for indices in (selection.indices_A, selection.indices_B):
            assert indices.min() >= 0
            assert indices.max() < h
        # softmax, in float64, of the logits that were chosen; NaN where those hold one, or an infinity at the top.
        weights = values.double().gather(-1, selection.indices_A.long()).softmax(-1)
        torch.testing.assert_close(
            selection.weights_A.double(), weights, rtol=1e-2 if values.dtype != torch.float32 else 1e-5, atol=1e-7,
            equal_nan=True,
        )  # fmt: skip


@SETTINGS
@given(logits(), st.integers(1, 20))
def test_nan_logits_give_nan_out_and_nothing_else_does(drawn, M):
    values, topk = drawn
    r, t, h = values.shape
    bank = torch.ones(h, 16, device=DEVICE)
    x = torch.ones(M, 16 * t, device=DEVICE)
    logits_B = torch.zeros(1, r, h, device=DEVICE)
    broken = values.float().gather(-1, ops.select(values, logits_B, topk).indices_A.long()).softmax(-1).isnan().any()
    y = ops.vblora_linear(x, None, values, logits_B, bank, topk, backend="triton")
    assert y.isnan().all() if broken else y.isfinite().all()


@settings(SETTINGS, max_examples=15)
@given(
    st.builds(
        LinearCase,
        M=st.integers(0, 40),
        K=st.integers(1, 3).map(lambda n: 24 * n),
        N=st.integers(1, 3).map(lambda n: 24 * n),
        r=st.integers(1, 5),
        h=st.integers(1, 50),
        b=st.sampled_from([3, 8, 12, 24]),
        k=st.just(1),
        dtype=st.sampled_from(DTYPES),
        parameter_dtype=st.sampled_from(DTYPES),
        base=st.booleans(),
        layout=st.sampled_from(["contiguous", "transposed", "gaps"]),
        seed=st.integers(0, 9),
    ),
    st.integers(1, 8),
)
def test_any_shape_layout_and_dtype_is_as_exact_as_eager(case, k):
    case.k = min(k, case.h)
    tensors = case.tensors()
    truth = case.run(reference.vblora_linear, in_float64(tensors))
    eager = case.run(reference.vblora_linear, tensors)
    for name, value in case.run(ops.vblora_linear, tensors, backend="triton").items():
        assert_as_exact_as_eager(value, eager[name], truth[name], case.dtype, f"{case} {name}")
