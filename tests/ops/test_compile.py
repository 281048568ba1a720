"""The ops inside what PyTorch builds around functions: compilers, export, autocast, deterministic mode."""

import pytest
import torch

from tests.models import DEVICE
from tests.ops.linear_case import LinearCase
from tests.ops.vera_case import VeraCase
from tests.tolerance import relative_error
from vblora_triton import VeraConfig, ops
from vblora_triton.vblora.layer import Linear
from vblora_triton.vera.layer import Linear as VeraLinear
from vblora_triton.vera.projection import ProjectionDict, draw_projections

BACKENDS = ["triton", "reference"]


class Block(torch.nn.Module):
    """Two adapted linears that share a bank, with an activation between them."""

    def __init__(self, bank, first, second):
        super().__init__()
        self.bank, self.first, self.second = bank, first, second

    def forward(self, x):
        return self.second(torch.nn.functional.silu(self.first(x)))


def block(backend: str) -> Block:
    torch.manual_seed(0)
    bank = torch.nn.ParameterDict({"default": torch.nn.Parameter(torch.randn(6, 16) * 0.02)})
    layers = []
    for in_features, out_features in ((32, 48), (48, 32)):
        base = torch.nn.Linear(in_features, out_features, bias=False).requires_grad_(False)
        layers.append(Linear(base, bank, "default", 2, 6, 16, init_logits_std=1.0))
        layers[-1].backend = backend
    return Block(bank, *layers).to(DEVICE)


