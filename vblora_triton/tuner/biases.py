"""The biases of the base model that an adapter trains: in force while it acts, and kept aside while it does not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from vblora_triton.tuner.file_keys import live_bias_name
from vblora_triton.tuner.undo import copy_all

# What is to be swapped: adapter, name of the bias, the bias, and a copy of it as it is.
Swap = list[tuple[str, str, Tensor, Tensor]]


class TrainedBiases:
    """What a BaseTuner does about biases that adapters train; a mix-in for it. At most one adapter trains any.

    trained_biases: adapter -> names of the biases, as its file has them.
    kept_biases: adapter -> {name: values that are not in force}: the model's own while the adapter acts, else its own.
    """

    trained_biases: dict[str, tuple[str, ...]]
    kept_biases: dict[str, dict[str, Tensor]]
    _biases_in_force: set[str]

    def _add_biases(self, adapter_name: str, names: Iterable[str], in_force: bool) -> None:
        """Take the biases that an adapter trains; they begin as the model's."""
        self.trained_biases[adapter_name] = tuple(names)
        self.kept_biases[adapter_name] = {name: self._bias(name).detach().clone() for name in names}
        if in_force:
            self._biases_in_force.add(adapter_name)

    def _forget_biases(self, adapter_name: str) -> None:
        for held in (self.trained_biases, self.kept_biases):
            held.pop(adapter_name, None)
        self._biases_in_force.discard(adapter_name)

    def _prepare_biases(self, wanted: Iterable[str]) -> Swap:
        """Make what `_swap_biases` needs so that the biases of these adapters, and of no others, are in force."""
        changed = self._biases_in_force ^ (set(wanted) & self.trained_biases.keys())
        biases = [(adapter, name, self._bias(name)) for adapter in changed for name in self.trained_biases[adapter]]
        return [(adapter, name, bias, bias.detach().clone()) for adapter, name, bias in biases]

    def _swap_biases(self, prepared: Swap) -> None:
        """Bring into force what was kept aside, and keep what was in force."""
        both = [(bias, self.kept_biases[adapter][name]) for adapter, name, bias, _ in prepared]
        copy_all([(bias, kept) for bias, kept in both if not (bias.is_meta or kept.is_meta)])
        for adapter, name, _, copied in prepared:
            self.kept_biases[adapter] = self.kept_biases[adapter] | {name: copied}
        self._biases_in_force ^= {adapter for adapter, *_ in prepared}

    def biases_aside(self, adapter_name: str) -> dict[str, Tensor]:
        """Return file key -> value of those biases of an adapter that are not in force."""
        kept = {} if adapter_name in self._biases_in_force else self.kept_biases.get(adapter_name, {})
        return {f"base_model.model.{name}": value for name, value in kept.items()}

    def keep_biases(self, adapter_name: str, values: dict[str, Tensor]) -> None:
        """Take other values, by file key, for biases of an adapter that are not in force."""
        given = {key.removeprefix("base_model.model."): value for key, value in values.items()}
        self.kept_biases[adapter_name] = self.kept_biases[adapter_name] | given

    def _train_biases(self, adapter_name: str, requires_grad: bool) -> None:
        for name in self.trained_biases[adapter_name]:
            self._bias(name).requires_grad_(requires_grad)

    def _bias(self: Any, name: str) -> nn.Parameter:
        return self.model.get_parameter(live_bias_name(self.model, name))
