"""Layers that read one x hand its gradient from one to the next: the same gradients, without autograd's additions."""

import threading
from contextvars import copy_context

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from tests.models import DEVICE
from tests.ops.linear_case import LinearCase
from tests.ops.vera_case import VeraCase
from tests.tolerance import relative_error
from vblora_triton import ops
from vblora_triton.ops import shared_input

SIZES = {"vblora": LinearCase(M=20, K=32, N=48, b=16, h=6), "vera": VeraCase(M=20, K=32, N=48, r=8)}
BACKENDS = ["triton", "reference"] if DEVICE == "cuda" else ["triton", "cpu", "reference"]


class Reader(nn.Module):
    """One adapted linear that owns its base's product, or calls the base."""

    def __init__(self, method: str, seed: int, backend: str, *, dtype=torch.float32, owns=True, dropout_p=0.0):
        super().__init__()
        case = SIZES[method]
        case = type(case)(**{**vars(case), "seed": seed, "dtype": dtype})
        tensors = {name: t.detach() for name, t in case.tensors().items() if name not in ("x", "base", "dy")}
        # Their gradients are to be seen beside the base's.
        self.trained = nn.ParameterDict({name: nn.Parameter(t) for name, t in tensors.items() if name not in "AB"})
        self.frozen = [t for name, t in tensors.items() if name in "AB"]
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn((case.N, case.K), generator=generator) / case.K**0.5
        self.base = ops.FrozenLinear(weight.to(DEVICE, dtype), None)
        self.call = ops.vblora_linear if method == "vblora" else ops.vera_linear
        self.rest = (case.k,) if method == "vblora" else ()
        self.options = {"backend": backend, "dropout_p": dropout_p, "training": True}
        self.owns = owns

    def forward(self, x, **more):
        base = self.base if self.owns else nn.functional.linear(x, self.base.weight)
        trained = [self.trained[name] for name in self.trained]
        return self.call(x, base, *trained, *self.frozen, *self.rest, **self.options, **more)


def readers(method, backend, count=3, **options):
    return [Reader(method, seed, backend, **options) for seed in range(count)]


def an_x(dtype=torch.float32):
    """A leaf, and what layers read, which is none."""
    # Of values that every dtype holds.
    leaf = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(9)).bfloat16()
    leaf = leaf.to(DEVICE, dtype).requires_grad_()
    return leaf, leaf * 1


def gradients(layers, use, shared=True, dtype=torch.float32):
    """By `use(layers, x)`, which returns a loss: the gradients of x and of each parameter, None where there is none."""
    leaf, x = an_x(dtype)
    if shared:
        with shared_input.shared_inputs():
            loss = use(layers, x)
    else:
        loss = use(layers, x)
    for layer in layers:
        layer.zero_grad()
    loss.backward()
    return [leaf.grad, *(p.grad for layer in layers for p in layer.parameters())]


def loss_of(*ys):
    """One that differs by layer and element."""
    total = 0.0
    for i, y in enumerate(ys):
        factors = torch.linspace(1, 2 + i, y.numel(), device=y.device, dtype=torch.float64)
        total += (y * factors.view(y.shape)).sin().sum()
    return total


def assert_alike(found, expected):
    assert [g is None for g in found] == [g is None for g in expected]
    # That of x is added up in another order, the others are bitwise equal.
    assert relative_error(found[0], expected[0]) < 1e-6
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert a is None or torch.equal(a, b)


def all_of(layers, x):
    return loss_of(*(layer(x) for layer in layers))


def edges_to(x, *ys):
    """How many edges of the graph from ys lead to the node that made x."""
    seen, stack, count = set(), [y.grad_fn for y in ys], 0
    while stack:
        node = stack.pop()
        if node is None or node in seen or node is x.grad_fn:
            continue
        seen.add(node)
        count += sum(following is x.grad_fn for following, _ in node.next_functions)
        stack += [following for following, _ in node.next_functions]
    return count


