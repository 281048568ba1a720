"""`get_peft_model` and the models it returns: what a user holds, loads and saves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from vblora_triton import checkpoint
from vblora_triton.tuner.config import AdapterFileError, PeftConfig, PeftType, TaskType
from vblora_triton.tuner.model import BaseTuner
from vblora_triton.vblora.model import VBLoRAModel

TUNERS: dict[PeftType, type[BaseTuner]] = {PeftType.VBLORA: VBLoRAModel}


def tuner_class(config: Any) -> type[BaseTuner]:
    """Return the model class of a configuration's method.

    Raises:
        TypeError: `config` is no configuration of this package.
        ValueError: its method is not one of this package.
    """
    if not isinstance(config, PeftConfig):
        raise TypeError(
            f"`peft_config` is of type {type(config).__module__}.{type(config).__name__}; give a "
            "vblora_triton configuration, such as vblora_triton.VBLoRAConfig."
        )
    if config.peft_type not in TUNERS:
        raise ValueError(
            f"`peft_type` is {config.peft_type!r}; supported: {', '.join(sorted(kind.value for kind in TUNERS))}."
        )
    return TUNERS[PeftType(config.peft_type)]


def task_class_for(config: PeftConfig, default: type[PeftModel]) -> type[PeftModel]:
    """Return the class for the configuration's `task_type`, or `default` where it names none."""
    # Here, because the task classes are PeftModels.
    from vblora_triton.task_models import TASK_CLASSES

    return default if config.task_type is None else TASK_CLASSES[TaskType(config.task_type)]


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put a new adapter on a model, in place, and return the model that trains, runs and saves it.

    Args:
        model: the base model, usually of transformers; its own parameters are frozen.
        peft_config: what to put on it, for instance a VBLoRAConfig. Kept, and completed: what `target_modules` stood
            for and where the base model came from are filled in.
        adapter_name: its name.
        mixed: adapters of different methods at once; not supported.
        autocast_adapter_dtype: adapter parameters in float32; else in the dtype of the base layer's weight.
        revision: the revision of the base model, noted in the configuration.
        low_cpu_mem_usage: make the parameters on the meta device, to be filled by a loader.
    Returns:
        A PeftModel, of the class that `peft_config.task_type` names.
    Raises:
        ValueError, TypeError: the adapter does not fit the model; model and configuration are as they were.
    """
    if mixed:
        raise ValueError("`mixed` is True; adapters of different methods on one model are not supported: leave it out.")
    tuner_class(peft_config)
    kind = task_class_for(peft_config, PeftModel)
    adapted = kind(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
    # A model made from a configuration has the empty string for a name.
    peft_config.base_model_name_or_path = getattr(model, "name_or_path", None) or peft_config.base_model_name_or_path
    if revision is not None:
        peft_config.revision = revision
    return adapted


class PeftModel(nn.Module):
    """A model with adapters. What it does not have itself is looked up in the adapted model, then in the plain one.

    base_model: the adapted model, for instance a VBLoRAModel; `base_model.model` is the plain one, changed in place.
    peft_config: adapter name -> configuration.

    Args:
        model: the model to adapt; its own parameters are frozen.
        peft_config: the first adapter's configuration.
        adapter_name: its name.
        autocast_adapter_dtype: adapter parameters in float32; else in the dtype of the base layer's weight.
        low_cpu_mem_usage: make them on the meta device, to be filled by a loader.
    Raises:
        ValueError, TypeError: the adapter does not fit the model, which is then as it was.
    """

    task_type: ClassVar[TaskType | None] = None
    task_heads: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        method = tuner_class(peft_config)
        tuner = method(model, peft_config, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype, self.task_heads)
        super().__init__()
        self.base_model = tuner
        self.peft_type = peft_config.peft_type

    # What is on the model.

    @property
    def peft_config(self) -> dict[str, Any]:
        """adapter name -> configuration."""
        return self.base_model.peft_config

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter, or the active ones, as they were set."""
        return self.base_model.active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters as a list."""
        return self.base_model.active_adapters

    @property
    def active_peft_config(self) -> Any:
        """The configuration of the first active adapter."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that are trained whole, as the configurations give them."""
        names = {name for config in self.peft_config.values() for name in config.modules_to_save or ()}
        return names or None

    def get_base_model(self) -> nn.Module:
        """Return the plain model, with the adapted layers in it."""
        return self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Count the parameters that are trained, and all."""
        trained = total = 0
        for parameter in self.parameters():
            # bitsandbytes packs two 4-bit weights into each byte.
            packed = 2 * parameter.element_size() if type(parameter).__name__ == "Params4bit" else 1
            count = (parameter.numel() or getattr(parameter, "ds_numel", 0)) * packed
            total += count
            trained += count if parameter.requires_grad else 0
        return trained, total

    def print_trainable_parameters(self) -> None:
        """Print the counts of `get_nb_trainable_parameters`."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    # Running it.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the adapted model.

        Raises:
            NotImplementedError: `adapter_names` is given; batches of several adapters are not supported yet.
        """
        _refuse_mixed_batch(kwargs)
        return self.get_base_model()(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the adapted model; see transformers' `generate`, and `forward` for what is refused."""
        _refuse_mixed_batch(kwargs)
        return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Let the model act as if it had no adapters, inside the context; trained biases stay."""
        were_disabled = self.base_model._disabled
        self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            if not were_disabled:
                self.base_model.enable_adapter_layers()

    # Adapters.

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Put another adapter on the model; it neither acts nor is trained until `set_adapter` names it.

        Args:
            adapter_name: a new name.
            peft_config: a configuration of the same method.
            low_cpu_mem_usage, autocast_adapter_dtype: see the class.
        Raises:
            ValueError, TypeError: the name is taken, or the adapter does not fit; nothing has changed then.
        """
        self.base_model.add_adapter(
            adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype, self.task_heads
        )

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        subfolder: str | None = None,
    ) -> checkpoint.LoadResult:
        """Put a saved adapter on the model; under the name of one that is there, give that one the saved values.

        Args:
            model_id: a folder with a saved adapter.
            adapter_name: its name here; it acts once `set_adapter` names it, or if it acted before.
            is_trainable: let it be trained; otherwise it is frozen and the model goes to eval().
            autocast_adapter_dtype: parameters in float32; else see `low_cpu_mem_usage`.
            low_cpu_mem_usage: without `autocast_adapter_dtype`, keep the file's dtype instead of the base weight's.
            subfolder: a folder inside `model_id`.
        Raises:
            AdapterFileError: a file that is missing, broken, or does not fit; the model is as it was.
            ValueError: `is_trainable`, and the file serves inference only.
        """
        tuner, folder = self.base_model, Path(model_id, subfolder or "")
        new = adapter_name not in self.peft_config
        if new:
            config = PeftConfig.from_pretrained(model_id, subfolder)
            expected = tuner.file_shapes(tuner.plan(config, tuner.model, self.task_heads))
        else:
            config = self.peft_config[adapter_name]
            expected = {key: tuple(tensor.shape) for key, tensor in tuner.adapter_tensors(adapter_name).items()}
        tensors, inference_only = checkpoint.check_adapter(type(tuner), config, expected, folder)
        _check_trainable(is_trainable and inference_only, folder)
        if new:
            config.inference_mode = not is_trainable
            tuner.add_adapter(adapter_name, config, low_cpu_mem_usage=True, heads=self.task_heads)
        self._fill(adapter_name, tensors, inference_only, autocast_adapter_dtype, low_cpu_mem_usage)
        if is_trainable:
            tuner.set_requires_grad(adapter_name)
        else:
            self.eval()
        return checkpoint.LoadResult([], [])

    def _fill(
        self, adapter_name: str, tensors: dict, inference_only: bool, autocast_adapter_dtype: bool, keep_dtype: bool
    ) -> None:
        base_dtype = next((layer.weight.dtype for _, layer in self.base_model.layers()), torch.float32)
        dtype = torch.float32 if autocast_adapter_dtype or not base_dtype.is_floating_point else base_dtype
        keep = keep_dtype and not autocast_adapter_dtype
        checkpoint.fill_adapter(self.base_model, adapter_name, tensors, inference_only, None if keep else dtype)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several at once, the active ones; see `BaseTuner.set_adapter`."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off the model; see `BaseTuner.delete_adapter`."""
        self.base_model.delete_adapter(adapter_name)

    # Files.

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Write adapters as PEFT does: "default" into the folder, others into folders of their names inside it.

        Every file is written beside the old one and then takes its place, so that a crash leaves the old one whole.

        Args:
            save_directory: the folder; made if need be.
            safe_serialization: adapter_model.safetensors; else adapter_model.bin.
            selected_adapters: which adapters; all by default.
            save_embedding_layers: "auto" or False; the embeddings are not saved unless `modules_to_save` names them.
            is_main_process: else nothing is written.
            state_dict: take the parameters from this state dict of the model.
        Raises:
            ValueError: `save_directory` is a file, there is no such adapter, or it cannot be saved in this form.
        """
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        self.base_model._check_known(*names)
        if save_embedding_layers not in ("auto", False):
            raise ValueError(
                f"`save_embedding_layers` is {save_embedding_layers!r}, which is not supported; name the "
                "embeddings in `modules_to_save` to train and save them."
            )
        if Path(save_directory).is_file():
            raise ValueError(f"`save_directory` is {str(save_directory)!r}, which is a file; give a folder.")
        # All adapters are read before the first is written.
        states = {name: checkpoint.adapter_state_dict(self.base_model, name, state_dict) for name in names}
        if not is_main_process:
            return
        for name, tensors in states.items():
            config, model = self.peft_config[name], self.get_base_model()
            config.base_model_name_or_path = (
                config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
            )
            changed: dict[str, Any] = {"inference_mode": True}
            if config.task_type is None:
                kind = type(model)
                changed["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
            checkpoint.write_adapter(
                checkpoint.adapter_folder(save_directory, name),
                tensors,
                config.to_json(**changed),
                checkpoint.model_card(config),
                safe_serialization,
            )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        autocast_adapter_dtype: bool = True,
        *,
        low_cpu_mem_usage: bool = False,
        subfolder: str | None = None,
    ) -> PeftModel:
        """Put a saved adapter on a plain model.

        Args:
            model: the base model, adapted in place.
            model_id: a folder with a saved adapter.
            config: use this configuration instead of the folder's.
            adapter_name, is_trainable, autocast_adapter_dtype, low_cpu_mem_usage, subfolder: see `load_adapter`.
        Returns:
            The model, of the class that the configuration's `task_type` names; in eval() unless `is_trainable`.
        Raises:
            AdapterFileError: a file that is missing, broken, or does not fit; the model is as it was.
            ValueError: `is_trainable`, and the file serves inference only; or the model has adapters already.
        """
        folder = Path(model_id, subfolder or "")
        config = PeftConfig.from_pretrained(model_id, subfolder) if config is None else config
        method, kind = tuner_class(config), task_class_for(config, cls)
        expected = method.file_shapes(method.plan(config, model, kind.task_heads))
        tensors, inference_only = checkpoint.check_adapter(method, config, expected, folder)
        _check_trainable(is_trainable and inference_only, folder)
        config.inference_mode = not is_trainable
        adapted = kind(model, config, adapter_name, low_cpu_mem_usage=True)
        adapted._fill(adapter_name, tensors, inference_only, autocast_adapter_dtype, low_cpu_mem_usage)
        return adapted if is_trainable else adapted.eval()

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Raise NotImplementedError: not supported yet, and the plain model's would push the plain model."""
        raise NotImplementedError(
            "push_to_hub() of an adapter is not supported yet; save_pretrained() to a folder and "
            "upload that with huggingface_hub.upload_folder()."
        )

    def __getattr__(self, name: str) -> Any:
        """Look further in the adapted model, which looks further in the plain one."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


def _refuse_mixed_batch(kwargs: dict[str, Any]) -> None:
    if kwargs.get("adapter_names") is not None:
        raise NotImplementedError(
            "`adapter_names`: batches whose rows use different adapters are not supported yet; call "
            "set_adapter() and run the rows of each adapter on their own."
        )
    kwargs.pop("adapter_names", None)


def _check_trainable(refused: bool, folder: Path) -> None:
    if refused:
        raise AdapterFileError(
            f"`is_trainable` is True, but the adapter in {str(folder)!r} was saved as top-k weights, "
            "which hold too little for training; load one saved in full "
            "(save_only_topk_weights=False)."
        )
