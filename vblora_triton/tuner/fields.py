"""Checks of single fields of a configuration; standard library alone."""

from __future__ import annotations

import math
import re
from typing import Any


def check_int(name: str, value: Any, minimum: int = 1) -> None:
    """Raise TypeError unless `value` is an int (no bool), ValueError unless it is at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` is {value!r} ({type(value).__name__}); give an int of at least {minimum}.")
    if value < minimum:
        raise ValueError(f"`{name}` is {value}; give an int of at least {minimum}.")


def check_float(name: str, value: Any, low: float, high: float, wanted: str) -> None:
    """Raise TypeError unless `value` is a real number, ValueError unless low <= value <= high and it is finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` is {value!r} ({type(value).__name__}); give {wanted}.")
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"`{name}` is {value}; give {wanted}.")


def check_bool(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r} ({type(value).__name__}); give True or False.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; choose one of {', '.join(map(repr, choices))}.")


def name_set(name: str, value: Any) -> set[str] | str | None:
    """Turn a list of module names into a set; leave None alone, and a string, if it is a regular expression."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"`{name}` is {value!r}, which is no regular expression ({error}); give a list of "
                "module names, or an expression that matches whole names."
            ) from error
        return value
    if isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(item, str) for item in value):
        return set(value)
    raise TypeError(f"`{name}` is {value!r}; give a list of module names or one regular expression.")


def name_list(name: str, value: Any) -> list[str] | None:
    """Return a list of module names, each once, in the order given; leave None alone."""
    if value is None:
        return None
    if isinstance(name_set(name, value), str):
        raise TypeError(f"`{name}` is {value!r}; give a list of module names.")
    return list(dict.fromkeys(value))


def check_layers(layers_to_transform: Any, layers_pattern: Any, target_modules: Any) -> None:
    """Check the two fields that restrict an adapter to some of the numbered layers; TypeError or ValueError."""
    if layers_to_transform is not None:
        numbers = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
        if not isinstance(numbers, (list, tuple)):
            raise TypeError(f"`layers_to_transform` is {layers_to_transform!r}; give a layer number or a list of them.")
        for number in numbers:
            check_int("layers_to_transform", number, minimum=0)
        if isinstance(target_modules, str):
            raise ValueError(
                f"`layers_to_transform` is {layers_to_transform!r}, but `target_modules` is the string "
                f"{target_modules!r}, beside which it has no effect; give `target_modules` as a list, or write the "
                "layer numbers into the expression."
            )
    if layers_pattern is not None:
        patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        if not isinstance(patterns, (list, tuple, set)) or not all(isinstance(item, str) for item in patterns):
            raise TypeError(f"`layers_pattern` is {layers_pattern!r}; give a name such as 'layers', or a list of them.")
        for pattern in patterns:
            name_set("layers_pattern", pattern)
        if patterns and layers_to_transform is None:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified. It is "
                f"{layers_pattern!r}: say which of these layers to adapt, or leave it out."
            )
