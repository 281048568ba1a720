"""VB-LoRA on a whole model: one vector bank per adapter, shared by all its layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vblora_triton.tuner.injection import InjectionPlan, UnsupportedTargetError
from vblora_triton.tuner.layer import linear_features
from vblora_triton.tuner.model import BaseTuner
from vblora_triton.tuner.targets import LORA_TARGETS
from vblora_triton.vblora.config import VBLoRAConfig
from vblora_triton.vblora.files import TopkLogits, decode_topk, encode_topk, index_dtype, topk_problem
from vblora_triton.vblora.layer import Linear, VBLoRALayer, logits_shapes

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
    method_name = "VB-LoRA"
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
        """Turn an adapter's tensors into what its file holds: float32, and top-k only where the config says so.

        Raises:
            ValueError: an adapter that was loaded from a top-k file is to be saved in full.
        """
        packed = {}
        for key, tensor in tensors.items():
            if _is_topk(key) and not config.save_only_topk_weights:
                raise ValueError(
                    f"{key.removesuffix(INDICES).removesuffix(WEIGHTS)} was loaded from a top-k file, which cannot be "
                    "saved in full; set `save_only_topk_weights` to True in its configuration."
                )
            if key.endswith(INDICES):
                packed[key] = tensor.to(index_dtype(config.num_vectors))
            elif key.endswith(WEIGHTS):
                packed[key] = tensor[..., :-1]
            elif _is_logits(key) and config.save_only_topk_weights:
                packed[key + INDICES], packed[key + WEIGHTS] = encode_topk(tensor, config.topk)
            else:
                packed[key] = tensor.float() if key == BANK_KEY or _is_logits(key) else tensor
        return packed

    @classmethod
    def unpack(
        cls,
        config: VBLoRAConfig,
        tensors: dict[str, Tensor],
        expected: dict[str, tuple[int, ...]],
        problems: dict[str, str],
    ) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]], bool]:
        """Turn what a file holds into what the model will hold; logits that are not all there become selections."""
        # Logits with entries of -inf: a top-k file that another writer read and saved again in full.
        cut = any(_is_logits(key) and t.is_floating_point() and torch.isneginf(t).any() for key, t in tensors.items())
        if not cut and not any(map(_is_topk, tensors)):
            return tensors, expected, False
        unpacked, wanted = dict(tensors), dict(expected)
        for key in filter(_is_logits, expected):
            pair = [key + suffix for suffix in (INDICES, WEIGHTS) if key + suffix in tensors]
            if bool(pair) == (key in tensors):
                continue  # neither form, or both: one of the keys is missing, or unknown
            problem = _form_problem(tensors, key, pair, expected[key], config.topk)
            taken = [unpacked.pop(name) for name in pair or [key]]
            del wanted[key]
            if problem or (not pair and cls.tensor_problem(key, taken[0])):
                problems[key] = problem or str(cls.tensor_problem(key, taken[0]))
                continue
            selection = decode_topk(*(taken if pair else encode_topk(taken[0], config.topk)))
            for suffix, tensor in zip((INDICES, WEIGHTS), selection, strict=True):
                unpacked[key + suffix], wanted[key + suffix] = tensor, tuple(tensor.shape)
        return unpacked, wanted, True

    @classmethod
    def tensor_problem(cls, key: str, tensor: Tensor) -> str | None:
        """Say what makes a tensor unfit for an adapter, or None."""
        if key.endswith(INDICES):
            return None  # checked with the weights, while unpacking
        if not _is_logits(key) or not tensor.is_floating_point():
            return super().tensor_problem(key, tensor)
        # -inf is an entry that is not selected, so long as others of its row are.
        bad = torch.isnan(tensor).any() or torch.isposinf(tensor).any() or torch.isneginf(tensor).all(-1).any()
        return "logits that are NaN or infinite" if bad else None

    def set_form(self, adapter_name: str, tensors: dict[str, Tensor]) -> set[str]:
        """Let the layers hold selections where these are selections, and logits where they are logits."""
        for name, layer in self.layers():
            keys = [
                f"base_model.model.{name}.vblora_logits_{matrix}{suffix}"
                for matrix in "AB"
                for suffix in (INDICES, WEIGHTS)
            ]
            if adapter_name not in layer.r:
                continue
            if keys[0] in tensors:
                device = torch.device("cpu") if layer.weight.is_meta else layer.weight.device
                layer.use_topk(adapter_name, TopkLogits(*(tensors[key].to(device) for key in keys)))
            elif not layer.is_trainable(adapter_name):
                layer.use_logits(adapter_name)
        return set()

    def full_shapes(self, adapter_name: str) -> dict[str, tuple[int, ...]]:
        """Return file key -> shape of an adapter that is on the model, in its full form."""
        shapes = {key: shape for key, shape in super().full_shapes(adapter_name).items() if not _is_topk(key)}
        for name, layer in self.layers():
            if adapter_name in layer.r:
                for matrix, shape in zip("AB", layer.full_shapes(adapter_name), strict=True):
                    shapes[f"base_model.model.{name}.vblora_logits_{matrix}"] = shape
        return shapes

    @classmethod
    def saved_bytes(cls, config: VBLoRAConfig, key: str, tensor: Tensor) -> int | None:
        """Return how many bytes a tensor takes in the file: of logits, or of what is kept of them, or of the bank."""
        rows = tensor.numel() // tensor.shape[-1] if tensor.dim() else 0
        index, weights = index_dtype(config.num_vectors).itemsize, rows * (config.topk - 1) * 4
        if key.endswith(INDICES):
            return tensor.numel() * index
        if key.endswith(WEIGHTS):
            return weights
        if _is_logits(key) and config.save_only_topk_weights:
            return rows * config.topk * index + weights
        return tensor.numel() * 4 if key == BANK_KEY or _is_logits(key) else None


def _is_logits(key: str) -> bool:
    return key.endswith((".vblora_logits_A", ".vblora_logits_B"))


def _is_topk(key: str) -> bool:
    return key.endswith((INDICES, WEIGHTS)) and _is_logits(key.removesuffix(INDICES).removesuffix(WEIGHTS))


def _form_problem(
    tensors: dict[str, Tensor], key: str, pair: list[str], shape: tuple[int, ...], topk: int
) -> str | None:
    """Say what keeps logits, or the pair of tensors that stands for them, from becoming a selection."""
    if len(pair) == 1:
        return f"its {pair[0].rpartition('_')[2]} only"
    if not pair:
        found = tuple(tensors[key].shape)
        return None if found == shape else f"shape {found}, {shape} is needed"
    indices, weights = tensors[pair[0]], tensors[pair[1]]
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
