"""One call of vera_linear as a value: its inputs, and its output and gradients by any implementation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.models import DEVICE
from tests.ops.linear_case import laid_out, name_of_dtypes

TRAINED = ("x", "base", "lambda_b", "lambda_d")


@dataclass
class VeraCase:
    M: int = 17
    K: int = 96
    N: int = 144
    r: int = 20
    # A has so many columns, and B so many rows, more than the layer needs.
    spare: int = 5
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype = torch.float32
    base_dtype: torch.dtype | None = None
    base: bool = True
    batch: tuple[int, ...] | None = None
    layout: str = "contiguous"
    seed: int = 0
    device: str = DEVICE

    def __str__(self) -> str:
        size = f"M{self.M}" if self.batch is None else "M" + "x".join(map(str, self.batch or ("scalar",)))
        dtypes = name_of_dtypes(self.dtype, self.base_dtype or self.dtype, self.parameter_dtype)
        extra = ("" if self.base else "-nobase") + ("" if self.layout == "contiguous" else f"-{self.layout}")
        return f"{size}-K{self.K}-N{self.N}-r{self.r}-{dtypes}{extra}"

    def tensors(self) -> dict[str, Tensor]:
        """Fresh leaf tensors, A and B without requires_grad, and "dy". base is absent where the case has none."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def uniform(*shape: int) -> Tensor:
            return (torch.rand(shape, generator=generator) * 2 - 1) * (6 / shape[1]) ** 0.5

        batch = (self.M,) if self.batch is None else self.batch
        out_dtype = self.base_dtype or self.dtype
        tensors = {"x": laid_out(self.layout, normal, *batch, self.K).to(self.device, self.dtype)}
        if self.base:
            tensors["base"] = laid_out(self.layout, normal, *batch, self.N).to(self.device, out_dtype)
        tensors |= {"lambda_b": normal(self.N), "lambda_d": normal(self.r) * 0.1}
        tensors |= {"A": uniform(self.r, self.K + self.spare), "B": uniform(self.N + self.spare, self.r)}
        for name in ("lambda_b", "lambda_d", "A", "B"):
            tensors[name] = tensors[name].to(self.device, self.parameter_dtype)
        dy = laid_out(self.layout, normal, *batch, self.N).to(self.device, out_dtype)
        return {name: t.requires_grad_(name in TRAINED) for name, t in tensors.items()} | {"dy": dy}

    def run(self, function: Callable[..., Tensor], tensors: dict[str, Tensor], **options) -> dict[str, Tensor]:
        """The output, as "y", and the gradient of each trained input for dy."""
        y = function(*arguments(tensors), **options)
        wanted = {name: tensors[name] for name in TRAINED if name in tensors}
        grads = torch.autograd.grad(y, list(wanted.values()), tensors["dy"])
        return {"y": y, **dict(zip(wanted, grads, strict=True))}


def arguments(tensors: dict[str, Tensor]) -> list[Tensor | None]:
    """The tensors in the order in which vera_linear takes them."""
    return [tensors.get(name) for name in (*TRAINED, "A", "B")]
