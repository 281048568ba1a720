"""The adapter methods: a line for each, at the end. All else is said in the method's own folder.

Its config.py holds `<Name>Config`, which says what it is called, what is trained at which rate and what the command
offers (`Method`); its model.py holds `<Name>Model`, which says which layers it makes and what is in its files.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from vblora_triton.tuner.config import PeftConfig

if TYPE_CHECKING:
    from vblora_triton.tuner.method import Method
    from vblora_triton.tuner.model import BaseTuner


def register(config_class: str) -> None:
    """Make a method known, here and in files, by its configuration's class: "package.config:NameConfig"."""
    known = resolve_name(config_class)
    PeftConfig.known[known.type_name] = known


def methods() -> dict[str, Method]:
    """Return what each method says of itself, by the name that the command has for it, such as "vblora"."""
    return {name.lower(): config_class.method for name, config_class in PeftConfig.known.items()}


def own_config(config: Any) -> PeftConfig:
    """Return a configuration of this package: the one given, or one made from PEFT's own of the same method.

    Raises:
        TypeError: it is neither.
        ValueError: its method is not one of this package.
    """
    if not issubclass(type(config), PeftConfig):
        home = type(config).__module__
        if home.partition(".")[0] != "peft" or not hasattr(config, "to_dict"):
            raise TypeError(
                f"`peft_config` is of type {home}.{type(config).__name__}; give a vblora_triton configuration, such as "
                "vblora_triton.VBLoRAConfig."
            )
        config = PeftConfig.from_dict(config.to_dict())
    if config.peft_type not in PeftConfig.known:
        raise ValueError(f"`peft_type` is {config.peft_type!r}; supported: {', '.join(sorted(PeftConfig.known))}.")
    return config


def tuner_class(config: Any) -> type[BaseTuner]:
    """Return the model class of a configuration's method; see `own_config` for errors."""
    return tuner_of(PeftConfig.known[own_config(config).peft_type])  # type: ignore[index]


def tuner_of(config_class: type[PeftConfig]) -> type[BaseTuner]:
    """Return the model class that belongs to a method's configuration class."""
    # Imported only now: a model needs torch and transformers, which take seconds.
    package, name = config_class.__module__.rpartition(".")[0], config_class.__name__.removesuffix("Config")
    return resolve_name(f"{package}.model:{name}Model")


register("vblora_triton.vblora.config:VBLoRAConfig")
register("vblora_triton.vera.config:VeraConfig")
