"""Fused Triton kernels for VB-LoRA and VeRA, in adapter layers that interchange with Hugging Face PEFT's."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import vblora_triton.methods  # noqa: F401 - registers them
from vblora_triton.hub import AdapterFileError
from vblora_triton.tuner import seen
from vblora_triton.tuner.config import PeftConfig, PeftType, PeftWarning, TaskType
from vblora_triton.vblora.config import VBLoRAConfig
from vblora_triton.vera.config import VeraConfig

if TYPE_CHECKING:
    from vblora_triton import ops
    from vblora_triton.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from vblora_triton.checkpoint import load_peft_weights
    from vblora_triton.exchange.checking import check_kernels
    from vblora_triton.exchange.convert import convert_to_lora, save_as_lora
    from vblora_triton.exchange.difference import diff_adapters
    from vblora_triton.exchange.inspection import inspect_adapter
    from vblora_triton.exchange.merge import merge_to_folder
    from vblora_triton.exchange.pack import pack_adapter
    from vblora_triton.injected import inject_adapter_in_model
    from vblora_triton.integrations.peft import is_patched, patch_peft, unpatch_peft
    from vblora_triton.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
        get_peft_config,
    )
    from vblora_triton.ops.dispatch import use_backend
    from vblora_triton.optim import parameter_groups
    from vblora_triton.peft_model import PeftModel, get_peft_model
    from vblora_triton.preparation import cast_mixed_precision_params, prepare_model_for_kbit_training
    from vblora_triton.state_dicts import (
        get_base_model_state_dict,
        get_peft_model_state_dict,
        set_base_model_state_dict,
        set_peft_model_state_dict,
    )
    from vblora_triton.status import get_layer_status, get_model_status
    from vblora_triton.task_models import (
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
    )
    from vblora_triton.vblora.model import VBLoRAModel
    from vblora_triton.vera.model import VeraModel

__version__ = "0.1.0"

seen.WHEN_ASKED.append("vblora_triton.integrations.in_peft:answer_in_peft")

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "AdapterFileError",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "TaskType",
    "VBLoRAConfig",
    "VBLoRAModel",
    "VeraConfig",
    "VeraModel",
    "cast_mixed_precision_params",
    "check_kernels",
    "convert_to_lora",
    "diff_adapters",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "inspect_adapter",
    "is_patched",
    "load_peft_weights",
    "merge_to_folder",
    "ops",
    "pack_adapter",
    "parameter_groups",
    "patch_peft",
    "prepare_model_for_kbit_training",
    "save_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "unpatch_peft",
    "use_backend",
]

# Imported when first asked for: they need torch and transformers, which take seconds.
_HOMES = {
    "PEFT_TYPE_TO_CONFIG_MAPPING": "mapping",
    "PEFT_TYPE_TO_PREFIX_MAPPING": "mapping",
    "PEFT_TYPE_TO_TUNER_MAPPING": "mapping",
    "get_peft_config": "mapping",
    "cast_mixed_precision_params": "preparation",
    "get_base_model_state_dict": "state_dicts",
    "prepare_model_for_kbit_training": "preparation",
    "set_base_model_state_dict": "state_dicts",
    "inject_adapter_in_model": "injected",
    "load_peft_weights": "checkpoint",
    "use_backend": "ops.dispatch",
    "check_kernels": "exchange.checking",
    "convert_to_lora": "exchange.convert",
    "save_as_lora": "exchange.convert",
    "diff_adapters": "exchange.difference",
    "inspect_adapter": "exchange.inspection",
    "merge_to_folder": "exchange.merge",
    "pack_adapter": "exchange.pack",
    "PeftModel": "peft_model",
    "get_layer_status": "status",
    "get_model_status": "status",
    "get_peft_model": "peft_model",
    "get_peft_model_state_dict": "state_dicts",
    "is_patched": "integrations.peft",
    "parameter_groups": "optim",
    "patch_peft": "integrations.peft",
    "set_peft_model_state_dict": "state_dicts",
    "unpatch_peft": "integrations.peft",
    "VBLoRAModel": "vblora.model",
    "VeraModel": "vera.model",
    **{name: "auto" for name in __all__ if name.startswith("AutoPeftModel")},
    **{name: "task_models" for name in __all__ if name.startswith("PeftModelFor")},
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("vblora_triton.ops")
    if name not in _HOMES:
        raise AttributeError(f"module 'vblora_triton' has no attribute {name!r}")
    value = getattr(import_module(f"vblora_triton.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
