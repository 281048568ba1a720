"""Which adapters act and which are trained: the state that every adapted layer keeps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

# Of the name of a file, on nearly all file systems.
LONGEST_NAME = 255


def as_names(adapter_names: str | Iterable[str]) -> list[str]:
    """Return the names of adapters as a list, each once, whether one was given or several.

    Raises:
        TypeError: neither a string nor several.
    """
    if isinstance(adapter_names, str):
        return [adapter_names]
    names = list(adapter_names) if isinstance(adapter_names, Iterable) else [adapter_names]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"`adapter_name` is {adapter_names!r}; give a string, or a list of them.")
    return list(dict.fromkeys(names))


def check_adapter_name(name: Any) -> None:
    """Check that an adapter can have this name.

    Raises:
        TypeError: no string.
        ValueError: empty, a path, too long for a folder, or a name that a container of torch cannot hold.
    """
    if not isinstance(name, str):
        raise TypeError(f"`adapter_name` is {name!r}; give a string.")
    if not name or any(character in name for character in "/\\.\0"):
        raise ValueError(
            f"`adapter_name` is {name!r}; it names a folder and a parameter: give at least one character "
            "and neither a slash, nor a backslash, nor a dot."
        )
    size = len(name.encode("utf-8", errors="replace"))
    if size > LONGEST_NAME:
        raise ValueError(
            f"`adapter_name` has {size} bytes; it names a folder when it is saved: give at most {LONGEST_NAME}."
        )
    if name.encode("utf-8", errors="replace").decode() != name:
        raise ValueError(f"`adapter_name` is {name!r}, which has characters that no file system takes; leave them out.")
    if any(hasattr(container, name) for container in (nn.ParameterDict(), nn.ModuleDict())):
        raise ValueError(
            f"`adapter_name` is {name!r}, which torch's containers use for an attribute; give another, "
            f"for instance {name + '_adapter'!r}."
        )


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
