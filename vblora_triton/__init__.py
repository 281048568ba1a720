"""Fused Triton kernels for VB-LoRA and VeRA, in adapter layers that interchange with Hugging Face PEFT's."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import vblora_triton.methods  # noqa: F401 - registers them
from vblora_triton.hub import AdapterFileError
from vblora_triton.tuner.config import PeftConfig, PeftType, TaskType
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
    from vblora_triton.checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
    from vblora_triton.exchange.convert import convert_to_lora
    from vblora_triton.exchange.difference import diff_adapters
    from vblora_triton.exchange.inspection import inspect_adapter
    from vblora_triton.exchange.merge import merge_to_folder
    from vblora_triton.exchange.pack import pack_adapter
    from vblora_triton.integrations.peft import is_patched, patch_peft, unpatch_peft
    from vblora_triton.ops.dispatch import use_backend
    from vblora_triton.optim import parameter_groups
    from vblora_triton.peft_model import PeftModel, get_peft_model
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

__all__ = [
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
    "TaskType",
    "VBLoRAConfig",
    "VBLoRAModel",
    "VeraConfig",
    "VeraModel",
    "convert_to_lora",
    "diff_adapters",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inspect_adapter",
    "is_patched",
    "merge_to_folder",
    "ops",
    "pack_adapter",
    "parameter_groups",
    "patch_peft",
    "set_peft_model_state_dict",
    "unpatch_peft",
    "use_backend",
]

# Imported when first asked for: they need torch and transformers, which take seconds.
_HOMES = {
    "use_backend": "ops.dispatch",
    "convert_to_lora": "exchange.convert",
    "diff_adapters": "exchange.difference",
    "inspect_adapter": "exchange.inspection",
    "merge_to_folder": "exchange.merge",
    "pack_adapter": "exchange.pack",
    "PeftModel": "peft_model",
    "get_layer_status": "status",
    "get_model_status": "status",
    "get_peft_model": "peft_model",
    "get_peft_model_state_dict": "checkpoint",
    "is_patched": "integrations.peft",
    "parameter_groups": "optim",
    "patch_peft": "integrations.peft",
    "set_peft_model_state_dict": "checkpoint",
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
