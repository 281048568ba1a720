"""A folder of results: it appears whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vblora_triton.errors import InputError


def check_new(output: str | os.PathLike) -> Path:
    """Return the path of a folder that is to be made.

    Raises:
        InputError: there is something already.
    """
    path = Path(output)
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} is there already; give the name of a new folder, or remove it first.")
    return path


@contextmanager
def new_folder(output: str | os.PathLike) -> Iterator[Path]:
    """Give a folder to write to; it becomes `output` when the block ends well, and is removed when it does not.

    Raises:
        InputError: `output` is there already, or cannot be made.
    """
    path = check_new(output)
    missing = [parent for parent in path.absolute().parents if not os.path.lexists(parent)]
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        # Beside it, so that it is on the same file system and moving is renaming.
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    except OSError as error:
        raise InputError(f"{path} cannot be made: {error.strerror or error}") from error
    try:
        # mkdtemp makes the folder private.
        umask = os.umask(0)
        os.umask(umask)
        work.chmod(0o777 & ~umask)
        yield work
        work.replace(path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise
