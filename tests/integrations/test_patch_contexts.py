"""patch_peft's contexts: overlapping, in threads, around an unpatch_peft, and with somebody's wrapper put on inside."""

import copy
import threading

import pytest
import torch
from torch import nn

from tests.integrations.peft_case import by_peft, logits, one_layer
from vblora_triton import is_patched, patch_peft, unpatch_peft
from vblora_triton.kernels.launch import counted

vblora_layer = pytest.importorskip("peft.tuners.vblora.layer")
vera_layer = pytest.importorskip("peft.tuners.vera.layer")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CLASSES = (vblora_layer.Linear, vera_layer.Linear)
ALONE = pytest.mark.parametrize("alone", [False, True], ids=["all of PEFT", "one model"])


@pytest.fixture(autouse=True)
def _comes_back():
    before = [dict(vars(cls)) for cls in CLASSES]
    yield
    unpatch_peft()
    assert [dict(vars(cls)) for cls in CLASSES] == before


def forwards() -> list:
    return [vars(cls)["forward"] for cls in CLASSES]


def runs_kernels(module: nn.Module) -> bool:
    with counted() as launches, torch.no_grad():
        module(torch.ones(20, 96)) if not hasattr(module, "config") else logits(module)
    return bool(launches)


@ALONE
def test_overlapping_contexts_leave_the_newest_and_in_the_end_nothing(alone):
    model, before = by_peft("vblora"), forwards()
    given = model if alone else None
    first, second, third = (patch_peft(given, backend=backend) for backend in ("triton", "reference", "triton"))
    second.close()
    assert runs_kernels(model)
    second = patch_peft(given, backend="reference")
    third.close()
    assert not runs_kernels(model)
    assert is_patched(model)
    first.close()
    assert not runs_kernels(model)
    assert is_patched(model)
    second.close()
    assert not is_patched(model)
    assert forwards() == before
    assert not any("forward" in vars(module) for module in model.modules())


def test_contexts_of_two_threads_that_overlap_take_back_everything():
    before, entered, both, left = forwards(), threading.Event(), threading.Event(), threading.Event()
    seen = []

    def first():
        with patch_peft():
            entered.set()
            both.wait(20)
        left.set()

    thread = threading.Thread(target=first)
    thread.start()
    assert entered.wait(20)
    with patch_peft():
        both.set()
        assert left.wait(20)
        seen.append(is_patched())
    thread.join()
    assert seen == [True]
    assert not is_patched()
    assert forwards() == before


@ALONE
def test_leaving_a_context_after_unpatching_changes_nothing(alone):
    model, before = by_peft("vblora"), forwards()
    given = model if alone else None
    patch_peft(given)
    with patch_peft(given):
        unpatch_peft(given)
        assert not is_patched(model)
    assert not is_patched(model)
    assert forwards() == before
    outer = patch_peft(given)
    unpatch_peft(given)
    patch_peft(given)
    outer.close()
    assert is_patched(model)


def test_a_copy_of_a_patched_model_stays_patched_after_a_context_of_its_own():
    model = by_peft("vera")
    patch_peft(model, backend="triton")
    copied = copy.deepcopy(model)
    with patch_peft(copied, backend="reference"):
        assert not runs_kernels(copied)
    assert runs_kernels(copied)


@ALONE
@pytest.mark.parametrize("leave", ["context", "unpatch", "unpatch everything"])
def test_a_wrapper_put_on_inside_stays_and_runs_pefts_own_afterwards(alone, leave, monkeypatch):
    layer, calls = one_layer("vblora"), []
    given, owner = (layer, layer) if alone else (None, type(layer))
    expected = layer(torch.ones(20, 96))
    context = patch_peft(given, backend="triton")
    wrapped = owner.forward

    def wrapper(*args, **kwargs):
        calls.append(1)
        return wrapped(*args, **kwargs)

    monkeypatch.setattr(owner, "forward", wrapper)
    assert runs_kernels(layer)
    if leave == "context":
        context.close()
    else:
        unpatch_peft(given if leave == "unpatch" else None)
    assert owner.forward is wrapper
    assert not runs_kernels(layer)
    torch.testing.assert_close(layer(torch.ones(20, 96)), expected, rtol=0, atol=0)
    assert len(calls) == 3
    monkeypatch.undo()
    assert not is_patched(layer)
    assert not is_patched()
    with patch_peft(given, backend="triton"):
        assert runs_kernels(layer)
    unpatch_peft()
