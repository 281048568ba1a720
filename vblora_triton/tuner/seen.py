"""How objects of ours come to be taken for PEFT's by those who ask isinstance()."""

from __future__ import annotations

import sys
from functools import cache
from operator import attrgetter
from pkgutil import resolve_name
from types import new_class
from typing import Any, ClassVar

# The function that is called with the module peft, once, before the first question about one of its classes is
# answered; by name, "module:function", for it needs all of the package.
WHEN_ASKED: list[str] = []


class SeenAsPefts:
    """A mix-in whose instances are, to `isinstance`, also peft's class of the same name, wherever peft is loaded.

    The type stays ours, and so does every method; only `model.__class__`, which `isinstance` reads where the type
    itself does not answer, names a class that descends from both.

    peft_name: the class of peft's, dotted, for those whose own name peft does not have.
    """

    peft_name: ClassVar[str]

    @property
    def __class__(self) -> type:
        """Our class, or where peft is loaded a class made from ours and peft's."""
        own: Any = type(self)
        peft = loaded_peft()
        if peft is None:
            return own
        tell(peft)
        theirs = attrgetter(own.peft_name)(peft)
        return own if issubclass(own, theirs) else _class_of_both(own, getattr(peft, own.__name__, theirs))

    @__class__.setter
    def __class__(self, kind: type) -> None:
        # FSDP assigns it, and means the type.
        object.__dict__["__class__"].__set__(self, kind)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle refuses an object whose __class__ is not its type, unless it is told how to make one.
        return make_blank, (type(self),), vars(self)


class AdaptedModel(SeenAsPefts):
    """A mix-in for what holds a base model and its adapters."""

    peft_name = "PeftModel"


def loaded_peft() -> Any:
    """Return the module peft, if somebody has imported all of it."""
    peft = sys.modules.get("peft")
    return None if peft is None or getattr(peft.__spec__, "_initializing", False) else peft


@cache
def tell(peft: Any) -> None:
    """Call whoever waits for peft to be there; the first time only."""
    for listener in WHEN_ASKED:
        resolve_name(listener)(peft)


@cache
def _class_of_both(own: Any, theirs: Any) -> type:
    # Ours comes first, so that whoever looks something up in the class finds ours.
    names = {"__module__": own.__module__, "__doc__": own.__doc__}
    return new_class(own.__name__, (own, theirs), exec_body=lambda namespace: namespace.update(names))


def make_blank(kind: Any) -> Any:
    """Make an object without calling __init__, as pickle wants it."""
    return kind.__new__(kind)
