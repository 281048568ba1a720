"""The safetensors files of a model, read and written a tensor at a time: a memory map of one would count as memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vblora_triton.errors import InputError
from vblora_triton.tuner.config import replacing

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Of a model whose files were one: transformers would read that one alone, by its usual name.
FIRST_NAME, ADDED_NAME = "model-base.safetensors", "model-added.safetensors"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CHUNK = 16 * 2**20


class Place(NamedTuple):
    """Where a tensor is: in which file, from which byte on, how many; and what its bytes mean."""

    file: Path
    start: int
    size: int
    dtype: str
    shape: tuple[int, ...]


class Shards:
    """The weights of a model in a folder.

    files: the safetensors files, in order.
    places: name -> place.

    Raises:
        InputError: no safetensors files, or broken ones.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / INDEX_NAME
        try:
            names = [SINGLE_NAME]
            if index.is_file():
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            # By their names alone: an index may come from anywhere, and must not point out of the folder.
            self.files = [folder / Path(name).name for name in names]
            if not self.files[0].is_file():
                raise InputError(
                    f"There is no {names[0]} in {folder}; give a base model that is saved as safetensors, which "
                    "save_pretrained() of transformers writes."
                )
            self.places = {name: place for file in self.files for name, place in _places(file)}
        except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError, SafetensorError) as error:
            raise InputError(f"The weights in {folder} cannot be read: {type(error).__name__}: {error}") from error

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(file.stat().st_size for file in self.files)

    def read(self, name: str) -> Tensor:
        """Return a tensor, in memory of its own.

        Raises:
            InputError: of a dtype that is not floating, as those of quantised models.
        """
        place = self.places[name]
        if place.dtype not in _DTYPES:
            raise InputError(
                f"{name} in {place.file} has dtype {place.dtype}; merging needs an unquantised base model."
            )
        data = bytearray(place.size)
        with place.file.open("rb") as source:
            source.seek(place.start)
            if source.readinto(data) != place.size:
                raise InputError(f"{place.file} ends in the middle of {name}.")
        return torch.frombuffer(data, dtype=_DTYPES[place.dtype]).reshape(place.shape)


def dtype_of(place: Place) -> torch.dtype | None:
    """Return the dtype of a floating tensor; None for any other."""
    return _DTYPES.get(place.dtype)


def write_like(source: Path, target: Path, places: dict[str, Place], changed: Callable[[str], Tensor | None]) -> None:
    """Write a file like another one, with some tensors changed; atomically.

    Args:
        places: what is in `source`, by name.
        changed: name -> the new tensor, of the same shape and dtype; None leaves the old one.
    """
    with replacing(target) as path, source.open("rb") as old, path.open("wb") as new:
        _copy(old, new, 8 + struct.unpack("<Q", old.read(8))[0], start=0)
        for name, place in sorted(places.items(), key=lambda item: item[1].start):
            tensor = changed(name)
            if tensor is None:
                _copy(old, new, place.size, place.start)
            else:
                new.write(_bytes(tensor))


def write_added(target: Path, added: dict[str, Tensor | Place]) -> None:
    """Write a file of tensors, some of them copied from other files; atomically."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in added.items():
        if isinstance(tensor, Place):
            size, dtype = tensor.size, tensor.dtype
        else:
            size, dtype = tensor.nbytes, _NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with replacing(target) as path, path.open("wb") as new:
        new.write(struct.pack("<Q", len(text)) + text)
        for tensor in added.values():
            if isinstance(tensor, Place):
                with tensor.file.open("rb") as old:
                    _copy(old, new, tensor.size, tensor.start)
            else:
                new.write(_bytes(tensor))


def _places(file: Path) -> Iterator[tuple[str, Place]]:
    # Opened for its checks: whatever the header claims is then in the file.
    with safe_open(file, framework="pt"), file.open("rb") as source:
        size = struct.unpack("<Q", source.read(8))[0]
        header = json.loads(source.read(size))
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, Place(file, 8 + size + start, end - start, entry["dtype"], tuple(entry["shape"]))


def _copy(old: BinaryIO, new: BinaryIO, size: int, start: int) -> None:
    old.seek(start)
    while size:
        chunk = old.read(min(size, _CHUNK))
        if not chunk:
            raise InputError(f"{old.name} became shorter while it was read.")
        new.write(chunk)
        size -= len(chunk)


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
