"""Models that several processes train: values that FSDP2 has split, and what would go wrong unseen."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vblora_triton.tuner.config import PeftWarning


def is_sharded(tensor: Any) -> bool:
    """Say whether this process holds a part of a tensor only (torch's DTensor)."""
    return hasattr(tensor, "full_tensor")


def is_model_sharded(model: nn.Module) -> bool:
    """Say whether FSDP2 has split parameters of a model, or of a part of it."""
    # What a forward pass has brought together goes back to its parts when a state dict is asked for.
    return is_distributed() and any(map(is_sharded, model.state_dict().values()))


def whole(tensor: Any) -> Tensor:
    """Return a tensor that may be sharded with all its values; every process must call it, at the same time."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def like(value: Tensor, target: Any) -> Tensor:
    """Return a value as what may be written into a target: its part of it, where that is sharded."""
    if not is_sharded(target) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has the same value: nothing is sent.
    value = value.to(target.device, target.dtype)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def is_distributed() -> bool:
    """Say whether this is one of several processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_writer(model: nn.Module) -> bool:
    """Say whether this process writes a model's files: of one that is sharded the first of those that share it."""
    if not is_model_sharded(model):
        return True
    mesh = next(tensor.device_mesh for tensor in model.state_dict().values() if is_sharded(tensor))
    # Of a mesh with other dimensions, such as copies of all shards, this one may be a slice.
    return torch.distributed.get_rank() == mesh._get_root_mesh().mesh.min().item()


def class_of(module: nn.Module) -> type:
    """Return a module's class, without the one that fully_shard() puts over it."""
    kind = type(module)
    return kind.__bases__[-1] if kind.__bases__[0].__name__ == "FSDPModule" else kind


def refuse_parted(tuner: Any, names: Iterable[str]) -> None:
    """Raise ValueError if DeepSpeed ZeRO-3 has taken away the values of parameters, named as in the PeftModel."""
    parameters = dict(tuner.named_parameters("base_model"))
    for name in names:
        shape = getattr(parameters.get(name), "ds_shape", None)
        if shape is not None and shape != parameters[name].shape:
            raise ValueError(
                f"DeepSpeed ZeRO-3 has split {name} over the processes; save inside `with deepspeed.zero."
                "GatheredParameters([p for p in model.parameters() if p.requires_grad]):`, in every process, with "
                "`is_main_process` in one of them, or give `state_dict`."
            )


NOT_MERGED = (
    "and its weights cannot be merged into; save the adapter, and merge it on disk, by `vblora-triton merge`, or in "
    "one process."
)
NOT_DELETED = "which would put an adapter's parameters back that was deleted; delete it before, or load without it."
NOT_UNLOADED = "and its base model alone could not be called; load that anew."


def refuse_sharded(model: nn.Module, reason: str = NOT_MERGED) -> None:
    """Raise TypeError if FSDP2 has split a model; `reason` ends the sentence."""
    if is_model_sharded(model):
        raise TypeError(f"The model is sharded by FSDP2, {reason}")


# Models -> the names of the parameters that their processes were seen to train together.
_averaged: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()


def check_processes(model: Any) -> None:
    """Check, where several processes train a PeftModel, that the gradients of all they train come together.

    Raises:
        RuntimeError: see `check_averaged` and `check_checkpoints`.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and is_distributed()):
        return
    tuner = model.base_model
    shared = [tensor for name in tuner.tuner_layer_cls.shared_layer_names for tensor in getattr(tuner, name).values()]
    check_checkpoints(tuner.model, shared)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if _averaged.get(model) != trained and check_averaged(model):
        _averaged[model] = trained


def check_averaged(model: nn.Module) -> bool:
    """Check that FSDP2, where it shards a part of a model, averages the gradients of all that is trained.

    Returns:
        Whether it shards any.
    Raises:
        RuntimeError: a trained parameter belongs to none of its groups: each process would train its own.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    found = [] if fsdp is None else [part for part in model.modules() if isinstance(part, fsdp.FSDPModule)]
    if not found:
        return False
    parameters = {id(held): own for own in _fsdp_parameters(found) for held in _versions(own)}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in parameters]
    if lost:
        raise RuntimeError(
            f"FSDP shards parts of the model, but not {lost[0]}{f' and {len(lost) - 1} more' if lost[1:] else ''}: "
            "their gradients would stay different in every process. Call fully_shard() on the whole PeftModel last, "
            "or vblora_triton.distributed.shard() in its place; put adapters on before that."
        )
    trained = [own for own in parameters.values() if own.sharded_param.requires_grad]
    for dtype in {own.param_dtype for own in trained if getattr(own, "param_dtype", None)}:
        warnings.warn(
            f"FSDP rounds the adapter to {dtype} in every forward pass, as its mixed precision says; load the base in "
            "that dtype, and leave mixed precision (`param_dtype`) out: the adapter then stays in its own.",
            PeftWarning,
            stacklevel=4,
        )
    return True


def check_checkpoints(model: nn.Module, shared: list[Tensor]) -> None:
    """Check that DDP can follow a model whose layers are computed anew in backward.

    Args:
        shared: what several layers read.
    Raises:
        RuntimeError: some of it is trained, checkpoints are reentrant, and DDP was not told that steps are alike.
    """
    ddp = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    if ddp is None or ddp.static_graph or not any(tensor.requires_grad for tensor in shared):
        return
    for part in model.modules():
        checkpoint = getattr(part, "_gradient_checkpointing_func", None)
        if part.training and getattr(part, "gradient_checkpointing", False) and checkpoint is not None:
            if getattr(checkpoint, "keywords", {}).get("use_reentrant"):
                raise RuntimeError(
                    "DDP takes the gradient of the vector bank for complete after the first of the layers that share "
                    "it, because gradient checkpointing is reentrant; give gradient_checkpointing_kwargs="
                    "{'use_reentrant': False}, or DistributedDataParallel(..., static_graph=True)."
                )
            return


def _fsdp_parameters(modules: list[Any]) -> list[Any]:
    """Return what FSDP2 keeps of each parameter that it manages, in these modules and in what is around them."""
    states = {module._get_fsdp_state() for module in modules}
    # Once it has run, the outermost one knows all.
    states |= {other for state in list(states) for other in state._state_ctx.all_states}
    groups: list[Any] = []
    for state in states:
        # torch 2.11 has one group of a module, or None.
        groups += getattr(state, "_fsdp_param_groups", None) or filter(None, [state._fsdp_param_group])
    return [parameter for group in groups for parameter in group.fsdp_params]


def _versions(parameter: Any) -> list[Any]:
    """Return the parameters, sharded and brought together, of which one is in the module at a time."""
    return [parameter.sharded_param, getattr(parameter, "_unsharded_param", None)]
