"""Layers that read one x computed as one node, from a model's second step on: what layers alone give, x read once."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.models import DEVICE, tiny_llama
from tests.tolerance import assert_as_exact_as_eager, relative_error
from vblora_triton import VBLoRAConfig, get_peft_model, ops
from vblora_triton.kernels.launch import counted, intercepted
from vblora_triton.ops.shared_input import Readers, shared_inputs

K, N, VECTOR, H, TOPK = 32, (48, 16, 48), 16, 6, 2


class Layer(nn.Module):
    """One adapted linear over a frozen base of its own, with a bank that others have too."""

    def __init__(self, bank: nn.Parameter, N: int, r: int = 4, seed: int = 0, bias: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(DEVICE)

        self.bank = bank
        self.logits_A, self.logits_B = nn.Parameter(normal(r, K // VECTOR, H)), nn.Parameter(normal(N // VECTOR, r, H))
        self.weight = nn.Parameter(normal(N, K) / K**0.5, requires_grad=False)
        self.bias = nn.Parameter(normal(N), requires_grad=False) if bias else None
        self.options = {"backend": "triton"}

    def forward(self, x):
        base = ops.FrozenLinear(self.weight, self.bias)
        return ops.vblora_linear(x, base, self.logits_A, self.logits_B, self.bank, TOPK, training=True, **self.options)


class Three(nn.Module):
    """q, k and v."""

    def __init__(self, r: int = 4, dtype=torch.float32, bias=True) -> None:
        super().__init__()
        bank = nn.Parameter(torch.randn((H, VECTOR), generator=torch.Generator().manual_seed(7)).to(DEVICE))
        self.layers = nn.ModuleList(Layer(bank, n, r, seed, bias and seed != 1) for seed, n in enumerate(N))
        for layer in self.layers:
            layer.weight.data = layer.weight.data.to(dtype)
            if layer.bias is not None:
                layer.bias.data = layer.bias.data.to(dtype)
        self.readers, self.dtype = Readers(), dtype

    def step(self, use, rows=20, together=True):
        """By `use(q, k, v, x)`, which returns results: these, and all gradients, None where there is none."""
        generator = torch.Generator().manual_seed(rows)
        # Of values that every dtype holds.
        leaf = torch.randn((2, rows // 2, K), generator=generator).bfloat16().to(DEVICE, self.dtype).requires_grad_()
        self.zero_grad()
        # A leaf is no x that layers share.
        if together:
            with shared_inputs(self.readers):
                ys = use(*self.layers, leaf * 1)
        else:
            ys = use(*self.layers, leaf * 1)
        dys = [torch.randn(y.shape, generator=generator).bfloat16().to(DEVICE, y.dtype) for y in ys]
        torch.autograd.backward(ys, dys)
        grads = {name: p.grad for name, p in self.named_parameters() if p.requires_grad}
        return {"x": leaf.grad, **grads, **{f"y{i}": y.detach() for i, y in enumerate(ys)}}


def qkv(q, k, v, x):
    return q(x), k(x), v(x)


def shrinks(three, use=qkv, **options):
    with counted() as names:
        three.step(use, **options)
    return names.count("_shrink_fwd_kernel"), names.count("_shrink_bwd_kernel")


def assert_alike(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        assert value is None or relative_error(found[name], value) < 1e-6, name


USES = {
    "in order": qkv,
    "another order": lambda q, k, v, x: (v(x), q(x), k(x)),
    "one twice": lambda q, k, v, x: (q(x), q(x), k(x)),
    "one unused": lambda q, k, v, x: (q(x), v(x), k(x))[:2],
    "first unused": lambda q, k, v, x: (q(x), v(x), k(x))[1:],
    "others read x": lambda q, k, v, x: (q(x), x.exp(), k(x), v(x), x.sin()),
    "an alias before": lambda q, k, v, x: (q(x), k(x.detach()), v(x)),
    "two of them": lambda q, k, v, x: (q(x), k(x)),
    "written to": lambda q, k, v, x: (q(x.clone()), *(lambda z: (k(z), v(z)))(x * 2)),
    "changed by who reads": lambda q, k, v, x: (q(x) + 1, k(x).mul_(2), v(x).add_(q(x).detach())),
    "checkpointed": lambda q, k, v, x: (checkpoint(lambda x: q(x) + v(x), x, use_reentrant=False), k(x)),
    "all checkpointed": lambda q, k, v, x: checkpoint(lambda x: (q(x), k(x), v(x)), x, use_reentrant=False),
    "reentrant": lambda q, k, v, x: (checkpoint(lambda x: q(x) + v(x), x, use_reentrant=True), k(x)),
    "one after the other": lambda q, k, v, x: (q(x), k(q(x)[..., :K]), v(x)),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_every_step_gives_what_layers_alone_give(use):
    three = Three()
    alone = three.step(use, together=False)
    for _ in range(2):
        assert_alike(three.step(use), alone)


@pytest.mark.parametrize(("r", "expected"), [(4, (1, 1)), (5, (1, 1)), (8, (2, 2)), (16, (3, 3))])
def test_x_is_read_once_from_the_second_step_on(r, expected):
    three = Three(r)
    assert shrinks(three) == (3, 3)
    # All ranks together have room for 16.
    assert shrinks(three) == shrinks(three, rows=34) == expected
    assert_alike(three.step(qkv), three.step(qkv, together=False))


def test_one_launch_finds_the_gradients_of_all_their_parameters_and_one_adds_up_what_is_alike():
    three = Three()
    three.step(qkv)
    with counted() as names:
        three.step(qkv)
    assert names.count("_parameter_grads_kernel") == 1
    # k is narrower than q and v; with q, v beside each other are of one size.
    assert names.count("_sum_partials_kernel") == 3
    alike = Three()
    alike.layers = nn.ModuleList(alike.layers[i] for i in (0, 2, 1))
    alike.step(qkv)
    with counted() as names:
        found = alike.step(qkv)
    assert names.count("_sum_partials_kernel") == 2
    assert_alike(found, alike.step(qkv, together=False))


def test_layers_whose_logits_differ_in_dtype_go_alone():
    three = Three()
    k = three.layers[1]
    k.logits_B.data = k.logits_B.data.bfloat16()
    three.step(qkv)
    assert shrinks(three) == (3, 3)
    assert_alike(three.step(qkv), three.step(qkv, together=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [18, 600])
def test_in_every_dtype_they_are_as_exact_as_plain_pytorch(dtype, rows):
    three, eager, exact = Three(3, dtype), Three(3, dtype), Three(3, dtype).double()
    exact.dtype = torch.float64
    for layer in (*eager.layers, *exact.layers):
        layer.options = {"backend": "reference"}
    three.step(qkv)
    assert shrinks(three) == (1, 1)
    found, eagers = three.step(qkv, rows), eager.step(qkv, rows, together=False)
    for name, truth in exact.step(qkv, rows, together=False).items():
        assert_as_exact_as_eager(found[name], eagers[name], truth, dtype, name)


@pytest.mark.parametrize(
    "use", [lambda q, k, v, x: (q(x), v(x)), lambda q, k, v, x: (q(x), k(x * 2), v(x))], ids=["without k", "another x"]
)
def test_a_step_that_is_not_as_foreseen_is_right_and_its_first_layer_goes_alone_from_then_on(use):
    three = Three()
    three.step(qkv)
    assert_alike(three.step(use), three.step(use, together=False))
    assert shrinks(three) == (3, 3)
    # k and v are together now.
    assert shrinks(three) == shrinks(three) == (2, 2)
    assert_alike(three.step(qkv), three.step(qkv, together=False))


def test_what_changes_between_two_of_them_is_seen():
    def changing(what):
        def use(q, k, v, x):
            y = q(x)
            with torch.no_grad():
                getattr(k, what).add_(0.5)
            return y, k(x), v(x)

        return use

    for what in ("logits_A", "logits_B"):
        three, other = Three(), Three()
        three.step(qkv)
        assert_alike(three.step(changing(what)), other.step(changing(what), together=False))
    # What is saved for backward, as the bank always is, torch does not let be changed.
    for what in ("weight", "bank"):
        three = Three()
        three.step(qkv)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            three.step(changing(what))


def replaced(parameter):
    parameter.data = parameter.data + 0.5


def frozen(parameter):
    parameter.requires_grad_(False)


@pytest.mark.parametrize("what", ["logits_A", "logits_B", "weight", "bias", "bank"])
@pytest.mark.parametrize("change", [replaced, frozen])
def test_data_put_in_anothers_place_and_freezing_between_two_of_them_are_seen(change, what):
    def use(q, k, v, x):
        y = q(x)
        change(getattr(v, what))
        return y, k(x), v(x)

    three, other = Three(), Three()
    three.step(qkv)
    found, expected = three.step(use), other.step(use, together=False)
    for name in ("y0", "y1", "y2", "layers.2.logits_A", "layers.2.logits_B"):
        if name in expected:
            assert_alike({name: found[name]}, {name: expected[name]})


def test_a_layer_that_is_not_called_any_more_does_no_harm():
    without_k = lambda q, k, v, x: (q(x), v(x))  # noqa: E731
    three = Three()
    three.step(qkv)
    with torch.no_grad():
        three.layers[1].logits_A.mul_(float("nan"))
    assert_alike(three.step(without_k), three.step(without_k, together=False))
    three = Three()
    three.step(qkv)
    # Of sizes, and in a dtype, that its call would refuse.
    three.layers[1].logits_A.data = torch.zeros(1, dtype=torch.float64, device=DEVICE)
    assert_alike(three.step(without_k), three.step(without_k, together=False))


def test_evaluation_forgets_so_that_replaced_parameters_are_freed():
    three = Three()
    three.step(qkv)
    with torch.no_grad(), shared_inputs(three.readers):
        qkv(*three.layers, torch.randn(20, K, device=DEVICE))
    assert not three.readers.following


def test_layers_with_hooks_of_their_own_go_alone():
    config = VBLoRAConfig(r=2, num_vectors=6, vector_length=16, target_modules=["q_proj", "k_proj", "v_proj"])
    model = get_peft_model(tiny_llama().to(DEVICE), config).train()
    model.enable_input_require_grads()
    layers = [layer for _, layer in model.base_model.adapted_layers()]
    for layer in layers:
        layer.backend = "triton"
    ids = torch.arange(40, device=DEVICE).view(2, 20)
    names: list[str] = []
    # With the hook, whose effect nobody knows, k itself once more in the first of two blocks; then q by itself too.
    for hooked, expected in ((False, 6), (False, 2), (True, 3), (True, 4)):
        if hooked:
            layers[1].register_forward_pre_hook(lambda module, inputs: None)
        names.clear()
        with intercepted(lambda kernel, *_: names.append(kernel.fn.__name__)):
            model(input_ids=ids)
        assert names.count("_shrink_fwd_kernel") == expected


def test_a_training_step_in_place_between_two_passes_is_seen():
    three, other = Three(), Three()
    for one, together in ((three, True), (other, False)):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], 0.1)
        for _ in range(3):
            found = one.step(qkv, together=together)
            optimizer.step()
        one.found = found
    assert_alike(three.found, other.found)


def test_alone_go_those_that_drop_or_train_their_base_or_are_no_parameters_or_few_or_called_from_somewhere_else():
    def with_options(**options):
        three = Three()
        for layer in three.layers:
            layer.options |= options
        return three

    dropping = with_options(dropout_p=0.5)
    trained = Three()
    for layer in trained.layers:
        layer.weight.requires_grad_(True)
    replicated = Three()
    for layer in replicated.layers:
        weight = layer.weight.detach().clone()
        del layer.weight
        layer.weight = weight
    banks = Three()
    banks.layers[1].bank = nn.Parameter(banks.layers[1].bank.detach().clone())
    banks.layers[2].options = {"backend": "reference"}
    for three in (dropping, trained, replicated, banks):
        assert shrinks(three) == shrinks(three)
    assert not replicated.readers.following
    few = Three()
    assert shrinks(few, rows=8) == shrinks(few, rows=8) == (3, 3)
    three = Three()

    def saved_elsewhere(q, k, v, x):
        with torch.autograd.graph.save_on_cpu():
            return qkv(q, k, v, x)

    assert shrinks(three, saved_elsewhere) == shrinks(three, saved_elsewhere) == (3, 3)


@pytest.mark.parametrize("frozen", ["bank", "logits_A", "logits_B", "all"])
def test_only_gradients_that_are_asked_for_are_there(frozen):
    three = Three()
    for layer in three.layers[1:] if frozen != "all" else three.layers:
        for name in ("bank", "logits_A", "logits_B"):
            getattr(layer, name).requires_grad_(name != frozen and frozen != "all")
    alone = three.step(qkv, together=False)
    for _ in range(2):
        assert_alike(three.step(qkv), alone)


def test_gradients_may_be_asked_of_one_or_of_none_and_twice():
    three, x = Three(), torch.randn(20, K, device=DEVICE, requires_grad=True)
    three.step(qkv)
    q, k, _ = three.layers
    with shared_inputs(three.readers):
        ys = qkv(*three.layers, x * 1)
    total = sum(y.sum() for y in ys)
    for wanted in ([x], [k.logits_A], [q.logits_B, x], [q.bank]):
        expected = torch.autograd.grad(sum(y.sum() for y in qkv(*three.layers, x * 1)), wanted)
        for _ in range(2):
            for a, b in zip(torch.autograd.grad(total, wanted, retain_graph=True), expected, strict=True):
                assert relative_error(a, b) < 1e-6
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(ys[1].square().sum(), x, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="is_grads_batched"):
        torch.autograd.grad(ys[1], x, torch.ones(2, *ys[1].shape, device=DEVICE), is_grads_batched=True)


def test_who_observes_backward_sees_operators_and_the_same_gradients():
    three, x = Three(), torch.randn(20, K, device=DEVICE, requires_grad=True)
    three.step(qkv)
    for seen in (slice(None), slice(1)):
        with shared_inputs(three.readers):
            ys = qkv(*three.layers, x * 1)[seen]
        inputs = [x, *(p for p in three.parameters() if p.requires_grad)]
        ones = [torch.ones_like(y) for y in ys]
        expected = torch.autograd.grad(ys, inputs, ones, retain_graph=True, allow_unused=True)
        with FlopCounterMode(display=False):
            found = torch.autograd.grad(ys, inputs, ones, allow_unused=True)
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            assert a is None or relative_error(a, b) < 1e-6


def test_the_memory_holds_nothing_that_did_not_come_back_and_is_not_copied():
    three = Three()
    three.step(qkv)
    assert len(three.readers.following) == 1
    three.layers = Three().layers
    three.step(qkv)
    known = [t for calls in three.readers.following.values() for call in calls for t in call]
    ours = {id(p) for p in three.parameters()}
    assert known
    assert {id(t) for t in known if isinstance(t, torch.Tensor)} <= ours
    for copied in (copy.deepcopy(three), pickle.loads(pickle.dumps(three))):
        assert not copied.readers.following


def test_a_model_reads_each_input_once_from_its_second_step_on():
    config = VBLoRAConfig(r=2, num_vectors=6, vector_length=16, target_modules="all-linear")
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama().to(DEVICE), config).train()
    for _, layer in model.base_model.adapted_layers():
        layer.backend = "triton"
    ids = torch.arange(40, device=DEVICE).view(2, 20)
    found = []
    for _ in range(2):
        model.zero_grad()
        with counted() as names:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        found.append((names.count("_shrink_fwd_kernel"), names.count("_shrink_bwd_kernel")))
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    layers = model.config.num_hidden_layers
    # q, k, v; o; gate, up; down. What the first q, k and v read has no gradient.
    assert found[0] == (7 * layers, 7 * layers)
    assert found[2] == (4 * layers + 2, 4 * layers + 2)
    for a, b in zip(found[1], found[3], strict=True):
        assert relative_error(a, b) < 1e-5
