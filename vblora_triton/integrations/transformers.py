"""How transformers, accelerate and trl come to treat our models as they treat PEFT's: the one place that sees to it.

Trainer asks `isinstance(model, peft.PeftModel)` before it looks for label names and columns in the plain model, saves
the adapter alone, and resumes from it or loads the best one; accelerate asks the same, and then has a function of
peft's read or fill the adapter. Two cases:

* peft is installed. Models and configurations of ours answer to the question with yes, see `SeenAsPefts`. Before the
  first such answer in_peft.py makes our layers and tuners known to peft's abstract classes, and lets some functions of
  peft's hand what is ours to ours.
* peft is not installed. Then transformers has no class to ask about, and its answer is always no. When the first
  PeftModel is made, `accept_in_trainer` puts `AdaptedModel` where transformers would have put peft's class.

Importing vblora_triton does neither. Written against transformers 5.10 to 5.23.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from vblora_triton.tuner.seen import AdaptedModel, loaded_peft, tell


def find_adapted(model: Any) -> Any:
    """Return the PeftModel of ours that a model is or, wrapped for running in parallel or compiled, holds; or None.

    One of peft's own answers for itself, whatever is in it.
    """
    peft = loaded_peft()
    theirs = () if peft is None else (peft.PeftModel, peft.PeftMixedModel)
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if issubclass(type(module), AdaptedModel):
            return module
        if issubclass(type(module), theirs):
            return None
    return None


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
    return isinstance(model, AdaptedModel)


def _complete_trainer() -> None:
    trainer: Any = sys.modules.get("transformers.trainer")
    # Without its Trainer the module is not loaded yet, or only in part.
    if hasattr(trainer, "Trainer"):
        # Trainer asks of this class only whether a model is an instance.
        trainer.PeftModel = AdaptedModel
        trainer.is_peft_available = lambda: True
        trainer._is_peft_model = _is_adapted
