"""Whether the kernels compute what they should on this machine: each against the definition, in float64."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vblora_triton import ops
from vblora_triton.ops.dispatch import resolve

# As in the tests: below the rounding of the operands themselves.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2**-15, torch.float16: 2**-15}


class Shape(NamedTuple):
    """Tokens, inputs, outputs, rank, and of VB-LoRA the bank and what is chosen from it."""

    tokens: int
    in_features: int
    out_features: int
    r: int
    num_vectors: int
    vector_length: int
    topk: int


# No powers of two alone, and one token, as in decoding.
SHAPES = (Shape(1, 96, 64, 4, 24, 16, 2), Shape(37, 64, 96, 3, 10, 32, 3), Shape(130, 160, 96, 8, 20, 16, 2))
# What a GPU does in no time, and an interpreter in hours.
LARGE = (Shape(1, 1024, 1024, 4, 256, 256, 2), Shape(2048, 1024, 2816, 4, 90, 256, 2))

_Inputs = dict[str, Tensor]
_VBLORA = ("x", "base", "logits_A", "logits_B", "vector_bank")
_VERA = ("x", "base", "lambda_b", "lambda_d", "A", "B")


class Comparison(NamedTuple):
    """One op, in one dtype and shape: the worst relative error of its results, and what that may be.

    problem: why there are no results, or None.
    """

    op: str
    dtype: str
    shape: Shape
    error: float
    allowed: float
    problem: str | None

    @property
    def passed(self) -> bool:
        """Whether the results are as exact as plain PyTorch's in the same dtypes. NaN is not."""
        return self.problem is None and self.error <= self.allowed


