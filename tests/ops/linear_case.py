"""One call of vblora_linear as a value: its inputs, and its output and gradients by any implementation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.models import DEVICE

NAMES = ("x", "base", "logits_A", "logits_B", "vector_bank")


@dataclass
class LinearCase:
    M: int = 17
    K: int = 96
    N: int = 144
    r: int = 4
    h: int = 60
    b: int = 48
    k: int = 2
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype = torch.float32
    base: bool = True
    batch: tuple[int, ...] | None = None
    layout: str = "contiguous"
    seed: int = 0
    device: str = DEVICE

    def __str__(self) -> str:
        size = f"M{self.M}" if self.batch is None else "M" + "x".join(map(str, self.batch or ("scalar",)))
        dtypes = name_of_dtypes(self.dtype, self.parameter_dtype)
        extra = ("" if self.base else "-nobase") + ("" if self.layout == "contiguous" else f"-{self.layout}")
        return f"{size}-K{self.K}-N{self.N}-r{self.r}-h{self.h}-b{self.b}-k{self.k}-{dtypes}{extra}"

    def tensors(self) -> dict[str, Tensor]:
        """Fresh leaf tensors, all with requires_grad, and "dy". base is absent where the case has none."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        batch = (self.M,) if self.batch is None else self.batch
        bank = torch.rand((self.h, self.b), generator=generator) * 0.04 - 0.02
        parameters = {
            "logits_A": normal(self.r, self.K // self.b, self.h),
            "logits_B": normal(self.N // self.b, self.r, self.h),
            "vector_bank": bank,
        }
        activations = {
            "x": laid_out(self.layout, normal, *batch, self.K),
            "base": laid_out(self.layout, normal, *batch, self.N),
        }
        dy = laid_out(self.layout, normal, *batch, self.N).to(self.device)
        tensors = {name: t.to(self.device, self.dtype) for name, t in activations.items()}
        tensors |= {name: t.to(self.device, self.parameter_dtype) for name, t in parameters.items()}
        if not self.base:
            del tensors["base"]
        return {name: t.requires_grad_() for name, t in tensors.items()} | {"dy": dy.to(self.dtype)}

    def run(self, function: Callable[..., Tensor], tensors: dict[str, Tensor], **options) -> dict[str, Tensor]:
        """The output, as "y", and the gradient of each input for dy."""
        inputs = {name: tensors[name] for name in NAMES if name in tensors}
        y = function(*(inputs.get(name) for name in NAMES), self.k, **options)
        grads = torch.autograd.grad(y, list(inputs.values()), tensors["dy"])
        return {"y": y, **dict(zip(inputs, grads, strict=True))}


def laid_out(layout: str, normal: Callable[..., Tensor], *shape: int) -> Tensor:
    """A tensor of this shape by `normal(*shape)`: contiguous, transposed, or with gaps between its elements."""
    if layout == "contiguous":
        return normal(*shape)
    if layout == "transposed":
        return normal(*reversed(shape)).permute(*reversed(range(len(shape))))
    if layout == "gaps":
        return normal(*shape[:-1], 2 * shape[-1])[..., ::2]
    raise ValueError(layout)


def name_of_dtypes(*dtypes: torch.dtype) -> str:
    """Such as "bf16-fp32"."""
    return "-".join(map(str, dtypes)).replace("torch.", "").replace("float", "fp").replace("bfp", "bf")


def in_float64(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rounded values in float64, where the arithmetic of the reference is exact enough to be the truth."""
    return {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in tensors.items()}
