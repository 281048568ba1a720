"""patch_peft, unpatch_peft and is_patched: what runs where and when, what is refused, and that all of it comes back."""

import copy
import functools
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from tests.integrations.peft_case import (
    ALONE,
    BOTH,
    METHODS,
    by_peft,
    forwards,
    inputs,
    logits,
    one_layer,
    peft_classes,
    peft_layers,
    runs_kernels,
)
from tests.models import tiny_llama
from vblora_triton import VBLoRAConfig, get_peft_model, is_patched, patch_peft, unpatch_peft

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ROOT = Path(__file__).parents[2]


@BOTH
def test_unpatching_once_gives_back_the_very_functions_after_any_number_of_calls(method):
    before, model = forwards(), by_peft(method)
    patch_peft(backend="triton")
    patched = forwards()
    assert is_patched()
    assert not set(patched) & set(before)
    patch_peft(backend="triton")
    assert forwards() == patched
    later = by_peft(method)
    assert all(map(is_patched, (model, later)))
    assert all(map(runs_kernels, (model, later)))
    patch_peft(backend="reference")
    assert not runs_kernels(model)
    for _ in range(2):
        unpatch_peft()
        assert all(now is then for now, then in zip(forwards(), before, strict=True))
        assert not any((is_patched(), is_patched(model), runs_kernels(model)))


@BOTH
def test_one_models_layers_are_patched_alone_and_before_all_of_peft(method):
    one, other = by_peft(method), by_peft(method)
    before, plain = forwards(), [vars(module).copy() for module in one.modules()]
    for _ in range(2):
        patch_peft(one, backend="triton")
    assert (is_patched(one), is_patched(other), is_patched()) == (True, False, False)
    assert forwards() == before
    assert (runs_kernels(one), runs_kernels(other)) == (True, False)
    with patch_peft(backend="reference"):
        assert runs_kernels(one)
        with pytest.raises(ValueError, match=r"patched all of PEFT; call unpatch_peft\(\)"):
            unpatch_peft(one)
    unpatch_peft(other)
    assert is_patched(one)
    unpatch_peft(one)
    assert not is_patched(one)
    assert not runs_kernels(one)
    with patch_peft(backend="triton"):
        with patch_peft(one, backend="reference"):
            assert not runs_kernels(one)
        assert runs_kernels(one)
        assert [vars(module).keys() for module in one.modules()] == [entry.keys() for entry in plain]
    assert not runs_kernels(one)


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
    with pytest.raises(KeyError), patch_peft(given):
        raise KeyError
    assert not is_patched(model)
    assert forwards() == before
    assert not any("forward" in vars(module) for module in model.modules())


def test_contexts_of_two_threads_that_overlap_take_back_everything():
    before, entered, both, left = forwards(), threading.Event(), threading.Event(), threading.Event()

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
        assert is_patched()
    thread.join()
    assert not is_patched()
    assert forwards() == before


@ALONE
def test_leaving_a_context_after_unpatching_changes_nothing(alone):
    model, before = by_peft("vblora"), forwards()
    given = model if alone else None
    outer = patch_peft(given)
    with patch_peft(given):
        unpatch_peft(given)
        assert not is_patched(model)
    assert not is_patched(model)
    assert forwards() == before
    patch_peft(given)
    outer.close()
    assert is_patched(model)


def test_copies_of_a_patched_model_are_patched_and_given_back_on_their_own():
    model = by_peft("vera")
    with patch_peft(model, backend="triton"):
        first, second, third = (copy.deepcopy(model) for _ in range(3))
        with patch_peft(first, backend="reference"):
            assert not runs_kernels(first)
        assert all(map(is_patched, (model, first, second, third)))
        unpatch_peft(model)
        unpatch_peft(second)
        assert [runs_kernels(one) for one in (model, first, second, third)] == [False, True, False, True]
    assert not any(map(is_patched, (model, first, second, third)))
    patch_peft(model, backend="triton")
    copied = copy.deepcopy(model)
    patch_peft()
    unpatch_peft()
    assert not any(map(is_patched, (model, copied)))
    assert not any(map(runs_kernels, (model, copied)))


