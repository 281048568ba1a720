"""Models built by PEFT compute the same with our ops: results, gradients, dtypes, refusals, memory."""

import copy
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from tests.integrations.peft_case import (
    ALONE,
    BOTH,
    DEVICE,
    METHODS,
    MODELS,
    by_peft,
    draw,
    fixed,
    in_float64,
    inputs,
    logits,
    one_layer,
    peft_layers,
    results,
    runs_kernels,
)
from tests.tolerance import assert_as_exact_as_eager
from vblora_triton import ops, patch_peft
from vblora_triton.kernels.launch import counted, intercepted

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out is set")


@pytest.fixture
def calls(monkeypatch) -> Mock:
    """A mock with a method for each op, which calls it."""
    mock = Mock()
    for name in ("vblora_linear", "vera_linear"):
        getattr(mock, name).side_effect = getattr(ops, name)
        monkeypatch.setattr(ops, name, getattr(mock, name))
    return mock


def by_kind(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One vector for all layers' gradients of a kind: the few numbers of one layer's are mostly noise from below it."""
    kinds: dict[str, list[torch.Tensor]] = {}
    for name, value in found.items():
        kind = next((part for part in name.split(".") if part.startswith(("vblora_", "vera_"))), name)
        kinds.setdefault(kind, []).append(value.flatten())
    return {kind: torch.cat(values) for kind, values in kinds.items()}


@BOTH
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_two_active_adapters_give_the_results_and_gradients_of_peft(method, family, dtype):
    model = by_peft(method, family, adapters=2, dtype=dtype)
    truth, eager = results(in_float64(model)), results(model)
    with patch_peft(backend="triton"), counted() as launches:
        own = results(model)
    assert own.keys() == eager.keys() == truth.keys()
    assert len(launches) >= 4 * len(peft_layers(model)), "both adapters of every layer, forward and backward"
    truth, eager, own = map(by_kind, (truth, eager, own))
    for kind in truth:
        assert_as_exact_as_eager(own[kind], eager[kind], truth[kind], dtype, kind)


def layer_results(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    assert layer(x.detach()).requires_grad == bool(trained)
    x = x.detach().requires_grad_()
    y = layer(x)
    grads = torch.autograd.grad((y * fixed(y)).sum(), [x, *trained.values()])
    return {"y": y, **dict(zip(("x", *trained), grads, strict=True))}


@BOTH
@pytest.mark.parametrize("state", ["training", "evaluation", "frozen"])
@pytest.mark.parametrize(
    ("mode", "shape"),
    # In 16 bits, rows enough that a gradient is more than the rounding of a few products.
    [
        ("fp32", (20,)),
        ("fp32", (2, 3, 5)),
        ("fp32", ()),
        ("bf16", (2, 3, 9)),
        ("bf16", (130,)),
        ("fp16", (20,)),
        ("autocast", (5, 26)),
    ],
    ids=str,
)
def test_each_gradient_of_one_layer_is_as_exact_as_pefts(method, mode, shape, state):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mode, torch.float32)
    layer = one_layer(method, dtype).train(state != "evaluation").requires_grad_(state != "frozen")
    x = torch.randn(*shape, 96, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    truth = layer_results(in_float64(layer), x.double())
    with torch.autocast(DEVICE, torch.bfloat16, enabled=mode == "autocast"):
        eager = layer_results(layer, x)
        with patch_peft(layer, backend="triton"), counted() as launches:
            own = layer_results(layer, x)
    assert launches
    for name in truth:
        # Under autocast the base layer's result is bf16, and x is not.
        floor = torch.bfloat16 if mode == "autocast" else dtype
        assert_as_exact_as_eager(own[name], eager[name], truth[name], floor, name)


@BOTH
@pytest.mark.parametrize("state", ["active", "disabled", "merged", "two active", "none active", "elsewhere"])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16], ids=str)
def test_results_have_the_dtypes_of_pefts(method, state, adapter, inputs):
    # The base layer answers in float32 to anything, as one that is kept in float32 does.
    class Wide(nn.Linear):
        def forward(self, x):
            return super().forward(x.float())

    layer = one_layer(method, base=Wide(96, 64))
    for name, parameter in layer.named_parameters():
        if "base_layer" not in name:
            parameter.data = parameter.data.to(adapter)
    for buffers in (getattr(layer, "vera_A", None), getattr(layer, "vera_B", None)):
        if buffers is not None:
            buffers["default"] = buffers["default"].to(adapter)
    if state == "merged":
        layer.merge()
    layer.enable_adapters(state != "disabled")
    active = {"two active": ["default", "default"], "none active": [], "elsewhere": ["elsewhere"]}
    layer._active_adapter = active.get(state, ["default"])
    x = torch.randn(5, 96, device=DEVICE).to(inputs)
    expected = layer(x)
    with patch_peft(layer):
        own = layer(x)
    assert own.dtype == expected.dtype == inputs
    tolerance = 3e-2 if torch.bfloat16 in (inputs, adapter) else 1e-6
    torch.testing.assert_close(own, expected, rtol=tolerance, atol=tolerance)


@BOTH
def test_merging_unmerging_and_disabling_are_pefts(method, calls):
    model = by_peft(method, "gpt2")
    expected = {"active": logits(model)}
    with model.disable_adapter():
        expected["disabled"] = logits(model)
    model.merge_adapter()
    expected["merged"] = logits(model)
    model.unmerge_adapter()
    assert (expected["active"] - expected["disabled"]).abs().max() > 1e-2
    with patch_peft():
        torch.testing.assert_close(logits(model), expected["active"], rtol=0, atol=1e-5)
        assert len(calls.method_calls) == len(peft_layers(model))
        model.merge_adapter()
        assert torch.equal(logits(model), expected["merged"])
        # PEFT unmerges where a merged model is called with its adapters disabled.
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), expected["disabled"], rtol=0, atol=1e-5)
        assert not any(layer.merged for layer in peft_layers(model))
        assert len(calls.method_calls) == len(peft_layers(model))
        torch.testing.assert_close(logits(model), expected["active"], rtol=0, atol=1e-5)


@BOTH
def test_dropout_draws_what_pefts_draws_on_the_reference(method):
    model = by_peft(method, **{f"{method}_dropout": 0.5}).train()
    torch.manual_seed(0)
    expected = results(model)
    with patch_peft(backend="reference"):
        torch.manual_seed(0)
        own = results(model)
        assert not torch.equal(results(model)["logits"], own["logits"]), "it is drawn anew in each call"
        assert torch.equal(logits(model.eval()), logits(model))
    for name in expected:
        torch.testing.assert_close(own[name], expected[name], rtol=1e-4, atol=1e-6)


@BOTH
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_with_dropout_learns_what_training_without_it_does(method, use_reentrant):
    model = by_peft(method, "bert", **{f"{method}_dropout": 0.5}).train()
    found = []
    with patch_peft(backend="triton"):
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            torch.manual_seed(0)
            found.append(results(model))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-5)


class Scaled(nn.Linear):
    def forward(self, x, factor, *, bias=0.0):
        return super().forward(x) * factor + bias


@BOTH
def test_base_layer_is_called_as_a_module_with_all_arguments(method):
    layer, x = one_layer(method, base=Scaled(96, 64)), torch.randn(5, 96, device=DEVICE)
    seen = []
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    expected = layer(x, 2.0, bias=1.0)
    with patch_peft():
        torch.testing.assert_close(layer(x, 2.0, bias=1.0), expected)
    assert len(seen) == 2
    assert torch.equal(*seen)


@BOTH
@pytest.mark.parametrize("hooked", [False, True])
def test_the_base_layer_is_called_where_somebody_watches_it_and_its_result_is_left_alone(method, hooked, calls):
    layer, outputs = one_layer(method), []
    if hooked:
        layer.base_layer.register_forward_hook(lambda *args: outputs.append((args[-1], args[-1].clone())))
    expected = layer(inputs())
    with patch_peft():
        torch.testing.assert_close(layer(inputs()), expected)
    assert len(outputs) == (2 if hooked else 0)
    assert all(torch.equal(output, before) for output, before in outputs)
    ((name, (_, base, *_), _),) = calls.method_calls
    assert name == f"{method}_linear"
    assert isinstance(base, torch.Tensor if hooked else ops.FrozenLinear)


def test_gradients_of_gradients_are_pefts_on_the_reference_and_refused_by_the_kernels():
    layer, x = one_layer("vblora"), torch.randn(5, 96, device=DEVICE, requires_grad=True)

    def twice():
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    expected = twice()
    with patch_peft(backend="reference"):
        torch.testing.assert_close(twice(), expected, rtol=1e-4, atol=1e-4)
    with patch_peft(backend="triton"), pytest.raises(RuntimeError):
        twice()


def saved_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """What backward keeps beside the input, parameters and buffers, which are there anyway."""
    projections = [v["default"] for v in (getattr(layer, "vera_A", None), getattr(layer, "vera_B", None)) if v]
    given = {t.untyped_storage()._cdata for t in (x, *layer.parameters(), *projections)}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in given:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    ("method", "fields"),
    [("vblora", {"r": 4, "num_vectors": 256, "vector_length": 256}), ("vera", {"r": 256})],
    ids=METHODS,
)
def test_a_large_layer_keeps_less_than_a_twentieth_of_pefts_bytes_for_backward(method, fields):
    # In evaluation, where PEFT looks at no values: its layer need not be computed, and keeps the same without dropout.
    layer = one_layer(method, torch.bfloat16, nn.Linear(4096, 4096, bias=False), **fields).eval()
    x = torch.randn(1024, 4096, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    own = copy.deepcopy(layer)
    with patch_peft(own, backend="triton"), intercepted(lambda *_: None):
        ours = saved_bytes(own, x)
    theirs = saved_bytes(layer, x)
    assert 0 < ours < 0.05 * theirs


@BOTH
@ALONE
def test_compiles_as_one_graph_in_evaluation_and_sees_the_change_after_a_reset(method, alone):
    torch._dynamo.reset()
    model = by_peft(method)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = logits(compiled)
        with patch_peft(model if alone else None, backend="triton"):
            torch.compiler.reset()
            torch.testing.assert_close(logits(compiled), expected, rtol=0, atol=1e-5)
            assert runs_kernels(compiled)
        torch.compiler.reset()
        assert not runs_kernels(compiled)


@BOTH
@ALONE
def test_compiled_training_gives_the_gradients_of_peft(method, alone):
    torch._dynamo.reset()
    model = by_peft(method).train()
    expected = results(model)
    with patch_peft(model if alone else None):
        model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
        own = results(model)
    for name in expected:
        torch.testing.assert_close(own[name], expected[name], rtol=1e-4, atol=1e-5)


@BOTH
def test_what_layers_share_is_brought_to_the_device_of_each(method):
    layer = one_layer(method).eval().to("meta")
    shared = {"vblora": ("vblora_vector_bank",), "vera": ("vera_A", "vera_B")}[method]
    for name in shared:
        elsewhere = {adapter: torch.empty(value.shape) for adapter, value in getattr(layer, name).items()}
        layer._buffers.pop(name, None), layer._modules.pop(name, None)
        object.__setattr__(layer, name, elsewhere)
    with patch_peft(backend="reference"):
        assert layer(inputs().to("meta")).device.type == "meta"


def test_a_second_vera_adapter_of_rank_one_is_spread_over_the_first_ones_ranks_as_in_peft():
    model = by_peft("vera")
    model.add_adapter("other", peft.VeraConfig(r=1, projection_prng_key=3, target_modules=["k_proj", "down_proj"]))
    draw(model).base_model.set_adapter("other")
    expected = results(model.eval())
    with patch_peft():
        own = results(model)
    for name in expected:
        torch.testing.assert_close(own[name], expected[name], rtol=1e-4, atol=1e-5)


class Halved(nn.Module):
    """What somebody may put in the place of a layer's dropout."""

    def forward(self, x):
        return x * 0.5


@BOTH
@pytest.mark.parametrize("backend", ["triton", "auto", "reference"])
@pytest.mark.parametrize("dropout", [Halved, lambda: nn.AlphaDropout(0.5)], ids=["halved", "alpha"])
def test_what_stands_in_the_place_of_dropout_acts_on_the_updates_input_as_in_peft(method, backend, dropout):
    layer = one_layer(method).train()
    getattr(layer, f"{method}_dropout")["default"] = dropout().train()
    plain = copy.deepcopy(layer)
    getattr(plain, f"{method}_dropout")["default"] = nn.Identity()
    torch.manual_seed(0)
    expected = layer_results(layer, inputs())
    with patch_peft(layer, backend=backend):
        torch.manual_seed(0)
        own = layer_results(layer, inputs())
    for name in expected:
        torch.testing.assert_close(own[name], expected[name], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected["y"], layer_results(plain, inputs())["y"])
