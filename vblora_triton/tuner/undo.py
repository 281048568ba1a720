"""All or nothing: what a block that fails did to modules and configurations is undone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vblora_triton.tuner.sharding import like

_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def undone_on_failure(*things: Any) -> Iterator[None]:
    """Undo what the block did, if it raises.

    Attributes, the containers in them, `requires_grad` of parameters and torch's generator become what they were. The
    values of tensors do not: the block writes into those that were there last of all, by `copy_all`.

    Args:
        things: modules, with all modules inside, and other objects.
    """
    owners = [owner for thing in things for owner in (_holders(thing) if isinstance(thing, nn.Module) else [thing])]
    attributes = [(owner, dict(vars(owner))) for owner in owners]
    containers = [
        (value, type(value)(value)) for _, held in attributes for value in held.values() if type(value) in _CONTAINERS
    ]
    modules = [thing for thing in things if isinstance(thing, nn.Module)]
    trained = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]
    random = torch.get_rng_state()
    try:
        yield
    except BaseException:
        for owner, held in attributes:
            vars(owner).clear()
            vars(owner).update(held)
        for container, content in containers:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        torch.set_rng_state(random)
        raise


def _holders(module: nn.Module) -> list[nn.Module]:
    """Return a module and those inside it, but for the dropouts of adapters, which may be many, and never change."""
    return [part for part in module.modules() if type(part) not in (nn.Dropout, nn.Identity)]


def copy_all(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Write (target, source) pairs, of one size each, whose sources were made before: all of them.

    To write into memory that is there needs none, or none for long: what fails is tried once more. Of a target that
    FSDP2 has sharded each process writes its own part.
    """
    with torch.no_grad():
        for target, source in pairs:
            try:
                target.copy_(like(source, target))
            except Exception:  # whatever a device says when it is short of memory
                target.copy_(like(source, target))
