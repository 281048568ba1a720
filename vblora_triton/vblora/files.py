"""The files of VB-LoRA, and the small form of logits in them and in memory: the top k entries and their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vblora_triton.ops import cpu, reference
from vblora_triton.tuner.file_keys import FLOATING, AdapterFiles, Shapes, at_least_float32, range_problem
from vblora_triton.tuner.injection import InjectionPlan
from vblora_triton.vblora.config import VBLoRAConfig

BANK_KEY = "base_model.vblora_vector_bank"
INDICES, WEIGHTS = "_topk_indices", "_topk_weights"


def logits_shapes(
    in_features: int, out_features: int, r: int, num_vectors: int, vector_length: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the shapes of logits_A, (r, in/b, num_vectors), and logits_B, (out/b, r, num_vectors)."""
    return (r, in_features // vector_length, num_vectors), (out_features // vector_length, r, num_vectors)


def index_dtype(num_vectors: int) -> torch.dtype:
    """Return the smallest dtype that files use for indices into a bank of this size."""
    if num_vectors < 2**8:
        return torch.uint8
    if num_vectors < 2**15:
        return torch.int16
    return torch.int32 if num_vectors < 2**31 else torch.int64


def encode_topk(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Reduce logits to what inference needs of them.

    Args:
        logits: (*rows, num_vectors), floating.
        topk: entries to keep of each row.
    Returns:
        indices (*rows, topk), dtype `index_dtype`, and weights (*rows, topk - 1), float32: softmax(top_k(logits))
        without its last entry, which is what is missing to 1.
    """
    # Sorting all of the logits would take longer than writing the file; of those without values only the sizes count.
    select = reference.select if logits.is_meta else cpu.select
    indices, weights = select(at_least_float32(logits.detach()), topk)
    return indices.to(index_dtype(logits.shape[-1])), weights[..., :-1].float().contiguous()


def decode_topk(indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Complete what a file holds of a selection.

    weight_k = max(0, 1 - sum of the others)

    Args:
        indices: (*rows, topk), an integer dtype.
        weights: (*rows, topk - 1), floating.
    Returns:
        indices (*rows, topk), int32, and weights (*rows, topk), float32, which add up to 1.
    """
    weights = weights.float()
    total = weights.sum(-1, keepdim=True)
    # Rounding, above all to 16 bits, can bring the sum above 1.
    complete = torch.cat([weights / total.clamp(min=1), (1 - total).clamp(min=0)], dim=-1)
    return indices.int(), complete


class TopkLogits(nn.Module):
    """What a layer holds of an adapter that was loaded from a top-k file: two selections, and no logits.

    indices_A, weights_A: buffers (r, in/b, topk), int32 and float32.
    indices_B, weights_B: buffers (out/b, r, topk).

    The weights stay float32 when the model is cast: the bank, which carries the values, follows the model.
    """

    indices_A: Tensor
    weights_A: Tensor
    indices_B: Tensor
    weights_B: Tensor

    def __init__(self, indices_A: Tensor, weights_A: Tensor, indices_B: Tensor, weights_B: Tensor) -> None:
        super().__init__()
        self.register_buffer("indices_A", indices_A)
        self.register_buffer("weights_A", weights_A)
        self.register_buffer("indices_B", indices_B)
        self.register_buffer("weights_B", weights_B)

    def selection(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return indices_A, weights_A, indices_B, weights_B."""
        return self.indices_A, self.weights_A, self.indices_B, self.weights_B

    def compose(self, vector_bank: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the bank's vectors into the pieces of A, (r, in/b, b), and of B, (out/b, r, b)."""
        return (
            reference.compose_selected(self.indices_A, self.weights_A, vector_bank),
            reference.compose_selected(self.indices_B, self.weights_B, vector_bank),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        exact = {"weights_A": self.weights_A, "weights_B": self.weights_B}
        super()._apply(fn, recurse)
        for name, weights in exact.items():
            now = getattr(self, name)
            if now.dtype != torch.float32:
                setattr(self, name, weights.to(now.device))
        return self


def topk_problem(indices: Tensor, weights: Tensor, num_vectors: int) -> str | None:
    """Say what makes a pair of tensors of a file no top-k form, or None."""
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        return f"indices of dtype {indices.dtype}, integers are needed"
    if weights.dtype not in FLOATING:
        return f"weights of dtype {weights.dtype}, floating ones are needed"
    wide = indices.long()
    if wide.numel() and (wide.min() < 0 or wide.max() >= num_vectors):
        return f"indices from {wide.min()} to {wide.max()}, where the bank has 0 to {num_vectors - 1}"
    ordered = wide.sort(-1).values
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        return "the same index twice in one row"
    total = weights.float().sum(-1)
    # 16-bit weights of another writer may add up to a little more than 1; 0.02 is five roundings of bfloat16.
    if not torch.isfinite(weights).all() or (weights < 0).any() or (total > 1.02).any():
        return "weights that are not finite, negative, or add up to more than 1"
    return None


class VBLoRAFiles(AdapterFiles):
    """The files of VB-LoRA: the bank, and of each layer its logits or what they select."""

    @classmethod
    def adapter_shapes(cls, plan: InjectionPlan) -> Shapes:
        """Return file key -> shape of the logits of every target and of the bank."""
        c = plan.config
        shapes: Shapes = {}
        for name, (in_features, out_features) in plan.features().items():
            logits = logits_shapes(in_features, out_features, c.r, c.num_vectors, c.vector_length)
            for attribute, shape in zip(("vblora_logits_A", "vblora_logits_B"), logits, strict=True):
                shapes[f"base_model.model.{name}.{attribute}"] = shape
        return shapes | {BANK_KEY: (c.num_vectors, c.vector_length)}

    @classmethod
    def pack(cls, config: VBLoRAConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn an adapter's tensors into what its file holds: top-k weights in float32 where the config says so.

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
                packed[key] = tensor
        return packed

    @classmethod
    def unpack(
        cls, config: VBLoRAConfig, tensors: dict[str, Tensor], expected: Shapes, problems: dict[str, str]
    ) -> tuple[dict[str, Tensor], Shapes, bool]:
        """Turn what a file holds into what the model will hold; logits that are not all there become selections."""
        # Logits with entries of -inf: a top-k file that another writer read and saved again in full.
        cut = any(_is_logits(key) and t.dtype in FLOATING and torch.isneginf(t).any() for key, t in tensors.items())
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
        if not _is_logits(key) or tensor.dtype not in FLOATING:
            return super().tensor_problem(key, tensor)
        # -inf is an entry that is not selected, so long as others of its row are.
        bad = torch.isnan(tensor).any() or torch.isposinf(tensor).any() or torch.isneginf(tensor).all(-1).any()
        return "logits that are NaN or infinite" if bad else range_problem(tensor)

    def set_form(self: Any, adapter_name: str, tensors: dict[str, Tensor]) -> set[str]:
        """Let the layers hold selections where these are selections, and logits where they are logits."""
        for name, layer in self.adapted_layers():
            keys = [
                f"base_model.model.{name}.vblora_logits_{matrix}{suffix}"
                for matrix in "AB"
                for suffix in (INDICES, WEIGHTS)
            ]
            if adapter_name not in layer.r:
                continue
            if keys[0] in tensors:
                device = torch.device("cpu") if layer.base_device.type == "meta" else layer.base_device
                layer.use_topk(adapter_name, TopkLogits(*(tensors[key].to(device) for key in keys)))
            elif not layer.is_trainable(adapter_name):
                layer.use_logits(adapter_name)
        return set()

    def full_shapes(self: Any, adapter_name: str) -> Shapes:
        """Return file key -> shape of an adapter that is on the model, in its full form."""
        shapes = {key: shape for key, shape in super().full_shapes(adapter_name).items() if not _is_topk(key)}
        for name, layer in self.adapted_layers():
            if adapter_name in layer.r:
                for matrix, shape in zip("AB", layer.full_shapes(adapter_name), strict=True):
                    shapes[f"base_model.model.{name}.vblora_logits_{matrix}"] = shape
        return shapes


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
