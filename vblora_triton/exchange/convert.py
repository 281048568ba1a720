"""Adapters as standard LoRA, for engines that serve LoRA alone: the factors written down, exact, and no SVD."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vblora_triton import checkpoint
from vblora_triton.card import card_fields
from vblora_triton.exchange.output import check_new, new_folder
from vblora_triton.exchange.stored import StoredAdapter, read_stored
from vblora_triton.folder import apart
from vblora_triton.integrations.transformers import find_adapted
from vblora_triton.tuner.contents import AdapterContents, Sizes

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# vLLM's choices for --max-lora-rank.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# The only modules saved whole that vLLM takes.
VLLM_HEADS = {"classifier", "score"}


class Conversion(NamedTuple):
    """What a conversion wrote.

    folder: where.
    rank: of every layer; lora_alpha is as large, so that the scale is 1.
    layers: how many.
    bytes: of adapter_model.safetensors.
    dtype: of the factors.
    notes: what a user has to know of it, a sentence each.
    """

    folder: Path
    rank: int
    layers: int
    bytes: int
    dtype: str
    notes: tuple[str, ...]


def convert_to_lora(
    adapter: str | os.PathLike | nn.Module,
    output: str | os.PathLike | float | None = None,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
    *,
    rank: float | None = None,
    base: str | os.PathLike | nn.Module | None = None,
    dtype: str | None = None,
    engine: str | None = None,
) -> Any:
    """Write a stored adapter as a standard LoRA adapter of PEFT's format, exactly.

    VB-LoRA: A and B as they are composed. VeRA: A[:, :in] and diag(lambda_b) B[:out] diag(lambda_d). lora_alpha is r,
    so that LoRA's scale is 1. Biases and modules that were trained whole are carried along.

    Of a model, in PEFT's call form convert_to_lora(model, rank, adapter_name), nothing is written.

    Args:
        adapter: a folder, or an id on the Hub; or a PeftModel.
        output: the folder to write, which must be new. Of a model, the rank, see `rank`.
        adapter_name: of a model: which of its adapters.
        rank: of a model: the rank asked for; more than the adapter's own is filled up with zeros. A fraction, in PEFT
            the part of the singular values to keep, is met by the adapter's own.
        progressbar, compile_kwargs: taken for PEFT's sake; there is nothing that takes long.
        base: see `read_stored`. VeRA's files do not always tell the sizes of layers, and then need it.
        dtype: of the factors, "float32" by default; "float16" and "bfloat16" round them.
        engine: "vllm" checks what vLLM would refuse, and makes 16 bits the default.
    Returns:
        A Conversion; of a model, as PEFT: the LoraConfig of peft, or where that is not installed its fields, and the
        tensors by their names in files.
    Raises:
        AdapterFileError: a broken adapter; nothing was written.
        ValueError: an adapter that cannot be written so, a `base` that is needed or does not fit, `output` exists.
        TypeError: a model without adapters.
    """
    if isinstance(adapter, nn.Module):
        return _of_model(adapter, output if rank is None else rank, adapter_name)  # type: ignore[arg-type]
    if output is None or isinstance(output, (int, float)):
        raise TypeError(f"`output` is {output!r}; give the folder to write.")
    check_new(output)
    stored = read_stored(adapter, base)
    notes = _check_engine(stored, engine)
    dtype = dtype or ("float32" if engine is None else _served_dtype(stored))
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` is {dtype!r}; choose one of {', '.join(DTYPES)}.")
    if engine is not None and dtype == "float32":
        raise ValueError("`dtype` is 'float32', but vLLM serves float16 or bfloat16; choose one of them.")
    tensors = _state_dict(stored, DTYPES[dtype])
    r = _rank(tensors)
    if dtype != "float32":
        notes.append(f"the factors were rounded from float32 to {dtype}")
    if engine == "vllm":
        notes += _vllm_rank(r)
    fields = lora_fields(stored.config, r, sorted(stored.layers))
    fields["base_model_name_or_path"] = stored.config.base_model_name_or_path
    with new_folder(output) as folder:
        checkpoint.write_adapter(
            folder, tensors, json.dumps(fields, indent=2, sort_keys=True) + "\n", _card(stored.config)
        )
        size = (folder / checkpoint.SAFETENSORS_NAME).stat().st_size
    return Conversion(Path(output), r, len(stored.layers), size, dtype, tuple(notes))


def save_as_lora(
    path: str | os.PathLike,
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """Write a model's adapter as a LoRA adapter of PEFT's format into a folder; see `convert_to_lora`, also for errors.

    Args:
        path: the folder; made if need be.
        model, rank, adapter_name, progressbar, compile_kwargs: as there.
    """
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    adapted = find_adapted(model)
    fields = config if isinstance(config, dict) else config.to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}
    text = json.dumps(plain | {"inference_mode": True}, indent=2, sort_keys=True) + "\n"
    checkpoint.write_adapter(Path(path), apart(tensors), text, _card(adapted.base_model.peft_config[adapter_name]))


def lora_fields(config: Any, r: int, layers: list[str]) -> dict[str, Any]:
    """Return the fields of PEFT's LoraConfig for an adapter's factors.

    Args:
        config: the adapter's configuration, settled.
        r: rank.
        layers: names of the adapted layers.
    """
    narrowed = (config.layers_to_transform, config.layers_pattern, config.exclude_modules, config.modules_to_save)
    named = isinstance(config.target_modules, set) and not any(narrowed)
    task = config.task_type
    return {
        "peft_type": "LORA",
        "task_type": None if task is None else str(getattr(task, "value", task)),
        "auto_mapping": config.auto_mapping,
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        # Whole names say the same to everyone.
        "target_modules": sorted(config.target_modules) if named else layers,
        "fan_in_fan_out": config.fan_in_fan_out,
        "bias": config.bias if config.bias in ("none", "all") else "lora_only",
        "modules_to_save": config.modules_to_save,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def factor_tensors(
    method: type[AdapterContents], config: Any, tensors: dict[str, Tensor], layers: dict[str, Sizes], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the LoRA factors of every layer by PEFT's names in files: lora_A (r, in) and lora_B (out, r).

    Args:
        tensors: of the adapter, by file key, as a model holds them.
        layers: the sizes of the adapted layers.
        dtype: of the factors.
    Raises:
        ValueError: the method has none, or they are not finite in this dtype.
    """
    factors = {}
    for name, sizes in layers.items():
        pair = method.lora_factors(config, tensors, name, sizes.in_features, sizes.out_features)
        for which, factor in zip("AB", pair, strict=True):
            # Each in memory of its own: one matrix may be the factor of all layers.
            rounded = factor.detach().to(dtype, copy=True).contiguous()
            if not torch.isfinite(rounded).all():
                raise ValueError(f"lora_{which} of {name} is not finite in {dtype}; choose another dtype.")
            factors[f"base_model.model.{name}.lora_{which}.weight"] = rounded
    return factors