@BOTH
def test_pickles_of_a_patched_model_load_as_pefts(method):
    model = by_peft(method)
    with patch_peft(model):
        loaded = pickle.loads(pickle.dumps(model))
    assert not is_patched(loaded)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


@ALONE
@pytest.mark.parametrize("leave", ["context", "unpatch", "unpatch everything"])
def test_a_wrapper_put_on_inside_stays_and_runs_pefts_own_afterwards(alone, leave, monkeypatch):
    layer, calls = one_layer("vblora"), []
    given, owner = (layer, layer) if alone else (None, type(layer))
    expected = layer(inputs())
    context = patch_peft(given, backend="triton")
    wrapped = owner.forward

    @functools.wraps(wrapped)
    def wrapper(*args, **kwargs):
        calls.append(1)
        return wrapped(*args, **kwargs)

    monkeypatch.setattr(owner, "forward", wrapper)
    assert runs_kernels(layer)
    with pytest.raises(TypeError, match="replaced"):
        patch_peft(given)
    if leave == "context":
        context.close()
    else:
        unpatch_peft(given if leave == "unpatch" else None)
    assert owner.forward is wrapper
    assert not runs_kernels(layer)
    assert torch.equal(layer(inputs()), expected)
    assert len(calls) == 3
    if alone:
        with patch_peft(backend="triton"):
            assert runs_kernels(layer)
    monkeypatch.undo()
    assert not is_patched(layer)
    assert not is_patched()
    with patch_peft(given, backend="triton"):
        assert runs_kernels(layer)


@BOTH
@ALONE
def test_layers_with_hooks_of_accelerate_are_patched_below_them(method, alone):
    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counting.calls += 1
            return args, kwargs

    layer = one_layer(method)
    given = layer if alone else None
    expected = layer(inputs())

    def check(patched: bool, calls: int) -> None:
        assert is_patched(layer) == runs_kernels(layer) == patched
        torch.testing.assert_close(layer(inputs()), expected)
        assert Counting.calls == calls

    add_hook_to_module(layer, Counting())
    patch_peft(given, backend="triton")
    check(True, 2)
    unpatch_peft(given)
    check(False, 4)
    # Removed hooks leave the method that they kept on the layer; added ones keep the one that they find.
    patch_peft(given, backend="triton")
    remove_hook_from_module(layer)
    check(True, 4)
    add_hook_to_module(layer, Counting())
    unpatch_peft(given)
    check(False, 6)
    remove_hook_from_module(layer)
    check(False, 6)
    patch_peft(given, backend="triton")
    check(True, 6)


def strange(own: type) -> type:
    """A kind of layer that PEFT does not have."""
    return type("StrangeLinear", (own,), {"forward": lambda self, x: x, "__module__": "somebodys.package"})


def doubled(own: type) -> type:
    """The same `forward`, of matrices composed in another way."""

    def _get_lora_matrices(self, adapter, cast_to_fp32=False):
        A, B = own._get_lora_matrices(self, adapter, cast_to_fp32)
        return 2 * A, B

    return type("Doubled", (own,), {"_get_lora_matrices": _get_lora_matrices, "__module__": "somebodys.package"})


@pytest.mark.parametrize(("method", "kind"), [("vblora", strange), ("vera", strange), ("vblora", doubled)])
def test_a_kind_of_layer_that_is_not_known_is_refused_by_name_and_stays_what_it_is(method, kind):
    model = by_peft(method)
    layer = peft_layers(model)[1]
    layer.__class__ = kind(type(layer))
    x = torch.randn(3, layer.in_features)
    expected = layer(x)
    with pytest.raises(TypeError, match=rf"layers\.0.*is a somebodys\.package\.{type(layer).__name__}, .*nothing was"):
        patch_peft(model)
    assert not any("forward" in vars(module) for module in model.modules())
    with patch_peft(backend="triton"):
        assert torch.equal(layer(x), expected)
        assert not is_patched(model)


@ALONE
def test_a_subclass_that_changes_nothing_is_patched(alone):
    # As FSDP2 and parametrizations make of a layer.
    layer = one_layer("vblora")
    layer.__class__ = type("FSDPLinear", (type(layer),), {})
    with patch_peft(layer if alone else None, backend="triton"):
        assert runs_kernels(layer)


