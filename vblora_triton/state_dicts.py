"""State dicts of an adapted model, in two parts: an adapter's, as its file has it, and the base model's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vblora_triton.checkpoint import LoadResult, adapter_state_dict, fill_adapter, fit_tensors
from vblora_triton.hub import AdapterFileError
from vblora_triton.injected import file_keys, injected_tuner, plain_keys
from vblora_triton.integrations.transformers import find_adapted
from vblora_triton.tuner.file_keys import live_bias_name
from vblora_triton.tuner.layer import BaseTunerLayer
from vblora_triton.tuner.model import BaseTuner
from vblora_triton.tuner.state import as_names
from vblora_triton.tuner.undo import copy_all, undone_on_failure


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str | list[str] = "default",
    **ignored: Any,
) -> dict[str, Tensor]:
    """Return what the file of an adapter holds, by key; on the model's devices, and where they can be the live tensors.

    Args:
        model: a PeftModel of ours, or one wrapped for running in parallel, or compiled.
        state_dict: see `adapter_state_dict`.
        adapter_name: which; the only active one may be given in a list.
        ignored: what PEFT's function takes beside these.
    Raises:
        ValueError: no such adapter, several, or one that cannot be saved in this form.
        TypeError: `model` is none of ours.
    """
    tuner, name, plain = _one_adapter(model, adapter_name)
    if state_dict is None and _is_sharded(model):
        # FSDP brings the parameters together for it, and names them as they were before it.
        state_dict = {key[max(key.find("base_model."), 0) :]: tensor for key, tensor in model.state_dict().items()}
    if state_dict is not None and plain:
        state_dict = file_keys(tuner, state_dict)
    tensors = adapter_state_dict(tuner, name, state_dict)
    return plain_keys(tensors) if plain else tensors


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str | list[str] = "default",
    **ignored: Any,
) -> LoadResult:
    """Give an adapter that is on the model the values that `get_peft_model_state_dict` returned, all or none.

    Args:
        model, adapter_name, ignored: as there.
        peft_model_state_dict: file key -> tensor; copied. Biases in it that the adapter does not train are given to the
            base model, as PEFT does.
    Raises:
        AdapterFileError: keys that are missing or unknown, shapes or values that do not fit; nothing has changed.
        ValueError, TypeError: as there.
    """
    tuner, name, plain = _one_adapter(model, adapter_name)
    if _is_sharded(model):
        raise TypeError("`model` is sharded by FSDP version 1; fill its adapter before, or use version 2.")
    stored = {key: tensor.detach().clone() for key, tensor in peft_model_state_dict.items()}
    stored = file_keys(tuner, stored) if plain else stored
    tuner.check_unmerged(name)
    expected = tuner.full_shapes(name)
    biases = {key: bias for key in stored.keys() - expected.keys() if (bias := _base_bias(tuner, key)) is not None}
    wrong = [key for key, bias in biases.items() if bias.shape != stored[key].shape]
    if wrong:
        raise AdapterFileError(
            f"`peft_model_state_dict` has biases of other shapes than the model: {', '.join(wrong)}."
        )
    base = {key: stored.pop(key) for key in biases}
    tensors, _ = fit_tensors(type(tuner), tuner.peft_config[name], expected, stored, "`peft_model_state_dict`")
    with undone_on_failure(tuner, tuner.peft_config[name]):
        fill_adapter(tuner, name, tensors, autocast_adapter_dtype=True, keep_dtype=False)
        copy_all([(bias, base[key].to(bias.device, bias.dtype)) for key, bias in biases.items()])
    return LoadResult([], [])


def _base_bias(tuner: BaseTuner, key: str) -> nn.Parameter | None:
    """Return the bias of the base model that a file's key names, if it names one."""
    if not key.endswith(".bias"):
        return None
    try:
        return tuner.model.get_parameter(live_bias_name(tuner.model, key.removeprefix("base_model.model.")))
    except AttributeError:
        return None