def _state_dict(stored: StoredAdapter, dtype: torch.dtype) -> dict[str, Tensor]:
    unknown = [name for name, sizes in stored.layers.items() if not sizes.exact]
    if unknown:
        name = stored.config.base_model_name_or_path
        raise ValueError(
            f"The adapter in {str(stored.folder)!r} does not say how many inputs {unknown[0]} has, and its base model, "
            f"{name!r}, is not here; give the base model (its configuration is enough)."
        )
    factors = factor_tensors(stored.method, stored.config, stored.tensors, stored.layers, dtype)
    whole = {key: t.to(dtype) if t.is_floating_point() else t for key, t in stored.beside().items()}
    return factors | {key: tensor.contiguous() for key, tensor in whole.items()}


def _rank(tensors: dict[str, Tensor]) -> int:
    return next(len(tensor) for key, tensor in tensors.items() if key.endswith(".lora_A.weight"))


def _of_model(model: nn.Module, rank: float | None, adapter_name: str) -> tuple[Any, dict[str, Tensor]]:
    adapted = find_adapted(model)
    if adapted is None:
        raise TypeError(f"`adapter` is a {type(model).__name__} without adapters; give a PeftModel of vblora_triton.")
    tuner = adapted.base_model
    tuner._check_known(adapter_name)
    config = tuner.peft_config[adapter_name]
    layers = {
        name: Sizes(layer.in_features, layer.out_features)
        for name, layer in tuner.adapted_layers()
        if adapter_name in layer.r
    }
    live = {key: tensor.detach().cpu() for key, tensor in tuner.adapter_tensors(adapter_name).items()}
    tensors = factor_tensors(type(tuner), config, live, layers, torch.float32)
    own = _rank(tensors)
    if rank is not None and rank >= 1 and rank < own:
        raise ValueError(f"`rank` is {rank}, but the factors of adapter {adapter_name!r} have {own}; give {own}.")
    extra = 0 if rank is None or rank < 1 else int(rank) - own
    for key, tensor in tensors.items() if extra else ():
        tensors[key] = nn.functional.pad(tensor, (0, 0, 0, extra) if ".lora_A." in key else (0, extra))
    fields = lora_fields(config, own + extra, sorted(layers))
    # As PEFT's: of the layers alone.
    fields |= {"bias": "none", "modules_to_save": None, "target_modules": sorted(layers)}
    try:
        from peft import LoraConfig
    except ImportError:
        return fields, tensors
    return LoraConfig(**{key: value for key, value in fields.items() if key != "peft_type"}), tensors


