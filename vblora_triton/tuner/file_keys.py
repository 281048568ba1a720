"""What an adapter's file holds, by which names, and what those names are in the model."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import psutil
import torch
from torch import Tensor, nn

from vblora_triton.tuner.config import PeftConfig
from vblora_triton.tuner.injection import InjectionPlan
from vblora_triton.tuner.layer import BaseTunerLayer, ModulesToSaveWrapper

Shapes = dict[str, tuple[int, ...]]
# What adapters are kept in; torch computes too little in others, of 8 bits.
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class AdapterFiles:
    """What a method's model says of its files; a mix-in for a BaseTuner. A method overrides what differs in its own."""

    prefix: ClassVar[str]
    config_class: ClassVar[type[PeftConfig]]

    @classmethod
    def adapter_shapes(cls, plan: InjectionPlan) -> Shapes:
        """Return file key -> shape of the method's own parameters for an adapter."""
        raise NotImplementedError

    @classmethod
    def pack(cls, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn an adapter's parameters, by file key, into what the file holds; on the meta device to count it."""
        return tensors

    @classmethod
    def unpack(
        cls, config: Any, tensors: dict[str, Tensor], expected: Shapes, problems: dict[str, str]
    ) -> tuple[dict[str, Tensor], Shapes, bool]:
        """Turn what a file holds into what the model will hold, by key; say which shapes, and if for inference only.

        `expected` has the shapes of the full form; what is wrong inside goes to `problems`, by file key.
        """
        return tensors, expected, False

    @classmethod
    def tensor_problem(cls, key: str, tensor: Tensor) -> str | None:
        """Say what makes a tensor of the right shape unfit for an adapter, or None."""
        if not tensor.is_floating_point():
            # A module that is saved whole may count something in integers.
            return f"dtype {tensor.dtype}, a floating one is needed" if cls.prefix in key else None
        if tensor.dtype not in FLOATING:
            return f"dtype {tensor.dtype}, float32, float64 or a 16-bit one is needed"
        if not torch.isfinite(tensor).all():
            return "values that are not finite"
        return range_problem(tensor) if cls.prefix in key else None

    def set_form(self, adapter_name: str, tensors: dict[str, Tensor]) -> set[str]:
        """Give the adapter the parameters that these are to fill; return the keys that are seen to already."""
        return set()

    def full_shapes(self: Any, adapter_name: str) -> Shapes:
        """Return file key -> shape of an adapter that is on the model, in its full form."""
        return {key: tuple(tensor.shape) for key, tensor in self.adapter_tensors(adapter_name).items()}

    @classmethod
    def file_shapes(cls, plan: InjectionPlan) -> Shapes:
        """Return file key -> shape of everything that belongs to the planned adapter."""
        shapes = cls.adapter_shapes(plan)
        for name, module in plan.saved.items():
            shapes |= {f"base_model.model.{name}.{key}": tuple(t.shape) for key, t in module.state_dict().items()}
        return shapes | {f"base_model.model.{name}": shape for name, shape in plan.biases.items()}

    def check_room(self: Any, plan: InjectionPlan) -> None:
        """Check that there is memory for a planned adapter, where its model begins.

        Raises:
            ValueError: there is not; the message says how many bytes are wanted, and how many are there.
        """
        wanted = 4 * sum(math.prod(shape) for shape in self.adapter_shapes(plan).values())
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        if "meta" in (device.type, torch.get_default_device().type):
            return
        there = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        if wanted > there:
            raise ValueError(
                f"An adapter of these sizes takes {wanted:,} bytes of memory, and there are {there:,} on "
                f"{device.type}; give smaller ones, or fewer `target_modules`."
            )

    def adapter_tensors(self: Any, adapter_name: str) -> dict[str, Tensor]:
        """Return file key -> live tensor of everything that belongs to an adapter."""
        state = buffers_outside(self) | self.state_dict(prefix="base_model.")
        held = {key: state[live] for key, live in adapter_keys(self, adapter_name).items()}
        return held | self.biases_aside(adapter_name)

    def get_nb_savable_parameters(self: Any, adapter: str = "default") -> tuple[int, int]:
        """Count what `save_pretrained` writes for an adapter, in float32-equivalents: bytes / 4.

        Returns:
            The method's own, and the rest (modules saved whole, biases).
        Raises:
            ValueError: there is no such adapter, or it cannot be saved in this form.
        """
        self._check_known(adapter)
        tensors = {key: tensor.to("meta") for key, tensor in self.adapter_tensors(adapter).items()}
        own = other = 0
        for key, tensor in self.pack(self.peft_config[adapter], tensors).items():
            size = tensor.numel() * tensor.element_size()
            if key.rpartition(".")[2].startswith(self.prefix):
                own += size
            else:
                other += size
        return own // 4, other // 4

    def print_savable_parameters(self: Any, adapter: str | None = None) -> None:
        """Print the counts of `get_nb_savable_parameters`, of one adapter or, by default, of each."""
        for name in self.peft_config if adapter is None else [adapter]:
            own, other = self.get_nb_savable_parameters(name)
            label = "" if len(self.peft_config) == 1 else f"{name}: "
            print(
                f"{label}{self.config_class.method.title} params to-be-saved (float32-equivalent): {own:,d} "
                f"|| total params to-be-saved: {own + other:,d}"
            )


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is in float64: a file must not round what was trained."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def range_problem(tensor: Tensor) -> str | None:
    """Say whether float32, in which adapters are computed, cannot hold a tensor's finite values."""
    lost = tensor.dtype == torch.float64 and (tensor.isfinite() & tensor.float().isinf()).any()
    return "values that float32 cannot hold" if lost else None


def adapter_keys(tuner: Any, adapter_name: str) -> dict[str, str]:
    """Return file key -> key in the state dict of the PeftModel, of everything that belongs to an adapter.

    The file's keys leave the adapter's name out, and the wrapper of a module that is saved whole:
    `base_model.model.L.vblora_logits_A`, `base_model.vblora_vector_bank`, `base_model.model.lm_head.weight`.

    Args:
        tuner: a BaseTuner with the adapter.
        adapter_name: which.
    """
    keys: dict[str, str] = {}
    shared = tuner.tuner_layer_cls.shared_layer_names
    for name, wrapper in tuner.wrappers():
        whole = f"base_model.model.{name}"
        if isinstance(wrapper, ModulesToSaveWrapper):
            if adapter_name in wrapper.modules_to_save:
                parts = wrapper.modules_to_save[adapter_name].state_dict()
                keys |= {f"{whole}.{key}": f"{whole}.modules_to_save.{adapter_name}.{key}" for key in parts}
        else:
            keys |= {f"{whole}.{key}": f"{whole}.{live}" for key, live in wrapper.file_names(adapter_name).items()}
    keys |= {f"base_model.{attribute}": f"base_model.{attribute}.{adapter_name}" for attribute in shared}
    for name in tuner.trained_biases[adapter_name]:
        keys[f"base_model.model.{name}"] = f"base_model.model.{live_bias_name(tuner.model, name)}"
    return keys


def buffers_outside(tuner: Any) -> dict[str, Tensor]:
    """Return key -> buffer of those that no state dict of the PeftModel holds, though an adapter may need them."""
    return {
        f"base_model.{name}.{key}": module._buffers[key]
        for name, module in tuner.named_modules()
        for key in module._non_persistent_buffers_set
        if module._buffers.get(key) is not None
    }


def live_bias_name(model: nn.Module, name: str) -> str:
    """Return what a bias is called now; other adapters may have wrapped its layer, or taken the wrapper off.

    Args:
        name: what the file of its adapter calls it, without `base_model.model.`.
    """
    owner = name.removesuffix(".bias").removesuffix(".base_layer")
    wrapped = isinstance(model.get_submodule(owner), BaseTunerLayer)
    return f"{owner}.base_layer.bias" if wrapped else f"{owner}.bias"
