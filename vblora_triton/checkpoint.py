"""Adapter files: a folder with adapter_model.safetensors, adapter_config.json and a model card, as PEFT has it."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vblora_triton.card import CARD_NAME, model_card
from vblora_triton.folder import BIN_NAME, SAFETENSORS_NAME, WEIGHT_NAMES, apart, changing, read_tensors, read_whole
from vblora_triton.hub import CONFIG_NAME, AdapterFileError, local_folder
from vblora_triton.tuner.config import PeftConfig, replacing
from vblora_triton.tuner.file_keys import adapter_keys, buffers_outside
from vblora_triton.tuner.layer import BaseTunerLayer
from vblora_triton.tuner.model import BaseTuner
from vblora_triton.tuner.sharding import class_of, is_writer, refuse_parted, whole
from vblora_triton.tuner.undo import copy_all

# Keys that PEFT adds for every ".bias" it comes across, inside the wrappers of modules that are saved anyway.
_WRAPPER_BIAS = re.compile(r"\.(original_module|modules_to_save)\..*bias$")


# Weights on disk: where they are, and the tensors by key.
File = tuple[Path, dict[str, Tensor]]


class LoadResult(NamedTuple):
    """What was left over when an adapter was loaded: nothing, for a file that does not fit is refused."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def adapter_state_dict(
    tuner: BaseTuner, adapter_name: str, state_dict: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return what the file of an adapter holds, by key; brought together by all processes, where FSDP2 has sharded it.

    Args:
        tuner: the model with the adapter.
        adapter_name: which.
        state_dict: take the tensors from this state dict of the PeftModel, instead of the model itself.
    Raises:
        ValueError: the state dict lacks parameters of the adapter, ZeRO-3 has split them, or the adapter cannot be
            saved in this form.
    """
    keys = {_unsharded(key): _unsharded(live) for key, live in adapter_keys(tuner, adapter_name).items()}
    if state_dict is None:
        refuse_parted(tuner, keys.values())
        tensors = tuner.adapter_tensors(adapter_name)
    else:
        state_dict = {_unsharded(key): tensor for key, tensor in buffers_outside(tuner).items()} | state_dict
        lacking = [live for live in keys.values() if live not in state_dict]
        if lacking:
            raise ValueError(
                f"`state_dict` lacks {_some(lacking)} of adapter {adapter_name!r}; give the state dict of "
                "the whole PeftModel, or leave it out."
            )
        tensors = {key: state_dict[live] for key, live in keys.items()} | tuner.biases_aside(adapter_name)
    empty = [key for key, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise ValueError(
            f"Adapter {adapter_name!r} has no values yet: {_some(empty)} is on the meta device; load or "
            "initialise it before saving."
        )
    return tuner.pack(tuner.peft_config[adapter_name], {key: whole(tensor.detach()) for key, tensor in tensors.items()})


def save_adapters(
    tuner: BaseTuner,
    save_directory: str | os.PathLike,
    adapter_names: list[str],
    state_dict: dict[str, Tensor] | None = None,
    safe: bool = True,
    write: bool = True,
) -> None:
    """Write adapters with their configurations and model cards; every one is read before the first is written.

    "default" goes into the folder itself, another adapter into a folder of its name inside. Of a model that FSDP2 has
    sharded the first process writes, and all must call.

    Args:
        state_dict: see `adapter_state_dict`.
        safe: see `write_adapter`.
        write: else only check that it could be done.
    Raises:
        ValueError: `save_directory` is a file, or an adapter cannot be saved in this form.
    """
    if not adapter_names:
        raise ValueError(
            "There is no adapter to save: unload() or merge_and_unload() took it off, or `selected_adapters` is empty. "
            "Save a merged model by its own save_pretrained()."
        )
    if Path(save_directory).is_file():
        raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file: `save_directory`.")
    for name in adapter_names:
        # A field may have been set since, such as save_only_topk_weights.
        tuner.peft_config[name].check()
    states = {name: apart(adapter_state_dict(tuner, name, state_dict)) for name in adapter_names}
    kind = class_of(tuner.model)
    for name, tensors in states.items() if write and is_writer(tuner) else ():
        config = tuner.peft_config[name]
        config.base_model_name_or_path = (
            config.base_model_name_or_path or getattr(tuner.model, "name_or_path", None) or None
        )
        changed: dict[str, Any] = {"inference_mode": True}
        if config.task_type is None:
            changed["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        if any(getattr(config, field) is not None for field in config.own_fields):
            # PEFT passes over what it does not know; whole names say the same to it.
            changed["target_modules"] = sorted(key for key, layer in tuner.adapted_layers() if name in layer.r)
        folder = Path(save_directory) if name == "default" else Path(save_directory, name)
        # The card names a base model that can be had by its name.
        told = copy.copy(config)
        if not hasattr(tuner.model, "config"):
            told.base_model_name_or_path = None
        write_adapter(folder, tensors, config.to_json(**changed), model_card(told), safe)


def write_adapter(folder: Path, tensors: dict[str, Tensor], config_text: str, card: str, safe: bool = True) -> None:
    """Write an adapter's weights, configuration and model card into a folder.

    Weights and configuration take the places of the old ones together; see `folder.changing`. A model card that is
    there is left alone.

    Args:
        safe: safetensors; else torch.save. The other kind's file is removed, for a reader would prefer one of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with changing(folder) as new:
        if safe:
            save_file(tensors, new / SAFETENSORS_NAME, metadata={"format": "pt"})
        else:
            torch.save(tensors, new / BIN_NAME)
        (new / CONFIG_NAME).write_text(config_text, encoding="utf-8")
    if not (folder / CARD_NAME).exists():
        with replacing(folder / CARD_NAME) as readme:
            readme.write_text(card, encoding="utf-8")


