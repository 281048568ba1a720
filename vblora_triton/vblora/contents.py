"""What can be made of VB-LoRA's tensors alone: the sizes of layers, LoRA's factors, and which bank vectors are used."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vblora_triton import ops
from vblora_triton.ops import cpu, reference
from vblora_triton.tuner.contents import AdapterContents, Sizes, layers_with
from vblora_triton.vblora.config import VBLoRAConfig
from vblora_triton.vblora.files import BANK_KEY, INDICES, WEIGHTS

_BARS, _WIDTH = 16, 40


class VBLoRAContents(AdapterContents):
    """What can be made of VB-LoRA's tensors."""

    @classmethod
    def stored_sizes(cls, config: VBLoRAConfig, tensors: dict[str, Tensor]) -> dict[str, Sizes]:
        """Return layer -> sizes: in_features / b rows of logits_A in each of r, and out_features / b of logits_B."""
        found: dict[str, dict[str, int]] = {}
        shape = tuple(tensors[BANK_KEY].shape) if BANK_KEY in tensors else None
        if shape != (config.num_vectors, config.vector_length):
            raise ValueError(f"{BANK_KEY} has shape {shape}, {(config.num_vectors, config.vector_length)} is needed")
        for matrix, dim in (("A", 1), ("B", 0)):
            for suffix in ("", INDICES, WEIGHTS):
                for name, tensor in layers_with(tensors, f"vblora_logits_{matrix}{suffix}"):
                    if tensor.dim() != 3 or tensor.shape[dim] == 0:
                        raise ValueError(
                            f"{name}.vblora_logits_{matrix}{suffix} has shape {tuple(tensor.shape)}, which no layer has"
                        )
                    found.setdefault(name, {})[matrix] = tensor.shape[dim] * config.vector_length
        incomplete = [name for name, sizes in found.items() if len(sizes) < 2]
        if incomplete:
            raise ValueError(f"{incomplete[0]} has one of vblora_logits_A and vblora_logits_B, both are needed")
        return {name: Sizes(sizes["A"], sizes["B"]) for name, sizes in found.items()}

    @classmethod
    def lora_factors(
        cls, config: VBLoRAConfig, tensors: dict[str, Tensor], layer: str, in_features: int, out_features: int
    ) -> tuple[Tensor, Tensor]:
        """Return A (r, in_features) and B (out_features, r), float32, the composed matrices themselves."""
        bank = tensors[BANK_KEY].float()
        pieces = []
        for matrix in "AB":
            key = f"base_model.model.{layer}.vblora_logits_{matrix}"
            if key in tensors:
                pieces.append(ops.compose(tensors[key].float(), bank, config.topk))
            else:
                pieces.append(reference.compose_selected(tensors[key + INDICES], tensors[key + WEIGHTS], bank))
        A, B = pieces
        return A.reshape(config.r, in_features), B.transpose(1, 2).reshape(out_features, config.r)

    @classmethod
    def facts(cls, config: VBLoRAConfig, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Return which bank vectors are selected, how often and by which layers, and how evenly.

        counts: per vector, the selections in which it is; weights: the sum of its weights in them.
        layers: layer -> {vector: selections of the layer in which it is}, of vectors that are selected.
        entropy_of_selections: mean of -sum w log2 w over selections, in bits; at most log2(topk).
        entropy_of_usage: the same of `counts` / their sum; at most log2(num_vectors).
        """
        counts = torch.zeros(config.num_vectors, dtype=torch.float64)
        sums, entropy, selections = counts.clone(), 0.0, 0
        layers: dict[str, dict[int, int]] = {}
        for layer, indices, weights in _selections(config, tensors):
            flat, w = indices.long().flatten(), weights.double()
            counts += torch.bincount(flat, minlength=config.num_vectors)
            sums.index_add_(0, flat, w.flatten())
            entropy += _entropy(w).sum().item()
            selections += w.shape[0] * w.shape[1]
            own = layers.setdefault(layer, {})
            for vector, times in zip(*(t.tolist() for t in flat.unique(return_counts=True)), strict=True):
                own[vector] = own.get(vector, 0) + times
        return {
            "selections": selections,
            "used_vectors": int((counts > 0).sum()),
            "counts": [int(count) for count in counts],
            "weights": [round(weight, 6) for weight in sums.tolist()],
            "layers": {name: {str(vector): own[vector] for vector in sorted(own)} for name, own in layers.items()},
            "entropy_of_selections": entropy / max(selections, 1),
            "entropy_of_usage": _entropy(counts / counts.sum().clamp(min=1)).item(),
        }

    @classmethod
    def fact_lines(cls, facts: dict[str, Any]) -> list[str]:
        """Return a histogram of the selections over the bank, and the entropies."""
        counts = facts["counts"]
        size = -(-len(counts) // _BARS)
        groups = [(start, counts[start : start + size]) for start in range(0, len(counts), size)]
        most = max((sum(group) for _, group in groups), default=0) or 1
        layers = [len(own) for own in facts["layers"].values()]
        lines = [
            f"vector bank: {facts['used_vectors']} of {len(counts)} vectors are selected, in {facts['selections']:,d} "
            "selections",
            f"  a layer selects {min(layers)} to {max(layers)} of them",
            "  vectors    selected",
        ]
        for start, group in groups:
            label = f"{start}-{start + len(group) - 1}" if len(group) > 1 else str(start)
            lines.append(f"  {label:<9}  {sum(group):>8,d}  {'█' * round(_WIDTH * sum(group) / most)}".rstrip())
        topk = max(1.0, sum(counts) / max(facts["selections"], 1))
        return [
            *lines,
            f"entropy of a selection: {facts['entropy_of_selections']:.2f} bits of at most {math.log2(topk):.2f}",
            f"entropy of the usage of the bank: {facts['entropy_of_usage']:.2f} bits of at most "
            f"{math.log2(len(counts)):.2f}",
        ]


def _selections(config: VBLoRAConfig, tensors: dict[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    """Return layer, indices and weights (rows, columns, topk), of each matrix."""
    found = []
    for matrix in "AB":
        for layer, logits in layers_with(tensors, f"vblora_logits_{matrix}"):
            found.append((layer, *cpu.select(logits.float(), config.topk)))
        for layer, indices in layers_with(tensors, f"vblora_logits_{matrix}{INDICES}"):
            found.append((layer, indices, tensors[f"base_model.model.{layer}.vblora_logits_{matrix}{WEIGHTS}"]))
    return found


def _entropy(weights: Tensor) -> Tensor:
    """Return -sum w log2 w over the last dimension."""
    return -torch.xlogy(weights, weights).sum(-1) / math.log(2)
