"""How transformers.Trainer comes to treat our models as it treats PEFT's: the one place that has to do with it.

Trainer asks `isinstance(model, peft.PeftModel)` before it looks for label names and columns in the plain model, saves
the adapter alone, and resumes from it or loads the best one. Two cases:

* peft is installed. Then nothing is changed: an instance of ours answers to the question with yes, see `SeenAsPefts`.
* peft is not installed. Then transformers has no class to ask about, and its answer is always no. When the first
  PeftModel is made, `accept_in_trainer` puts `SeenAsPefts` where transformers would have put peft's class.

Importing vblora_triton does neither. Written against transformers 5.10 to 5.23.
"""

from __future__ import annotations

import sys
from functools import cache
from types import new_class
from typing import Any


class SeenAsPefts:
    """A mix-in whose instances are, to `isinstance`, also peft's class of the same name, wherever peft is loaded.

    The type stays ours, and so does every method; only `model.__class__`, which `isinstance` reads where the type
    itself does not answer, names a class that descends from both.
    """

    @property
    def __class__(self) -> type:
        """Our class, or where peft is loaded a class made from ours and peft's."""
        own: Any = type(self)
        theirs = getattr(sys.modules.get("peft"), "PeftModel", None)
        if theirs is None or issubclass(own, theirs):
            return own
        return _class_of_both(own, getattr(sys.modules["peft"], own.__name__, theirs))

    @__class__.setter
    def __class__(self, kind: type) -> None:
        # FSDP assigns it, and means the type.
        object.__dict__["__class__"].__set__(self, kind)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle refuses an object whose __class__ is not its type, unless it is told how to make one.
        return _make_blank, (type(self),), vars(self)


@cache
def _class_of_both(own: Any, theirs: Any) -> type:
    # Ours comes first, so that whoever looks something up in the class finds ours.
    names = {"__module__": own.__module__, "__doc__": own.__doc__}
    return new_class(own.__name__, (own, theirs), exec_body=lambda namespace: namespace.update(names))


def _make_blank(kind: Any) -> Any:
    accept_in_trainer()
    return kind.__new__(kind)


def accept_in_trainer() -> None:
    """Where peft is not installed, let transformers.Trainer take our PeftModel for it; called when one is made.

    Replaces `_is_peft_model` in transformers.trainer_utils and, once that is loaded, what transformers.trainer knows
    of peft. Nothing is imported for it but transformers.trainer_utils, which is small.
    """
    from transformers import trainer_utils

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
