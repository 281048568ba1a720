"""What state the adapters of a model are in, layer by layer and as a whole."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from vblora_triton.tuner.layer import BaseTunerLayer, ModulesToSaveWrapper
from vblora_triton.tuner.model import BaseTuner


@dataclass
class TunerLayerStatus:
    """The adapters of one layer.

    name: of the layer in the model that was adapted.
    module_type: "vblora.Linear", or "ModulesToSaveWrapper" for a module that is trained whole.
    enabled: whether its adapters act.
    active_adapters, merged_adapters, available_adapters: names.
    requires_grad: adapter -> whether its parameters are trained, "irregular" if some are.
    devices: adapter -> the types of the devices that its parameters are on, sorted.
    quantization_backend: None; the base layer's format is not told apart.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """The adapters of a model.

    base_model_type, adapter_model_type: class names, for instance "LlamaForCausalLM" and "VBLoRAModel".
    peft_types: adapter -> method, for instance "VBLORA".
    trainable_params, total_params: counts of the whole model.
    num_adapter_layers: layers with adapters, modules that are trained whole included.
    The others as in `TunerLayerStatus`; "irregular" where the layers disagree.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Literal["irregular"]
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Literal["irregular"] | None = None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Return the status of every layer with adapters, in the order of the model's modules.

    Args:
        model: a PeftModel, or any module that has adapted layers inside.
    Raises:
        ValueError: there are none.
    """
    tuner = _tuner(model)
    layers = [
        _layer_status(name, module)
        for name, module in tuner.named_modules()
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper))
    ]
    if not layers:
        raise ValueError(
            f"No adapter layers found in the model: `model` is a {type(model).__name__}. Give one that "
            "get_peft_model() or PeftModel.from_pretrained() returned."
        )
    return layers


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """Return the status of a model's adapters taken together.

    Args:
        model: a PeftModel, or any module that has adapted layers inside.
    Raises:
        ValueError: there are none.
    """
    layers, tuner = get_layer_status(model), _tuner(model)
    configs = getattr(tuner, "peft_config", {})
    plain = tuner.model if configs else tuner
    trained, total = count_parameters(model)
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    partly = any(set(merged) & set(layer.available_adapters) - set(layer.merged_adapters) for layer in layers)
    active = _agreed(tuple(layer.active_adapters) for layer in layers)
    available = sorted({name for layer in layers for name in layer.available_adapters})
    return TunerModelStatus(
        base_model_type=type(plain).__name__,
        adapter_model_type=type(tuner).__name__ if configs else "None",
        peft_types={name: config.peft_type.value for name, config in configs.items()},
        trainable_params=trained,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_agreed(layer.enabled for layer in layers),
        active_adapters="irregular" if active == "irregular" else list(active),
        merged_adapters="irregular" if partly else merged,
        requires_grad={
            name: _agreed(layer.requires_grad[name] for layer in layers if name in layer.requires_grad)
            for name in available
        },
        available_adapters=available,
        devices={name: sorted({d for layer in layers for d in layer.devices.get(name, ())}) for name in available},
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count the parameters that are trained, and all."""
    trained = total = 0
    for parameter in model.parameters():
        # bitsandbytes packs two 4-bit weights into each byte.
        packed = 2 * parameter.element_size() if type(parameter).__name__ == "Params4bit" else 1
        count = (parameter.numel() or getattr(parameter, "ds_numel", 0)) * packed
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total


def _tuner(model: nn.Module) -> Any:
    """Return the adapted model inside a PeftModel; any other model itself."""
    inner = getattr(model, "base_model", None)
    return inner if isinstance(inner, BaseTuner) else model


def _layer_status(name: str, layer: Any) -> TunerLayerStatus:
    tensors = {adapter: layer.tensors_of(adapter) for adapter in layer.available_adapters()}
    return TunerLayerStatus(
        name=name,
        module_type=repr(layer).partition("(")[0],
        enabled=not layer.disable_adapters,
        active_adapters=list(layer.active_adapters),
        merged_adapters=list(getattr(layer, "merged_adapters", ())),
        requires_grad={adapter: _agreed(t.requires_grad for t in own) for adapter, own in tensors.items()},
        available_adapters=sorted(tensors),
        devices={adapter: sorted({tensor.device.type for tensor in own}) for adapter, own in tensors.items()},
    )


def _agreed(values: Iterable[Hashable]) -> Any:
    """Return the value that all share, or "irregular"."""
    different = set(values)
    return different.pop() if len(different) == 1 else "irregular"
