"""patch_peft, unpatch_peft and is_patched: what is replaced, what is refused, and that all of it comes back."""

import copy
import functools
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from tests.integrations.peft_case import METHODS, by_peft, logits, one_layer, peft_layers
from tests.models import tiny_llama
from vblora_triton import VBLoRAConfig, get_peft_model, is_patched, patch_peft, unpatch_peft
from vblora_triton.kernels.launch import counted

peft = pytest.importorskip("peft")
vblora_layer = pytest.importorskip("peft.tuners.vblora.layer")
vera_layer = pytest.importorskip("peft.tuners.vera.layer")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ROOT = Path(__file__).parents[2]
CLASSES = (vblora_layer.Linear, vera_layer.Linear)
BOTH = pytest.mark.parametrize("method", METHODS)


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


def test_unpatching_once_restores_the_very_functions_after_any_number_of_calls():
    before = forwards()
    assert not is_patched()
    patch_peft()
    patched = forwards()
    assert is_patched()
    assert not set(patched) & set(before)
    patch_peft()
    assert forwards() == patched
    patch_peft(backend="triton")
    assert set(forwards()).isdisjoint(patched + before)
    unpatch_peft()
    assert all(now is then for now, then in zip(forwards(), before, strict=True))
    assert not is_patched()
    unpatch_peft()
    assert forwards() == before


def test_each_context_takes_back_what_its_call_changed():
    before, model = forwards(), by_peft("vblora")
    with patch_peft():
        outer = forwards()
        with patch_peft():
            assert forwards() == outer
        assert forwards() == outer
        with patch_peft(backend="reference"):
            assert set(forwards()).isdisjoint(outer + before)
        assert forwards() == outer
        with patch_peft(model, backend="triton"):
            assert runs_kernels(model)
        assert is_patched(model)
        assert not runs_kernels(model)
    assert forwards() == before
    with patch_peft(model), patch_peft(model, backend="triton"):
        assert runs_kernels(model)
    assert not is_patched(model)
    with pytest.raises(KeyError), patch_peft():
        raise KeyError
    assert forwards() == before


@BOTH
def test_one_models_layers_are_patched_alone(method):
    one, other = by_peft(method), by_peft(method)
    before, plain = forwards(), [dict(vars(module)) for module in one.modules()]
    patch_peft(one, backend="triton")
    patch_peft(one, backend="triton")
    assert is_patched(one)
    assert not is_patched(other)
    assert not is_patched()
    assert forwards() == before
    assert runs_kernels(one)
    assert not runs_kernels(other)
    unpatch_peft(other)
    assert is_patched(one)
    unpatch_peft(one)
    assert not is_patched(one)
    assert not runs_kernels(one)
    assert [vars(module).keys() for module in one.modules()] == [entry.keys() for entry in plain]


def test_unpatching_everything_reaches_single_models_and_their_copies():
    model = by_peft("vera")
    patch_peft(model, backend="triton")
    copied = copy.deepcopy(model)
    assert is_patched(copied)
    assert runs_kernels(copied)
    patch_peft()
    with pytest.raises(ValueError, match=r"patched all of PEFT; call unpatch_peft\(\)"):
        unpatch_peft(model)
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


@BOTH
@pytest.mark.parametrize("alone", [False, True], ids=["all of PEFT", "one model"])
def test_layers_with_hooks_of_accelerate_are_patched_below_them(method, alone):
    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counting.calls += 1
            return args, kwargs

    def undo():
        unpatch_peft(layer if alone else None)

    layer = one_layer(method)
    cpu = torch.ones(20, 96).to(next(layer.parameters()).device)
    expected = layer(cpu)
    add_hook_to_module(layer, Counting())
    patch_peft(layer if alone else None, backend="triton")
    assert is_patched(layer)
    with counted() as launches:
        torch.testing.assert_close(layer(cpu), expected)
    assert launches
    assert Counting.calls == 1
    undo()
    with counted() as launches:
        torch.testing.assert_close(layer(cpu), expected)
    assert not launches
    assert Counting.calls == 2
    # Removed hooks leave the method that they kept on the layer; added ones keep the one that they find.
    patch_peft(layer if alone else None, backend="triton")
    remove_hook_from_module(layer)
    with counted() as launches:
        layer(cpu)
    assert launches
    add_hook_to_module(layer, Counting())
    undo()
    remove_hook_from_module(layer)
    with counted() as launches:
        torch.testing.assert_close(layer(cpu), expected)
    assert not launches
    assert not is_patched(layer)
    assert Counting.calls == 2
    patch_peft(layer if alone else None, backend="triton")
    with counted() as launches:
        layer(cpu)
    assert launches


