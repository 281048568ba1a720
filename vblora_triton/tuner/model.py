"""What the models of every method do: put adapters on a model, switch them, merge them, and take them off again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vblora_triton.integrations.quantization import check_cast, keep_unpacked
from vblora_triton.ops.shared_input import Readers, shared_inputs
from vblora_triton.tuner.biases import TrainedBiases
from vblora_triton.tuner.contents import AdapterContents
from vblora_triton.tuner.file_keys import AdapterFiles
from vblora_triton.tuner.injection import InjectionPlan, check_plain, make_plan, walk_wrappers
from vblora_triton.tuner.layer import BaseTunerLayer, ModulesToSaveWrapper
from vblora_triton.tuner.merging import Merging, unmerge_layers
from vblora_triton.tuner.sharding import NOT_DELETED, refuse_sharded
from vblora_triton.tuner.state import as_names, check_adapter_name, hold, release
from vblora_triton.tuner.undo import undone_on_failure


class BaseTuner(AdapterFiles, AdapterContents, Merging, TrainedBiases, nn.Module):
    """A model with adapters on it, kept as `model` and changed in place.

    A subclass sets the class attributes and says what one adapter is made of; see `AdapterFiles` for its files, and
    `AdapterContents` for what else can be made of them.

    prefix: what the names of the method's parameters begin with.
    config_class, tuner_layer_cls: the classes of its configuration and of its layers, whatever they adapt.
    linear_cls: the class of the layer that adapts a linear one. It is made of the base layer, what its
        `shared_layer_names` names, the adapter's name, and `layer_arguments`; `update_layer` takes the name, what is
        shared, and the arguments.
    target_module_mapping: `model_type` -> the usual targets.

    Args:
        model: the model to adapt.
        peft_config: the adapter's configuration, or {adapter_name: configuration}.
        adapter_name: its name.
        low_cpu_mem_usage: make the adapter's parameters on the meta device, to be filled by a loader.
        autocast_adapter_dtype: parameters in float32; else in the dtype of the base layer's weight.
        heads: names of modules that the task trains in full, where the model has them.
    Raises:
        ValueError, TypeError: the adapter does not fit the model, which is then as it was.
    """

    # PEFT's tuners for which it is true cannot be put on by inject_adapter_in_model().
    uses_shared_state: ClassVar[bool] = False
    tuner_layer_cls: ClassVar[type[BaseTunerLayer]]
    linear_cls: ClassVar[Any]
    target_module_mapping: ClassVar[dict[str, list[str] | str]]

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        heads: Sequence[str] = (),
    ) -> None:
        check_plain(model)
        super().__init__()
        self.model = model
        keep_unpacked(model)
        self.peft_config: dict[str, Any] = {}
        self.active_adapter: str | list[str] = adapter_name
        self.trained_biases, self.kept_biases, self._biases_in_force = {}, {}, set()
        self._disabled = False
        self._readers = Readers()
        self._held: tuple[Tensor, ...] = ()
        config = peft_config[adapter_name] if isinstance(peft_config, Mapping) else peft_config
        self.add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype, heads)

    # What a method provides.

    @classmethod
    def check_plan(cls, plan: InjectionPlan) -> None:
        """Check the sizes of the targets; raise ValueError that names each that does not fit."""

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Make what the layers of the adapter will share."""

    @classmethod
    def layer_arguments(cls, config: Any) -> dict[str, Any]:
        """Return what a layer has to know of an adapter's configuration, by the names of its arguments."""
        return {}

    def _create_and_replace(
        self, config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, current_key: str
    ) -> None:
        """Give the adapter to one layer: to the adapted layer that is there, or to a new one in the layer's place."""
        shared = (getattr(self, attribute) for attribute in self.tuner_layer_cls.shared_layer_names)
        if isinstance(target, self.tuner_layer_cls):
            layer: Any = target
            layer.update_layer(adapter_name, *shared, **self.layer_arguments(config))
        else:
            self._replace_module(current_key, self._create_new_module(config, *shared, adapter_name, target))

    @classmethod
    def _create_new_module(cls, config: Any, *parts: Any, **kwargs: Any) -> Any:
        """Make the adapted layer for a linear one; `parts` are what is shared, the adapter's name, and the linear one.

        Raises:
            UnsupportedTargetError: it is neither nn.Linear nor Conv1D.
        """
        *others, target = parts
        return cls.linear_cls(target, *others, **cls.layer_arguments(config), **kwargs)

    # Life of an adapter.

    @classmethod
    def plan(cls, config: Any, model: nn.Module, heads: Sequence[str] = ()) -> InjectionPlan:
        """Work out, without touching it, what an adapter would do to a model; see `make_plan` for errors."""
        if not isinstance(config, cls.config_class):
            raise TypeError(
                f"`peft_config` is of type {type(config).__module__}.{type(config).__name__}; give a "
                f"{cls.config_class.__module__.partition('.')[0]}.{cls.config_class.__name__}."
            )
        plan = make_plan(config, model, cls.target_module_mapping, heads)
        cls.check_plan(plan)
        return plan

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        heads: Sequence[str] = (),
    ) -> None:
        """Put another adapter on the model; it is frozen until `set_adapter` names it.

        Raises:
            ValueError, TypeError: the name is taken or cannot be one, or the adapter does not fit; nothing has
                changed then.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.peft_config:
            raise ValueError(
                f"Adapter with name '{adapter_name}' already exists. Choose another name, or delete it first."
            )
        plan = self.plan(peft_config, self.model, heads)
        biased = [name for name, config in self.peft_config.items() if config.bias != "none"]
        if biased and plan.config.bias != "none":
            raise ValueError(
                f"`bias` is {plan.config.bias!r}, but adapter {biased[0]!r} trains biases of the same model "
                "already; give this adapter bias='none'."
            )
        if not low_cpu_mem_usage:
            self.check_room(plan)
        before = [] if self.peft_config else list(self.model.parameters())
        with undone_on_failure(self, peft_config):
            self._inject(plan, adapter_name, low_cpu_mem_usage)
            for parameter in before:
                parameter.requires_grad_(False)
            # The user's own object, so that a field set later, such as save_only_topk_weights, counts when saving.
            vars(peft_config).update(vars(plan.config))
            self.peft_config[adapter_name] = peft_config
            self._add_biases(adapter_name, plan.biases, adapter_name in self.active_adapters)
            if not autocast_adapter_dtype:
                for _, layer in self.adapted_layers():
                    layer.cast_adapter(adapter_name)
            active = adapter_name in self.active_adapters
            self._train(adapter_name, active and not peft_config.inference_mode)

    def _inject(self, plan: InjectionPlan, adapter_name: str, low_cpu_mem_usage: bool) -> None:
        with torch.device("meta") if low_cpu_mem_usage else nullcontext():
            self._pre_injection_hook(self.model, plan.config, adapter_name)
            for name in plan.targets:
                target, parent = self.model.get_submodule(name), self.model.get_submodule(name.rpartition(".")[0])
                self._create_and_replace(plan.config, adapter_name, target, name.rpartition(".")[2], parent, name)
        for name in plan.saved:
            module = self.model.get_submodule(name)
            if isinstance(module, ModulesToSaveWrapper):
                module.add(adapter_name)
            else:
                wrapper = ModulesToSaveWrapper(module, self.active_adapter)
                wrapper.add(adapter_name)
                self._replace_module(name, wrapper.train(module.training))

    def _replace_module(self, name: str, module: nn.Module) -> None:
        """Put a wrapper in a module's place, or the module back; a wrapper follows the model's adapter state."""
        if isinstance(module, (self.tuner_layer_cls, ModulesToSaveWrapper)):
            module.set_adapter(self.active_adapter)
            module.enable_adapters(not self._disabled)
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)

    def _forget(self, adapter_name: str) -> None:
        """Take an adapter off, and with it every wrapper that held nothing else."""
        for name, module in list(self.wrappers()):
            module.delete_adapter(adapter_name)
            if not module.available_adapters():
                own = module.original_module if isinstance(module, ModulesToSaveWrapper) else module.get_base_layer()
                self._replace_module(name, own)
        for attribute in self.tuner_layer_cls.shared_layer_names:
            if adapter_name in getattr(self, attribute, ()):
                del getattr(self, attribute)[adapter_name]

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off the model; if it was the only active one, the first that is left becomes active.

        Raises:
            ValueError: there is no such adapter, or it is merged.
            TypeError: the model is sharded by FSDP2.
        """
        self._check_known(adapter_name)
        refuse_sharded(self, NOT_DELETED)
        refused = f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first. "
        self.check_unmerged(adapter_name, refused)
        biases = self._prepare_biases({*self.active_adapters, *self._merged()} - {adapter_name})
        self._train_biases(adapter_name, False)
        self._swap_biases(biases)
        self._forget(adapter_name)
        self._forget_biases(adapter_name)
        del self.peft_config[adapter_name]
        if adapter_name in self.active_adapters:
            left = [name for name in self.active_adapters if name != adapter_name] or list(self.peft_config)[:1]
            self._activate(left, inference_mode=bool(left) and self.peft_config[left[0]].inference_mode)

    # Which adapters act, and which are trained.

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters as a list."""
        return as_names(self.active_adapter)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several at once, the active ones; their updates add up.

        Args:
            adapter_name: a name or a list of names.
            inference_mode: leave them frozen; otherwise they, and only they, are trained.
        Raises:
            ValueError: no such adapter, or two that each have their own copy of the same module.
        """
        names = as_names(adapter_name)
        self._check_known(*names)
        for name, wrapper in self.wrappers():
            copies = wrapper.modules_to_save if isinstance(wrapper, ModulesToSaveWrapper) else ()
            both = [adapter for adapter in names if adapter in copies]
            if len(both) > 1:
                raise ValueError(
                    f"Only one adapter can be set at a time for {wrapper}, which is {name}: `adapter_name` is {names}, "
                    f"and {', '.join(both)} each have their own copy of it; activate one of them."
                )
        biases = self._prepare_biases(names)
        unmerge_layers(dict(self.adapted_layers()))
        self._swap_biases(biases)
        self._activate(adapter_name, inference_mode)

    def _activate(self, adapter_names: str | list[str], inference_mode: bool) -> None:
        self.active_adapter = adapter_names
        self._held = ()
        for _, wrapper in self.wrappers():
            wrapper.set_adapter(adapter_names, inference_mode)
        trained = set() if inference_mode else set(as_names(adapter_names))
        for adapter in self.trained_biases:
            self._train_biases(adapter, adapter in trained)

    def _train(self, adapter_name: str, requires_grad: bool) -> None:
        for _, wrapper in self.wrappers():
            wrapper.set_requires_grad(adapter_name, requires_grad)
        self._train_biases(adapter_name, requires_grad)

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Train or freeze adapters, active or not.

        Raises:
            ValueError: no such adapter, or one that holds too little to be trained.
        """
        names = as_names(adapter_names)
        self._check_known(*names)
        for adapter in names if requires_grad else ():
            self.check_trainable(adapter)
        for adapter in names:
            self._train(adapter, requires_grad)

    def check_trainable(self, adapter_name: str) -> None:
        """Raise ValueError if the adapter was loaded from a file that serves inference only."""
        if not all(layer.is_trainable(adapter_name) for _, layer in self.adapted_layers()):
            raise ValueError(
                f"Adapter {adapter_name!r} was loaded from a top-k file, which holds too little for training; train "
                "the one that was saved in full (save_only_topk_weights=False)."
            )

    def disable_adapter_layers(self) -> None:
        """Let the model act as if it had no adapters, and freeze them; trained biases stay.

        What is merged is unmerged: here, and not by a forward, which may be compiled, or a replica's.
        """
        unmerge_layers({name: layer for name, layer in self.adapted_layers() if layer.merged_adapters})
        if not self._disabled:
            shared = (getattr(self, attribute) for attribute in self.tuner_layer_cls.shared_layer_names)
            self._held = hold(parameter for parameters in shared for parameter in parameters.parameters())
        self._disabled = True
        for _, wrapper in self.wrappers():
            wrapper.enable_adapters(False)

    def enable_adapter_layers(self) -> None:
        """Let the active adapters act again, and be trained as they were."""
        release(self._held)
        self._held = ()
        self._disabled = False
        for _, wrapper in self.wrappers():
            wrapper.enable_adapters(True)

    # What is on the model.

    def adapted_layers(self) -> Iterator[tuple[str, Any]]:
        """Walk the adapted layers, by their name in `model`."""
        return ((name, module) for name, module in self.wrappers() if isinstance(module, self.tuner_layer_cls))

    @property
    def targeted_module_names(self) -> list[str]:
        """Names of the adapted layers, in `model`."""
        return [name for name, _ in self.adapted_layers()]

    def wrappers(self) -> Iterator[tuple[str, Any]]:
        """Walk the adapted layers and the modules that are saved whole, by their name in `model`."""
        return walk_wrappers(self.model, self.tuner_layer_cls)

    def _check_known(self, *adapter_names: str, phrase: str = "Adapter {} does not exist") -> None:
        if not all(isinstance(name, str) for name in adapter_names):
            raise TypeError(f"`adapter_name` is {adapter_names[0]!r}; give a string.")
        unknown = [name for name in adapter_names if name not in self.peft_config]
        if unknown:
            there = ", ".join(map(repr, self.peft_config)) or "none"
            raise ValueError(
                f"{phrase.format(', '.join(map(str, unknown)))}. There is none named {', '.join(map(repr, unknown))}; "
                f"the adapters here: {there}."
            )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say whether an adapter can be written as one of LoRA; see `vblora_triton.convert_to_lora`."""
        return adapter_name in self.peft_config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        if torch.compiler.is_compiling():
            return self.model(*args, **kwargs)
        if "_is_replica" in vars(self):  # Not by getattr, which would go on to look in the model.
            self._share_own()
        try:
            with self.running():
                # Found sooner than the attribute.
                return self._modules["model"](*args, **kwargs)  # type: ignore[misc]
        except Exception as error:
            empty = [part for part in (*args, *kwargs.values()) if isinstance(part, torch.Tensor) and not part.numel()]
            if not empty:
                raise
            raise ValueError(
                f"The batch is empty: an input has the shape {tuple(empty[0].shape)}, which "
                f"{type(self.model).__name__} cannot take ({type(error).__name__}: {error}); leave such batches out."
            ) from error

    def _share_own(self) -> None:
        """Let the layers of a replica, which nn.DataParallel made, read what is shared on its own device."""
        shared = tuple(getattr(self, attribute) for attribute in self.tuner_layer_cls.shared_layer_names)
        for _, layer in self.adapted_layers():
            layer._shared = shared

    def running(self) -> AbstractContextManager[Any]:
        """Return a context for a call of the model, in which layers that read one input share."""
        return nullcontext() if torch.compiler.is_compiling() else shared_inputs(self._readers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Before the first module is cast.
        check_cast(self, fn)
        return super()._apply(fn, recurse)

    def __getattr__(self, name: str) -> Any:
        """Look further in the model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)