def results(model, function, x):
    x = x.detach().requires_grad_()
    y = function(x)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y.square().sum(), [x, *parameters.values()])
    return [y.detach(), *grads]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_compiles_as_one_graph(backend, training, grad):
    torch._dynamo.reset()
    model = block(backend).train(training)
    compiled = torch.compile(model, fullgraph=True)
    for rows in (20, 3):
        x = torch.randn(2, rows, 32, device=DEVICE)
        if grad:
            for a, b in zip(results(model, model, x), results(model, compiled, x), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        else:
            with torch.no_grad():
                torch.testing.assert_close(model(x), compiled(x), rtol=1e-4, atol=1e-5)


def vera_block(backend: str) -> Block:
    """The same with VeRA."""
    torch.manual_seed(0)
    A, B = ProjectionDict(), ProjectionDict()
    A["default"], B["default"] = draw_projections(0, 5, 48, 48)
    layers = []
    for in_features, out_features in ((32, 48), (48, 32)):
        base = torch.nn.Linear(in_features, out_features, bias=False).requires_grad_(False)
        layers.append(VeraLinear(base, A, B, "default", VeraConfig(r=5)))
        layers[-1].vera_lambda_b["default"].data.normal_()
        layers[-1].backend = backend
    return Block(A, *layers).to(DEVICE)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("make", [block, vera_block], ids=["vblora", "vera"])
def test_a_new_number_of_tokens_compiles_nothing_again_in_training(make, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make(backend).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (40, 41, 130, 64, 97):
        x = torch.randn(rows, 32, device=DEVICE)
        for a, b in zip(results(model, model, x), results(model, compiled, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, rows


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("grad", [True, False])
def test_is_traced_for_torchscript_and_saved(backend, grad, tmp_path):
    model = block(backend).cpu().eval()
    with torch.set_grad_enabled(grad):
        torch.jit.trace(model, (torch.randn(20, 32),), check_trace=False).save(str(tmp_path / "model.pt"))
        x = torch.randn(7, 32)
        torch.testing.assert_close(torch.jit.load(str(tmp_path / "model.pt"))(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_compiles_as_one_graph_with_its_rate(backend):
    torch._dynamo.reset()
    ones = (torch.zeros(1, 8, 1), torch.zeros(1, 1, 1), torch.ones(1, 16))
    parameters = [t.to(DEVICE) for t in ones]

    def dropped(x):
        return ops.vblora_linear(x, None, *parameters, 1, dropout_p=0.25, training=True, backend=backend)

    compiled = torch.compile(dropped, fullgraph=True)
    x = torch.ones(200, 128, device=DEVICE, requires_grad=True)
    y = compiled(x)
    (scale,) = torch.autograd.grad(y[:, 0].sum(), x)
    # Forward and backward saw one mask.
    torch.testing.assert_close(y[:, 0], scale.sum(-1), rtol=1e-5, atol=0)
    assert abs((scale == 0).float().mean().item() - 0.25) < 0.02
    assert not torch.equal(y, compiled(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_exports_in_evaluation(backend):
    model = block(backend).eval()
    x = torch.randn(4, 32, device=DEVICE)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_dtype_of_the_base_layer_and_the_precision_of_the_parameters(backend, dtype):
    model = block(backend).first
    x = torch.randn(20, 32, device=DEVICE)
    with torch.autocast(DEVICE, dtype):
        base = model.base_layer(x)
        y = model(x)
    assert y.dtype == base.dtype == dtype
    (y.float() ** 2).sum().backward()
    grad = model.vblora_logits_A["default"].grad
    assert grad.dtype == torch.float32
    # The update alone, in float64 from the same input: autocast must not have rounded A, B or s to 16 bits.
    logits = [model.vblora_logits_A["default"], model.vblora_logits_B["default"], model.vblora_vector_bank["default"]]
    truth = ops.vblora_linear(x.double(), None, *(t.double() for t in logits), 2, backend="reference")
    with torch.autocast(DEVICE, dtype):
        update = ops.vblora_linear(x, None, *logits, 2, backend=backend)
    assert relative_error(update, truth) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_selective_checkpointing_that_saves_the_base_layers_result_is_satisfied(backend):
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    def policy(context, op, *args, **kwargs):
        matmuls = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if op in matmuls else CheckpointPolicy.PREFER_RECOMPUTE

    model, x = block(backend), torch.randn(20, 32, device=DEVICE)

    def checkpointed(x):
        return checkpoint(
            model, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
        )

    for a, b in zip(results(model, model, x), results(model, checkpointed, x), strict=True):
        torch.testing.assert_close(a, b)


def test_deterministic_mode_is_satisfied():
    case = LinearCase(M=40)
    torch.use_deterministic_algorithms(True)
    try:
        results = [case.run(ops.vblora_linear, case.tensors(), backend="triton") for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def programs_in_another_order(monkeypatch, turn: int) -> None:
    """Let the interpreter, which runs the programs of a launch one after another, start with others."""
    from triton.runtime.interpreter import InterpreterBuilder

    own = InterpreterBuilder.set_grid_idx

    def set_grid_idx(self, *place):
        sizes = zip(place, self.grid_dim, strict=True)
        own(self, *(size - 1 - at if turn == 1 else (at + turn) % size for at, size in sizes))

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", set_grid_idx)


def test_200_repeats_are_bitwise_equal(monkeypatch):
    # Two blocks of rows and two of columns, so that there are sums to be reordered.
    case = LinearCase(M=70, K=48, N=144, r=2, h=5, b=48, dtype=torch.bfloat16)
    tensors = case.tensors()
    first = case.run(ops.vblora_linear, tensors, backend="triton")
    # A GPU runs programs as they come; the interpreter in one order, again and again, unless it is told another.
    for repeat in range(199 if DEVICE == "cuda" else 3):
        with monkeypatch.context() as patched:
            if DEVICE == "cpu" and repeat:
                programs_in_another_order(patched, repeat)
            again = case.run(ops.vblora_linear, tensors, backend="triton")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: CUDA graphs")
@pytest.mark.parametrize("method", ["vblora", "vera"])
def test_graph_capture_replays_with_new_dropout_each_time(method):
    case = LinearCase(M=130, K=256, N=256, b=64) if method == "vblora" else VeraCase(M=130, K=256, N=256)
    function = ops.vblora_linear if method == "vblora" else ops.vera_linear
    tensors = case.tensors()

    def step():
        return list(case.run(function, tensors, dropout_p=0.5, training=True, backend="triton").values())

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append([t.clone() for t in captured])
    assert not torch.equal(replays[0][0], replays[1][0])
    assert all(t.isfinite().all() for t in replays[-1])