def read_files(folder: Path, config: Any = None, missing: Any = None) -> tuple[Any, File]:
    """Read the configuration, unless one is given, and the weights of an adapter's folder, both of one save.

    Args:
        missing: the configuration where the folder has none.
    Returns:
        The configuration; the weights' file and what it holds.
    Raises:
        AdapterFileError: a file is missing or broken.
    """

    def read() -> tuple[Any, File]:
        found = config
        if found is None:
            there = missing is None or (folder / CONFIG_NAME).is_file()
            found = PeftConfig.from_pretrained(folder) if there else missing
        return found, read_tensors(folder)

    return read_whole(folder, read)


def load_peft_weights(
    model_id: str | os.PathLike,
    device: str | torch.device | None = None,
    key_mapping: dict[str, str] | None = None,
    subfolder: str | None = None,
    **download: Any,
) -> dict[str, Tensor]:
    """Read what the file of a saved adapter holds, by key.

    Args:
        model_id: a folder with a saved adapter, or its id on the Hub.
        device: where to put the tensors; the CPU by default.
        key_mapping: see `rename_keys`.
        subfolder, download: see `hub.local_folder`.
    Raises:
        AdapterFileError: there is no such file, or it cannot be read.
    """
    _, tensors = read_tensors(local_folder(model_id, WEIGHT_NAMES, subfolder, **download))
    return {key: tensor.to(device or "cpu") for key, tensor in rename_keys(tensors, key_mapping).items()}


def rename_keys(tensors: dict[str, Tensor], key_mapping: dict[str, str] | None) -> dict[str, Tensor]:
    """Rename the modules that the keys of an adapter's file name, for a model that was laid out otherwise then.

    Args:
        key_mapping: expression -> replacement, as `_checkpoint_conversion_mapping` of a transformers model has them;
            the first that is found in a key, "base_model.model." left out, counts.
    """
    renamed = {}
    for key, tensor in tensors.items():
        prefix = next((p for p in ("base_model.model.", "base_model.") if key.startswith(p)), "")
        inner = key.removeprefix(prefix)
        for pattern, replacement in (key_mapping or {}).items():
            inner, count = re.subn(pattern, replacement, inner)
            if count:
                break
        renamed[prefix + inner] = tensor
    return renamed


def fitting(
    tuner_class: type[BaseTuner],
    config: Any,
    expected: dict[str, tuple[int, ...]],
    file: File,
    is_trainable: bool,
    key_mapping: dict[str, str] | None = None,
) -> dict[str, Tensor]:
    """Check that an adapter's weights are what a model expects. Touches no model.

    Args:
        expected: file key -> shape, of the adapter in its full form.
        file: from `read_files`.
        is_trainable: the adapter is to be trained.
        key_mapping: see `rename_keys`.
    Returns:
        What the model is to hold, by key.
    Raises:
        AdapterFileError: missing or unknown keys, wrong shapes or dtypes, values that are not finite, indices out of
            range, in one error that names them all; or `is_trainable`, and the file serves inference only.
    """
    path, stored = file
    stored = rename_keys(stored, key_mapping)
    tensors, inference_only = fit_tensors(tuner_class, config, expected, stored, str(path))
    if is_trainable and inference_only:
        raise AdapterFileError(
            f"`is_trainable` is True, but the adapter in {str(path.parent)!r} was saved as top-k weights, which hold "
            "too little for training; load one saved in full (save_only_topk_weights=False)."
        )
    return tensors


def fit_tensors(
    tuner_class: type[BaseTuner],
    config: Any,
    expected: dict[str, tuple[int, ...]],
    stored: dict[str, Tensor],
    source: str,
) -> tuple[dict[str, Tensor], bool]:
    """Return what the model is to hold, by key, and whether it serves inference only; see `fitting`."""
    if getattr(config, "bias", "none") == "all":
        stored = {key: tensor for key, tensor in stored.items() if not _WRAPPER_BIAS.search(key)}
    broken: dict[str, str] = {}
    tensors, expected, inference_only = tuner_class.unpack(config, stored, expected, broken)
    missing = [key for key in expected if key not in tensors]
    unknown = [key for key in tensors if key not in expected]
    problems = [
        *([f"missing {_some(missing)}"] if missing else []),
        *([f"unknown {_some(unknown)}"] if unknown else []),
    ]
    for key in expected.keys() & tensors.keys():
        found, shape = tuple(tensors[key].shape), tuple(expected[key])
        right = found == shape
        problem = tuner_class.tensor_problem(key, tensors[key]) if right else f"shape {found}, {shape} is needed"
        if problem:
            broken[key] = problem
    problems += [f"{key}: {problem}" for key, problem in sorted(broken.items())]
    if problems:
        raise AdapterFileError(f"{source} does not fit the model and {CONFIG_NAME}: {_some(problems, '; ')}.")
    return tensors, inference_only