@BOTH
def test_layers_made_after_patching_are_patched_too(method):
    with patch_peft(backend="triton"):
        model = by_peft(method)
        assert is_patched(model)
        assert runs_kernels(model)
    assert not runs_kernels(model)


@BOTH
def test_a_kind_of_layer_that_is_not_known_is_refused_by_name(method):
    model = by_peft(method)
    own = type(peft_layers(model)[0])
    strange = type("StrangeLinear", (own,), {"forward": lambda self, x: x, "__module__": "somebodys.package"})
    peft_layers(model)[1].__class__ = strange
    with pytest.raises(TypeError, match=r"layers\.0.*is a somebodys\.package\.StrangeLinear, which .* nothing was"):
        patch_peft(model)
    assert not any("forward" in vars(module) for module in model.modules())
    with patch_peft():
        assert not is_patched(model)
        assert strange.forward is not own.forward


def test_a_subclass_that_composes_otherwise_stays_what_it_is():
    layer, x = one_layer("vblora"), torch.ones(20, 96)
    own = type(layer)

    class Doubled(own):
        def _get_lora_matrices(self, adapter, cast_to_fp32=False):
            A, B = super()._get_lora_matrices(adapter, cast_to_fp32)
            return 2 * A, B

    layer.__class__ = Doubled
    expected = layer(x)
    with patch_peft(backend="triton"), counted() as launches:
        assert torch.equal(layer(x), expected)
    assert not launches
    with pytest.raises(TypeError, match=r"Doubled, which patch_peft does not know"):
        patch_peft(layer)


def test_a_subclass_that_changes_nothing_is_patched():
    # As FSDP2 and parametrizations make of a layer.
    layer = one_layer("vblora")
    layer.__class__ = type("FSDPLinear", (type(layer),), {})
    with patch_peft(layer, backend="triton"):
        assert runs_kernels(layer)


@BOTH
def test_a_forward_that_somebody_replaced_is_refused_by_name(method):
    model = by_peft(method)
    layer = peft_layers(model)[0]
    layer.forward = lambda x: x
    with pytest.raises(TypeError, match=r"k_proj is a peft.* whose `forward` somebody replaced"):
        patch_peft(model)
    assert not any(is_patched(one) for one in peft_layers(model))


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (vblora_layer.Linear, "forward"),
        (vblora_layer.Linear, "_get_lora_matrices"),
        (vblora_layer.Linear, "_get_low_rank_matrix"),
        (vera_layer.Linear, "forward"),
    ],
)
@pytest.mark.parametrize("wraps", [False, True], ids=["another", "functools.wraps"])
def test_a_version_of_peft_that_computes_otherwise_is_refused_by_name(cls, name, wraps, monkeypatch):
    model = by_peft("vblora" if cls is vblora_layer.Linear else "vera")
    unknown = vars(cls)[name]

    def replaced(self, *args):
        return unknown(self, *args)

    with monkeypatch.context() as context:
        context.setattr(cls, name, functools.wraps(unknown)(replaced) if wraps else replaced)
        before = forwards()
        for given in (None, model):
            with pytest.raises(TypeError, match=rf"{cls.__module__}.Linear.{name} of peft {peft.__version__} is not"):
                patch_peft(given)
        assert forwards() == before
        assert not is_patched()
    # A model of the other method is none of this one's business.
    other = by_peft("vera" if cls is vblora_layer.Linear else "vblora")
    with monkeypatch.context() as context:
        context.setattr(cls, name, lambda self, *args: unknown(self, *args))
        with patch_peft(other):
            assert is_patched(other)


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


def test_models_of_this_package_are_told_apart():
    model = get_peft_model(tiny_llama(), VBLoRAConfig(r=2, num_vectors=4, vector_length=32, target_modules=["k_proj"]))
    with pytest.raises(ValueError, match="Models made by vblora_triton run its ops already"):
        patch_peft(model)
    assert not is_patched(model)
    for function in (is_patched, unpatch_peft):
        with pytest.raises(TypeError, match="`model` is a int"):
            function(3)


def test_a_mixed_model_is_patched_whole():
    model = by_peft("vblora")
    lora = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no VB-LoRA and no VeRA layer"):
        patch_peft(lora)
    both = nn.ModuleList([model, by_peft("vera"), lora])
    with patch_peft(both):
        assert all(is_patched(part) for part in both[:2])
        assert not is_patched(lora)
        both.append(by_peft("vera"))
        assert not is_patched(both)


def run(code: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True, text=True)


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
