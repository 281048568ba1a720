"""What the layers of every method do: hold several adapters, say which are active, and step out of the way."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vblora_triton.integrations import quantization
from vblora_triton.tuner.seen import SeenAsPefts
from vblora_triton.tuner.sharding import refuse_sharded
from vblora_triton.tuner.state import AdapterState, as_names


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """Return (in_features, out_features) of a linear layer, quantised or not, or None for a module that is none."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return quantization.features(module)


class UnsupportedTargetError(TypeError, ValueError):
    """A targeted module cannot carry an adapter (TypeError to some callers, ValueError to others, so both)."""


class BaseTunerLayer(AdapterState):
    """A linear layer with adapters; a mix-in for an nn.Module that keeps the original as `base_layer`.

    A method's layer lists in `adapter_layer_names` its attributes that map adapter names to parameters, in
    `shared_layer_names` those of them that belong to the model, and in `other_param_names` its other such mappings;
    `dropout_name` is that which maps them to an nn.Dropout or nn.Identity.
    Each adapter adds one matrix, `get_delta_weight`, to the weight, and can be merged into it.

    r: dict, adapter -> rank; it holds every adapter that the layer has.
    backend: "auto", "triton" or "reference"; see `ops.use_backend`.
    fan_in_fan_out: the base layer, transformers' Conv1D, stores its weight (in_features, out_features).
    keep_base_weight: hold the weight as it was while adapters are merged, so that `unmerge` restores it bit for bit.
        It costs the memory of the weight. Turned off, `unmerge` subtracts the matrices again, exact to rounding; of a
        quantised weight, which would be rounded to its format once more, it refuses to.
    """

    adapter_layer_names: tuple[str, ...] = ()
    shared_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    dropout_name: str

    base_layer: Any
    merged_adapters: list[str]
    r: dict[str, int]
    in_features: int
    out_features: int
    training: bool
    backend: str
    keep_base_weight: bool = True
    _base_weight: quantization.Content | None = None
    # In a tuple, where nn.Module does not see modules to register: they are the model's own. Copying and pickling keep
    # them so, and .to() changes the parameters inside them.
    _shared: tuple[Any, ...] = ()

    def _wrap(self, base_layer: nn.Module, kwargs: dict[str, Any]) -> None:
        """Take a linear layer as `base_layer`, with no adapter yet; UnsupportedTargetError if it is none."""
        sizes = linear_features(base_layer)
        if sizes is None:
            raise UnsupportedTargetError(
                f"`base_layer` is a {type(base_layer).__name__}; give an nn.Linear or a Conv1D of transformers."
            )
        self.in_features, self.out_features = sizes
        self.fan_in_fan_out = self.is_target_conv_1d_layer = isinstance(base_layer, Conv1D)
        self.base_layer = base_layer
        self.r = {}
        setattr(self, self.dropout_name, nn.ModuleDict())
        for name in self.own_names():
            setattr(self, name, nn.ParameterDict())
        self.merged_adapters = []
        self.backend = "auto"
        self._active_adapter = []
        self.kwargs = kwargs

    def get_base_layer(self) -> nn.Module:
        """Return the layer that the adapters were put on."""
        return self.base_layer

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: models reach for it (T5 asks its dtype)."""
        return self.base_layer.weight

    @property
    def base_device(self) -> torch.device:
        """Where the base layer is; quantised ones may have no `weight`."""
        return quantization.device_of(self.base_layer)

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype of the base weight, or float32 where that holds no numbers that count as they are."""
        dtype = getattr(getattr(self.base_layer, "weight", None), "dtype", None)
        return dtype if dtype in quantization.FLOATS else torch.float32

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged into the base weight."""
        return bool(self.merged_adapters)

    def available_adapters(self) -> list[str]:
        """Name the adapters that this layer has, in the order in which they came."""
        return list(self.r)

    @classmethod
    def own_names(cls) -> list[str]:
        """Name the attributes that map adapters to parameters of this layer alone."""
        return [name for name in cls.adapter_layer_names if name not in cls.shared_layer_names]

    def file_names(self, adapter_name: str) -> dict[str, str]:
        """Return name in the file -> name here, of each tensor of an adapter that is this layer's own."""
        return {name: f"{name}.{adapter_name}" for name in self.own_names() if adapter_name in getattr(self, name)}

    def _empty(self, *shape: int) -> Tensor:
        """Make a tensor for a parameter: on the CPU, so that a seed gives the same values whatever the device.

        It has none on the meta device, where the base weight is or torch.device() says so.
        """
        device = self.base_device
        return torch.empty(shape, dtype=torch.float32, device=device if device.type == "meta" else None)

    def _hold(
        self, adapter_name: str, r: int, dropout: float, parameters: dict[str, Tensor], *shared: Any, frozen: bool
    ) -> None:
        """Take an adapter, or a new one in place of the one of that name.

        Args:
            dropout: probability; that an element of the input is dropped in training.
            parameters: attribute -> its values, which are moved to the device of the base weight.
            shared: what `shared_layer_names` names; kept by reference.
            frozen: otherwise it is trained if it is active.
        """
        self.r[adapter_name] = r
        dropouts = getattr(self, self.dropout_name)
        dropouts[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        dropouts[adapter_name].train(self.training)
        for name, values in parameters.items():
            getattr(self, name)[adapter_name] = nn.Parameter(values if values.is_meta else values.to(self.base_device))
        self._shared = shared
        self.set_requires_grad(adapter_name, adapter_name in self.active_adapters and not frozen)

    def own_parameters(self) -> list[Tensor]:
        """Return the parameters of all adapters that are this layer's alone."""
        return [parameter for name in self.own_names() for parameter in getattr(self, name).values()]

    def tensors_of(self, adapter_name: str) -> list[Tensor]:
        """Return everything that an adapter consists of here, what it shares with other layers included."""
        mappings = (getattr(self, name) for name in self.adapter_layer_names)
        return [mapping[adapter_name] for mapping in mappings if adapter_name in mapping]

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Train or freeze the parameters of adapters; one that cannot be trained stays frozen."""
        names = as_names(adapter_names)
        for parameters in (getattr(self, attribute) for attribute in self.adapter_layer_names):
            for adapter in names:
                if adapter in parameters:
                    parameters[adapter].requires_grad_(requires_grad and self.is_trainable(adapter))

    def cast_adapter(self, adapter_name: str) -> None:
        """Give the adapter's parameters, all or none, the dtype of the base weight; see `base_dtype`."""
        parameters = [tensor for tensor in self.tensors_of(adapter_name) if isinstance(tensor, nn.Parameter)]
        values = [parameter.detach().to(self.base_dtype) for parameter in parameters]
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value

    def is_trainable(self, adapter_name: str) -> bool:
        """Say whether the adapter holds what training needs."""
        return True

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; what it shares with other layers is the model's to delete."""
        if adapter_name in self.merged_adapters:
            raise ValueError(f"Adapter {adapter_name!r} is merged into the base weights; unmerge it before deleting.")
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            if attribute not in self.shared_layer_names and adapter_name in getattr(self, attribute):
                del getattr(self, attribute)[adapter_name]
        if adapter_name in self.active_adapters:
            self._active_adapter = [name for name in self.active_adapters if name != adapter_name]

    # Merging.

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what the adapter adds to the weight, float32, in the weight's own layout."""
        raise NotImplementedError

    def adapters_to_merge(self: Any, adapter_names: list[str] | None = None) -> list[str]:
        """Name the adapters that a call of `merge` adds: of those asked for, what this layer has and has not merged.

        Raises:
            TypeError: `adapter_names` is a string, or the base is sharded or quantised so that it cannot be written.
        """
        if isinstance(adapter_names, str):
            raise TypeError(
                f"adapter_names should be a list of strings, got {adapter_names!r}. Give `adapter_names` as "
                f"[{adapter_names!r}]."
            )
        asked = self.active_adapters if adapter_names is None else adapter_names
        available = self.available_adapters()
        names = [name for name in dict.fromkeys(asked) if name in available and name not in self.merged_adapters]
        if names:
            refuse_sharded(self)
            quantization.check_mergeable(self.base_layer)
        return names

    def merged_weight(self, adapter_names: list[str], check_finite: bool = False) -> Tensor:
        """Return the base weight, dequantised, with the adapters added: summed in float32 at least, not yet rounded.

        Raises:
            ValueError: with `check_finite`, the result is not finite; the message names the adapter.
        """
        with torch.no_grad():
            weight = quantization.weight(self.base_layer)
            # float64 weights keep their bits.
            total = weight.to(torch.promote_types(weight.dtype, torch.float32))
            for adapter in adapter_names:
                total = total + self.get_delta_weight(adapter)
                if check_finite and not torch.isfinite(total.to(weight.dtype)).all():
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken: merging "
                        f"{adapter!r} gives weights that are not finite. Nothing was changed."
                    )
            return total

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight, after which the forward no longer computes them.

        weight <- round(weight + sum_adapters get_delta_weight(adapter)), in float32

        A quantised weight is dequantised, and rounded to its format again, of which a warning tells.

        Args:
            safe_merge: check that the result is finite before anything is changed.
            adapter_names: adapters to merge; the active ones by default.
        Raises:
            ValueError: with `safe_merge`, the result is not finite.
            TypeError: `adapter_names` is no list, or the base is sharded or quantised so that it cannot be written.
        """
        names = self.adapters_to_merge(adapter_names)
        if names:
            quantization.warn_of_rounding([self.base_layer])
            self.add_to_weight(names, safe_merge)
        elif self.merged:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)

    def add_to_weight(self, adapter_names: list[str], safe_merge: bool = False) -> None:
        """Merge adapters that `adapters_to_merge` has named."""
        weight = quantization.quantised(self.base_layer, self.merged_weight(adapter_names, safe_merge))
        if self.keep_base_weight and not self.merged:
            self._base_weight = quantization.content(self.base_layer)
        quantization.put(self.base_layer, weight)
        self.merged_adapters.extend(adapter_names)

    def unmerged_weight(self) -> quantization.Content:
        """Return the base weight without the merged adapters: bit for bit, where `keep_base_weight` was on.

        Raises:
            ValueError: it was off, and the base is quantised.
        """
        if self._base_weight is not None:
            return quantization.moved(self._base_weight, self.base_device)
        if quantization.is_quantised(self.base_layer):
            raise ValueError(
                f"The base layer is a {type(self.base_layer).__name__}, and its weight was not kept when adapters were "
                "merged (`keep_base_weight` was False): subtracting them again would round it once more. Load the base "
                "again."
            )
        with torch.no_grad():
            deltas = [self.get_delta_weight(adapter) for adapter in self.merged_adapters]
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            return quantization.quantised(self.base_layer, self.weight.to(wide) - torch.stack(deltas).sum(0))

    def check_loadable(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Raise ValueError if a state dict is for this layer, whose weight is not its own while adapters are merged."""
        if self.merged and any(key.startswith(prefix) for key in state_dict):
            raise ValueError(
                f"Adapters are merged into the weight of {prefix.removesuffix('.')}, which unmerging puts back over "
                "the one that is loaded now; call unmerge_adapter() before load_state_dict()."
            )

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again; see `unmerged_weight`."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        quantization.put(self.base_layer, self.unmerged_weight())
        self._base_weight = None
        self.merged_adapters.clear()


