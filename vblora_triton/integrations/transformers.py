"""How transformers, accelerate and trl come to treat our models as they treat PEFT's: the one place that sees to it.

Trainer asks `isinstance(model, peft.PeftModel)` before it looks for label names and columns in the plain model, saves
the adapter alone, and resumes from it or loads the best one; accelerate asks the same, and then has a function of
peft's read or fill the adapter. Two cases:

* peft is installed. Models and configurations of ours answer to the question with yes, see `SeenAsPefts`. Before the
  first such answer `answer_in_peft` makes our layers and tuners known to peft's abstract classes, and lets peft's
  functions for state dicts hand a model of ours to ours: theirs would leave out what they do not know, silently.
* peft is not installed. Then transformers has no class to ask about, and its answer is always no. When the first
  PeftModel is made, `accept_in_trainer` puts `SeenAsPefts` where transformers would have put peft's class.

Importing vblora_triton does neither. Written against transformers 5.10 to 5.23.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

from vblora_triton.tuner.layer import BaseTunerLayer
from vblora_triton.tuner.model import BaseTuner
from vblora_triton.tuner.seen import WHEN_ASKED, SeenAsPefts, loaded_peft, tell

# Name of a function of peft's -> what answers in its place where the model is ours; checkpoint.py puts them in.
ANSWERS: dict[str, Callable[..., Any]] = {}


def find_adapted(model: Any) -> Any:
    """Return the PeftModel of ours that a model is or, wrapped for running in parallel or compiled, holds; or None.

    One of peft's own answers for itself, whatever is in it.
    """
    peft = loaded_peft()
    theirs = () if peft is None else (peft.PeftModel, peft.PeftMixedModel)
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if issubclass(type(module), SeenAsPefts):
            return module
        if issubclass(type(module), theirs):
            return None
    return None


def answer_in_peft(peft: Any) -> None:
    """Let peft's classes and functions know our layers, tuners and models."""
    known = peft.tuners.tuners_utils
    known.BaseTunerLayer.register(BaseTunerLayer)
    known.BaseTuner.register(BaseTuner)
    for name, ours in ANSWERS.items():
        theirs = getattr(peft, name)
        either = _either(theirs, ours)
        for module in (peft, peft.utils, peft.utils.save_and_load):
            if getattr(module, name, None) is theirs:
                setattr(module, name, either)


def _either(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(theirs)
    def answer(model: Any, *args: Any, **kwargs: Any) -> Any:
        return (theirs if find_adapted(model) is None else ours)(model, *args, **kwargs)

    return answer


WHEN_ASKED.append(answer_in_peft)


def accept_in_trainer() -> None:
    """Where peft is not installed, let transformers.Trainer take our PeftModel for it; called when one is made.

    Replaces `_is_peft_model` in transformers.trainer_utils and, once that is loaded, what transformers.trainer knows
    of peft. Nothing is imported for it but transformers.trainer_utils, which is small.
    """
    from transformers import trainer_utils

    if (peft := loaded_peft()) is not None:
        tell(peft)
    if not trainer_utils.is_peft_available():
        trainer_utils._is_peft_model = _is_adapted
        _complete_trainer()


def _is_adapted(model: Any) -> bool:
    """Answer Trainer's question without peft."""
    # Trainer may have been imported since; it asks this first when it is made.
    _complete_trainer()
    return isinstance(model, SeenAsPefts)


def _complete_trainer() -> None:
    trainer: Any = sys.modules.get("transformers.trainer")
    # Without its Trainer the module is not loaded yet, or only in part.
    if hasattr(trainer, "Trainer"):
        # Trainer asks of this class only whether a model is an instance.
        trainer.PeftModel = SeenAsPefts
        trainer.is_peft_available = lambda: True
        trainer._is_peft_model = _is_adapted