def _one_adapter(model: nn.Module, adapter_name: str | list[str]) -> tuple[BaseTuner, str, bool]:
    """Return the tuner, the adapter's name, and whether the model is a plain one with the adapter inside."""
    adapted, names = find_adapted(model), as_names(adapter_name)
    tuner: Any = injected_tuner(model) if adapted is None else adapted.base_model
    if tuner is None:
        raise TypeError(f"`model` is a {type(model).__name__}; give a PeftModel of vblora_triton.")
    if len(names) != 1:
        raise ValueError(f"`adapter_name` is {adapter_name!r}; give the name of one adapter.")
    tuner._check_known(*names)
    return tuner, names[0], adapted is None


def _is_sharded(model: nn.Module) -> bool:
    """Say whether FSDP, version 1, keeps the parameters of a model, or of parts of it, in shapes of its own."""
    return any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict that the base model had before any adapter was put on it: its keys, and no adapter's.

    Args:
        model: a PeftModel. Adapters that are merged are in the weights.
    Raises:
        TypeError: `model` is none of ours.
    """
    base, keys = _base_keys(model)
    state = base.state_dict()
    return {key: state[live] for key, live in keys.items()}


def set_base_model_state_dict(model: nn.Module, state_dict: dict[str, Tensor], strict: bool = True) -> LoadResult:
    """Load a state dict of the plain base model into an adapted one; adapters keep their values.

    Args:
        model: a PeftModel.
        state_dict: by the keys of `get_base_model_state_dict`.
        strict: the keys must be those of the model.
    Returns:
        The keys that are missing, and those that the model does not have.
    Raises:
        RuntimeError: `strict`, and keys are missing or unknown; or shapes differ. Nothing has changed then.
        ValueError: an adapter is merged into the weights, which would be lost.
        TypeError: `model` is none of ours.
    """
    base, keys = _base_keys(model)
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in base.modules()):
        raise ValueError("Adapters are merged into the base model's weights; call unmerge_adapter() first.")
    result = LoadResult([key for key in keys if key not in state_dict], [key for key in state_dict if key not in keys])
    current = base.state_dict()
    found = {keys[key]: tensor for key, tensor in state_dict.items() if key in keys}
    wrong = [
        f"size mismatch for {key}: {tuple(state_dict[key].shape)}, the model has {tuple(current[live].shape)}"
        for key, live in keys.items()
        if live in found and found[live].shape != current[live].shape
    ]
    if strict and result.missing_keys:
        wrong.append(f"Missing key(s) in state_dict: {', '.join(result.missing_keys)}")
    if strict and result.unexpected_keys:
        wrong.append(f"Unexpected key(s) in state_dict: {', '.join(result.unexpected_keys)}")
    if wrong:
        raise RuntimeError(f"Error(s) in loading state_dict into the base {type(base).__name__}: {'; '.join(wrong)}.")
    base.load_state_dict(found, strict=False)
    return result


def _base_keys(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """Return the plain model of an adapted one, and key without adapters -> key of its state dict as it is."""
    adapted = find_adapted(model)
    if adapted is None:
        raise TypeError(f"`model` is a {type(model).__name__}; give a PeftModel of vblora_triton.")
    base = adapted.get_base_model()
    inside = {
        f"{name}.": "base_layer." if isinstance(wrapper, BaseTunerLayer) else "original_module."
        for name, wrapper in adapted.base_model.wrappers()
    }
    keys = {}
    for live in base.state_dict():
        key: str | None = live
        # The innermost first, so that the names of those around it still fit.
        for name in sorted(inside, key=len, reverse=True):
            if key is not None and key.startswith(name):
                rest = key.removeprefix(name)
                key = name + rest.removeprefix(inside[name]) if rest.startswith(inside[name]) else None
        if key is not None:
            keys[key] = live
    return base, keys
