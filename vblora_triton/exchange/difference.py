"""What two adapters differ in."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from vblora_triton.exchange.stored import read_stored

# Names that a terminal shows of a long list; JSON has all.
_MOST = 6


def diff_adapters(
    first: str | os.PathLike, second: str | os.PathLike, base: str | os.PathLike | nn.Module | None = None
) -> dict[str, Any]:
    """Say what two adapters differ in: settings, tensors, and what they do to each layer.

    Args:
        first, second, base: adapters, and the base model of both; see `read_stored`.
    Returns:
        Ready for JSON. "same" (nothing differs), "settings" (field -> [first, second]), "only_in_first" and
        "only_in_second" (names of tensors), "tensors" (name -> "largest absolute difference", or [shape, shape] where
        these differ), and "layers" (name -> relative difference of the two updates, |dW1 - dW2| / |dW1| in the
        Frobenius norm), of layers that both have, where their sizes are known.
    Raises:
        AdapterFileError: a broken adapter.
        ValueError: a base model that cannot be read or does not fit.
    """
    a, b = read_stored(first, base), read_stored(second, base)
    fields = sorted({*vars(a.config), *vars(b.config)} - {"peft_version"})
    pairs = {name: [_plain(getattr(s.config, name, None)) for s in (a, b)] for name in fields}
    settings = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    tensors: dict[str, Any] = {}
    for key in sorted(a.tensors.keys() & b.tensors.keys()):
        difference = _difference(a.tensors[key], b.tensors[key])
        if difference:
            tensors[key] = difference
    layers = {}
    for name in a.layers.keys() & b.layers.keys():
        if a.layers[name] == b.layers[name] and a.layers[name].exact:
            sizes = a.layers[name].in_features, a.layers[name].out_features
            try:
                factors = [s.method.lora_factors(s.config, s.tensors, name, *sizes) for s in (a, b)]
            except ValueError:
                continue  # a method that has no such factors
            relative = _relative(*factors[0], *factors[1])
            if relative:
                layers[name] = relative
    only = [sorted(x.tensors.keys() - y.tensors.keys()) for x, y in ((a, b), (b, a))]
    return {
        "same": not (settings or tensors or layers or any(only)),
        "settings": settings,
        "only_in_first": only[0],
        "only_in_second": only[1],
        "tensors": tensors,
        "layers": {name: layers[name] for name in a.layers if name in layers},
    }


def difference_lines(report: dict[str, Any]) -> list[str]:
    """Return the lines in which a terminal shows what `diff_adapters` returned."""
    if report["same"]:
        return ["The adapters are the same: settings and every bit of the tensors."]
    lines = [f"{name}: {first!r} and {second!r}" for name, (first, second) in report["settings"].items()]
    for which in ("first", "second"):
        names = report[f"only_in_{which}"]
        lines += [f"only in the {which}: {name}" for name in names[:_MOST]]
        lines += [f"only in the {which}: and {len(names) - _MOST} more"] if len(names) > _MOST else []
    for name, value in report["tensors"].items():
        what = f"shapes {value[0]} and {value[1]}" if isinstance(value, list) else f"differ by up to {value:.3g}"
        lines.append(f"{name}: {what}")
    if report["layers"]:
        lines.append("what they add to the weights, |dW1 - dW2| / |dW1|:")
        lines += [f"  {name}: {value:.3g}" for name, value in report["layers"].items()]
    elif not (report["tensors"] or report["only_in_first"] or report["only_in_second"]):
        lines.append("The tensors are the same.")
    return lines


def _difference(first: Tensor, second: Tensor) -> Any:
    """Return the largest absolute difference, 0 for equal tensors, or both shapes."""
    if first.shape != second.shape:
        return [list(first.shape), list(second.shape)]
    if torch.equal(first, second):
        return 0
    # Logits may be -inf, where they are in both it is no difference.
    apart = (first.double() - second.double()).abs().nan_to_num(nan=0.0)
    return apart.max().item()


def _relative(A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> float:
    """Return |B1 A1 - B2 A2| / |B1 A1| in the Frobenius norm, without making the products."""
    A, B = torch.cat([A1, A2]).double(), torch.cat([B1, -B2], dim=1).double()
    whole = ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt()
    one = ((B1.T @ B1).double() * (A1 @ A1.T).double()).sum().clamp(min=0).sqrt()
    if torch.equal(A1, A2) and torch.equal(B1, B2):
        return 0.0
    return (whole / one).item() if one else float("inf")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else getattr(value, "value", value)
