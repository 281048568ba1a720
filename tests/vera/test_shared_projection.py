"""Layers that read one input share its projection: fewer products, the same results, nothing left behind."""

import copy
import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.models import DEVICE, VOCABULARY, tiny_llama
from tests.tolerance import relative_error
from vblora_triton import VeraConfig, get_peft_model
from vblora_triton.kernels.launch import counted
from vblora_triton.ops import shared_input

# More than the rows up to which projections are not packed: the launch that packs one counts it.
TOKENS = (2, 40)


def adapted(dtype=torch.bfloat16, checkpointing=None, layers=2, **options):
    torch.manual_seed(0)
    base = tiny_llama(num_hidden_layers=layers).to(DEVICE, dtype)
    model = get_peft_model(base, VeraConfig(r=20, target_modules="all-linear", **options))
    for name, parameter in model.named_parameters():
        if "lambda_b" in name:
            torch.nn.init.normal_(parameter)
    for _, layer in model.base_model.adapted_layers():
        layer.backend = "triton"
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    return model.train()


def tokens(seed=0):
    return torch.randint(0, VOCABULARY, TOKENS, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def attention(model):
    layer = model.base_model.model.model.layers[0].self_attn
    return layer.q_proj, layer.k_proj


def step(function, model, ids):
    """Projections made in forward, the logits, and the gradients by name."""
    model.zero_grad()
    with counted() as names:
        logits = function(ids).logits
    projections = names.count("_pack_rows_kernel")
    logits.float().square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return projections, logits.detach(), grads


def assert_alike(a, b):
    """Of float32: the same results to the bit, and gradients but for the order in which those of an input add up."""
    assert torch.equal(a[1], b[1])
    assert a[2].keys() == b[2].keys()
    for name in a[2]:
        assert relative_error(a[2][name], b[2][name]) < 1e-4, name


def exact_gradients(model, ids):
    """In float64 by the definition."""
    exact = copy.deepcopy(model).double()
    for _, layer in exact.base_model.adapted_layers():
        layer.backend = "reference"
    return step(exact, exact, ids)[2]


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_q_k_v_and_gate_up_project_once_with_the_same_results(checkpointing):
    model, ids = adapted(checkpointing=checkpointing), tokens()
    shared = step(model, model, ids)
    # Outside of the VeraModel's forward nothing is shared.
    alone = step(model.base_model.model, model, ids)
    layers = model.config.num_hidden_layers
    assert (shared[0], alone[0]) == (4 * layers, 7 * layers)
    assert len(shared[2]) == 14 * layers
    assert torch.equal(shared[1], alone[1])
    exact = exact_gradients(model, ids)
    errors = [[relative_error(found[2][name], truth) for name, truth in exact.items()] for found in (shared, alone)]
    assert sum(errors[0]) < 1.1 * sum(errors[1])


def test_nothing_is_shared_between_steps():
    model = adapted(dtype=torch.float32)
    for seed in range(3):
        assert_alike(step(model, model, tokens(seed)), step(model.base_model.model, model, tokens(seed)))
        assert shared_input._shared.get() is None


def test_layers_that_are_checkpointed_one_by_one_each_repeat_their_own_projection():
    model, x = adapted(), torch.randn(80, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    q, k = attention(model)

    def run(call):
        with shared_input.shared_inputs():
            y = call(q, x)[:, :32] + call(k, x)[:, :32]
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, q.vera_lambda_d["default"]])]

    plain = run(lambda layer, x: layer(x))
    for a, b in zip(plain, run(lambda layer, x: checkpoint(layer, x, use_reentrant=False)), strict=True):
        assert torch.equal(a, b)


def test_an_input_that_changes_is_projected_again_and_none_is_kept_alive():
    q, k = attention(adapted())
    x = torch.randn(80, 64, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad(), shared_input.shared_inputs(), counted() as names:
        q(x)
        second = k(x)
        assert names.count("_pack_rows_kernel") == 1
        x.mul_(2)
        changed = k(x)
        assert names.count("_pack_rows_kernel") == 2
        assert not torch.equal(changed, second)
        x.data = torch.ones_like(x)
        assert torch.equal(k(x), k(torch.ones_like(x)))
        alive = weakref.ref(x)
        del x
        gc.collect()
        assert alive() is None


def test_dropout_is_not_shared():
    model, ids = adapted(vera_dropout=0.3, layers=1), tokens()
    torch.manual_seed(1)
    with_dropout = step(model, model, ids)
    assert with_dropout[0] == 7
    torch.manual_seed(1)
    assert torch.equal(with_dropout[1], step(model.base_model.model, model, ids)[1])
    exact, found = adapted(dtype=torch.float32, vera_dropout=0.3, layers=1), []
    for function in (exact, exact.base_model.model):
        torch.manual_seed(1)
        found.append(step(function, exact, ids))
    assert_alike(*found)
    assert step(model.eval(), model, ids)[0] == 4


def test_adapters_with_other_projections_do_not_meet():
    model, ids = adapted(), tokens()
    model.add_adapter("other", VeraConfig(r=20, target_modules="all-linear", projection_prng_key=7))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lambda_b.other" in name:
                parameter.normal_()
        model.base_model.set_adapter(["default", "other"])
        assert torch.equal(model(ids).logits, model.base_model.model(ids).logits)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_model_compiles_as_one_graph(backend):
    torch._dynamo.reset()
    model, ids = adapted(dtype=torch.float32).eval(), tokens()
    for _, layer in model.base_model.adapted_layers():
        layer.backend = backend
    compiled = torch.compile(model.base_model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_layer_whose_hook_may_change_its_input_projects_for_itself():
    q, k = attention(adapted())
    x = torch.randn(80, 64, device=DEVICE, dtype=torch.bfloat16)
    expected = k(x * 2)

    def double(x):
        # Without a trace in its version.
        x.data.mul_(2)

    k.register_forward_pre_hook(lambda module, args: double(args[0]))
    with torch.no_grad(), shared_input.shared_inputs():
        q(x)
        assert torch.equal(k(x), expected)
