"""What can be made of an adapter's tensors alone, without a model that it is on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from vblora_triton.tuner.config import PeftConfig

_ROOT = "base_model.model."


class Sizes(NamedTuple):
    """The sizes of a layer, as far as an adapter's file tells them: with `exact` False, in_features is a stand-in."""

    in_features: int
    out_features: int
    exact: bool = True


class AdapterContents:
    """What a method makes of an adapter's tensors; a mix-in for a BaseTuner. A method overrides what it has.

    `tensors` are what a model holds of the adapter, by file key, as `checkpoint.fitting` returns them.
    """

    config_class: ClassVar[type[PeftConfig]]

    @classmethod
    def stored_sizes(cls, config: Any, tensors: dict[str, Tensor]) -> dict[str, Sizes]:
        """Return layer -> sizes, as far as a file tells them that may be broken.

        Args:
            tensors: what the file holds, unchecked.
        Raises:
            ValueError: they tell too little, or are no file of this configuration.
        """
        raise ValueError(
            f"A file of {cls.config_class.method.title} does not say which layers it is for; give its base model."
        )

    @classmethod
    def lora_factors(
        cls, config: Any, tensors: dict[str, Tensor], layer: str, in_features: int, out_features: int
    ) -> tuple[Tensor, Tensor]:
        """Return A (rank, in_features) and B (out_features, rank), float32: what the adapter adds to a weight is B A.

        Raises:
            ValueError: the method's update is no such product.
        """
        raise ValueError(f"{cls.config_class.method.title} cannot be written as LoRA; merge it into its base model.")

    @classmethod
    def facts(cls, config: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Return what there is to say of the values, ready for JSON, by name."""
        return {}

    @classmethod
    def fact_lines(cls, facts: dict[str, Any]) -> list[str]:
        """Return the lines in which a terminal shows `facts`."""
        return []


def layers_with(tensors: dict[str, Tensor], leaf: str) -> Iterator[tuple[str, Tensor]]:
    """Walk the layers that have a tensor of this name, in the order of their numbers: name in the model, tensor."""
    ending = f".{leaf}"
    names = [key[len(_ROOT) : -len(ending)] for key in tensors if key.startswith(_ROOT) and key.endswith(ending)]
    return ((name, tensors[f"{_ROOT}{name}{ending}"]) for name in sorted(names, key=natural))


def natural(name: str) -> list[Any]:
    """Return what to sort a name by so that layers.10 comes after layers.9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
