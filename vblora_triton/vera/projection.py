"""The frozen random matrices of VeRA: how they are drawn, and where a model keeps them."""

from __future__ import annotations

import math
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from typing import Any

import torch
from torch import Tensor, nn


def draw_projections(projection_prng_key: int, r: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """Draw A and B, the same ones wherever and whenever the same is asked for.

    A ~ uniform(-sqrt(6 / in_features), sqrt(6 / in_features)), then B ~ uniform(-sqrt(6 / r), sqrt(6 / r)), from one
    generator; torch's own are left as they are.

    Args:
        projection_prng_key: the generator's seed.
        in_features, out_features: the largest of the layers that share them.
    Returns:
        A (r, in_features) and B (out_features, r), float32, on the CPU.
    """
    generator = torch.Generator("cpu").manual_seed(projection_prng_key)
    drawn = []
    for shape in ((r, in_features), (out_features, r)):
        # In this order of operations: files without A and B count on every bit.
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        empty = torch.empty(shape, dtype=torch.float32, device="cpu")
        drawn.append(empty.uniform_(-bound, bound, generator=generator))
    return drawn[0], drawn[1]


class ProjectionDict(nn.Module):
    """One projection per adapter, all A's or all B's of a model: frozen buffers under the adapters' names.

    Adapters whose projections are equal share one tensor. It is never written to: an adapter that is given other values
    gets a tensor of its own, and the others keep theirs. Casting the model leaves the projections in float32.
    """

    def set(self, adapter_name: str, projection: Tensor, persistent: bool = True) -> None:
        """Give an adapter its projection, or another in place of it.

        Args:
            projection: a matrix; it becomes float32, and is kept by reference unless another adapter has its equal.
            persistent: whether state dicts hold it.
        """
        projection = projection.detach().to(torch.float32)
        others = (other for name, other in self.items() if name != adapter_name)
        self._buffers[adapter_name] = next((other for other in others if _equal(other, projection)), projection)
        change = self._non_persistent_buffers_set.discard if persistent else self._non_persistent_buffers_set.add
        change(adapter_name)

    def __setitem__(self, adapter_name: str, projection: Tensor) -> None:
        self.set(adapter_name, projection)

    def __getitem__(self, adapter_name: str) -> Tensor:
        return self._buffers[adapter_name]  # type: ignore[return-value]

    def __delitem__(self, adapter_name: str) -> None:
        del self._buffers[adapter_name]
        self._non_persistent_buffers_set.discard(adapter_name)

    def __contains__(self, adapter_name: object) -> bool:
        return adapter_name in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)

    def keys(self) -> KeysView[str]:
        """Return the adapters' names."""
        return self._buffers.keys()

    def values(self) -> ValuesView[Tensor]:
        """Return the projections."""
        return self._buffers.values()  # type: ignore[return-value]

    def items(self) -> ItemsView[str, Tensor]:
        """Return names and projections."""
        return self._buffers.items()  # type: ignore[return-value]

    def clear(self) -> None:
        """Forget all of them."""
        self._buffers.clear()
        self._non_persistent_buffers_set.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved: dict[int, Tensor] = {}
        for name, old in self.items():
            if id(old) not in moved:
                new = fn(old)
                # A cast is for the model: rounded, these would be others than the lambdas were trained with.
                moved[id(old)] = new if new.dtype == old.dtype else old.to(new.device)
            self._buffers[name] = moved[id(old)]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take values from a state dict: each into a tensor of its own, for a shared one is others' too."""
        for name, held in self.items():
            if isinstance(state_dict.get(prefix + name), Tensor) and not held.is_meta:
                self._buffers[name] = held.clone()
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, held in list(self.items()):
            self.set(name, held, name not in self._non_persistent_buffers_set)

    def extra_repr(self) -> str:
        """Name the projections and their shapes."""
        return "\n".join(f"({name}): {tuple(held.shape)} on {held.device}" for name, held in self.items())


def _equal(a: Tensor, b: Tensor) -> bool:
    """Say whether one may stand for the other; of tensors without values it is not known."""
    return a is b or (not a.is_meta and a.device == b.device and a.shape == b.shape and torch.equal(a, b))
