"""An adapter as it is in its folder, read and checked without a model that runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from vblora_triton import checkpoint, hub
from vblora_triton.exchange.base import empty_base, skeleton
from vblora_triton.folder import WEIGHT_NAMES
from vblora_triton.hub import AdapterFileError
from vblora_triton.methods import tuner_class
from vblora_triton.peft_model import PeftModel
from vblora_triton.tuner.contents import Sizes
from vblora_triton.tuner.injection import InjectionPlan
from vblora_triton.tuner.model import BaseTuner


class StoredAdapter(NamedTuple):
    """An adapter's folder and what is in it.

    file: the weights.
    method: the class of its models.
    plan: its configuration, settled, and what it means in its base model, or in what the file tells of that.
    base: the base model, on the meta device; None where there was none to check the file against.
    layers: the sizes of the adapted layers.
    tensors: file key -> value, as a model would hold them, on the CPU.
    trainable: whether they are all that training needs.
    """

    folder: Path
    file: Path
    method: type[BaseTuner]
    plan: InjectionPlan
    base: nn.Module | None
    layers: dict[str, Sizes]
    tensors: dict[str, Tensor]
    trainable: bool

    @property
    def config(self) -> Any:
        """The configuration, settled."""
        return self.plan.config

    def beside(self) -> dict[str, Tensor]:
        """Return the tensors that are not the method's own: modules saved whole, and trained biases."""
        own = f".{self.method.prefix}"
        shared = f"base_model{own}"
        layers = {f"base_model.model.{name}" for name in self.layers}
        return {
            key: tensor
            for key, tensor in self.tensors.items()
            if not key.startswith(shared) and key.rpartition(own)[0] not in layers
        }


def read_stored(adapter: str | os.PathLike, base: str | os.PathLike | nn.Module | None = None) -> StoredAdapter:
    """Read an adapter's folder, and check it as a load would: against its base model, where that can be had.

    Where it cannot, against itself: an adapter whose layers are not alike is refused then, for a broken one would not
    show.

    Args:
        adapter: a folder, or an id on the Hub.
        base: the base model, or its folder or hub id; by default what the adapter's configuration names, if that is
            on this machine. Of a folder or an id only the configuration is read.
    Raises:
        AdapterFileError: a file that is missing, broken, or does not fit.
        ValueError: the base model cannot be read, or the adapter does not fit it.
    """
    folder = hub.local_folder(adapter, WEIGHT_NAMES)
    config, (file, stored) = checkpoint.read_files(folder)
    method = tuner_class(config)
    model = base if isinstance(base, nn.Module) else empty_base(config, None if base is None else os.fspath(base))
    sizes: dict[str, Sizes] = {}
    if model is None:
        try:
            sizes = method.stored_sizes(config, stored)
        except AdapterFileError:
            raise
        except ValueError as error:
            raise AdapterFileError(f"{file}: {error}; or give the base model, to check the file against it.") from error
    plan = method.plan(config, model or skeleton(config, stored, sizes), PeftModel.class_for(config).task_heads)
    expected = method.file_shapes(plan)
    tensors = checkpoint.fitting(method, config, expected, (file, stored), is_trainable=False)
    layers = {name: sizes[name] if model is None else Sizes(*size) for name, size in plan.features().items()}
    return StoredAdapter(folder, file, method, plan, model, layers, tensors, tensors.keys() == expected.keys())
