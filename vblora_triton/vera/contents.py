"""What can be made of VeRA's tensors alone: the sizes of layers, LoRA's factors, and how large the scales are."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vblora_triton.tuner.contents import AdapterContents, Sizes, layers_with
from vblora_triton.vera.config import VeraConfig
from vblora_triton.vera.files import A_KEY, B_KEY
from vblora_triton.vera.projection import draw_projections

# Layers of one parent that read the same x, so that they have one in_features.
_SIBLINGS = (
    {"q_proj", "k_proj", "v_proj"},
    {"query", "key", "value"},
    {"q", "k", "v"},
    {"gate_proj", "up_proj"},
)


class VeraContents(AdapterContents):
    """What can be made of VeRA's tensors."""

    @classmethod
    def stored_sizes(cls, config: VeraConfig, tensors: dict[str, Tensor]) -> dict[str, Sizes]:
        """Return layer -> sizes; out_features is the length of lambda_b, and in_features that of A's rows, at most.

        The layer that reads most reads all of A: where all layers must read as much, that is what each of them reads.
        """
        lambdas = dict(layers_with(tensors, "vera_lambda_b"))
        wrong = [name for name, tensor in lambdas.items() if tensor.dim() != 1 or not len(tensor)]
        if wrong:
            raise ValueError(f"{wrong[0]}.vera_lambda_b has shape {tuple(lambdas[wrong[0]].shape)}, which no layer has")
        _check_projections(config, tensors, max(map(len, lambdas.values()), default=0))
        endings = {name.rpartition(".")[2] for name in lambdas}
        parents = {name.rpartition(".")[0].rpartition(".")[2] for name in lambdas}
        alike = len(endings) == 1 or (len(parents) == 1 and any(endings <= names for names in _SIBLINGS))
        widest = tensors[A_KEY].shape[1] if A_KEY in tensors else 1
        exact = alike and A_KEY in tensors
        return {name: Sizes(widest, len(tensor), exact) for name, tensor in lambdas.items()}

    @classmethod
    def lora_factors(
        cls, config: VeraConfig, tensors: dict[str, Tensor], layer: str, in_features: int, out_features: int
    ) -> tuple[Tensor, Tensor]:
        """Return A[:, :in_features] and diag(lambda_b) B[:out_features] diag(lambda_d), float32."""
        lambda_b, lambda_d = (tensors[f"base_model.model.{layer}.vera_lambda_{which}"].float() for which in "bd")
        A, B = tensors[A_KEY].float(), tensors[B_KEY].float()
        return A[:, :in_features], lambda_b[:, None] * B[:out_features] * lambda_d

    @classmethod
    def facts(cls, config: VeraConfig, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Return the mean absolute scales of each layer: of its directions, lambda_d, and of its outputs, lambda_b."""
        means: dict[str, dict[str, float]] = {}
        for which in ("lambda_d", "lambda_b"):
            for layer, scales in layers_with(tensors, f"vera_{which}"):
                means.setdefault(layer, {})[which] = scales.double().abs().mean().item()
        return {"projections_in_file": config.save_projection, "mean_absolute_scales": means}

    @classmethod
    def fact_lines(cls, facts: dict[str, Any]) -> list[str]:
        """Return where the projections are, and the mean scales of each layer."""
        where = "in the file" if facts["projections_in_file"] else "not in the file; drawn from `projection_prng_key`"
        means = facts["mean_absolute_scales"]
        width = max(map(len, means), default=0)
        return [
            f"projections: {where}",
            f"  {'mean absolute scales':<{width}}  lambda_d   lambda_b",
            *(f"  {name:<{width}}  {own['lambda_d']:<9.3g}  {own['lambda_b']:<.3g}" for name, own in means.items()),
        ]


def _check_projections(config: VeraConfig, tensors: dict[str, Tensor], max_out: int) -> None:
    """Raise ValueError for projections that only the base model could tell from broken ones."""
    A, B = tensors.get(A_KEY), tensors.get(B_KEY)
    if A is None or B is None:
        return  # the loader knows whether they may be missing
    shapes = f"vera_A {tuple(A.shape)} and vera_B {tuple(B.shape)}"
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != config.r or B.shape[1] != config.r or not A.shape[1]:
        raise ValueError(f"{shapes} are no projections of rank {config.r}")
    drawn = draw_projections(config.projection_prng_key, config.r, A.shape[1], B.shape[0])
    if any((held.float() != one).any() for held, one in zip((A, B), drawn, strict=True)):
        raise ValueError(
            f"{shapes} are not those that `projection_prng_key` = {config.projection_prng_key} gives, so that what "
            "was cut off from them would not show"
        )
    if B.shape[0] < max_out:
        raise ValueError(f"{shapes} have fewer outputs than the {max_out} of a layer")
