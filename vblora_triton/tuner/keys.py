"""The names that an adapter's parameters have in its file, and those they have in the model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vblora_triton.tuner.layer import BaseTunerLayer, ModulesToSaveWrapper


def adapter_keys(tuner: Any, adapter_name: str) -> dict[str, str]:
    """Return file key -> key in the state dict of the PeftModel, of everything that belongs to an adapter.

    The file's keys leave the adapter's name out, and the wrapper of a module that is saved whole:
    `base_model.model.L.vblora_logits_A`, `base_model.vblora_vector_bank`, `base_model.model.lm_head.weight`.

    Args:
        tuner: a BaseTuner with the adapter.
        adapter_name: which.
    """
    keys: dict[str, str] = {}
    shared = tuner.tuner_layer_cls.shared_layer_names
    for name, wrapper in tuner.wrappers():
        whole = f"base_model.model.{name}"
        if isinstance(wrapper, ModulesToSaveWrapper):
            if adapter_name in wrapper.modules_to_save:
                parts = wrapper.modules_to_save[adapter_name].state_dict()
                keys |= {f"{whole}.{key}": f"{whole}.modules_to_save.{adapter_name}.{key}" for key in parts}
        else:
            keys |= {f"{whole}.{key}": f"{whole}.{live}" for key, live in wrapper.file_names(adapter_name).items()}
    keys |= {f"base_model.{attribute}": f"base_model.{attribute}.{adapter_name}" for attribute in shared}
    for name in tuner.trained_biases[adapter_name]:
        keys[f"base_model.model.{name}"] = f"base_model.model.{live_bias_name(tuner.model, name)}"
    return keys


def buffers_outside(tuner: Any) -> dict[str, Tensor]:
    """Return key -> buffer of those that no state dict of the PeftModel holds, though an adapter may need them."""
    return {
        f"base_model.{name}.{key}": module._buffers[key]
        for name, module in tuner.named_modules()
        for key in module._non_persistent_buffers_set
        if module._buffers.get(key) is not None
    }


def live_bias_name(model: nn.Module, name: str) -> str:
    """Return what a bias is called now; other adapters may have wrapped its layer, or taken the wrapper off.

    Args:
        name: what the file of its adapter calls it, without `base_model.model.`.
    """
    owner = name.removesuffix(".bias").removesuffix(".base_layer")
    wrapped = isinstance(model.get_submodule(owner), BaseTunerLayer)
    return f"{owner}.base_layer.bias" if wrapped else f"{owner}.bias"
