"""How much of a model an adapter's file will hold."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor


class SavableCounts:
    """The counts of what `save_pretrained` writes; a mix-in for a BaseTuner, which says what one tensor costs."""

    method_name: ClassVar[str]

    @classmethod
    def saved_bytes(cls, config: Any, key: str, tensor: Tensor) -> int | None:
        """Return how many bytes a tensor of the method takes in the file; None for one that is not the method's."""
        raise NotImplementedError

    def get_nb_savable_parameters(self: Any, adapter: str = "default") -> tuple[int, int]:
        """Count what `save_pretrained` writes for an adapter, in float32-equivalents: bytes / 4.

        Returns:
            The method's own, and the rest (modules saved whole, biases).
        Raises:
            ValueError: there is no such adapter.
        """
        self._check_known(adapter)
        own = other = 0
        for key, tensor in self.adapter_tensors(adapter).items():
            size = self.saved_bytes(self.peft_config[adapter], key, tensor)
            own += size or 0
            other += tensor.numel() * tensor.element_size() if size is None else 0
        return own // 4, other // 4

    def print_savable_parameters(self: Any, adapter: str | None = None) -> None:
        """Print the counts of `get_nb_savable_parameters`, of one adapter or, by default, of each."""
        for name in self.peft_config if adapter is None else [adapter]:
            own, other = self.get_nb_savable_parameters(name)
            label = "" if len(self.peft_config) == 1 else f"{name}: "
            print(
                f"{label}{self.method_name} params to-be-saved (float32-equivalent): {own:,d} "
                f"|| total params to-be-saved: {own + other:,d}"
            )
