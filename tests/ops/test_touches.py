"""All that touches a tensor of M x K or M x N in a training step of an adapted layer over a plain base, counted."""

import re

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tests.models import DEVICE
from vblora_triton import VeraConfig
from vblora_triton.kernels.launch import intercepted
from vblora_triton.ops.shared_input import Readers, shared_inputs
from vblora_triton.vblora.layer import Linear
from vblora_triton.vera.layer import Linear as VeraLinear
from vblora_triton.vera.projection import ProjectionDict, draw_projections

# All sizes differ, so that a shape says which tensor it is.
M, K, N, R = 600, 96, 144, 4
# Rows of which the base's product comes first.
FEW = 70
# These make no pass over memory; of those that only call others, the others are counted.
SILENT = "empty|view|reshape|flatten|alias|stride|expand|detach|select|transpose|permute|numpy_T|aten::t$|resolve"
SILENT += "|aten::(linear|matmul|to|contiguous)$"


def a_bank() -> nn.ParameterDict:
    return nn.ParameterDict({"default": nn.Parameter(torch.randn(6, 48, device=DEVICE) * 0.02)})


def layer(method: str, backend: str, bias: bool, bank: nn.ParameterDict | None = None) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Linear(K, N, bias=bias).requires_grad_(False)
    if method == "vblora":
        bank = bank or a_bank()
        made: nn.Module = Linear(base, bank, "default", r=R, num_vectors=6, vector_length=48)
    else:
        A, B = ProjectionDict(), ProjectionDict()
        A["default"], B["default"] = (t.to(DEVICE) for t in draw_projections(0, R, K, N))
        made = VeraLinear(base, A, B, "default", VeraConfig(r=R))
    made.backend = backend
    return made.train().to(DEVICE)