# vLLM.


def _check_engine(stored: StoredAdapter, engine: str | None) -> list[str]:
    """Raise ValueError for what an engine would refuse; return what it does otherwise, a sentence each."""
    if engine is None:
        return []
    if engine != "vllm":
        raise ValueError(f"`engine` is {engine!r}; supported: 'vllm'.")
    config = stored.config
    heads = sorted(set(config.modules_to_save or ()) - VLLM_HEADS)
    if config.bias != "none":
        raise ValueError(f"The adapter's `bias` is {config.bias!r}, but vLLM takes 'none' alone; merge it instead.")
    if heads:
        raise ValueError(
            f"The adapter trained {', '.join(heads)} whole, and vLLM takes only {' and '.join(sorted(VLLM_HEADS))} so; "
            "merge it instead."
        )
    if not config.base_model_name_or_path:
        raise ValueError(
            "The adapter's `base_model_name_or_path` is not set, and vLLM serves an adapter only with the model of "
            "that name; set it in adapter_config.json to what `vllm serve` is given."
        )
    return [f"vLLM takes it for a model that it serves by the name {config.base_model_name_or_path!r} alone"]


def _vllm_rank(r: int) -> list[str]:
    fits = [rank for rank in VLLM_RANKS if rank >= r]
    if not fits:
        raise ValueError(f"The adapter's rank is {r}, but vLLM takes at most {VLLM_RANKS[-1]}; merge it instead.")
    padded = f", which makes room for {fits[0]} in each layer" if fits[0] > r else ""
    return [f"its rank is {r}: start vLLM with --max-lora-rank {fits[0]} or more{padded}"]


def _served_dtype(stored: StoredAdapter) -> str:
    """Return the 16-bit dtype of the base model, where it says it, or bfloat16."""
    settings = getattr(stored.base, "config", None)
    return "float16" if getattr(settings, "dtype", None) == torch.float16 else "bfloat16"


def _card(config: Any) -> str:
    base, title = card_fields(config).get("base_model"), config.method.title
    head = [f'base_model: "{base}"'] if base else []
    lines = ["---", *head, "library_name: peft", "tags:", "- lora", "- vblora-triton", "---", ""]
    text = f"The factors of a {title} adapter, exact, as a standard LoRA adapter. It is larger than the original, and"
    return "\n".join([*lines, "# LoRA adapter", "", text, "serves where only LoRA is known.", ""])
