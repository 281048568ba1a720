"""An adapter's folder: weights and configuration are two files, but change as one, whenever a process is killed.

A reader opens them by their names, one after the other, so no order of two renames is safe: in between stands the one
adapter's configuration beside the other's weights. Where both change, each name becomes a symbolic link through one
folder, `current`, first to what is there already; a single rename of `current` then changes both, and the new files
take the links' places. Whenever that ends, the names lead to one whole adapter, for every program that reads them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_IMODE
from typing import TypeVar

import torch
from safetensors.torch import load
from torch import Tensor

from vblora_triton.hub import CONFIG_NAME, AdapterFileError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
# A reader takes the first that is there.
WEIGHT_NAMES = (SAFETENSORS_NAME, BIN_NAME)
NAMES = (*WEIGHT_NAMES, CONFIG_NAME)

_WORK = ".adapter."
_T = TypeVar("_T")


@contextmanager
def changing(folder: Path) -> Iterator[Path]:
    """Give an empty folder for an adapter's weights and configuration, which take the old ones' places as it ends well.

    Savers wait for each other, and what killed ones left behind is cleared away first. A file keeps the permissions of
    the one that it replaces.

    Args:
        folder: the adapter's folder, which exists.
    """
    with _locked(folder):
        for left in folder.glob(f"{_WORK}*.tmp"):
            _settle(folder, left)
        for name in NAMES:
            for left in folder.glob(f".{name}.*.tmp"):
                left.unlink(missing_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder, prefix=_WORK, suffix=".tmp"))
        try:
            new = work / "new"
            new.mkdir()
            yield new
            for file in new.iterdir():
                file.chmod(_mode_for(folder, file.name))
                _flush(file)
            for place in (new, work):
                place.chmod(S_IMODE(folder.stat().st_mode))
            _put_in_place(folder, work)
        finally:
            _settle(folder, work)
        _flush(folder)


def _put_in_place(folder: Path, work: Path) -> None:
    config, new = folder / CONFIG_NAME, work / "new"
    if config.exists() and config.read_bytes() != (new / CONFIG_NAME).read_bytes() and _link_names(folder, work):
        (work / "next").symlink_to("new")
        os.replace(work / "next", work / "current")
        return
    # Weights alone change, by one rename or one unlink; or there is nothing to be lost, and no configuration before the
    # weights are there.
    name = next(name for name in WEIGHT_NAMES if (new / name).exists())
    os.replace(new / name, folder / name)
    for other in WEIGHT_NAMES:
        if other != name:
            (folder / other).unlink(missing_ok=True)
    os.replace(new / CONFIG_NAME, config)


def _link_names(folder: Path, work: Path) -> bool:
    """Let every name lead through `current` to the file that it is; say whether this file system can."""
    (work / "old").mkdir()
    for name in NAMES:
        if (folder / name).exists():
            _same_file(folder / name, work / "old" / name)
    try:
        (work / "current").symlink_to("old")
    except (OSError, NotImplementedError):
        return False
    for name in NAMES:
        (work / name).symlink_to(Path(work.name, "current", name))
        os.replace(work / name, folder / name)
    return True


def _settle(folder: Path, work: Path) -> None:
    """Put the files that names lead to by way of `work` in the names' places, and remove `work`."""
    for name in NAMES:
        place = folder / name
        if place.is_symlink() and Path(os.readlink(place)).parts[0] == work.name:
            if place.exists():
                _same_file(place, work / "plain")
                os.replace(work / "plain", place)
            else:
                place.unlink()
    shutil.rmtree(work, ignore_errors=True)


def _same_file(source: Path, target: Path) -> None:
    """Make `target` the same file, or a copy where the file system knows no second names."""
    target.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(source), target)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target)


def _mode_for(folder: Path, name: str) -> int:
    """Return the permissions for a new file: those of the one that it replaces, or what open() would give."""
    for other in (name, *NAMES):
        if (folder / other).exists():
            return S_IMODE((folder / other).stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _flush(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk."""
    with suppress(PermissionError):  # Windows opens no folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other savers out of a folder; the lock ends with the process, and leaves no file behind."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def read_whole(folder: Path, read: Callable[[], _T]) -> _T:
    """Return what `read` makes of a folder's files, all of one save: once more, where another save came in between.

    Raises:
        AdapterFileError: what `read` raised, with the files as they stay.
    """
    for _ in range(100):
        before, error = _signature(folder), None
        try:
            result = read()
        except AdapterFileError as caught:
            error = caught
        if _signature(folder) == before:
            break
    if error is not None:
        raise error
    return result


def _signature(folder: Path) -> list[tuple[int, int, int] | None]:
    """Return what tells whether the files of a folder are the same as at another time."""
    found: list[tuple[int, int, int] | None] = []
    for name in NAMES:
        try:
            status = (folder / name).stat()
        except OSError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return found


def read_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Read the weights of an adapter's folder, from safetensors or, where there are none, from PEFT's .bin.

    Returns:
        The file that was read, and its tensors by key, on the CPU, each in memory of its own: a map of the file would
        change with it under a running model, and no two parameters may be one.
    Raises:
        AdapterFileError: no such file, or one that cannot be read.
    """
    path = folder / SAFETENSORS_NAME
    if not path.is_file():
        path = folder / BIN_NAME
        if not path.is_file():
            raise AdapterFileError(
                f"There is neither {SAFETENSORS_NAME} nor {BIN_NAME} in {str(folder)!r}; give the "
                "folder of a saved adapter."
            )
    try:
        if path.name == SAFETENSORS_NAME:
            tensors = load(path.read_bytes())
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch.load lets any error of a broken pickle through
        raise AdapterFileError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in tensors.items()
    ):
        raise AdapterFileError(f"{path} holds no dictionary of named tensors.")
    unusable = [
        f"{key} is {'on the meta device' if tensor.is_meta else tensor.layout}"
        for key, tensor in tensors.items()
        if tensor.layout is not torch.strided or tensor.is_meta
    ]
    if unusable:
        raise AdapterFileError(
            f"{path} must hold dense tensors with values, but {', '.join(unusable[:12])}; save them again as such."
        )
    return path, apart(tensors)


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring tensors to the CPU, contiguous, and no two in the same storage, as safetensors wants them."""
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        found[key] = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        storages.add(tensor.untyped_storage().data_ptr())
    return found
