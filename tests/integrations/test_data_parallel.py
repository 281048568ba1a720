"""torch.nn.DataParallel: its replicas of an adapted model, made on the CPU in the place of several GPUs."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.parallel import replicate

from tests.models import VOCABULARY, adapted_by, tiny_llama
from vblora_triton import VBLoRAConfig, VeraConfig, use_backend

TARGETS = {"target_modules": ["q_proj", "k_proj", "v_proj"]}
METHODS = {
    "vblora": (VBLoRAConfig, {"r": 2, "num_vectors": 8, "vector_length": 16}),
    "vera": (VeraConfig, {"r": 3}),
}


@pytest.fixture
def replicas_on_cpu(monkeypatch):
    """Let torch make replicas on one CPU: what Broadcast gives there, copies that are no leaves, and its own code."""
    module = sys.modules["torch.nn.parallel.replicate"]

    def broadcast(tensors, devices, detach=False):
        with torch.set_grad_enabled(not detach and torch.is_grad_enabled()):
            return [[tensor.detach().clone() if detach else tensor.clone() for tensor in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits.square().sum()


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.parametrize(("method", "backend"), [("vblora", "auto"), ("vera", "auto"), ("vblora", "triton")])
def test_replicas_that_run_at_once_give_the_gradients_of_the_whole_batch(method, backend, replicas_on_cpu):
    model = adapted_by(*METHODS[method], **TARGETS).train()
    ids = torch.randint(0, VOCABULARY, (2, 18), generator=torch.Generator().manual_seed(1))
    with use_backend("reference"):
        expected = gradients(model, loss_of(model, ids))
    with use_backend(backend):
        # So that the model remembers which of its layers read one input.
        for _ in range(2):
            loss_of(model, ids).backward()
        replicas = replicate(model, ["first", "second"])
        # Triton's interpreter is for one thread.
        with ThreadPoolExecutor(1 if backend == "triton" else 2) as threads:
            losses = list(threads.map(loss_of, replicas, ids.chunk(2)))
        found = gradients(model, sum(losses))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("method", METHODS)
def test_a_replica_reads_what_is_shared_on_its_own_device(method, replicas_on_cpu):
    model = adapted_by(*METHODS[method], **TARGETS)
    first, second = replicate(model, ["first", "second"])
    for replica in (model, first, second):
        loss_of(replica, torch.zeros(1, 5, dtype=torch.long))
    for name in model.base_model.tuner_layer_cls.shared_layer_names:
        for replica in (model, first, second):
            own = getattr(replica.base_model, name)
            assert all(getattr(layer, name) is own for _, layer in replica.base_model.adapted_layers())
        kept = [getattr(replica.base_model, name)["default"] for replica in (model, first, second)]
        assert len({tensor.data_ptr() for tensor in kept}) == 3


def test_replicas_switch_adapters_with_their_model(replicas_on_cpu):
    config_class, fields = METHODS["vblora"]
    model = adapted_by(config_class, fields, **TARGETS)
    model.add_adapter("other", config_class(**fields, **TARGETS))
    ids = torch.zeros(1, 5, dtype=torch.long)
    with torch.no_grad():
        for name in ("other", "default"):
            model.set_adapter(name)
            expected = model(input_ids=ids).logits
            (replica,) = replicate(model, ["first"], detach=True)
            torch.testing.assert_close(replica(input_ids=ids).logits, expected)
        with model.disable_adapter():
            (replica,) = replicate(model, ["first"], detach=True)
            torch.testing.assert_close(replica(input_ids=ids).logits, tiny_llama()(input_ids=ids).logits)
