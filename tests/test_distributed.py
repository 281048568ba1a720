"""Two processes on gloo: they learn what one does of both batches, and DDP sends what is not zero."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import VOCABULARY, adapted_by, enlarge
from vblora_triton import VBLoRAConfig, VeraConfig, get_peft_model
from vblora_triton.distributed import average_selected_logits, check_selections

H = 2048
METHODS = {
    "vblora": (VBLoRAConfig, {"r": 2, "num_vectors": 12, "vector_length": 16, "target_modules": "all-linear"}),
    "vera": (VeraConfig, {"r": 8, "target_modules": "all-linear"}),
}


def made(method, **changes):
    """A small Llama with an adapter, in float64 where it can be, ready to be trained."""
    return adapted_by(*METHODS[method], **changes).double().train()


def rows():
    return torch.randint(0, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(3))


def own_rows():
    """Every second row, as a sampler deals them out."""
    return rows()[dist.get_rank() :: dist.get_world_size()]


def backward(model, ids):
    model(input_ids=ids, labels=ids).loss.backward()


def gradients(model):
    return {
        name.removeprefix("module."): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def ddp_gradients(method, checkpointing):
    model = made(method)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    return two_steps(DistributedDataParallel(model))


def two_steps(model):
    """The gradients of a second step, by which time much has been noted of the first."""
    for _ in range(2):
        model.zero_grad()
        backward(model, own_rows())
    return gradients(model)


def assert_equal_to_one_process(method, found):
    model = made(method)
    backward(model, rows())
    wanted = gradients(model)
    for own in found:
        assert own.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert gradient.abs().max() > 0
            assert (own[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("method", METHODS)
def test_ddp_gives_the_gradients_of_one_process(method, checkpointing, pair):
    assert_equal_to_one_process(method, pair(ddp_gradients, method, checkpointing))


class Sent(TorchDispatchMode):
    """Counts the bytes that are handed to all-reduce; DDP broadcasts buffers besides."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "c10d::allreduce_":
            self.bytes += sum(t.numel() * t.element_size() for t in args[0])
        return func(*args, **kwargs or {})


def sparse_and_dense(steps):
    """Bytes sent and gradients of DDP with and without the hook, over all steps of an accumulation."""
    found = []
    for sparse in (False, True):
        model = adapted_by(*METHODS["vblora"], num_vectors=H).train()
        model = DistributedDataParallel(model, bucket_cap_mb=1)
        if sparse:
            average_selected_logits(model)
        with Sent() as sent:
            # DDP sorts its buckets anew after the first step.
            for _ in range(2):
                model.zero_grad()
                with model.no_sync():
                    for _ in range(steps - 1):
                        backward(model, own_rows().flip(0))
                sent.bytes = 0
                backward(model, own_rows())
        found.append((sent.bytes, gradients(model)))
    return found


@pytest.mark.parametrize("steps", [1, 3])
def test_of_the_logits_ddp_sends_a_hundredth_and_gives_the_same_bits(steps, pair):
    for (dense_bytes, dense), (sparse_bytes, sparse) in pair(sparse_and_dense, steps):
        logits = sum(4 * gradient.numel() for name, gradient in dense.items() if "logits" in name)
        others = sum(4 * gradient.numel() for name, gradient in dense.items() if "logits" not in name)
        assert dense_bytes == logits + others
        assert others < sparse_bytes <= others + logits / 100
        for name, gradient in dense.items():
            assert torch.equal(sparse[name], gradient), name
            assert gradient.any()


class Either(nn.Module):
    """The first process goes through both layers, the second one through the first alone."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.second(self.first(x)) if dist.get_rank() == 0 else self.first(x)


def gradients_of_unused_layers():
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = enlarge(get_peft_model(Either(), VBLoRAConfig(**METHODS["vblora"][1])))
        model = DistributedDataParallel(model, find_unused_parameters=True)
        if sparse:
            average_selected_logits(model)
        model(torch.randn(5, 32)).square().sum().backward()
        found.append(gradients(model))
    return found


def test_a_layer_that_one_process_does_not_use_gets_the_same_bits(pair):
    for dense, sparse in pair(gradients_of_unused_layers):
        assert all(torch.equal(sparse[name], gradient) and gradient.any() for name, gradient in dense.items())
        assert any("second" in name for name in dense)


def patched_gradients():
    from peft import VBLoRAConfig as PeftsConfig
    from peft import get_peft_model as pefts

    from vblora_triton import patch_peft

    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = enlarge(
            pefts(nn.Sequential(nn.Linear(32, 32)), PeftsConfig(**METHODS["vblora"][1] | {"target_modules": ["0"]}))
        )
        with patch_peft(model):
            model = DistributedDataParallel(model)
            if sparse:
                average_selected_logits(model)
            model(torch.randn(5, 32)).square().sum().backward()
        found.append(gradients(model))
    return found


def test_pefts_own_model_patched_gets_the_same_bits(pair):
    pytest.importorskip("peft")
    for dense, sparse in pair(patched_gradients):
        assert all(torch.equal(sparse[name], gradient) and gradient.any() for name, gradient in dense.items())


def selections_checked(differ):
    model = made("vblora")
    check_selections(model)
    if differ and dist.get_rank() == 1:
        logits = next(
            parameter for name, parameter in model.named_parameters() if "1.mlp.up_proj.vblora_logits_B" in name
        )
        with torch.no_grad():
            # Two entries of one row change places.
            logits[0, 0] = logits[0, 0].flip(0)
    try:
        check_selections(model)
    except RuntimeError as error:
        return str(error)


def test_every_process_is_told_where_another_one_selects_other_vectors(pair):
    assert pair(selections_checked, False) == [None, None]
    one, two = pair(selections_checked, True)
    assert one == two
    assert "in 1 of 28 tensors of logits" in one
    assert "layers.1.mlp.up_proj.vblora_logits_B" in one


def refused():
    for model in (made("vblora"), DistributedDataParallel(made("vera"))):
        try:
            average_selected_logits(model)
        except (TypeError, ValueError) as error:
            yield f"{type(error).__name__}: {error}"


def refusals():
    return list(refused())


def test_what_sends_no_logits_is_refused(pair):
    for plain, vera in pair(refusals):
        assert plain.startswith("TypeError: `model` is a PeftModel; give a torch.nn.parallel.DistributedDataParallel")
        assert vera.startswith("ValueError: `model` trains no logits of VB-LoRA")
