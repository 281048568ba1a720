"""What peft is told of our classes, and which of its functions hand what is ours to ours; once, when peft is there.

accelerate, transformers and trl ask isinstance() of peft's classes, and call peft's functions by these names. Theirs
would leave out of a model of ours what they do not know, or put peft's layers on for a configuration of ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any

from torch import nn

from vblora_triton.injected import inject_adapter_in_model, injected_tuner
from vblora_triton.integrations.transformers import find_adapted
from vblora_triton.peft_model import get_peft_model
from vblora_triton.state_dicts import get_peft_model_state_dict, set_peft_model_state_dict
from vblora_triton.tuner.config import PeftConfig
from vblora_triton.tuner.layer import BaseTunerLayer
from vblora_triton.tuner.model import BaseTuner

# What answers in the place of a function of peft's, and the argument that says whether it should.
ANSWERS: tuple[tuple[Callable[..., Any], str], ...] = (
    (get_peft_model, "peft_config"),
    (inject_adapter_in_model, "peft_config"),
    (get_peft_model_state_dict, "model"),
    (set_peft_model_state_dict, "model"),
)


def answer_in_peft(peft: Any) -> None:
    """Let peft's classes and functions know our layers, tuners, models and configurations."""
    known = peft.tuners.tuners_utils
    known.BaseTunerLayer.register(BaseTunerLayer)
    known.BaseTuner.register(BaseTuner)
    for ours, deciding in ANSWERS:
        theirs = getattr(peft, ours.__name__)
        # Not where somebody has put a function of their own there.
        if isinstance(theirs, FunctionType) and f"{theirs.__module__}.".startswith("peft.") and not theirs.__closure__:
            _hand_over(theirs, ours, deciding)


def _hand_over(theirs: FunctionType, ours: Callable[..., Any], deciding: str) -> None:
    """Let a function give calls to ours where the argument `deciding` is ours.

    Its code is exchanged, and the function stays the same object, for others have imported it under names of their own.
    """
    original = FunctionType(theirs.__code__, theirs.__globals__, theirs.__name__, theirs.__defaults__)
    original.__kwdefaults__ = theirs.__kwdefaults__
    signature = inspect.signature(theirs)

    @wraps(original)
    def either(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        return (ours if is_ours(given.get(deciding)) else original)(**given)

    theirs.__wrapped__ = original  # type: ignore[attr-defined]  # for inspect.signature
    theirs.__defaults__, theirs.__kwdefaults__ = None, {"_either": either}
    theirs.__code__ = _call.__code__


def _call(*args: Any, _either: Any, **kwargs: Any) -> Any:
    return _either(*args, **kwargs)


def is_ours(value: Any) -> bool:
    """Say whether it is a configuration of ours, a model with our adapters, or one wrapped around such a model."""
    if isinstance(value, nn.Module):
        return find_adapted(value) is not None or injected_tuner(value) is not None
    return issubclass(type(value), PeftConfig)
