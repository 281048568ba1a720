"""The weight of a quantised base layer, read and written, and layers that are adapted and merged around it."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.quantised import FORMATS, FOUR_BITS, quantised_linear, rounding
from vblora_triton import VBLoRAConfig, VeraConfig, cast_mixed_precision_params, get_peft_model
from vblora_triton.integrations import quantization
from vblora_triton.tuner.linear import frozen_linear

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

EVERY = pytest.mark.parametrize("name", FORMATS)
METHODS = {
    "vblora": lambda **fields: VBLoRAConfig(r=2, num_vectors=6, vector_length=32, **fields),
    "vera": lambda **fields: VeraConfig(r=4, **fields),
}
BOTH = pytest.mark.parametrize("method", METHODS)
pytestmark = pytest.mark.filterwarnings("ignore:The base weights are quantised")


def layer_of(name: str, bias: bool = True, **options):
    torch.manual_seed(0)
    return quantised_linear(name, nn.Linear(64, 96, bias=bias), **options).requires_grad_(False)


def adapted(name: str, method: str, base: nn.Module | None = None):
    """Two layers, of which the first is adapted so that it changes by far more than rounding does."""
    base = layer_of(name) if base is None else base
    torch.manual_seed(1)
    model = get_peft_model(nn.Sequential(base, nn.Linear(96, 8)), METHODS[method](target_modules=["0"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "vblora_" in key or "vera_lambda" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def plain_copy(layer: nn.Module) -> nn.Linear:
    """A plain layer with the weight of a quantised one."""
    plain = nn.Linear(64, 96)
    plain.weight, plain.bias = nn.Parameter(quantization.weight(layer)), nn.Parameter(layer.bias.detach().clone())
    return plain.requires_grad_(False)


@EVERY
def test_weight_is_what_the_layer_multiplies_by(name):
    layer = layer_of(name, bias=False).train()
    torch.testing.assert_close(layer(torch.eye(64)).T, quantization.weight(layer), rtol=1e-6, atol=1e-7)


@EVERY
def test_a_weight_that_is_set_is_rounded_by_no_more_than_the_format_does(name):
    layer = layer_of(name)
    new = torch.randn(96, 64, generator=torch.Generator().manual_seed(2))
    quantization.set_weight(layer, new)
    error, bound = (quantization.weight(layer).double() - new.double()).abs(), rounding(name, new)
    assert (error <= bound).all()
    assert (error / bound).max() > 0.5


@EVERY
def test_a_layer_called_with_a_new_weight_computes_with_it(name):
    layer = layer_of(name, bias=False).train()
    layer(torch.randn(3, 64))
    quantization.set_weight(layer, torch.randn(96, 64))
    torch.testing.assert_close(layer(torch.eye(64)).T, quantization.weight(layer), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FOUR_BITS)
def test_a_layer_that_a_cpu_repacked_reads_as_before_but_for_scales_in_bfloat16(name):
    from bitsandbytes import functional as bnb

    layer = layer_of(name)
    before = quantization.weight(layer)
    # What such a CPU does in evaluation, on any.
    layer.weight.data, _ = bnb._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(quantization.weight(layer), before, rtol=2.0**-8, atol=0)
    quantization.set_weight(layer, before)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    torch.testing.assert_close(quantization.weight(layer), before, rtol=2.0**-8, atol=1e-2 * before.abs().max())


# Under the interpreter kernels are slow, and know nothing of formats.
BACKENDS = pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "auto") for name in FORMATS), *(("nf4", backend) for backend in ("triton", "reference"))],
)


@BACKENDS
@BOTH
def test_many_tokens_give_results_and_gradients_of_the_dequantised_weight(name, method, backend):
    model = adapted(name, method)
    plain = adapted(name, method, plain_copy(layer_of(name)))
    results = []
    for adapter in (model, plain):
        adapter.base_model.model[0].backend = backend
        x = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        y = adapter(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in adapter.parameters() if p.requires_grad)])
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@BACKENDS
@BOTH
def test_nothing_of_the_size_of_the_weight_is_kept_between_forward_and_backward(name, method, backend, monkeypatch):
    model, made, saved = adapted(name, method), [], []
    model.base_model.model[0].backend = backend
    original = quantization.product_weight

    def watched(base_layer, x):
        make = original(base_layer, x)

        def noted():
            made.append(weakref.ref(result := make()))
            return result

        return noted

    monkeypatch.setattr(quantization, "product_weight", watched)
    x = torch.randn(32, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = model.base_model.model[0](x)
    gc.collect()
    assert len(made) == 1
    assert made[0]() is None
    # x, y's size and less.
    assert max(saved) <= 32 * 96
    y.sum().backward()
    assert len(made) == 2


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao int8"])
def test_few_tokens_call_the_base_as_a_module_and_so_do_hooks_and_other_dtypes(name):
    layer = layer_of(name, compute_dtype=torch.float32) if name == "nf4" else layer_of(name)
    layer.support_avx512bf16_for_cpu = False
    assert frozen_linear(layer, torch.randn(17, 64)) is not None
    assert frozen_linear(layer, torch.randn(16, 64)) is None
    if name != "int8":
        assert frozen_linear(layer, torch.randn(17, 64).bfloat16()) is None
    with torch.autocast("cpu"):
        assert frozen_linear(layer, torch.randn(17, 64)) is None
    layer.register_forward_hook(lambda *_: None)
    assert frozen_linear(layer, torch.randn(17, 64)) is None


@EVERY
@BOTH
def test_merged_is_dequantised_and_added_up_to_the_formats_rounding(name, method):
    model = adapted(name, method)
    layer = model.base_model.model[0]
    exact = quantization.weight(layer.base_layer).double() + layer.get_delta_weight("default").double()
    base = layer.base_layer
    with pytest.warns(UserWarning, match="merging rounds them"):
        merged = model.merge_and_unload(safe_merge=True)
    assert merged[0] is base
    assert ((quantization.weight(base).double() - exact).abs() <= rounding(name, exact)).all()


@EVERY
def test_unmerging_puts_the_very_bits_back_whatever_was_called_between(name):
    model = adapted(name, "vblora").eval()
    base = model.base_model.model[0].base_layer
    before = quantization.weight(base)
    model.merge_adapter()
    assert not torch.equal(quantization.weight(base), before)
    merged = copy.deepcopy(model)
    for rows in (1, 32):
        with torch.no_grad():
            # Another merged adapter repacks nothing that is kept.
            model(torch.randn(rows, 64))
    for one in (model, merged):
        one.unmerge_adapter()
        assert torch.equal(quantization.weight(one.base_model.model[0].base_layer), before)


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao fp8"])
def test_unmerging_is_refused_where_the_original_was_not_kept(name):
    model = adapted(name, "vera")
    layer = model.base_model.model[0]
    layer.keep_base_weight = False
    model.merge_adapter()
    before = quantization.weight(layer.base_layer)
    with pytest.raises(ValueError, match=f"{type(layer.base_layer).__name__}.*keep_base_weight.*Load the base again"):
        model.unmerge_adapter()
    assert torch.equal(quantization.weight(layer.base_layer), before)
    assert layer.merged_adapters == ["default"]


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao int8"])
def test_parameters_of_adapters_never_take_the_dtype_of_packed_weights(name):
    base = nn.Sequential(layer_of(name))
    model = get_peft_model(base, METHODS["vblora"](target_modules=["0"]), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_blocks_that_a_cpu_reads_with_wrong_scales_are_not_written():
    layer = quantised_linear("nf4", nn.Linear(96, 64))
    with pytest.raises(ValueError, match="wrong scales on a CPU where in_features, here 96"):
        quantization.set_weight(layer, torch.randn(64, 96))


def test_a_value_that_int8_of_bitsandbytes_cannot_take_changes_nothing():
    model = adapted("int8", "vblora")
    layer = model.base_model.model[0]
    before = quantization.weight(layer.base_layer)
    with torch.no_grad():
        layer.vblora_vector_bank["default"].mul_(1e9)
    with pytest.raises(ValueError, match="beyond those of float16"):
        model.merge_adapter()
    assert torch.equal(quantization.weight(layer.base_layer), before)
    assert not layer.merged


def stored(name: str) -> nn.Module:
    return layer_of("nf4", storage=torch.bfloat16) if name == "nf4 in bfloat16" else layer_of(name)


STORED = ("nf4 in bfloat16", *FORMATS)
CASTS = [nn.Module.half, nn.Module.double, lambda m: m.to("cpu", torch.float16), lambda m: m.type(torch.float16)]


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("adapted_one", [True, False], ids=["adapted", "beside"])
def test_a_cast_leaves_the_values_of_quantised_weights_or_is_refused_before_anything_is_cast(name, adapted_one):
    layer = stored(name)
    before, kept = quantization.weight(layer), layer.weight.dtype
    base = nn.Sequential(nn.Linear(64, 64), layer)
    model = get_peft_model(base, METHODS["vera"](target_modules=["1" if adapted_one else "0"]))
    for cast in CASTS:
        state = {key: value.dtype for key, value in model.state_dict().items()}
        refused = kept.is_floating_point or cast is CASTS[-1]
        if refused:
            with pytest.raises(ValueError, match=rf"model\.1.* a {type(layer).__name__}, is kept in {kept} and cannot"):
                cast(model)
            assert {key: value.dtype for key, value in model.state_dict().items()} == state
            if adapted_one:
                with pytest.raises(ValueError, match="cannot be cast"):
                    cast(model.base_model.model[1])
        else:
            cast(model)
            assert model.base_model.model[0].bias.dtype in (torch.float16, torch.float64)
        assert torch.equal(quantization.weight(layer), before)
    # What casts nothing, and what is of that dtype already.
    model.float() if name != "nf4 in bfloat16" else model.bfloat16()
    model.cpu()
    assert torch.equal(quantization.weight(layer), before)


@pytest.mark.parametrize("name", STORED)
def test_mixed_precision_casts_what_is_beside_quantised_weights(name):
    layer = stored(name)
    before = quantization.weight(layer)
    model = get_peft_model(nn.Sequential(layer, nn.Linear(96, 8)), METHODS["vblora"](target_modules=["0"]))
    cast_mixed_precision_params(model, torch.bfloat16)
    assert torch.equal(quantization.weight(layer), before)
    assert model.base_model.model[1].weight.dtype == layer.bias.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("name", FORMATS)
def test_copies_of_quantised_models_compute_the_same(name):
    model = adapted(name, "vblora").eval()
    x = torch.randn(32, 64)
    for copied in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        if copied is not copy.deepcopy and name.startswith("torchao"):
            # As docs/quantised.md says; when torchao can, that page is to say so.
            with pytest.raises(AttributeError, match=r"functools\.partial"):
                copied(model)
        else:
            assert torch.equal(copied(model)(x), model(x))


def test_the_int8_product_of_bitsandbytes_rounds_x_in_evaluation_and_ours_does_not():
    model, x = adapted("int8", "vera"), torch.randn(32, 64)
    layer = model.base_model.model[0]
    exact = nn.functional.linear(x, quantization.weight(layer.base_layer), layer.bias)
    with torch.no_grad():
        layer.vera_lambda_b["default"].zero_()
        own = layer.base_layer.eval()(x)
        torch.testing.assert_close(layer.eval()(x), exact, rtol=1e-5, atol=1e-6)
    assert 1e-3 < (own - exact).abs().max() < 0.1


@pytest.mark.parametrize(("name", "method"), [("nf4", "vblora"), ("int8", "vera"), ("torchao fp8", "vblora")])
def test_a_step_on_a_quantised_base_compiles_as_one_graph(name, method):
    torch._dynamo.reset()
    counters.clear()
    model = adapted(name, method).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    graphs = []
    for rows in (32, 48, 20, 32):
        x = torch.randn(rows, 64)
        wanted = torch.autograd.grad(model(x).square().sum(), trained)
        for found, gradient in zip(torch.autograd.grad(compiled(x).square().sum(), trained), wanted, strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
        graphs.append(counters["stats"]["unique_graphs"])
    # bitsandbytes' layers note on their first call what they will compute in.
    assert graphs[1:] == [1 if name.startswith("torchao") else 2] * 3


@pytest.mark.parametrize("name", ["torchao int8", "torchao fp8"])
def test_an_evaluated_model_on_weights_of_torchao_is_exported(name):
    model, x = adapted(name, "vera").eval(), torch.randn(32, 64)
    with torch.no_grad():
        exported = torch.export.export(model.get_base_model(), (x,)).module()
        torch.testing.assert_close(exported(x), model(x), rtol=1e-5, atol=1e-5)
