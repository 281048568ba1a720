"""What putting an adapter on a model will do, worked out and checked before the model is touched."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from vblora_triton.tuner.config import PeftConfig
from vblora_triton.tuner.layer import BaseTunerLayer, ModulesToSaveWrapper, UnsupportedTargetError, linear_features
from vblora_triton.tuner.targets import (
    find_targets,
    name_matches,
    never_called,
    original_modules,
    resolve_targets,
    warn_of_idle_names,
)


@dataclass(frozen=True)
class InjectionPlan:
    """An adapter's configuration with everything open in it settled, and the modules that it means.

    config: a copy; `target_modules`, `modules_to_save` and `fan_in_fan_out` are final.
    targets: name in the model -> the linear layer, without wrappers.
    saved: name in the model -> module to train in full, without wrappers.
    biases: name in the model -> shape, of the biases that are trained and saved.
    """

    config: Any
    targets: dict[str, nn.Module]
    saved: dict[str, nn.Module]
    biases: dict[str, tuple[int, ...]]

    def features(self) -> dict[str, tuple[int, int]]:
        """Return the targets' (in_features, out_features) by name."""
        sizes = {name: linear_features(module) for name, module in self.targets.items()}
        return {name: size for name, size in sizes.items() if size is not None}


def make_plan(
    config: Any, model: nn.Module, defaults: dict[str, list[str] | str], heads: Sequence[str] = ()
) -> InjectionPlan:
    """Settle which modules of a model an adapter adapts, saves and trains. Changes nothing.

    Args:
        config: the adapter's configuration.
        defaults: `model_type` -> the usual targets.
        heads: names that a task trains in full, where the model has them.
    Returns:
        The plan; sizes are the method's to check.
    Raises:
        UnsupportedTargetError: a target that cannot carry an adapter.
        ValueError: no target, a module to save that does not exist, a field of the configuration.
    """
    settled = copy.copy(config)
    settled.check()
    modules = dict(original_modules(model))
    for name in settled.modules_to_save or ():
        if name not in heads and not any(name_matches([name], key) for key in modules):
            raise ValueError(
                f"`modules_to_save` names {name!r}, which this model does not have; give the end of a "
                f"module's name, for instance one of {', '.join(child for child, _ in model.named_children())}."
            )
    if heads:
        settled.modules_to_save = list(dict.fromkeys([*(settled.modules_to_save or ()), *heads]))
    saved = {key: module for key, module in modules.items() if name_matches(settled.modules_to_save, key)}
    # The whole is saved, not its parts again.
    saved = {key: module for key, module in saved.items() if not any(key.startswith(f"{whole}.") for whole in saved)}

    settled.target_modules = resolve_targets(settled, model, defaults)
    settled.check()
    targets = find_targets(settled, model)
    warn_of_idle_names(config.target_modules, model, defaults)
    _check_kinds(targets, modules)
    layouts = {isinstance(module, Conv1D) for module in targets.values()}
    if len(layouts) == 1:
        settled.fan_in_fan_out = True in layouts
    return InjectionPlan(settled, targets, saved, _trained_biases(settled, model, targets, saved))


def _check_kinds(targets: dict[str, nn.Module], modules: dict[str, nn.Module]) -> None:
    wrong = [f"{name} ({type(module).__name__})" for name, module in targets.items() if not linear_features(module)]
    if wrong:
        raise UnsupportedTargetError(
            f"Target module {', '.join(wrong)} is not supported. Currently, only `torch.nn.Linear` and "
            "`transformers.pytorch_utils.Conv1D` are, and quantised layers whose class is called Linear: name such in "
            "`target_modules`, or take these out with `exclude_modules`."
        )
    unreachable = [name for name in targets if never_called(modules, name)]
    if unreachable:
        raise UnsupportedTargetError(
            f"`target_modules` matches {', '.join(unreachable)} of nn.MultiheadAttention, which "
            "reads their weights without calling them, so that an adapter would have no effect; "
            "take them out with `exclude_modules`."
        )


def _trained_biases(
    config: PeftConfig, model: nn.Module, targets: dict[str, nn.Module], saved: dict[str, nn.Module]
) -> dict[str, tuple[int, ...]]:
    """Name the biases that `config.bias` trains, as the state dict names them where this is the only adapter."""
    mode = getattr(config, "bias", "none")
    biases = {}
    for name, module in original_modules(model):
        if mode == "none" or is_saved_part(name, saved) or not (mode == "all" or name in targets):
            continue
        bias = module._parameters.get("bias")
        if bias is not None:
            biases[f"{name}.base_layer.bias" if name in targets else f"{name}.bias"] = tuple(bias.shape)
    return biases


def is_saved_part(name: str, saved: dict[str, nn.Module]) -> bool:
    """Say whether a module is one of those saved whole, or lies in one."""
    return any(name == whole or name.startswith(f"{whole}.") for whole in saved)


def has_adapters(model: nn.Module) -> bool:
    """Say whether any module of the model is an adapted or a wrapped one."""
    return any(isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)) for module in model.modules())


def walk_wrappers(model: nn.Module, layer_class: Any) -> Iterator[tuple[str, Any]]:
    """Walk the adapted layers of a class and the modules that are saved whole, by name."""
    seen, ahead = set(), [("", model)]
    while ahead:
        name, module = ahead.pop()
        if module in seen:
            continue
        seen.add(module)
        if isinstance(module, (layer_class, ModulesToSaveWrapper)):
            yield name, module
        # Nothing is adapted inside an adapted layer, and what each of its adapters has there can be much.
        if not isinstance(module, layer_class):
            below = [(f"{name}.{child}" if name else child, part) for child, part in module.named_children()]
            ahead += reversed(below)


def check_plain(model: Any) -> None:
    """Raise TypeError unless `model` is a module, ValueError if it carries adapters."""
    if not isinstance(model, nn.Module):
        hint = " AutoPeftModel.from_pretrained() loads the base model too." if isinstance(model, str) else ""
        raise TypeError(f"`model` is of type {type(model).__name__}; give a torch.nn.Module.{hint}")
    if has_adapters(model):
        raise ValueError(
            "`model` carries adapters already; add another with add_adapter() of the model that put them on, or take "
            "them off with unload() or merge_and_unload() first."
        )
