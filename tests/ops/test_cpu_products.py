"""`cpu.product`: right whoever computes it, and by oneDNN only where that is fast."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.linear_case import LinearCase
from tests.ops.vera_case import VeraCase
from tests.tolerance import assert_as_exact_as_eager
from vblora_triton import ops
from vblora_triton.ops import cpu

ONEDNN = cpu.onednn() is not None


def matrix(rows, columns, layout, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + columns)
    if layout == "transposed":
        return torch.randn(columns, rows, generator=generator).to(dtype).T
    if layout == "gaps":
        return torch.randn(rows, columns + 7, generator=generator).to(dtype)[:, :columns]
    return torch.randn(rows, columns, generator=generator).to(dtype)


@pytest.fixture
def operands(monkeypatch):
    """What oneDNN was given."""
    given = []

    def remember(left, right, *rest):
        given.append((left, right))
        return linear(left, right, *rest)

    linear = cpu.onednn()
    if ONEDNN:
        monkeypatch.setattr(cpu, "onednn", lambda: remember)
    return given


@pytest.mark.parametrize("left", ["contiguous", "transposed", "gaps"])
@pytest.mark.parametrize("right", ["contiguous", "transposed", "gaps"])
@pytest.mark.parametrize("M", [64, 200])
def test_every_layout_is_right_and_onednn_is_given_none_with_gaps(left, right, M, operands):
    a, b = matrix(M, 300, left), matrix(130, 300, right)
    value = cpu.product(a, b)
    assert_as_exact_as_eager(value, a @ b.T, a.double() @ b.double().T, torch.float32, "product")
    assert value.is_contiguous()
    assert len(operands) == (ONEDNN and left != "gaps" and (right != "gaps" or M == 200))
    for operand in operands[0] if operands else ():
        assert operand.is_contiguous() or operand.T.is_contiguous()


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((0, 300, 200), torch.float32),
        ((200, 0, 300), torch.float32),
        ((8, 8, 8), torch.float32),
        ((4096, 1024, 4), torch.float32),
        ((200, 300, 130), torch.float64),
        ((200, 300, 130), torch.bfloat16),
    ],
)
def test_sizes_and_dtypes_that_gain_nothing_are_left_to_torch(sizes, dtype, operands):
    M, K, N = sizes
    a, b = matrix(M, K, "contiguous", dtype), matrix(N, K, "contiguous", dtype)
    assert torch.equal(cpu.product(a, b), a @ b.T)
    assert operands == []


def test_who_looks_on_or_has_switched_onednn_off_sees_torchs_own_product(operands):
    a, b = matrix(200, 300, "contiguous"), matrix(130, 300, "contiguous")
    with FlopCounterMode(display=False) as counter:
        cpu.product(a, b)
    assert counter.get_total_flops() == 2 * 200 * 300 * 130
    with torch.backends.mkldnn.flags(enabled=False):
        cpu.product(a, b)
    assert operands == []


def test_a_processor_without_avx512_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert cpu.onednn.__wrapped__() is None


@pytest.mark.parametrize("M", [1, 20, 200])
def test_times_is_the_product_with_the_matrix_as_it_is(M):
    a, b = matrix(M, 300, "contiguous"), matrix(300, 130, "contiguous")
    assert_as_exact_as_eager(cpu.times(a, b), a @ b, a.double() @ b.double(), torch.float32, "product")


@pytest.mark.parametrize(
    ("case", "products"),
    [
        (LinearCase(M=16, K=384, N=384, base=False), 0),
        (VeraCase(M=16, K=384, N=384, r=256, spare=0, base=False), 6),
    ],
    ids=["vblora", "vera"],
)
def test_of_few_rows_onednn_is_given_the_products_of_a_layer_that_has_several(case, products, operands):
    tensors = {name: t.detach().cpu() for name, t in case.tensors().items()}
    x, dy = tensors.pop("x").requires_grad_(), tensors.pop("dy")
    base = ops.FrozenLinear(matrix(384, 384, "contiguous"))
    if isinstance(case, VeraCase):
        y = ops.vera_linear(x, base, *tensors.values(), backend="cpu")
    else:
        y = ops.vblora_linear(x, base, *tensors.values(), case.k, backend="cpu")
    torch.autograd.grad(y, x, dy)
    assert len(operands) == products * ONEDNN


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", ["vblora", "vera"])
def test_the_base_is_multiplied_likewise_in_both_passes(method, bias, operands):
    case = {"vblora": LinearCase, "vera": VeraCase}[method](M=150, K=192, N=240, base=False)
    tensors = {name: t.detach().cpu() for name, t in case.tensors().items()}
    x, dy = tensors.pop("x").requires_grad_(), tensors.pop("dy")
    weight, offset = matrix(240, 192, "contiguous"), torch.linspace(-1, 1, 240) if bias else None
    rest = (*tensors.values(), case.k) if method == "vblora" else tensors.values()
    function = getattr(ops, f"{method}_linear")
    y = function(x, ops.FrozenLinear(weight, offset), *rest, backend="cpu")
    (dx,) = torch.autograd.grad(y, x, dy)
    shapes = [(left.shape, right.shape) for left, right in operands]
    assert (((150, 192), (240, 192)) in shapes) == ONEDNN
    assert (((150, 240), (192, 240)) in shapes) == ONEDNN
    exact = [t.double() if isinstance(t, torch.Tensor) else t for t in rest]
    wide = x.detach().double().requires_grad_()
    base = torch.nn.functional.linear(wide, weight.double(), None if offset is None else offset.double())
    truth = function(wide, base, *exact, backend="reference")
    torch.testing.assert_close(y, truth.float(), rtol=1e-4, atol=1e-4)
    (truth_dx,) = torch.autograd.grad(truth, wide, dy.double())
    torch.testing.assert_close(dx, truth_dx.float(), rtol=1e-4, atol=1e-4)