def touching(function, *shapes):
    """The result, and each operator that is given a tensor of one of these shapes; the profiler is no mode."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        result = function()
    large = {*shapes, *(tuple(reversed(shape)) for shape in shapes)}
    events = [e for e in profiled.events() if {tuple(shape) for shape in e.input_shapes} & large]
    # What aten's own product with a bias does inside is its own business, and nn.Linear's too.
    own = [e.name for e in events if e.cpu_parent is None or e.cpu_parent.name != "aten::addmm"]
    return result, [n for n in own if re.match("aten::|mkldnn::", n) and not re.search(SILENT, n)]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("method", ["vblora", "vera"])
def test_each_pass_touches_activations_once_and_the_base_product_in_place(method, bias):
    adapted = layer(method, "triton", bias)
    x, dy = torch.randn(M, K, device=DEVICE, requires_grad=True), torch.randn(M, N, device=DEVICE)
    launched: list[set[int]] = []

    def look(kernel, grid, arguments):
        # Not run: the interpreter has operators of its own.
        memory = [t.untyped_storage() for t in arguments.values() if isinstance(t, torch.Tensor)]
        launched.append({storage.data_ptr() for storage in memory if storage.nbytes() in (4 * M * K, 4 * M * N)})

    def pointers(*tensors):
        return [t.untyped_storage().data_ptr() for t in tensors]

    with intercepted(look):
        y, forward = touching(lambda: adapted(x), (M, K), (M, N))
        in_forward, launched = launched, []
        _, backward = touching(lambda: y.backward(dy), (M, K), (M, N))
    # VeRA's own products are PyTorch's too: of x, and y written; of dy twice, for dp and for D, and dx written.
    own = ["aten::addmm"] if method == "vera" else []
    assert forward == 2 * own + ["aten::addmm_"]
    assert backward == 3 * own + ["aten::addmm_"]
    if method == "vera":
        assert [touched for touched in (*in_forward, *launched) if touched] == []
        return
    (x_at, y_at), (dy_at, dx_at) = pointers(x, y), pointers(dy, x.grad)
    # One reads x, and another one writes y.
    assert [touched for touched in in_forward if touched] == [{x_at}, {y_at}]
    # One reads dy; dx is written once, by what reads x.
    assert sum(dx_at in touched for touched in launched) == 1
    assert sum(x_at in touched for touched in launched) == 1
    assert sum(dy_at in touched for touched in launched) == 1
    assert set().union(*launched) <= {x_at, dy_at, dx_at}


def test_of_few_rows_kernels_add_bias_and_update_to_the_base_product_and_touch_activations_once():
    adapted = layer("vblora", "triton", bias=True)
    x, dy = torch.randn(FEW, K, device=DEVICE, requires_grad=True), torch.randn(FEW, N, device=DEVICE)
    launched: list[list[int]] = []
    biases = []

    def look(kernel, grid, arguments):
        memory = [t.untyped_storage() for t in arguments.values() if isinstance(t, torch.Tensor)]
        launched.append([storage.nbytes() for storage in memory if storage.nbytes() in (4 * FEW * K, 4 * FEW * N)])
        biases.append(arguments.get("Bias_ptr"))

    with intercepted(look):
        y, forward = touching(lambda: adapted(x), (FEW, K), (FEW, N))
        in_forward, launched = [sizes for sizes in launched if sizes], []
        _, backward = touching(lambda: y.backward(dy), (FEW, K), (FEW, N))
    # cuBLAS writes y and dx; one kernel reads x, and one reads and writes y; one reads dy, one x and dx.
    assert forward == backward == ["aten::addmm"]
    assert in_forward == [[4 * FEW * K], [4 * FEW * N] * 2]
    assert [sizes for sizes in launched if sizes] == [[4 * FEW * N], [4 * FEW * K] * 3]
    # Of 16 bits cuBLAS has no fp32 result with a bias in it.
    assert [bias is adapted.base_layer.bias for bias in biases if bias is not None] == [True]


def test_layers_that_read_one_x_read_it_once_in_each_direction():
    bank, readers = a_bank(), Readers()
    layers = [layer("vblora", "triton", bias=True, bank=bank) for _ in range(3)]
    leaf, dy = torch.randn(M, K, device=DEVICE, requires_grad=True), torch.randn(M, N, device=DEVICE)
    launched: list[tuple[str, set[int]]] = []

    def look(kernel, grid, arguments):
        memory = [t.untyped_storage() for t in arguments.values() if isinstance(t, torch.Tensor)]
        large = {storage.data_ptr() for storage in memory if storage.nbytes() in (4 * M * K, 4 * M * N)}
        launched.append((kernel.fn.__name__, large))

    def step(x):
        with shared_inputs(readers):
            return [own(x) for own in layers]

    with intercepted(look):
        step(leaf * 1)
        launched.clear()
        x = leaf * 1
        ys, forward = touching(lambda: step(x), (M, K), (M, N))
        in_forward = [(name, large) for name, large in launched if large]
        launched.clear()
        grads, backward = touching(lambda: torch.autograd.grad(ys, [x], [dy] * 3), (M, K), (M, N))
    # Beside the products with each base, which add to what a kernel wrote, nothing touches one but these kernels.
    assert forward == backward == ["aten::addmm_"] * 3
    x_at, dx_at, dy_at = (t.untyped_storage().data_ptr() for t in (x, grads[0], dy))
    ys_at = [y.untyped_storage().data_ptr() for y in ys]
    assert in_forward == [("_shrink_fwd_kernel", {x_at}), *(("_expand_fwd_kernel", {y_at}) for y_at in ys_at)]
    in_backward = [(name, large) for name, large in launched if large]
    assert in_backward == [("_expand_bwd_kernel", {dy_at})] * 3 + [("_shrink_bwd_kernel", {x_at, dx_at})]


@pytest.mark.skipif(DEVICE != "cpu", reason="what a CPU runs")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("method", ["vblora", "vera"])
def test_on_a_cpu_products_alone_touch_activations_and_veras_scales(method, bias):
    adapted = layer(method, "auto", bias)
    x, dy = torch.randn(FEW, K, requires_grad=True), torch.randn(FEW, N)
    y, forward = touching(lambda: adapted(x), (FEW, K), (FEW, N))
    _, backward = touching(lambda: y.backward(dy), (FEW, K), (FEW, N))
    base, product = "aten::addmm" if bias else "aten::mm", "aten::mm"
    if method == "vblora":
        # Forward s, the base's, and s B^T added in place; backward ds, the base's dx, ds A added in place, dA and dB.
        assert sorted(forward) == sorted([product, base, "aten::addmm_"])
        assert sorted(backward) == sorted([product] * 4 + ["aten::addmm_"])
    else:
        # Forward p, the base's, and q = u B^T, scaled and added to it in one step. Backward du of dy, its dx, and
        # the update's added in place; and, sooner than by products with B, sum_m dy * q and dy * lambda_b.
        assert sorted(forward) == sorted([product, base, "aten::addcmul_"])
        assert sorted(backward) == sorted([product] * 2 + ["aten::mul", "aten::sum", "aten::mul", "aten::add_"])
