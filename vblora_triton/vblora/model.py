"""VB-LoRA on a whole model: one vector bank per adapter, shared by all its layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vblora_triton.tuner.layer import linear_features
from vblora_triton.tuner.model import BaseTuner
from vblora_triton.tuner.plan import InjectionPlan, UnsupportedTargetError
from vblora_triton.tuner.targets import LORA_TARGETS
from vblora_triton.vblora.config import VBLoRAConfig
from vblora_triton.vblora.layer import Linear, VBLoRALayer, logits_shapes
from vblora_triton.vblora.topk import decode_topk, encode_topk, index_dtype, topk_problem

BANK_KEY = "base_model.vblora_vector_bank"
INDICES, WEIGHTS = "_topk_indices", "_topk_weights"

# Where VB-LoRA adapts more layers by default than LoRA does.
VBLORA_TARGETS: dict[str, list[str] | str] = LORA_TARGETS | {
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
}


class VBLoRAModel(BaseTuner):
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
        """Give the adapter to one layer: to the adapted layer that is there, or to a new one in the layer's place."""
        if isinstance(target, Linear):
            target.update_layer(adapter_name, self.vblora_vector_bank, **_layer_arguments(vblora_config))
        else:
            layer = self._create_new_module(vblora_config, self.vblora_vector_bank, adapter_name, target)
            self._replace_module(current_key, layer)

    @staticmethod
    def _create_new_module(
        vblora_config: VBLoRAConfig,
        vblora_vector_bank: nn.ParameterDict,
        adapter_name: str,
        target: nn.Module,
        **kwargs: Any,
    ) -> Linear:
        """Make the adapted layer for a linear one; its type decides how its weight is stored.

        Raises:
            UnsupportedTargetError: neither nn.Linear nor Conv1D.
        """
        if linear_features(target) is None:
            raise UnsupportedTargetError(
                f"`target` is a {type(target).__name__}; only nn.Linear and transformers' Conv1D can be adapted."
            )
        conv = isinstance(target, Conv1D)
        return Linear(
            target,
            vblora_vector_bank,
            adapter_name,
            fan_in_fan_out=conv,
            is_target_conv_1d_layer=conv,
            **_layer_arguments(vblora_config),
            **kwargs,
        )

    @classmethod
    def check_plan(cls, plan: InjectionPlan) -> None:
        """Check that `vector_length` divides every target, both ways.

        Raises:
            ValueError: it does not; the message names each layer and lengths that would do.
        """
        b = plan.config.vector_length
        wrong, common = [], 0
        for name, sizes in plan.features().items():
            common = math.gcd(common, *sizes)
            for label, size in zip(("in_features", "out_features"), sizes, strict=True):
                if size % b:
                    wrong.append(f"`{label}` of {name} is {size}")
        if wrong:
            divisors = (length for length in range(1, common + 1) if common % length == 0)
            near = sorted(sorted(divisors, key=lambda length: abs(math.log(length / b)))[:3], reverse=True)
            raise ValueError(
                f"`vector_length` is {b}, but {', '.join(wrong)}; {' and '.join(map(str, near))} "
                f"divide{'s' if len(near) == 1 else ''} every targeted layer. Give one of them, or take "
                "layers out with `exclude_modules`."
            )

    @classmethod
    def adapter_shapes(cls, plan: InjectionPlan) -> dict[str, tuple[int, ...]]:
        """Return file key -> shape of the logits of every target and of the bank."""
        c = plan.config
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (in_features, out_features) in plan.features().items():
            logits = logits_shapes(in_features, out_features, c.r, c.num_vectors, c.vector_length)
            for attribute, shape in zip(("vblora_logits_A", "vblora_logits_B"), logits, strict=True):
                shapes[f"base_model.model.{name}.{attribute}"] = shape
        return shapes | {BANK_KEY: (c.num_vectors, c.vector_length)}

    @classmethod
    def pack(cls, config: VBLoRAConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn an adapter's parameters into what its file holds: float32, and top-k only where the config says so.

        Raises:
            ValueError: logits of a top-k file are to be saved in full.
        """
        packed = {}
        for key, tensor in tensors.items():
            if key == BANK_KEY:
                packed[key] = tensor.float()
            elif not _is_logits(key):
                packed[key] = tensor
            elif config.save_only_topk_weights:
                packed[key + INDICES], packed[key + WEIGHTS] = encode_topk(tensor, config.topk)
            elif torch.isneginf(tensor).any():
                raise ValueError(
                    f"{key} was loaded from a top-k file, which cannot be saved in full; set "
                    "`save_only_topk_weights` to True in its configuration."
                )
            else:
                packed[key] = tensor.float()
        return packed

    @classmethod
    def unpack(
        cls,
        config: VBLoRAConfig,
        tensors: dict[str, Tensor],
        expected: dict[str, tuple[int, ...]],
        problems: dict[str, str],
    ) -> tuple[dict[str, Tensor], bool]:
        """Turn what a file holds, in either form, into parameters; a top-k form serves inference only."""
        unpacked = {key: tensor for key, tensor in tensors.items() if not key.endswith((INDICES, WEIGHTS))}
        packed = sorted({key.removesuffix(INDICES).removesuffix(WEIGHTS) for key in tensors if key not in unpacked})
        # A wrong size in the configuration must not make us allocate that much.
        sized = BANK_KEY in tensors and tuple(tensors[BANK_KEY].shape) == expected[BANK_KEY]
        for key in packed:
            present = [key + suffix for suffix in (INDICES, WEIGHTS) if key + suffix in tensors]
            if key not in expected or key in unpacked:
                # Unknown; or both forms of the same logits.
                unpacked |= {name: tensors[name] for name in present}
                continue
            problem = (
                f"its {present[0].rpartition('_')[2]} only"
                if len(present) == 1
                else _pair_problem(tensors[key + INDICES], tensors[key + WEIGHTS], expected[key], config.topk)
            )
            if problem or not sized:
                problems[key] = problem or ""
            else:
                unpacked[key] = decode_topk(tensors[key + INDICES], tensors[key + WEIGHTS], config.num_vectors)
        logits = [t for key, t in unpacked.items() if _is_logits(key) and t.is_floating_point()]
        return unpacked, any(bool(torch.isneginf(tensor).any()) for tensor in logits)

    def mark_inference_only(self, adapter_name: str, inference_only: bool) -> None:
        """Note whether an adapter's logits are all there; one whose are not stays frozen."""
        for _, layer in self.layers():
            if inference_only and adapter_name in layer.vblora_logits_A:
                layer.inference_only_adapters.add(adapter_name)
                layer.set_requires_grad(adapter_name, False)
            else:
                layer.inference_only_adapters.discard(adapter_name)

    def get_nb_savable_parameters(self, adapter: str = "default") -> tuple[int, int]:
        """Count what `save_pretrained` writes for an adapter, in float32-equivalents: bytes / 4.

        Returns:
            VB-LoRA's own (logits, or indices and weights, and the bank), and the rest (modules saved whole, biases).
        Raises:
            ValueError: there is no such adapter.
        """
        self._check_known(adapter)
        config = self.peft_config[adapter]
        own = other = 0
        tensors = self.adapter_tensors(adapter)
        for key, tensor in tensors.items():
            if key == BANK_KEY:
                own += tensor.numel() * 4
            elif not _is_logits(key):
                other += tensor.numel() * tensor.element_size()
            elif config.save_only_topk_weights:
                rows = tensor.numel() // config.num_vectors
                own += rows * (config.topk * index_dtype(config.num_vectors).itemsize + (config.topk - 1) * 4)
            else:
                own += tensor.numel() * 4
        return own // 4, other // 4

    def print_savable_parameters(self, adapter: str | None = None) -> None:
        """Print the counts of `get_nb_savable_parameters`, of one adapter or, by default, of each."""
        for name in self.peft_config if adapter is None else [adapter]:
            own, other = self.get_nb_savable_parameters(name)
            label = "" if len(self.peft_config) == 1 else f"{name}: "
            print(
                f"{label}VB-LoRA params to-be-saved (float32-equivalent): {own:,d} "
                f"|| total params to-be-saved: {own + other:,d}"
            )


def _is_logits(key: str) -> bool:
    return key.endswith((".vblora_logits_A", ".vblora_logits_B"))


def _pair_problem(indices: Tensor, weights: Tensor, shape: tuple[int, ...], topk: int) -> str | None:
    rows = shape[:-1]
    if tuple(indices.shape) != (*rows, topk) or tuple(weights.shape) != (*rows, topk - 1):
        return (
            f"shapes {tuple(indices.shape)} of indices and {tuple(weights.shape)} of weights, where {(*rows, topk)} "
            f"and {(*rows, topk - 1)} belong"
        )
    return topk_problem(indices, weights, shape[-1])


def _layer_arguments(config: VBLoRAConfig) -> dict[str, Any]:
    names = ("r", "topk", "num_vectors", "vector_length", "vblora_dropout", "init_logits_std")
    return {name: getattr(config, name) for name in names}
