"""VB-LoRA on a whole model: one vector bank per adapter, shared by all its layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from vblora_triton.tuner.injection import InjectionPlan
from vblora_triton.tuner.model import BaseTuner
from vblora_triton.tuner.targets import LORA_TARGETS
from vblora_triton.vblora.config import VBLoRAConfig
from vblora_triton.vblora.contents import VBLoRAContents
from vblora_triton.vblora.files import VBLoRAFiles
from vblora_triton.vblora.layer import Linear, VBLoRALayer

# Where VB-LoRA adapts more layers by default than LoRA does.
VBLORA_TARGETS: dict[str, list[str] | str] = LORA_TARGETS | {
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
}


class VBLoRAModel(VBLoRAFiles, VBLoRAContents, BaseTuner):
    """A model with VB-LoRA adapters (arXiv 2405.15179).

    vblora_vector_bank: nn.ParameterDict, adapter -> bank (num_vectors, vector_length), which all layers read.

    Args:
        model: the model to adapt, in place.
        peft_config: a VBLoRAConfig, or {adapter_name: VBLoRAConfig}.
        adapter_name, low_cpu_mem_usage, autocast_adapter_dtype: see `BaseTuner`.
    Raises:
        ValueError, TypeError: the adapter does not fit the model, which is then as it was.
    """

    prefix = "vblora_"
    config_class = VBLoRAConfig
    tuner_layer_cls = VBLoRALayer
    linear_cls = Linear
    target_module_mapping = VBLORA_TARGETS

    def _init_vblora_vector_bank(self, config: VBLoRAConfig, adapter_name: str) -> None:
        """Draw an adapter's bank: uniform in [-bound, bound], float32, on the device where the model begins."""
        bank = torch.empty(config.num_vectors, config.vector_length, dtype=torch.float32)
        nn.init.uniform_(bank, -config.init_vector_bank_bound, config.init_vector_bank_bound)
        device = next(self.model.parameters()).device
        self.vblora_vector_bank[adapter_name] = nn.Parameter(bank if bank.is_meta else bank.to(device))

    def _pre_injection_hook(self, model: nn.Module, config: VBLoRAConfig, adapter_name: str) -> None:
        """Make the place for banks, if there is none, and draw this adapter's bank, once."""
        if "vblora_vector_bank" not in self._modules:
            self.vblora_vector_bank = nn.ParameterDict()
        self._init_vblora_vector_bank(config, adapter_name)

    def _create_and_replace(
        self,
        vblora_config: VBLoRAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        super()._create_and_replace(vblora_config, adapter_name, target, target_name, parent, current_key)

    @classmethod
    def _create_new_module(  # type: ignore[override]
        cls,
        vblora_config: VBLoRAConfig,
        vblora_vector_bank: nn.ParameterDict,
        adapter_name: str,
        target: nn.Module,
        **kwargs: Any,
    ) -> Linear:
        return super()._create_new_module(vblora_config, vblora_vector_bank, adapter_name, target, **kwargs)

    @classmethod
    def layer_arguments(cls, config: VBLoRAConfig) -> dict[str, Any]:
        """Return what a layer has to know of an adapter's configuration, by the names of its arguments."""
        names = ("r", "topk", "num_vectors", "vector_length", "vblora_dropout", "init_logits_std")
        return {name: getattr(config, name) for name in names}

    @classmethod
    def check_plan(cls, plan: InjectionPlan) -> None:
        """Check that `vector_length` divides every target, both ways.

        Raises:
            ValueError: it does not; the message names each layer and lengths that would do.
        """
        b = plan.config.vector_length
        wrong, common, phrase = [], 0, ""
        for name, sizes in plan.features().items():
            common = math.gcd(common, *sizes)
            for label, size in zip(("in_features", "out_features"), sizes, strict=True):
                if size % b:
                    wrong.append(f"`{label}` of {name} is {size}")
                    phrase = phrase or f"`{label}` {size} must be divisible by `vector_length` {b}"
        if wrong:
            divisors = (length for length in range(1, common + 1) if common % length == 0)
            near = sorted(sorted(divisors, key=lambda length: abs(math.log(length / b)))[:3], reverse=True)
            raise ValueError(
                f"{phrase}: `vector_length` is {b}, but {', '.join(wrong)}; {' and '.join(map(str, near))} "
                f"divide{'s' if len(near) == 1 else ''} every targeted layer. Give one of them, or take "
                "layers out with `exclude_modules`."
            )