@pytest.mark.parametrize("owns", [True, False], ids=["own-base", "called-base"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", SIZES)
def test_gradients_are_those_of_layers_alone(method, backend, owns):
    layers = readers(method, backend, owns=owns)
    assert_alike(gradients(layers, all_of), gradients(layers, all_of, shared=False))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", SIZES)
def test_one_edge_leads_to_x_where_there_were_three(method, backend):
    layers, (_, x) = readers(method, backend), an_x()
    assert edges_to(x, *(layer(x) for layer in layers)) >= 3
    with shared_input.shared_inputs():
        assert (edges_to(x, *(layer(x) for layer in layers)) == 1) == (backend != "reference")


@pytest.mark.parametrize("method", SIZES)
def test_bf16_is_as_exact_as_layers_alone(method):
    layers = readers(method, "triton", dtype=torch.bfloat16)
    shared, alone = (gradients(layers, all_of, shared, torch.bfloat16)[0] for shared in (True, False))
    exact = [layer.double() for layer in readers(method, "reference", dtype=torch.bfloat16)]
    for layer in exact:
        layer.base, layer.frozen = ops.FrozenLinear(layer.base.weight.double()), [t.double() for t in layer.frozen]
    dx = gradients(exact, all_of, False, torch.float64)[0]
    assert relative_error(shared, dx) < 1.5 * relative_error(alone, dx) + 1e-3


@pytest.mark.parametrize("backend", BACKENDS[:-1])
@pytest.mark.parametrize("method", SIZES)
def test_autograd_adds_up_nothing_of_the_size_of_x(method, backend):
    layers, (_, x) = readers(method, backend), an_x()
    with shared_input.shared_inputs():
        loss = all_of(layers, x)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        loss.backward()
    added = [e.name for e in profiled.events() if e.name == "aten::add" and [4, 5, 32] in e.input_shapes]
    assert added == []


USES = {
    "another order": lambda q, k, v, x: loss_of(v(x), q(x), k(x)),
    "twice": lambda q, k, v, x: loss_of(q(x), q(x), k(x)),
    "second alone": lambda q, k, v, x: (q(x), loss_of(k(x)), v(x))[1],
    "last alone": lambda q, k, v, x: (q(x), k(x), loss_of(v(x)))[2],
    "first alone": lambda q, k, v, x: (loss_of(q(x)), k(x), v(x))[0],
    "another x": lambda q, k, v, x: loss_of(q(x), k(x * 2), v(x)),
    "detached": lambda q, k, v, x: loss_of(q(x), k(x.detach()), v(x)),
    "other readers": lambda q, k, v, x: loss_of(q(x), x.exp(), k(x), x, v(x)),
    "one after the other": lambda q, k, v, x: loss_of(k(q(x)[..., :32]), v(x)),
    "each checkpointed": lambda *qkv: loss_of(*(checkpoint(layer, qkv[3], use_reentrant=False) for layer in qkv[:3])),
    "checkpointed together": lambda q, k, v, x: loss_of(
        checkpoint(lambda x: q(x) + k(x), x, use_reentrant=False), v(x)
    ),
    "reentrant": lambda q, k, v, x: loss_of(checkpoint(lambda x: q(x) + k(x), x, use_reentrant=True), v(x)),
    "one reentrant": lambda q, k, v, x: loss_of(q(x), checkpoint(k, x, use_reentrant=True), v(x)),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("backend", BACKENDS[:-1])
@pytest.mark.parametrize("method", SIZES)
def test_whatever_the_calls_gradients_stay(method, backend, use):
    layers = readers(method, backend)
    by = lambda layers, x: use(*layers, x)  # noqa: E731
    assert_alike(gradients(layers, by), gradients(layers, by, shared=False))


@pytest.mark.parametrize("method", SIZES)
def test_each_layer_drops_by_its_own_mask(method):
    layers = readers(method, "triton", dropout_p=0.5)

    def seeded(layers, x):
        torch.manual_seed(3)
        return all_of(layers, x)

    assert_alike(gradients(layers, seeded), gradients(layers, seeded, shared=False))


@pytest.mark.parametrize("backend", BACKENDS[:-1])
@pytest.mark.parametrize("method", SIZES)
def test_an_x_that_is_written_to_is_another(method, backend):
    layers = readers(method, backend)

    def use(layers, x):
        first = layers[0](x).detach()
        with torch.no_grad():
            x.mul_(2)
        return loss_of(*(layer(x) for layer in layers[1:])) + first.sum()

    assert_alike(gradients(layers, use), gradients(layers, use, shared=False))
    # And what a layer keeps of it shows that it was written to, as it does alone.
    _, x = an_x()
    with shared_input.shared_inputs():
        y = layers[0](x)
        alias = shared_input._shared.get().alias
        x.detach().mul_(2)
        assert alias._version == x._version > 0
    if method == "vblora":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS[:-1])
@pytest.mark.parametrize("method", SIZES)
def test_a_gradient_can_be_asked_of_anything(method, backend):
    layers = readers(method, backend)
    parameters = [p for layer in layers for p in layer.parameters()]
    for wanted in ([0], [1], [1, 4], [0, 5]):
        found = []
        for shared in (True, False):
            leaf, x = an_x()
            inputs = [[leaf, *parameters][i] for i in wanted]
            if shared:
                with shared_input.shared_inputs():
                    loss = all_of(layers, x)
            else:
                loss = all_of(layers, x)
            found.append(torch.autograd.grad(loss, inputs))
        for a, b in zip(*found, strict=True):
            assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("method", SIZES)
def test_backward_may_run_twice(method):
    layers, (leaf, x) = readers(method, "triton"), an_x()
    with shared_input.shared_inputs():
        loss = all_of(layers, x)
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * once)


@pytest.mark.parametrize("method", SIZES)
def test_readers_of_a_leaf_stay_apart(method):
    q, k, _ = readers(method, "triton")
    leaf, _ = an_x()
    with shared_input.shared_inputs():
        first, second = q(leaf), k(leaf)
    # In this order the graph of the other one must still be there.
    second.sum().backward()
    first.sum().backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("method", SIZES)
def test_hooks_see_what_they_would(method):
    layers = readers(method, "triton")

    def use(layers, x):
        x.retain_grad()
        seen.append(x)
        x.register_hook(lambda grad: grad * 3)
        return all_of(layers, x)

    found = []
    for shared in (True, False):
        seen = []
        found.append((gradients(layers, use, shared), seen[0].grad))
    assert_alike(found[0][0], found[1][0])
    assert relative_error(found[0][1], found[1][1]) < 1e-6


@pytest.mark.parametrize("method", SIZES)
def test_what_is_saved_may_be_packed_and_computed_somewhere_else(method):
    layers = readers(method, "triton")

    def packed(layers, x):
        with torch.autograd.graph.save_on_cpu():
            return all_of(layers, x)

    assert_alike(gradients(layers, packed), gradients(layers, packed, shared=False))


@pytest.mark.parametrize("method", SIZES)
def test_other_threads_share_nothing(method):
    layers, (_, x) = readers(method, "triton"), an_x()
    made = []
    with shared_input.shared_inputs():
        y = layers[0](x)
        thread = threading.Thread(target=lambda: made.append(layers[1](x)))
        thread.start()
        thread.join()
    assert edges_to(x, y, made[0]) == 2


def test_nothing_outlives_the_context_nor_is_made_without_gradients():
    (q, k, v), (_, x) = readers("vblora", "triton"), an_x()
    with shared_input.shared_inputs():
        with torch.no_grad():
            q(x)
        assert shared_input._shared.get().alias is None
        with torch.inference_mode():
            q(torch.ones_like(x))
        k(x)
        assert shared_input._shared.get().alias is not None
        v(x.detach())
    assert shared_input._shared.get() is None


def test_a_batch_of_gradients_and_a_second_derivative_are_refused():
    layers, (_, x) = readers("vblora", "triton"), an_x()
    with shared_input.shared_inputs():
        y = sum(layer(x) for layer in layers)
    with pytest.raises((NotImplementedError, RuntimeError), match="is_grads_batched"):
        torch.autograd.grad(y, x, torch.ones(2, *y.shape, device=DEVICE), is_grads_batched=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def test_another_thread_in_a_copy_of_the_context_shares_nothing():
    x = torch.randn(3, 4, requires_grad=True) * 2
    found = []
    with shared_input.shared_inputs():
        assert shared_input.newest_alias(x) is x
        run = copy_context().run
        thread = threading.Thread(target=run, args=(lambda: found.append(shared_input.newest_alias(x)),))
        thread.start()
        thread.join()
        assert not shared_input.find_value(x, x, x.dtype)[0]
    assert found == [None]
