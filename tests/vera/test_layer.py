"""The layer of VeRA by itself: what it computes, holds, merges and refuses."""

import copy
import pickle
from unittest.mock import Mock, patch

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from vblora_triton import VeraConfig
from vblora_triton.vera.layer import Linear, VeraLayer
from vblora_triton.vera.projection import ProjectionDict, draw_projections

R, IN, OUT = 5, 12, 20


def projections(**adapters) -> tuple[ProjectionDict, ProjectionDict]:
    """adapter -> (key, r): A and B larger than the layer, as when a larger layer shares them."""
    A, B = ProjectionDict(), ProjectionDict()
    for name, (key, r) in adapters.items():
        A[name], B[name] = draw_projections(key, r, IN + 4, OUT + 3)
    return A, B


def make(kind=nn.Linear, bias=True, **fields) -> Linear:
    """A layer with an adapter "default" whose scales are large."""
    torch.manual_seed(0)
    base = Conv1D(OUT, IN) if kind is Conv1D else nn.Linear(IN, OUT, bias=bias)
    layer = Linear(base, *projections(default=(0, R)), "default", VeraConfig(r=R, **fields))
    draw(layer, "default")
    return layer.eval()


def draw(layer: VeraLayer, adapter: str) -> None:
    with torch.no_grad():
        layer.vera_lambda_b[adapter].normal_()
        layer.vera_lambda_d[adapter].normal_()


