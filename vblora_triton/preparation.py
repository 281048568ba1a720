"""What makes a base model ready to be trained with adapters on it: dtypes, and gradients of its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vblora_triton.integrations.quantization import is_plain, keep_unpacked


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters that are not trained to `dtype`, and those that are to float32, in place.

    Quantised weights stay as they are.
    """
    for parameter in model.parameters():
        if is_plain(parameter):
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Prepare a quantised model of transformers for adapters that are trained on it, in place, and return it.

    Its parameters are frozen, those in 16 bits become float32 (norms and the output head, as a rule), and where it is
    quantised activations are checkpointed.

    Args:
        model: the base model, before adapters are put on it.
        use_gradient_checkpointing: of a quantised model; a plain one is left alone.
        gradient_checkpointing_kwargs: what `model.gradient_checkpointing_enable` is given.
        auto_clear_cache: give freed memory back to the GPU.
    """
    options = gradient_checkpointing_kwargs or {}
    keep_unpacked(model)
    method = getattr(model, "quantization_method", None)
    own_kernels = getattr(method, "value", method) in ("gptq", "aqlm", "eetq", "hqq", "torchao")
    bitsandbytes = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        half = parameter.dtype in (torch.float16, torch.bfloat16) and is_plain(parameter)
        if half and not own_kernels:
            parameter.data = parameter.data.to(torch.float32)
    if auto_clear_cache and torch.cuda.is_available() and not own_kernels:
        torch.cuda.empty_cache()
    if (bitsandbytes or own_kernels) and use_gradient_checkpointing:
        if options.get("use_reentrant", True):
            require_input_grads(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


def require_input_grads(model: Any) -> None:
    """Let gradients reach the inputs of a frozen model; a reentrant checkpoint has none for its layers otherwise."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    else:
        model.get_input_embeddings().register_forward_hook(_require_grad)


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)