class Check(NamedTuple):
    """What a check found.

    backend: what was compared with the definition: "triton", or "cpu" where no kernels run.
    device: its name. versions: package -> version. seconds: how long it took.
    """

    backend: str
    device: str
    versions: dict[str, str]
    comparisons: tuple[Comparison, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every comparison passed."""
        return all(comparison.passed for comparison in self.comparisons)


def check_kernels(backend: str = "auto") -> Check:
    """Compare each op, its result and its gradients, with its definition in float64, in every dtype.

    An error may be twice that of plain PyTorch from the same inputs in the same dtypes, plus a floor.

    Args:
        backend: "auto" for what runs on this machine: the kernels on a GPU, elsewhere PyTorch with gradients written
            out; or "triton", "cpu".
    Raises:
        ValueError: an unknown backend, or one that cannot run here.
    """
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resolved = resolve(backend)
    chosen = ("triton" if device.type == "cuda" else "cpu") if resolved == "auto" else resolved
    if chosen == "triton":
        _probe(device)
    shapes = SHAPES + (LARGE if device.type == "cuda" else ())
    comparisons = tuple(
        _compare(name, op, inputs(shape), dtype, shape, chosen, device)
        for name, op, inputs in _OPS
        for dtype in FLOOR
        for shape in shapes
    )
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return Check(chosen, named, _versions(), comparisons, time.perf_counter() - start)


def _probe(device: torch.device) -> None:
    """Raise ValueError, with the reason, where no kernels run."""
    x, one = torch.zeros(1, 16, device=device), torch.zeros(1, device=device)
    ops.vera_linear(x, None, x[0], one, x, x.T, backend="triton")


def _compare(
    name: str, op: Callable[..., Tensor], inputs: _Inputs, dtype: torch.dtype, shape: Shape, backend: str, device: Any
) -> Comparison:
    """Compare the results of a backend, and of plain PyTorch, with float64 from the same rounded inputs."""
    # Activations have the dtype; parameters are float32 whatever the model is.
    rounded = {key: t.to(dtype) if key in ("x", "base", "dy") else t for key, t in inputs.items()}
    truth = _results(op, {key: t.double() for key, t in rounded.items()}, shape, "reference")
    placed = {key: t.to(device) for key, t in rounded.items()}
    eager = _results(op, placed, shape, "reference")
    try:
        found = _results(op, placed, shape, backend)
    except Exception as error:  # whatever a compiler or a driver raises
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        return Comparison(name, str(dtype)[6:], shape, float("nan"), 0.0, text)
    worst = (0.0, 0.0)
    for one, plain, exact in zip(found, eager, truth, strict=True):
        pair = (_error(one, exact), 2 * _error(plain, exact) + FLOOR[dtype])
        # The one that is nearest to what it may be, or beyond it; NaN is beyond.
        if not pair[0] * worst[1] <= worst[0] * pair[1] or worst[1] == 0:
            worst = pair
    return Comparison(name, str(dtype)[6:], shape, *worst, None)


def _results(op: Callable[..., Tensor], inputs: _Inputs, shape: Shape, backend: str) -> list[Tensor]:
    """Return the result of an op and the gradients of all of its inputs."""
    leaves = {key: t.detach().clone().requires_grad_() for key, t in inputs.items() if key not in ("dy", "A", "B")}
    fixed = {key: inputs[key] for key in ("A", "B") if key in inputs}
    y = op(leaves | fixed, shape, backend)
    grads = torch.autograd.grad(y, list(leaves.values()), inputs["dy"].to(y.dtype))
    return [t.detach().cpu() for t in (y, *grads)]


def _error(value: Tensor, truth: Tensor) -> float:
    scale = truth.norm()
    return ((value.double() - truth).norm() / (scale if scale > 0 else 1)).item()


def _draw(*sizes: int, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    return torch.randn(sizes, generator=generator) * scale


def _vblora_inputs(shape: Shape) -> _Inputs:
    g, b = torch.Generator().manual_seed(0), shape.vector_length
    return {
        "x": _draw(shape.tokens, shape.in_features, generator=g),
        "base": _draw(shape.tokens, shape.out_features, generator=g),
        "dy": _draw(shape.tokens, shape.out_features, generator=g),
        "logits_A": _draw(shape.r, shape.in_features // b, shape.num_vectors, generator=g, scale=2),
        "logits_B": _draw(shape.out_features // b, shape.r, shape.num_vectors, generator=g, scale=2),
        "vector_bank": _draw(shape.num_vectors, b, generator=g, scale=0.1),
    }


def _vblora(inputs: _Inputs, shape: Shape, backend: str) -> Tensor:
    x, base, logits_A, logits_B, bank = (inputs[name] for name in _VBLORA)
    return ops.vblora_linear(x, base, logits_A, logits_B, bank, shape.topk, backend=backend)


def _compose_inputs(shape: Shape) -> _Inputs:
    inputs = _vblora_inputs(shape)
    g = torch.Generator().manual_seed(1)
    dy = _draw(*inputs["logits_A"].shape[:2], shape.vector_length, generator=g)
    return {"logits": inputs["logits_A"], "vector_bank": inputs["vector_bank"], "dy": dy}


def _compose(inputs: _Inputs, shape: Shape, backend: str) -> Tensor:
    return ops.compose(inputs["logits"], inputs["vector_bank"], shape.topk, backend=backend)


def _vera_inputs(shape: Shape) -> _Inputs:
    g, r = torch.Generator().manual_seed(0), 8 * shape.r
    inputs = {key: t for key, t in _vblora_inputs(shape).items() if key in ("x", "base", "dy")}
    return inputs | {
        "lambda_b": _draw(shape.out_features, generator=g),
        "lambda_d": _draw(r, generator=g),
        "A": _draw(r, shape.in_features, generator=g, scale=0.1),
        "B": _draw(shape.out_features, r, generator=g, scale=0.1),
    }


def _vera(inputs: _Inputs, shape: Shape, backend: str) -> Tensor:
    x, base, lambda_b, lambda_d, A, B = (inputs[name] for name in _VERA)
    return ops.vera_linear(x, base, lambda_b, lambda_d, A, B, backend=backend)


_OPS: tuple[tuple[str, Callable[..., Tensor], Callable[[Shape], _Inputs]], ...] = (
    ("vblora_linear", _vblora, _vblora_inputs),
    ("compose", _compose, _compose_inputs),
    ("vera_linear", _vera, _vera_inputs),
)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    if torch.version.cuda or torch.version.hip:
        versions["cuda" if torch.version.cuda else "hip"] = str(torch.version.cuda or torch.version.hip)
    return versions
