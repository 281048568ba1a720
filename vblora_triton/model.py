"""PeftModel: what a user holds, loads and saves."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from vblora_triton import card, checkpoint, hub, status
from vblora_triton.folder import WEIGHT_NAMES
from vblora_triton.integrations.transformers import accept_in_trainer
from vblora_triton.methods import own_config, tuner_class
from vblora_triton.preparation import require_input_grads
from vblora_triton.tuner.config import PeftConfig, TaskType
from vblora_triton.tuner.injection import check_plain
from vblora_triton.tuner.seen import AdaptedModel
from vblora_triton.tuner.sharding import check_processes
from vblora_triton.tuner.state import as_names, check_adapter_name
from vblora_triton.tuner.undo import undone_on_failure

# The classes of the tasks; task_models.py puts them in.
TASK_CLASSES: dict[TaskType, type[PeftModel]] = {}


class PeftModel(AdaptedModel, nn.Module):
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
        accept_in_trainer()

    @classmethod
    def class_for(cls, config: PeftConfig) -> type[PeftModel]:
        """Return the class for the configuration's `task_type`, or this one where it names none."""
        return cls if config.task_type is None else TASK_CLASSES[TaskType(config.task_type)]

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
        """The configuration of the first active adapter; ValueError where there is none."""
        if not self.active_adapters:
            raise ValueError(
                "There is no active adapter: it was deleted, or taken off by unload() or merge_and_unload(). Put one "
                "on with add_adapter() or load_adapter(), and call set_adapter()."
            )
        return self.peft_config[self.active_adapters[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter is active, and adapters are not disabled."""
        return bool(self.active_adapters) and not self.base_model._disabled

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The dtype of the plain model, where that has one."""
        return getattr(self.base_model, "dtype", None)

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that are trained whole, as the configurations give them."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    def get_base_model(self) -> nn.Module:
        """Return the plain model, with the adapted layers in it."""
        return self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Count the parameters that are trained, and all."""
        return status.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print the counts of `get_nb_trainable_parameters`."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """Return the status of every layer with adapters."""
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        """Return the status of the adapters taken together."""
        return status.get_model_status(self)

    # Running it.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the adapted model. Batches of several adapters (`adapter_names`) are refused: NotImplementedError.

        Where several processes train it, `check_processes` sees to it that they do so together.
        """
        _refuse_mixed_batch(kwargs)
        check_processes(self)
        return self._modules["base_model"](*args, **kwargs)  # type: ignore[misc]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the adapted model; see transformers' `generate`, and `forward` for what is refused."""
        _refuse_mixed_batch(kwargs)
        with self.base_model.running():
            return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Let the model act as if it had no adapters, and freeze them, inside the context; trained biases stay."""
        states = {wrapper.disable_adapters for _, wrapper in self.base_model.wrappers()}
        if len(states) > 1:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled. After the "
                "disable_adapter context all of them will be enabled.",
                # Past contextlib.
                stacklevel=3,
            )
        self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            if states != {True}:
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
            peft_config: a configuration of the same method, or PEFT's own.
            low_cpu_mem_usage, autocast_adapter_dtype: see the class.
        Raises:
            ValueError, TypeError: the name is taken, or the adapter does not fit; nothing has changed then.
        """
        config = own_config(peft_config)
        if config.peft_type != self.peft_type:
            raise TypeError(
                f"Cannot combine adapters with different peft types. Found {self.peft_type} and {config.peft_type}: "
                f"`peft_config` is a {type(config).__name__}; give a vblora_triton."
                f"{self.base_model.config_class.__name__}."
            )
        self.base_model.add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype, self.task_heads)

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        subfolder: str | None = None,
        key_mapping: dict[str, str] | None = None,
        **options: Any,
    ) -> checkpoint.LoadResult:
        """Put a saved adapter on the model; under the name of one that is there, give that one the saved values.

        Args:
            model_id: a folder with a saved adapter, or its id on the Hub.
            adapter_name: its name here; it acts once `set_adapter` names it, or if it acted before.
            is_trainable: let it be trained; otherwise a new adapter is frozen, and the model goes to eval().
            autocast_adapter_dtype: parameters in float32; else see `low_cpu_mem_usage`.
            low_cpu_mem_usage: without `autocast_adapter_dtype`, keep the file's dtype instead of the base weight's.
            subfolder: a folder inside `model_id`.
            key_mapping: expression -> replacement, for the names of modules in the file, where the model was laid out
                otherwise when it was saved; that of the model, `_checkpoint_conversion_mapping`, by default.
            options: `revision`, `token`, `cache_dir`, ... of a download, see `hub.local_folder`; and where to put the
                adapter, see `hub.PLACEMENT`.
        Raises:
            AdapterFileError: a file that is missing, broken, or does not fit; the model is as it was.
            ValueError: `is_trainable`, and the file serves inference only.
            TypeError: an unknown option of a download.
        """
        check_adapter_name(adapter_name)
        tuner, download = self.base_model, hub.download_options(options)
        folder = hub.local_folder(model_id, WEIGHT_NAMES, subfolder, **download)
        key_mapping = _key_mapping(tuner.model) if key_mapping is None else key_mapping
        own = self.peft_config.get(adapter_name)
        config, file = checkpoint.read_files(folder, missing=own)
        if own is None:
            with checkpoint.blaming(folder):
                expected = tuner.file_shapes(tuner.plan(config, tuner.model, self.task_heads))
        else:
            tuner.check_unmerged(adapter_name)
            config = checkpoint.refill_config(own, config)
            expected = tuner.full_shapes(adapter_name)
        tensors = checkpoint.fitting(type(tuner), config, expected, file, is_trainable, key_mapping)
        with undone_on_failure(tuner, own or config):
            if own is None:
                config.inference_mode = not is_trainable
                tuner.add_adapter(adapter_name, config, low_cpu_mem_usage=True, heads=self.task_heads)
            for name in config.origin_fields:
                setattr(self.peft_config[adapter_name], name, getattr(config, name))
            checkpoint.fill_adapter(tuner, adapter_name, tensors, autocast_adapter_dtype, low_cpu_mem_usage)
        if is_trainable:
            tuner.set_requires_grad(adapter_name)
        else:
            self.eval()
        return checkpoint.LoadResult([], [])

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several at once, the active ones; see `BaseTuner.set_adapter`."""
        self.base_model._check_known(*as_names(adapter_name), phrase="Adapter {} not found")
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off the model; see `BaseTuner.delete_adapter`."""
        self.base_model.delete_adapter(adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say whether an adapter can be written as one of LoRA; see `vblora_triton.convert_to_lora`."""
        return self.base_model.supports_lora_conversion(adapter_name)

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Let gradients reach the inputs of a plain model, which reentrant checkpoints need; return the model.

        A quantised one has been prepared by `prepare_model_for_kbit_training`.
        """
        quantised = ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")
        if not any(getattr(model, name, False) for name in quantised):
            require_input_grads(model)
        return model

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
            is_main_process: else nothing is written. Where FSDP2 shards the model all call, and the first one writes.
            state_dict: take the parameters from this state dict of the model.
        Raises:
            ValueError: `save_directory` is a file, there is no such adapter, or it cannot be saved in this form.
        """
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        self.base_model._check_known(
            *names, phrase="You passed an invalid `selected_adapters` argument: adapter {} does not exist"
        )
        if save_embedding_layers not in ("auto", False):
            raise ValueError(
                f"`save_embedding_layers` is {save_embedding_layers!r}, which is not supported; name the "
                "embeddings in `modules_to_save` to train and save them."
            )
        checkpoint.save_adapters(
            self.base_model, save_directory, names, state_dict, safe_serialization, is_main_process
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
        key_mapping: dict[str, str] | None = None,
        **options: Any,
    ) -> PeftModel:
        """Put a saved adapter on a plain model.

        Args:
            model: the base model, adapted in place.
            model_id: a folder with a saved adapter, or its id on the Hub.
            config: use this configuration instead of the folder's.
            adapter_name, is_trainable, autocast_adapter_dtype, low_cpu_mem_usage, subfolder, key_mapping, options: see
                `load_adapter`.
        Returns:
            The model, of the class that the configuration's `task_type` names; in eval() unless `is_trainable`.
        Raises:
            AdapterFileError: a file that is missing, broken, or does not fit; the model is as it was.
            ValueError: `is_trainable`, and the file serves inference only; or the model has adapters already.
            TypeError: an unknown option of a download.
        """
        check_plain(model)
        check_adapter_name(adapter_name)
        folder = hub.local_folder(model_id, WEIGHT_NAMES, subfolder, **hub.download_options(options))
        key_mapping = _key_mapping(model) if key_mapping is None else key_mapping
        given = config is not None
        config, file = checkpoint.read_files(folder, own_config(config) if given else None)
        method, kind = tuner_class(config), cls.class_for(config)
        with nullcontext() if given else checkpoint.blaming(folder):
            expected = method.file_shapes(method.plan(config, model, kind.task_heads))
        tensors = checkpoint.fitting(method, config, expected, file, is_trainable, key_mapping)
        with undone_on_failure(model, config):
            config.inference_mode = not is_trainable
            adapted = kind(model, config, adapter_name, low_cpu_mem_usage=True)
            checkpoint.fill_adapter(
                adapted.base_model, adapter_name, tensors, autocast_adapter_dtype, low_cpu_mem_usage
            )
        return adapted if is_trainable else adapted.eval()

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload what `save_pretrained` writes to a repository on the Hub.

        Args:
            repo_id: such as "someone/their-adapter"; made if need be.
            options: commit_message, private, token, revision, create_pr; see `hub.push`.
        Returns:
            huggingface_hub's CommitInfo.
        """
        return hub.push(self.save_pretrained, repo_id, **options)

    def create_or_update_model_card(self, output_dir: str | os.PathLike) -> None:
        """Write a model card into a folder, or add what an adapter's card needs to the one that is there.

        transformers.Trainer asks for this after it has written a card of its own.
        """
        card.update_model_card(Path(output_dir), self.active_peft_config)

    def __getattr__(self, name: str) -> Any:
        """Look further in the adapted model, which looks further in the plain one."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


def _key_mapping(model: nn.Module) -> dict[str, str]:
    """Return what transformers knows of how the modules of a model were called before."""
    return getattr(model, "_checkpoint_conversion_mapping", None) or {}


def _refuse_mixed_batch(kwargs: dict[str, Any]) -> None:
    if kwargs.get("adapter_names") is not None:
        raise NotImplementedError(
            "`adapter_names`: batches whose rows use different adapters are not supported yet; call "
            "set_adapter() and run the rows of each adapter on their own."
        )
    kwargs.pop("adapter_names", None)
