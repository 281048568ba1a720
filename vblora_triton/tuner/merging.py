"""Merging over a whole model: every check is made before the first weight is changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vblora_triton.integrations import quantization
from vblora_triton.tuner.biases import Swap
from vblora_triton.tuner.layer import BaseTunerLayer, ModulesToSaveWrapper
from vblora_triton.tuner.sharding import NOT_UNLOADED, refuse_sharded


class Merging:
    """What a BaseTuner does about merging; a mix-in for it."""

    active_adapter: str | list[str]

    def merge_adapter(self: Any, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters, the active ones by default, into the base weights; `unmerge_adapter` undoes it.

        Args:
            adapter_names: which.
            safe_merge: check that every result is finite before any weight is changed.
        Raises:
            ValueError: no such adapter, a result that is not finite, or a weight tied to the embedding.
            TypeError: `adapter_names` is a string, or a base weight is sharded by FSDP2, or quantised in a way that
                cannot be written.
        """
        self._check_known(*([] if adapter_names is None or isinstance(adapter_names, str) else adapter_names))
        biases = self._prepare_biases({*self.active_adapters, *self._merged(), *(adapter_names or ())})
        merge_layers(self.model, dict(self.adapted_layers()), adapter_names, safe_merge)
        self._swap_biases(biases)

    def unmerge_adapter(self: Any) -> None:
        """Restore the base weights of every layer that has adapters merged."""
        biases = self._prepare_biases(self.active_adapters)
        unmerge_layers(dict(self.adapted_layers()))
        self._swap_biases(biases)

    def _merged(self: Any) -> set[str]:
        """Return the adapters that are merged, in any layer."""
        return {name for _, layer in self.adapted_layers() for name in layer.merged_adapters}

    def check_unmerged(self: Any, adapter_name: str, refused: str = "") -> None:
        """Raise ValueError if the adapter is merged, beginning with `refused`: other values would not be in force."""
        if adapter_name in self._merged():
            raise ValueError(
                f"{refused}Adapter {adapter_name!r} is merged into the base weights; call unmerge_adapter() first."
            )

    def merge_and_unload(
        self: Any, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merge adapters into the base weights for good, take all adapters off, and return the plain model.

        Args:
            progressbar: show one.
            safe_merge: check that every result is finite before any weight is changed.
            adapter_names: which; the active ones by default.
        Raises:
            ValueError, TypeError: as `merge_adapter`.
        """
        self._check_known(*([] if adapter_names is None or isinstance(adapter_names, str) else adapter_names))
        kept = self.active_adapters if adapter_names is None else adapter_names
        biases = self._prepare_biases({*kept, *self._merged()})
        merge_layers(
            self.model, dict(self.adapted_layers()), adapter_names, safe_merge, keep=False, progressbar=progressbar
        )
        return self._unload(kept, biases)

    def unload(self: Any) -> nn.Module:
        """Take all adapters off, merged ones too, and return the model with its original weights.

        Raises:
            TypeError: the model is sharded by FSDP2.
        """
        refuse_sharded(self, NOT_UNLOADED)
        biases = self._prepare_biases([])
        unmerge_layers(dict(self.adapted_layers()))
        return self._unload([], biases)

    def _load_from_state_dict(self: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Before the first module takes anything.
        for name, layer in self.adapted_layers():
            layer.check_loadable(state_dict, f"{prefix}model.{name}.")
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)

    def _unload(self: Any, kept: list[str], biases: Swap) -> nn.Module:
        self._swap_biases(biases)
        unload_model(self.model, dict(self.wrappers()), kept)
        for attribute in self.tuner_layer_cls.shared_layer_names:
            getattr(self, attribute).clear()
        self.peft_config.clear()
        for held in (self.trained_biases, self.kept_biases, self._biases_in_force):
            held.clear()
        self.active_adapter = []
        return self.model


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
        keep: hold the base weights for `unmerge`, where a layer's `keep_base_weight` asks for it. Else there are copies
            of them on the CPU until all are merged, in case that one cannot be; quantised ones stay where they are.
    Raises:
        ValueError: with `safe_merge`, a result that is not finite; a weight that something else in the model reads too.
        TypeError: `adapter_names` is a string, or a base weight is sharded by FSDP2, or quantised in a way that
            cannot be written.
    """
    names = {key: layer.adapters_to_merge(adapter_names) for key, layer in layers.items()}
    refuse_sharded(model)
    check_alone(model, {key: layers[key] for key in layers if names[key]})
    merged = sorted({name for layer in layers.values() for name in layer.merged_adapters})
    if merged:
        more = sorted({name for new in names.values() for name in new})
        warnings.warn(
            f"Already following adapters were merged {','.join(merged)}. You are now additionally merging "
            f"{','.join(more)}."
            if more
            else "All adapters are already merged, nothing to do.",
            stacklevel=3,
        )
    quantization.warn_of_rounding(layer.base_layer for key, layer in layers.items() if names[key])
    if safe_merge:
        for key, layer in _shown(layers.items(), progressbar, "Checking"):
            layer.merged_weight(names[key], check_finite=True)
    done: list[tuple[BaseTunerLayer, dict[str, Any], list[str], quantization.Content | None]] = []
    try:
        for key, layer in _shown(layers.items(), progressbar, "Merging"):
            if names[key]:
                kept = keep and layer.keep_base_weight
                # The layer's own copy is of the weight as it was before the first adapter.
                own = kept and not layer.merged
                aside = None if kept else torch.device("cpu")
                before = None if own else quantization.content(layer.base_layer, aside)
                done.append((layer, dict(vars(layer)), list(layer.merged_adapters), before))
                layer.keep_base_weight = kept
                layer.add_to_weight(names[key])
    except BaseException:
        for layer, attributes, merged, before in reversed(done):
            saved = layer._base_weight if before is None else before
            if saved is not None:
                quantization.put(layer.base_layer, saved)
            vars(layer).clear()
            vars(layer).update(attributes)
            layer.merged_adapters[:] = merged
        raise


def unmerge_layers(layers: dict[str, BaseTunerLayer]) -> None:
    """Restore the base weight of every layer that has adapters merged, or of none."""
    merged = [layer for layer in layers.values() if layer.merged]
    for layer, weight in [(layer, layer.unmerged_weight()) for layer in merged]:
        quantization.put(layer.base_layer, weight)
    for layer in merged:
        layer._base_weight = None
        layer.merged_adapters.clear()


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


def check_alone(model: nn.Module, layers: dict[str, BaseTunerLayer]) -> None:
    """Check that nothing else in the model reads the weights of these layers, which merging would change for it too."""
    weights = {_place(layer.weight): key for key, layer in layers.items()}
    bases = {id(layer.get_base_layer()): key for key, layer in layers.items()}
    own = {id(layer) for layer in layers.values()}
    problems = []
    for name, module in model.named_modules():
        for child, part in module._modules.items():
            if id(part) in bases and id(module) not in own:
                problems.append(f"{bases[id(part)]} is one module with {name}.{child}")
        for child, parameter in module._parameters.items():
            key = None if parameter is None else weights.get(_place(parameter))
            if key is not None and module is not layers[key].get_base_layer():
                problems.append(f"the weight of {key} is tied to {name}.{child}")
    if problems:
        raise ValueError(
            f"Merging would change more than the adapted layers: {'; '.join(problems)}. Load the base model with "
            "tie_word_embeddings=False, give each its own weight, or leave this layer out."
        )


def _place(tensor: Tensor) -> tuple[str, int]:
    """Return what two tensors in the same memory have in common."""
    address = 0 if tensor.is_meta else tensor.data_ptr()
    return ("address", address) if address else ("identity", id(tensor))


def _shown(items: Iterable[Any], progressbar: bool, what: str) -> Iterable[Any]:
    if not progressbar:
        return items
    from tqdm.auto import tqdm

    return tqdm(list(items), desc=what)
