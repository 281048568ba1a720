"""Whole models of transformers with adapters, compiled and exported."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.models import VOCABULARY, enlarge, tiny_llama
from vblora_triton import VBLoRAConfig, VeraConfig, get_peft_model, use_backend

TARGETS = {"target_modules": ["q_proj", "k_proj", "v_proj"]}
METHODS = {
    "vblora": (VBLoRAConfig, {"r": 2, "num_vectors": 8, "vector_length": 16}, "vblora_dropout"),
    "vera": (VeraConfig, {"r": 3}, "vera_dropout"),
}

both_methods = pytest.mark.parametrize("method", METHODS)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def config(method: str, dropout: float = 0.0):
    """The configuration of an adapter."""
    config_class, fields, name = METHODS[method]
    return config_class(**fields, **TARGETS, **{name: dropout})


def adapted(method: str, dropout: float = 0.0, **changes) -> nn.Module:
    """A Llama in training that was adapted twice."""
    model = get_peft_model(tiny_llama(**changes), config(method, dropout))
    model.add_adapter("other", config(method, dropout))
    return enlarge(model).train()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def graphs() -> int:
    """How many graphs there are; that none is broken is seen to by fullgraph=True."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def step(function, model: nn.Module, ids: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    """The loss of a training step, and its gradients."""
    torch.manual_seed(seed)
    loss = function(input_ids=ids, labels=ids).loss
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted) > 1
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@both_methods
def test_a_training_step_is_one_graph_whatever_the_step_and_the_batch(method):
    model = adapted(method)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for shape in ((2, 9), (3, 9), (4, 14)):
        found = step(compiled, model, tokens(*shape))
        with use_backend("reference"):
            assert_same(found, step(model, model, tokens(*shape)))
        for parameter, gradient in zip(trained, found[1:], strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        assert graphs() == 1


def test_a_new_batch_size_costs_one_graph_without_being_told():
    model = adapted("vera", num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    counted = []
    for rows in (2, 2, 3, 5, 4, 2):
        compiled(input_ids=tokens(rows, 9))
        counted.append(graphs())
    assert counted == [1, 1, 2, 2, 2, 2]


@both_methods
def test_each_adapter_costs_one_graph_and_coming_back_none(method):
    model = adapted(method, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    ids, counted = tokens(2, 9), []
    for name in ("default", "other", "default", "other"):
        model.set_adapter(name)
        assert_same(step(compiled, model, ids), step(model, model, ids))
        counted.append(graphs())
    assert counted == [1, 2, 2, 2]
    for _ in range(2):
        with model.disable_adapter(), torch.no_grad():
            torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
        assert_same(step(compiled, model.train(), ids), step(model, model, ids))
        counted.append(graphs())
    # Without adapters, and in evaluation.
    assert counted[-2:] == [4, 4]


def test_two_graphs_do_for_all_blocks_that_are_compiled_each_on_its_own():
    model = adapted("vblora", num_hidden_layers=3, use_cache=False)
    expected = step(model, model, tokens(2, 9))
    for layer in model.get_base_model().model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_same(step(model, model, tokens(2, 9)), expected)
        # The first block's input has no gradient.
        assert graphs() == 2


def test_layers_that_are_computed_together_are_compiled_one_by_one_with_the_same_results():
    model, ids = adapted("vblora"), tokens(2, 9)
    with use_backend("reference"):
        expected = step(model, model, ids)
    with use_backend("triton"):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        # Eager twice, so that the model knows which layers read one input; then in turns.
        for function in (model, model, compiled, model, compiled):
            assert_same(step(function, model, ids), expected)
        assert model.base_model._readers.following
        assert graphs() == 1


@both_methods
def test_an_evaluated_model_is_exported_for_any_number_of_rows_and_any_length(method):
    model = adapted(method, num_hidden_layers=1).eval()
    dynamic = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with torch.no_grad():
        program = torch.export.export(
            # torch refuses dynamic shapes of a model whose forward takes **kwargs, as ours does.
            model.get_base_model(),
            (),
            {"input_ids": tokens(2, 9), "use_cache": False},
            dynamic_shapes={"input_ids": dynamic, "use_cache": None},
        ).module()
        for shape in ((2, 9), (3, 14), (5, 4)):
            found = program(input_ids=tokens(*shape), use_cache=False).logits
            torch.testing.assert_close(found, model(input_ids=tokens(*shape)).logits)


@both_methods
def test_gradients_with_dropout_and_checkpointing_are_those_of_the_loss_as_it_was_drawn(method):
    model = adapted(method, dropout=0.05, num_hidden_layers=1, use_cache=False).double()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.get_base_model().disable_input_require_grads()
    # With a partitioner that computes again in backward what checkpointing does not keep.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
    ids, trained = tokens(2, 9), [p for p in model.parameters() if p.requires_grad]

    def loss(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return compiled(input_ids=ids).logits.square().mean()

    gradients = torch.autograd.grad(loss(0), trained)
    directions = [torch.randn_like(p) for p in trained]
    ends = []
    for move in (1e-3, -2e-3):
        with torch.no_grad():
            torch._foreach_add_(trained, directions, alpha=move)
        # The same seed draws the same mask.
        ends.append(loss(0).detach())
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-3, rtol=1e-2, atol=0)
    assert ends[1] != loss(1)
    assert graphs() == 1
