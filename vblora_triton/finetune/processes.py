"""Processes that train together, as torchrun and `accelerate launch` start them; and the signal that ends one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vblora_triton.errors import InputError

# What `accelerate launch` sets for ways to train that split a model up.
_SPLITTING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


def rank() -> int:
    """Return this process's number; 0 prints and writes."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return how many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Say whether this process is the one that prints and writes."""
    return rank() == 0


def check_processes(batch_size: int) -> None:
    """Check that a step can be shared by the processes that there are.

    Raises:
        InputError: a batch that cannot be split evenly, or a launcher that would split the model.
    """
    for name in _SPLITTING:
        if os.environ.get(name, "").lower() in ("1", "true"):
            raise InputError(
                f"{name} is set, but this command keeps the whole model in every process; launch it with torchrun, or "
                "train with transformers.Trainer in a script of your own."
            )
    if batch_size % world_size():
        raise InputError(
            f"--batch-size {batch_size} cannot be shared by {world_size()} processes; give a multiple of that."
        )


def own_device() -> torch.device:
    """Return the device that this process trains on."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if world_size() == 1:
        return torch.device("cuda")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def from_main(value: str) -> str:
    """Return the first process's value, when that one has come here too; Trainer has made the group by then."""
    box = [value]
    if world_size() > 1:
        torch.distributed.broadcast_object_list(box)
    return box[0]


def leave() -> None:
    """Leave the group of processes that Trainer has made."""
    if world_size() > 1 and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM, with which schedulers end a job, do what Ctrl-C does; for the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)
