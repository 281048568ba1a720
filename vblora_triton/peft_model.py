"""`get_peft_model`: a new adapter on a model, in the class of its task. PeftModel itself is in model.py."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from vblora_triton.methods import own_config, tuner_class
from vblora_triton.task_models import TASK_CLASSES, PeftModel
from vblora_triton.tuner.config import PeftConfig
from vblora_triton.tuner.injection import has_adapters
from vblora_triton.tuner.merging import strip_model
from vblora_triton.tuner.model import BaseTuner
from vblora_triton.tuner.state import check_adapter_name

__all__ = ["TASK_CLASSES", "PeftModel", "get_peft_model"]


def is_adapted(model: Any) -> bool:
    """Say whether a plain model has adapters inside; a PeftModel, or a module that holds one, is no plain model."""
    return (
        isinstance(model, nn.Module)
        and has_adapters(model)
        and not any(isinstance(module, BaseTuner) for module in model.modules())
    )


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put a new adapter on a model, in place, and return the model that trains, runs and saves it.

    Args:
        model: the base model, usually of transformers; its own parameters are frozen. Adapters that an earlier call
            put on it are taken off, with a warning.
        peft_config: what to put on it, for instance a VBLoRAConfig. Kept, and completed: what `target_modules` stood
            for and where the base model came from are filled in.
        adapter_name: its name.
        mixed: adapters of different methods at once; not supported.
        autocast_adapter_dtype: adapter parameters in float32; else in the dtype of the base layer's weight.
        revision: the revision of the base model, noted in the configuration.
        low_cpu_mem_usage: make the parameters on the meta device, to be filled by a loader.
    Returns:
        A PeftModel, of the class that `peft_config.task_type` names.
    Raises:
        ValueError, TypeError: the adapter does not fit the model; model and configuration are as they were.
    """
    if mixed:
        raise ValueError("`mixed` is True; adapters of different methods on one model are not supported: leave it out.")
    peft_config = own_config(peft_config)
    method = tuner_class(peft_config)
    kind = PeftModel.class_for(peft_config)
    if is_adapted(model):
        check_adapter_name(adapter_name)
        method.plan(peft_config, model, kind.task_heads)
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time: `model` carried adapters of an earlier call "
            "of get_peft_model(). They are taken off, and the model that call returned is not to be used any more. To "
            "have several, use add_adapter().",
            stacklevel=2,
        )
        strip_model(model)
    adapted = kind(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
    # A model made from a configuration has the empty string for a name.
    old, new = peft_config.base_model_name_or_path, getattr(model, "name_or_path", None)
    if old and new and old != new:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{old}' to '{new}'. Please ensure that the "
            "correct base model is loaded when loading this checkpoint.",
            stacklevel=2,
        )
    peft_config.base_model_name_or_path = new or old
    if revision is not None:
        peft_config.revision = revision
    return adapted
