"""Which adapters act and which are trained: the state that every adapted layer keeps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def as_names(adapter_names: str | Iterable[str]) -> list[str]:
    """Return the names of adapters as a list, each once, whether one was given or several."""
    return [adapter_names] if isinstance(adapter_names, str) else list(dict.fromkeys(adapter_names))


def hold(parameters: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Freeze parameters for a while; return those that were trained, for `release`."""
    held = tuple(parameter for parameter in parameters if parameter.requires_grad)
    for parameter in held:
        parameter.requires_grad_(False)
    return held


def release(held: Iterable[Tensor]) -> None:
    """Train again what `hold` froze."""
    for parameter in held:
        parameter.requires_grad_(True)


class AdapterState:
    """Which adapters act and which are trained, in an adapted layer or in a module that is saved whole."""

    _active_adapter: str | list[str]
    _disable_adapters: bool = False
    # Parameters that are frozen only while the adapters are off.
    _held: tuple[Tensor, ...] = ()

    @property
    def disable_adapters(self) -> bool:
        """Whether the layer acts as its base layer, or the module as its original, alone; may be set."""
        return self._disable_adapters

    @disable_adapters.setter
    def disable_adapters(self, disabled: bool) -> None:
        self.enable_adapters(not disabled)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter, or the active ones, as they were set."""
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters as a list; not all of them need be here."""
        return as_names(self._active_adapter)

    def _get_available_adapters(self: Any) -> set[str]:
        # By the name that peft's functions know.
        return set(self.available_adapters())

    # PEFT's name for it.
    _all_available_adapter_names = _get_available_adapters

    def enable_adapters(self: Any, enabled: bool) -> None:
        """Turn all adapters on or off; off they are frozen, and on again those are trained that were before."""
        if enabled:
            release(self._held)
            self._held = ()
        elif not self._disable_adapters:
            self._held = hold(self.own_parameters())
        self._disable_adapters = not enabled

    def set_adapter(self: Any, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, trained unless `inference_mode`, and freeze the others."""
        self._active_adapter = adapter_names
        self._held = ()
        active, here = set(as_names(adapter_names)), self.available_adapters()
        self.set_requires_grad(here, False)
        if not inference_mode:
            self.set_requires_grad([adapter for adapter in here if adapter in active])
