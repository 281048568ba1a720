"""Merging over a whole model: every check is made before the first weight is changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from vblora_triton.tuner.layer import BaseTunerLayer, ModulesToSaveWrapper


def merge_layers(
    model: nn.Module,
    layers: dict[str, BaseTunerLayer],
    adapter_names: list[str] | None,
    safe_merge: bool,
    keep: bool = True,
    progressbar: bool = False,
) -> None:
    """Merge adapters into the base weights of all layers, or of none.

    Args:
        keep: hold the base weights for `unmerge`, where a layer's `keep_base_weight` asks for it.
    Raises:
        ValueError: with `safe_merge`, a result that is not finite; a weight that is tied to the input embedding.
        TypeError: `adapter_names` is a string, or a base weight is quantised.
    """
    names = {key: layer.adapters_to_merge(adapter_names) for key, layer in layers.items()}
    _check_untied(model, [key for key in layers if names[key]], layers)
    if safe_merge:
        for key, layer in _shown(layers.items(), progressbar, "Checking"):
            layer.merged_weight(names[key], check_finite=True)
    for key, layer in _shown(layers.items(), progressbar, "Merging"):
        if names[key]:
            layer.keep_base_weight = layer.keep_base_weight and keep
            layer.merge(adapter_names=names[key])


def unmerge_layers(layers: dict[str, BaseTunerLayer]) -> None:
    """Restore the base weight of every layer that has adapters merged."""
    for layer in layers.values():
        if layer.merged:
            layer.unmerge()


def strip_model(model: nn.Module) -> None:
    """Take every adapter off a model, whoever put it on, and restore the weights that adapters were merged into."""
    found = dict(model.named_modules())
    layers = {name: module for name, module in found.items() if isinstance(module, BaseTunerLayer)}
    unmerge_layers(layers)
    heads = {name: module for name, module in found.items() if isinstance(module, ModulesToSaveWrapper)}
    unload_model(model, layers | heads, [])


def unload_model(model: nn.Module, wrappers: dict[str, Any], kept: list[str]) -> None:
    """Put the bare layers back in place of the wrappers.

    Args:
        kept: the adapters whose copies of modules stay; elsewhere the original module comes back.
    """
    for name, wrapper in wrappers.items():
        if isinstance(wrapper, ModulesToSaveWrapper):
            copies = [wrapper.modules_to_save[key] for key in kept if key in wrapper.modules_to_save]
            bare = copies[0] if copies else wrapper.original_module
        else:
            bare = wrapper.get_base_layer()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, bare)


def _check_untied(model: Any, merging: list[str], layers: dict[str, BaseTunerLayer]) -> None:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    tied = [key for key in merging if embedding is not None and layers[key].weight is embedding.weight]
    if tied:
        raise ValueError(
            f"The weight of {', '.join(tied)} is tied to the input embedding, which merging would change "
            "too; load the base model with tie_word_embeddings=False, or leave this layer out."
        )


def _shown(items: Iterable[Any], progressbar: bool, what: str) -> Iterable[Any]:
    if not progressbar:
        return items
    from tqdm.auto import tqdm

    return tqdm(list(items), desc=what)