@BOTH
def test_a_forward_that_somebody_replaced_is_refused_by_name(method):
    model = by_peft(method)
    peft_layers(model)[0].forward = lambda x: x
    with pytest.raises(TypeError, match=r"k_proj is a peft.* whose `forward` somebody replaced"):
        patch_peft(model)
    assert not any(is_patched(one) for one in peft_layers(model))


@pytest.mark.parametrize(
    ("method", "name"),
    [("vblora", "forward"), ("vblora", "_get_lora_matrices"), ("vblora", "_get_low_rank_matrix"), ("vera", "forward")],
)
@pytest.mark.parametrize("wraps", [False, True], ids=["another", "functools.wraps"])
def test_a_version_of_peft_that_computes_otherwise_is_refused_by_name(method, name, wraps, monkeypatch):
    cls = peft_classes()[METHODS.index(method)]
    model, other = by_peft(method), by_peft("vera" if method == "vblora" else "vblora")
    unknown = vars(cls)[name]

    def replaced(self, *args):
        return unknown(self, *args)

    monkeypatch.setattr(cls, name, functools.wraps(unknown)(replaced) if wraps else replaced)
    before = forwards()
    for given in (None, model):
        with pytest.raises(TypeError, match=rf"{cls.__module__}.Linear.{name} of peft {peft.__version__} is not"):
            patch_peft(given)
    assert forwards() == before
    assert not is_patched()
    # A model of the other method is none of this one's business.
    with patch_peft(other):
        assert is_patched(other)
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "llama"}, TypeError, "`model` is a str; give a torch module, or nothing"),
        ({"backend": "cuda"}, ValueError, "`backend` is 'cuda'"),
        ({"model": nn.Linear(2, 2)}, ValueError, "a Linear, has no VB-LoRA and no VeRA layer of PEFT"),
    ],
    ids=["no model", "no backend", "no layer"],
)
def test_mistakes_are_named_and_change_nothing(arguments, error, message):
    before = forwards()
    with pytest.raises(error, match=message):
        patch_peft(**arguments)
    assert forwards() == before
    for function in (is_patched, unpatch_peft):
        with pytest.raises(TypeError, match="`model` is a int"):
            function(3)


def test_of_mixed_models_the_layers_of_both_methods_are_patched_and_no_others():
    lora = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    config = VBLoRAConfig(r=2, num_vectors=4, vector_length=32, target_modules=["k_proj"])
    for model in (lora, get_peft_model(tiny_llama(), config)):
        with pytest.raises(
            ValueError, match=r"no VeRA layer of PEFT.*Models made by vblora_triton run its ops already"
        ):
            patch_peft(model)
        assert not is_patched(model)
    both = nn.ModuleList([by_peft("vblora"), by_peft("vera"), lora])
    with patch_peft(both):
        assert all(is_patched(part) for part in both[:2])
        assert not is_patched(lora)
        both.append(by_peft("vera"))
        assert not is_patched(both)


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_importing_the_functions_imports_no_peft_and_a_call_changes_two_attributes_of_it():
    code = """
import sys
from vblora_triton import is_patched, patch_peft, unpatch_peft
import vblora_triton.integrations.peft, torch
unpatch_peft()
assert not is_patched() and not is_patched(torch.nn.Linear(2, 2))
assert not [name for name in sys.modules if name.split(".")[0] == "peft"]
import peft
def everything():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "peft":
            for key, value in vars(module).items():
                found[name, key] = value
                if isinstance(value, type) and value.__module__ == name:
                    found.update({(name, key, own): vars(value)[own] for own in vars(value)})
    return found
before = everything()
patch_peft()
after = everything()
changed = {key for key in after if key in before and after[key] is not before[key]}
assert changed == {(f"peft.tuners.{m}.layer", "Linear", "forward") for m in ("vblora", "vera")}, changed
assert after.keys() == before.keys()
unpatch_peft()
after = everything()
assert all(after[key] is value for key, value in before.items())
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_without_peft_the_way_to_get_it_is_named():
    code = "import sys; sys.modules['peft'] = None; import vblora_triton; vblora_triton.patch_peft()"
    result = run(code)
    assert "ImportError: patch_peft() needs peft >= 0.19: pip install 'vblora-triton[peft]'." in result.stderr
