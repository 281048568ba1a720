"""The base model of a stored adapter, without its weights: real, or as far as the adapter's file tells it."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vblora_triton.hub import AdapterFileError
from vblora_triton.tuner.config import TaskType
from vblora_triton.tuner.contents import Sizes
from vblora_triton.tuner.targets import ALL_LINEAR, name_matches

_ROOT = "base_model.model."

# TaskType -> the class of transformers that makes the base model.
_TASKS = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}


def empty_base(config: Any, base: str | None) -> nn.Module | None:
    """Make the base model of an adapter on the meta device, where its configuration can be read.

    Args:
        config: the adapter's configuration.
        base: a folder or a hub id; by default what the configuration names, if that is on this machine.
    Returns:
        The model without weights; None where `base` is None, and what the configuration names is not here.
    Raises:
        ValueError: `base` cannot be read, or is of no class of transformers.
    """
    import transformers

    name = base or config.base_model_name_or_path
    if not name:
        return None
    try:
        # What nobody asked for by name is not downloaded.
        settings = transformers.AutoConfig.from_pretrained(name, local_files_only=base is None)
    except (OSError, ValueError, KeyError) as error:
        if base is None:
            return None
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"The base model {base!r} cannot be read: {reason}") from error
    made = _class_of(transformers, config, settings)
    with torch.device("meta"):
        return made.from_config(settings) if hasattr(made, "from_config") else made(settings)


def _class_of(transformers: Any, config: Any, settings: Any) -> Any:
    """Return the class that the adapter was trained on: that of its task, or its own note of it, or the base's."""
    if config.task_type is not None:
        return getattr(transformers, _TASKS[TaskType(config.task_type)])
    mapping = config.auto_mapping or {}
    library, name = mapping.get("parent_library"), mapping.get("base_model_class")
    if not (isinstance(library, str) and library.partition(".")[0] == "transformers"):
        name = (settings.architectures or [None])[0]
    made = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(made, type) and issubclass(made, transformers.PreTrainedModel)):
        raise ValueError(
            f"The adapter's base model is a {name}, which is no model class of transformers; give the model itself as "
            "`base` to the function of Python."
        )
    return made


def skeleton(config: Any, stored: dict[str, Tensor], sizes: dict[str, Sizes]) -> nn.Module:
    """Make a module, on the meta device, that has the layers, and whatever else a file has tensors for, and no more.

    Args:
        stored: what the file holds, unchecked.
        sizes: of the layers.
    Raises:
        AdapterFileError: parts may be missing, which only the base model could tell.
    """
    _check_alike(config, sizes)
    whole = nn.Module()
    with torch.device("meta"):
        for name, size in sizes.items():
            bias = f"{_ROOT}{name}.base_layer.bias" in stored
            layer: nn.Module = nn.Linear(size.in_features, size.out_features, bias)
            if config.fan_in_fan_out:
                layer = Conv1D(size.out_features, size.in_features)
            _put(whole, name, layer)
        for key, tensor in stored.items():
            owner, _, leaf = key.removeprefix(_ROOT).rpartition(".")
            if key.startswith(_ROOT) and owner.removesuffix(".base_layer") not in sizes:
                part = _put(whole, owner, nn.Module())
                part._parameters[leaf] = nn.Parameter(torch.empty(tensor.shape), requires_grad=False)
    return whole


def _put(whole: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put a module in its place, and return the one that is there. Past add_module(): a file may name anything."""
    *path, last = name.split(".")
    for part in path:
        whole = whole._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
    return whole._modules.setdefault(last, module)  # type: ignore[return-value]


def _check_alike(config: Any, sizes: dict[str, Sizes]) -> None:
    """Raise AdapterFileError unless numbered layers are all there, have the same parts, and these the same sizes."""
    problem = _unlike(config, sizes)
    if problem:
        raise AdapterFileError(
            f"The adapter's {problem}. Without its base model that cannot be told from a broken file; give the base "
            "model."
        )


def _unlike(config: Any, sizes: dict[str, Sizes]) -> str | None:
    targets = config.target_modules
    if not sizes:
        return "file has no layers"
    if targets is None:
        return "configuration leaves `target_modules` open"
    strange = [name for name in sizes if targets != ALL_LINEAR and not name_matches(targets, name)]
    if strange:
        return f"file has tensors for {strange[0]}, which `target_modules` does not name"
    listed = set() if isinstance(targets, str) else targets
    unused = [target for target in sorted(listed) if not any(name_matches([target], name) for name in sizes)]
    if unused:
        return f"file has no tensors for {unused[0]} of `target_modules`"
    groups: dict[tuple[str, str], dict[int, Sizes]] = defaultdict(dict)
    for name, size in sizes.items():
        match = re.match(r"(.*?)\.(\d+)\.(.*)", name)
        if match:
            groups[match[1], match[3]][int(match[2])] = size
    numbers: dict[str, set[int]] = {}
    for (stem, _), members in groups.items():
        numbers.setdefault(stem, set()).update(members)
    in_full = set(sizes) <= listed
    for (stem, part), members in groups.items():
        if len(set(members.values())) > 1:
            return f"layers {stem}.*.{part} differ in size"
        wanted = numbers[stem] if config.layers_to_transform is not None else set(range(max(numbers[stem]) + 1))
        missing = sorted(wanted - set(members))
        if missing and not in_full:
            return f"file has no tensors for {stem}.{missing[0]}.{part}"
    return None