class ModulesToSaveWrapper(SeenAsPefts, AdapterState, nn.Module):
    """A module that is trained in full beside the adapters: each adapter has a copy, the original stays as it was.

    At most one active adapter may have a copy of the same module.
    """

    peft_name = "utils.ModulesToSaveWrapper"
    # PEFT's functions look for these.
    adapter_layer_names = ("modules_to_save",)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, original_module: nn.Module, active_adapter: str | list[str]) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self._active_adapter = active_adapter

    def add(self, adapter_name: str) -> None:
        """Give the adapter its copy of the original module."""
        self.modules_to_save[adapter_name] = copy.deepcopy(self.original_module)

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters that have a copy here: one, or none."""
        return [name for name in as_names(self._active_adapter) if name in self.modules_to_save]

    @property
    def _adapters(self) -> set[str]:
        # PEFT's name for it.
        return set(self.modules_to_save)

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """Return which of these adapters has a copy here, if any; PEFT's functions ask before they set it."""
        return next((name for name in as_names(adapter_name) if name in self.modules_to_save), None)

    @property
    def merged_adapters(self) -> list[str]:
        """None: copies take the original's place as they are."""
        return []

    @property
    def active_copy(self) -> nn.Module:
        """The module in force: the active adapter's copy, or the original."""
        if not self._disable_adapters:
            for name in self.active_adapters:
                return self.modules_to_save[name]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module in force."""
        return self.active_copy(*args, **kwargs)

    def own_parameters(self) -> list[Tensor]:
        """Return the parameters of all copies."""
        return list(self.modules_to_save.parameters())

    def tensors_of(self, adapter_name: str) -> list[Tensor]:
        """Return the parameters of an adapter's copy."""
        return list(self.modules_to_save[adapter_name].parameters())

    def available_adapters(self) -> list[str]:
        """Name the adapters that have a copy."""
        return list(self.modules_to_save)

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return an adapter's copy by the keys that it has in a file, out of the state dict of this wrapper."""
        return {key: state_dict[live] for key, live in self.adapter_state_dict_load_map(adapter_name).items()}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return key in a file -> key in the state dict of this wrapper, of an adapter's copy."""
        if adapter_name not in self.modules_to_save:
            return {}
        return {key: f"modules_to_save.{adapter_name}.{key}" for key in self.modules_to_save[adapter_name].state_dict()}

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Train or freeze the copies of adapters."""
        for name in as_names(adapter_names):
            if name in self.modules_to_save:
                self.modules_to_save[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None = None) -> None:
        """Forget an adapter's copy; which adapters are to be active then is the model's to say, by `set_adapter`."""
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]
        self._active_adapter = [name for name in as_names(self._active_adapter) if name != adapter_name]

    def __getattr__(self, name: str) -> Any:
        """Look further in the module in force: models read their head's weight or size."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" not in self.__dict__ or "modules_to_save" not in self._modules:
                raise
            return getattr(self.active_copy, name)