@contextmanager
def blaming(folder: Path) -> Iterator[None]:
    """Let what is wrong with a configuration be said with the name of its file, as an AdapterFileError."""
    try:
        yield
    except AdapterFileError:
        raise
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"{folder / CONFIG_NAME} does not fit the model: {error}") from error


def refill_config(config: Any, stored: Any) -> Any:
    """Return the configuration by which to read a file for an adapter that is there: its own, but `file_fields`.

    Raises:
        AdapterFileError: the values in the file mean something else than those of the adapter, by its `fixed_fields`.
    """
    read = copy.copy(config)
    if not isinstance(stored, type(config)):
        return read
    for name in config.fixed_fields:
        if getattr(stored, name) != getattr(config, name):
            raise AdapterFileError(
                f"`{name}` is {getattr(stored, name)!r} in the file's {CONFIG_NAME}, but {getattr(config, name)!r} of "
                "the adapter that is to take its values; load it under another name, or delete that adapter first."
            )
    for name in config.file_fields:
        setattr(read, name, getattr(stored, name))
    return read


def fill_adapter(
    tuner: BaseTuner, adapter_name: str, tensors: dict[str, Tensor], autocast_adapter_dtype: bool, keep_dtype: bool
) -> None:
    """Put checked tensors into an adapter that is on the model; last of all into those that have values already.

    A parameter that has values keeps its identity, for an optimizer may hold it; one on the meta device is replaced.

    Args:
        tensors: key -> value, from `fitting`.
        autocast_adapter_dtype: parameters that were on the meta device become float32, or stay float64.
        keep_dtype: where they do not, they keep the file's dtype instead of taking that of the base layers' weights.
    Raises:
        AdapterFileError: values that do not fit the dtype that the model gives them. What has changed by then is for
            the caller to undo.
    """
    base = next((layer.base_dtype for _, layer in tuner.adapted_layers()), torch.float32)
    done = tuner.set_form(adapter_name, tensors)
    aside, written = tuner.biases_aside(adapter_name), []
    for key, live in adapter_keys(tuner, adapter_name).items():
        if key in done:
            continue
        owner_name, _, leaf = live.removeprefix("base_model.").rpartition(".")
        owner = tuner.get_submodule(owner_name)
        current = aside.get(key, getattr(owner, leaf))
        own = isinstance(owner, nn.ParameterDict) and current.is_meta
        dtype = current.dtype
        if own and autocast_adapter_dtype:
            dtype = torch.promote_types(torch.float32, tensors[key].dtype)
        elif own:
            dtype = tensors[key].dtype if keep_dtype else base
        device = _device(tuner, owner_name) if current.is_meta else current.device
        value = _converted(key, tensors[key], dtype, device)
        if key in aside:
            tuner.keep_biases(adapter_name, {key: value})
        elif not current.is_meta:
            written.append((current, value))
        elif isinstance(current, nn.Parameter):
            setattr(owner, leaf, nn.Parameter(value, requires_grad=current.requires_grad))
        else:
            setattr(owner, leaf, value)
    copy_all(written)


def _converted(key: str, value: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a value as a model is to hold it; AdapterFileError if it cannot be held so."""
    if value.is_floating_point() != dtype.is_floating_point:
        raise AdapterFileError(f"{key} is of dtype {value.dtype}, but the model holds {dtype} there.")
    converted = value.to(device, dtype)
    if (converted.isinf() & ~value.to(device).isinf()).any():
        largest = value[value.isfinite()].abs().max().item()
        raise AdapterFileError(
            f"{key} has values up to {largest:g}, which {dtype}, its dtype in the model, cannot hold."
        )
    return converted


def _unsharded(key: str) -> str:
    """Return a key as it is without FSDP, version 1, which puts a module of its own around others."""
    return key.replace("_fsdp_wrapped_module.", "")


def _device(tuner: BaseTuner, owner_name: str) -> torch.device:
    """Return where a parameter of an adapter belongs: with its layer's weight, or where the model begins."""
    layer = tuner.get_submodule(owner_name.rpartition(".")[0])
    device = layer.base_device if isinstance(layer, BaseTunerLayer) else next(tuner.model.parameters()).device
    if device.type == "meta":
        # Where accelerate computes what it keeps on the CPU or on disk; a model without values has no such hook.
        module = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        return torch.device(getattr(getattr(module, "_hf_hook", None), "execution_device", None) or "cpu")
    return device


def _some(items: list[str], separator: str = ", ", most: int = 12) -> str:
    """Join items, the first dozen of many."""
    more = f"{separator}and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more
