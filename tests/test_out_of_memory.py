"""Out of memory at any moment: what an operation had begun is undone, bit for bit, or it is completed."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vblora_triton import PeftModel, VBLoRAConfig, VeraConfig, get_peft_model

METHODS = {
    "vblora": partial(VBLoRAConfig, r=2, num_vectors=4, vector_length=8),
    "vera": partial(VeraConfig, r=3),
}
FIELDS = {"target_modules": ["a", "b"], "modules_to_save": ["head"]}


class Base(nn.Module):
    """Two layers and a head, and a normalisation that counts in integers."""

    def __init__(self, dtype=torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 2)
        self.to(dtype).eval()

    def forward(self, x):
        return self.head(self.norm(self.b(self.a(x))))


class FailAt(TorchDispatchMode):
    """Lets the n-th operator fail for want of memory, whether it allocates or not."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == -1:
            raise torch.OutOfMemoryError(f"no memory for {function}")
        return function(*args, **(kwargs or {}))


def state_of(root: nn.Module) -> list:
    """Everything about a module and those inside it, tensors by identity and value."""
    found = [torch.get_rng_state()]
    for name, module in root.named_modules():
        found.append((name, id(module)))
        for key, value in sorted(vars(module).items()):
            if key not in ("_parameters", "_buffers", "_modules"):
                found.append((key, plain(value)))
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    found += [key, id(tensor), tensor.requires_grad, tensor.dtype, tensor.detach().clone()]
    return found


def plain(value):
    """A value in a form that can be compared later."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: plain(held) for key, held in value.items()}
    if isinstance(value, (list, tuple, set)):
        return type(value)(value) if isinstance(value, set) else [plain(held) for held in value]
    if isinstance(value, (VBLoRAConfig, VeraConfig)):
        return id(value), plain(vars(value))
    return value if isinstance(value, (str, int, float, bool, type(None))) else id(value)


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and one.is_meta == other.is_meta and (one.is_meta or torch.equal(one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def forget_identities(state) -> list:
    """A state without what differs between two models that are alike."""
    if isinstance(state, (list, tuple)):
        return [forget_identities(entry) for entry in state]
    if isinstance(state, dict):
        return {key: forget_identities(value) for key, value in state.items()}
    return None if isinstance(state, int) and not isinstance(state, bool) and state > 2**20 else state


def filled(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vblora_" in name or "vera_" in name or "modules_to_save" in name or name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def two_adapters(config) -> PeftModel:
    """One active adapter with biases, and one that is not active."""
    model = get_peft_model(Base(), config(**FIELDS, bias="all"), "first")
    model.add_adapter("second", config(**FIELDS))
    return filled(model)


def merged(config) -> PeftModel:
    model = two_adapters(config)
    model.merge_adapter(["first"])
    return model


def merged_without_copies(config) -> PeftModel:
    model = two_adapters(config)
    for _, layer in model.base_model.adapted_layers():
        layer.keep_base_weight = False
    model.merge_adapter(["first"])
    return model


def load_over(model, config, folder):
    model.load_adapter(folder, "first")


# name -> what it is done to, and what is done.
OPERATIONS = {
    "add_adapter": (
        two_adapters,
        lambda m, config, _: m.add_adapter("third", config(**FIELDS), autocast_adapter_dtype=False),
    ),
    "get_peft_model": (lambda config: Base(), lambda m, config, _: get_peft_model(m, config(**FIELDS, bias="all"))),
    "cast_adapter": (two_adapters, lambda m, *_: m.base_model.model.a.cast_adapter("first")),
    "set_adapter": (two_adapters, lambda m, *_: m.set_adapter("second")),
    "set_adapter while merged": (merged, lambda m, *_: m.set_adapter("second")),
    "delete_adapter": (two_adapters, lambda m, *_: m.delete_adapter("first")),
    "merge_adapter": (two_adapters, lambda m, *_: m.merge_adapter(safe_merge=True)),
    "merge_adapter over another": (merged, lambda m, *_: m.merge_adapter(["second"])),
    "merge_and_unload": (two_adapters, lambda m, *_: m.merge_and_unload()),
    "merge_and_unload of several": (merged, lambda m, *_: m.merge_and_unload(adapter_names=["second"])),
    "unmerge_adapter": (merged, lambda m, *_: m.unmerge_adapter()),
    "unmerge_adapter without copies": (merged_without_copies, lambda m, *_: m.unmerge_adapter()),
    "unload": (merged, lambda m, *_: m.unload()),
    "from_pretrained": (lambda config: Base(), lambda m, config, folder: PeftModel.from_pretrained(m, folder)),
    "load_adapter": (two_adapters, lambda m, config, folder: m.load_adapter(folder / "plain", "third")),
    "load_adapter over one": (two_adapters, load_over),
    "load_adapter over one that is not active": (
        two_adapters,
        lambda m, config, folder: m.load_adapter(folder / "plain", "second", is_trainable=True),
    ),
}


@pytest.fixture(scope="module", params=METHODS)
def method(request, tmp_path_factory):
    """A method's configuration, and a folder with an adapter that trains biases and, inside, one that does not."""
    config, folder = METHODS[request.param], tmp_path_factory.mktemp(request.param)
    filled(get_peft_model(Base(), config(**FIELDS, bias="all")), seed=1).save_pretrained(folder)
    filled(get_peft_model(Base(), config(**FIELDS), "plain"), seed=2).save_pretrained(folder)
    return config, folder


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_that_runs_out_of_memory_is_undone_or_completed(name, method):
    config, folder = method
    make, operation = OPERATIONS[name]
    completed = make(config)
    torch.manual_seed(3)
    operation(completed, config, folder)
    expected = forget_identities(state_of(completed))
    failed = 0
    for n in range(10_000):
        model = make(config)
        torch.manual_seed(3)
        before = state_of(model)
        mode = FailAt(n)
        try:
            with mode:
                operation(model, config, folder)
        except torch.OutOfMemoryError:
            failed += 1
            assert same(state_of(model), before), n
        else:
            assert same(forget_identities(state_of(model)), expected), n
        if mode.left >= 0:
            break
    # Copies were made when the adapter was merged: to write them back needs no memory.
    assert failed > 0 or name == "unmerge_adapter"


def test_a_configuration_is_as_it_was_after_an_adapter_could_not_be_put_on(method):
    config = method[0](target_modules="all-linear", modules_to_save=["head"])
    before = copy.deepcopy(vars(config))
    with pytest.raises(torch.OutOfMemoryError), FailAt(3):
        get_peft_model(Base(), config)
    assert vars(config) == before
