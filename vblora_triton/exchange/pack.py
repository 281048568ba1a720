"""An adapter written again in its small form."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import NamedTuple

from torch import nn

from vblora_triton import checkpoint
from vblora_triton.card import model_card
from vblora_triton.exchange.output import check_new, new_folder
from vblora_triton.exchange.stored import read_stored


class Packed(NamedTuple):
    """What was written: where, in which form, and the bytes of the weights before and after."""

    folder: Path
    form: str
    bytes_before: int
    bytes_after: int


def pack_adapter(
    adapter: str | os.PathLike, output: str | os.PathLike, base: str | os.PathLike | nn.Module | None = None
) -> Packed:
    """Write an adapter in its method's small form: VB-LoRA's top-k weights, VeRA without its projections.

    Args:
        adapter, base: see `read_stored`.
        output: the folder to write, which must be new.
    Raises:
        AdapterFileError: a broken adapter; nothing was written.
        ValueError: `output` exists, the adapter is in that form already, or its method has no other, or a VeRA
            adapter whose projections its key does not give.
    """
    check_new(output)
    stored = read_stored(adapter, base)
    forms = stored.config.method.forms
    if len(forms) < 2:
        raise ValueError(f"{stored.config.method.title} has one form of files, in which this adapter is.")
    small = forms[1]
    if all(getattr(stored.config, name) == value for name, value in small.fields.items()):
        raise ValueError(f"The adapter in {str(stored.folder)!r} is in that form already: {small.label}.")
    config = copy.copy(stored.config)
    for name, value in small.fields.items():
        setattr(config, name, value)
    tensors = {key: t.contiguous() for key, t in stored.method.pack(config, stored.tensors).items()}
    with new_folder(output) as folder:
        checkpoint.write_adapter(folder, tensors, config.to_json(inference_mode=True), model_card(config))
        size = (folder / checkpoint.SAFETENSORS_NAME).stat().st_size
    return Packed(Path(output), small.label, stored.file.stat().st_size, size)
