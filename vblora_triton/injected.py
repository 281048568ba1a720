"""Adapters inside a plain model, which stays what it is: `inject_adapter_in_model`, and its keys in files."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vblora_triton.methods import own_config, tuner_class
from vblora_triton.tuner.model import BaseTuner

# Where a plain model keeps the tuner that put adapters on it; in a tuple, so that it is not registered as a part.
_KEPT = "_vblora_triton_tuner"


def inject_adapter_in_model(
    peft_config: Any,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter on a plain model and return that model, changed in place, without anything around it.

    Its linear layers are adapted ones, what they share (VB-LoRA's bank, VeRA's projections) is registered on the model
    under PEFT's name for it, and `model.peft_config` maps adapter names to configurations. All parameters but the
    adapter's are frozen. `get_peft_model_state_dict(model)` reads the adapter, `set_peft_model_state_dict` fills it.

    Args:
        peft_config: a configuration, PEFT's own included.
        model: a module without adapters, or one that an earlier call was given.
        adapter_name, low_cpu_mem_usage: see `get_peft_model`.
        state_dict: not supported: the configuration says which layers to adapt.
    Raises:
        ValueError, TypeError: the adapter does not fit the model, or is of another method than an earlier one.
    """
    if state_dict is not None:
        raise ValueError("`state_dict` cannot say which layers to adapt; name them in `peft_config.target_modules`.")
    config = own_config(peft_config)
    method, tuner = tuner_class(config), injected_tuner(model)
    if tuner is None:
        tuner = method(model, config, adapter_name, low_cpu_mem_usage)
        vars(model)[_KEPT] = (tuner,)
    else:
        tuner.add_adapter(adapter_name, config, low_cpu_mem_usage)
    for attribute in tuner.tuner_layer_cls.shared_layer_names:
        setattr(model, attribute, getattr(tuner, attribute))
    model.peft_config = tuner.peft_config  # type: ignore[assignment]
    return model


def injected_tuner(model: nn.Module) -> BaseTuner | None:
    """Return what put adapters on a plain model by `inject_adapter_in_model`; None for any other model."""
    kept: Any = vars(model).get(_KEPT)
    return None if kept is None else kept[0]


def plain_keys(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn the keys of an adapter's file into those of the plain model that has it inside."""
    return {
        key.removeprefix("base_model.model.").removeprefix("base_model."): tensor for key, tensor in tensors.items()
    }


def file_keys(tuner: BaseTuner, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn the keys of a plain model with an adapter inside into those of files; the latter may be there already."""
    shared = tuner.tuner_layer_cls.shared_layer_names
    keys = {key: "base_model." if key.partition(".")[0] in shared else "base_model.model." for key in tensors}
    return {key if key.startswith("base_model.") else f"{keys[key]}{key}": tensor for key, tensor in tensors.items()}