def update(layer: VeraLayer, adapter: str, x: torch.Tensor) -> torch.Tensor:
    """An adapter's update by its formula, in float64."""
    A, B = layer.vera_A[adapter].double()[:, :IN], layer.vera_B[adapter].double()[:OUT]
    lambda_b, lambda_d = layer.vera_lambda_b[adapter].double(), layer.vera_lambda_d[adapter].double()
    return (((x.double() @ A.T) * lambda_d) @ B.T) * lambda_b


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("shape", [(IN,), (3, IN), (2, 4, IN), (0, IN)], ids=str)
def test_forward_adds_the_formula_in_float64(kind, shape):
    layer, x = make(kind), torch.randn(shape)
    expected = layer.base_layer(x).double() + update(layer, "default", x)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_every_gradient_is_the_formulas_in_float64(bias):
    layer, x = make(bias=bias), torch.randn(3, 4, IN, requires_grad=True)
    wide = copy.deepcopy(layer).double()
    x64 = x.detach().double().requires_grad_()
    own = (x, layer.vera_lambda_b["default"], layer.vera_lambda_d["default"])
    other = (x64, wide.vera_lambda_b["default"], wide.vera_lambda_d["default"])
    grads = torch.autograd.grad(layer(x).square().sum(), own)
    truth = torch.autograd.grad((wide.base_layer(x64) + update(wide, "default", x64)).square().sum(), other)
    for actual, expected in zip(grads, truth, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_new_adapter_changes_nothing_until_it_is_trained():
    layer = Linear(nn.Linear(IN, OUT), *projections(default=(0, R)), "default", VeraConfig(r=R, d_initial=0.07))
    x = torch.randn(3, IN)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert torch.equal(layer.vera_lambda_d["default"], torch.full((R,), 0.07))
    assert not layer.vera_lambda_b["default"].any()
    draw(layer, "default")
    layer.reset_vera_parameters("default", d_initial=0.2)
    assert torch.equal(layer.vera_lambda_d["default"], torch.full((R,), 0.2))
    assert torch.equal(layer(x), layer.base_layer(x))


def test_the_call_forms_are_pefts():
    A, B = projections(one=(0, R), two=(1, 3))
    layer = Linear(nn.Linear(IN, OUT), vera_A=A, vera_B=B, adapter_name="one", config=VeraConfig(r=99), r=R)
    layer.update_layer("two", A, B, 3, config=VeraConfig(r=3, vera_dropout=0.5))
    assert layer.r == {"one": R, "two": 3}
    assert isinstance(layer.vera_dropout["one"], nn.Identity)
    assert layer.vera_dropout["two"].p == 0.5
    assert {name: p.shape for name, p in layer.vera_lambda_d.items()} == {"one": (R,), "two": (3,)}
    assert {name: p.requires_grad for name, p in layer.vera_lambda_b.items()} == {"one": True, "two": False}
    assert repr(layer).startswith("vera.Linear(")
    assert layer.adapter_layer_names == ("vera_lambda_b", "vera_lambda_d")


@pytest.mark.parametrize(
    ("make_arguments", "words"),
    [
        (lambda A, B: ("other", A, B, R), ["`vera_A`", "'other'", "['default']"]),
        (lambda A, B: ("default", A, B, R + 1), ["`vera_A`", f"({R}, {IN + 4})", f"({R + 1}, at least {IN})"]),
        (lambda A, B: ("default", {"default": A["default"][:, : IN - 1]}, B, R), ["`vera_A`", f"{IN - 1})"]),
        (lambda A, B: ("default", A, {"default": B["default"][: OUT - 1]}, R), ["`vera_B`", f"({OUT - 1}, {R})"]),
        (lambda A, B: ("default", A, B, 0), ["`r`", "0"]),
    ],
    ids=["no projection", "rank", "A", "B", "r"],
)
def test_what_does_not_fit_is_refused_before_anything_changes(make_arguments, words):
    layer = make()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(ValueError, match=words[0]) as caught:
        layer.update_layer(*make_arguments(layer.vera_A, layer.vera_B), config=VeraConfig())
    assert all(word in str(caught.value) for word in words), caught.value
    assert layer.r == {"default": R}
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def test_only_linear_layers_can_be_adapted():
    with pytest.raises(TypeError, match="Embedding"):
        Linear(nn.Embedding(4, 4), *projections(default=(0, R)), "default", VeraConfig(r=R))


def test_active_adapters_add_up_and_a_disabled_layer_is_its_base():
    layer, x = make(), torch.randn(3, IN)
    A, B = layer.vera_A, layer.vera_B
    A["other"], B["other"] = draw_projections(3, 2, IN, OUT)
    layer.update_layer("other", A, B, 2, config=VeraConfig(r=2))
    draw(layer, "other")
    base = layer.base_layer(x).double()
    layer.set_adapter(["default", "other"])
    expected = base + update(layer, "default", x) + update(layer, "other", x)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    layer.set_adapter("other")
    torch.testing.assert_close(layer(x).double(), base + update(layer, "other", x), rtol=1e-5, atol=1e-5)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    layer.delete_adapter("other")
    assert layer.available_adapters() == ["default"]
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_merging_sums_in_float32_and_rounds_once(kind, dtype):
    layer, x = make(kind), torch.randn(3, IN)
    layer.base_layer.to(dtype)
    before = layer.weight.detach().clone()
    # By the formula on the identity: its rows are the columns of the update's matrix.
    delta = update(layer, "default", torch.eye(IN)).T
    delta = delta.T if kind is Conv1D else delta
    torch.testing.assert_close(layer.get_delta_weight("default").double(), delta, rtol=1e-5, atol=1e-5)
    assert layer.get_delta_weight("default").dtype == torch.float32
    unmerged = layer(x.to(dtype))
    layer.merge(safe_merge=True)
    expected = before.float() + layer.get_delta_weight("default")
    assert torch.equal(layer.weight, expected.to(dtype))
    scale = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    torch.testing.assert_close(layer(x.to(dtype)), unmerged, rtol=scale, atol=scale)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("base", ["plain", "hook"])
def test_the_base_layer_is_called_only_where_somebody_watches_it_and_its_result_is_left_alone(base):
    layer, x, kept = make(bias=False), torch.randn(3, IN), []
    layer.base_layer.requires_grad_(False)
    expected = layer.base_layer(x).double() + update(layer, "default", x)
    if base == "hook":
        layer.base_layer.register_forward_hook(lambda module, args, out: kept.append((out, out.clone())) or None)
    called = Mock(side_effect=type(layer.base_layer).forward, autospec=True)
    with patch.object(type(layer.base_layer), "forward", lambda *args: called(*args)):
        y = layer(x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert called.call_count == len(kept) == (base == "hook")
    assert all(torch.equal(out, before) for out, before in kept)


def test_dropout_acts_in_training_alone_and_follows_the_seed():
    layer, x = make(vera_dropout=0.5), torch.randn(64, IN)
    still = layer(x)
    assert torch.equal(still, layer(x))
    layer.train()
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.allclose(first, still)
    layer.vera_dropout["default"].p = 1.0
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("training", [True, False])
def test_dropout_of_a_new_adapter_is_in_the_mode_of_its_layer(training):
    layer, x = make().train(training), torch.randn(64, IN)
    layer.vera_A["other"], layer.vera_B["other"] = draw_projections(1, R, IN, OUT)
    layer.update_layer("other", layer.vera_A, layer.vera_B, R, VeraConfig(r=R, vera_dropout=0.5))
    draw(layer, "other")
    layer.set_adapter("other")
    assert layer.vera_dropout["other"].training == training
    assert torch.equal(layer(x), layer(x)) == (not training)


def test_projections_elsewhere_are_brought_to_the_device_of_the_input():
    layer = make()
    held = layer.vera_A["default"], layer.vera_B["default"]
    layer.to("meta")
    layer.vera_A["default"], layer.vera_B["default"] = held
    y = layer(torch.randn(3, IN, device="meta"))
    assert (y.device.type, y.shape) == ("meta", (3, OUT))
    assert layer._delta("default").is_meta


def test_the_result_has_the_dtype_of_the_base_layers_also_under_autocast():
    layer = make()
    assert layer.to(torch.bfloat16)(torch.randn(3, IN, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make()(torch.randn(3, IN)).dtype == torch.bfloat16


def test_backend_is_the_one_asked_for():
    layer = make()
    layer.backend = "nonsense"
    with pytest.raises(ValueError, match="nonsense"):
        layer(torch.randn(3, IN))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_computes_the_same_and_is_its_own(copied):
    layer, x = make(), torch.randn(3, IN)
    other = copied(layer)
    assert torch.equal(other(x), layer(x))
    draw(other, "default")
    assert not torch.equal(other(x), layer(x))
