"""The output folder: all of a run's results appear in it at once, or none."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from vblora_triton.errors import InputError
from vblora_triton.methods import methods

BASE = "base"
REPORT = "report.json"
PLOT = "loss.png"
# In the workspace: former results, while new ones take their places.
OLD = "old"


def results() -> list[str]:
    """Name what a run writes, whatever its method; the report last, so that a folder with one is complete."""
    adapters = dict.fromkeys(form.folder for method in methods().values() for form in method.forms)
    return [BASE, *adapters, PLOT, REPORT]


def check_output(output: Path) -> None:
    """Check that results can be written; leaves nothing behind.

    Raises:
        InputError: the folder cannot be made or written, or holds something else under the names of the results.
    """
    taken = [name for name in results() if os.path.lexists(output / name)]
    if taken and REPORT not in taken:
        raise InputError(
            f"--output {output} already holds {', '.join(taken)}, but no {REPORT} of an earlier run, so it would be "
            "overwritten unasked; choose another folder."
        )
    with _workspace(output) as workspace:
        try:
            (workspace / "probe").write_bytes(b"probe")
        except OSError as error:
            raise _unwritable(output, error) from None


def stamp(output: str | os.PathLike) -> tuple[int, int] | None:
    """Tell the results in a folder from those of another run; None where there are none."""
    try:
        report = os.stat(os.path.join(output, REPORT))
    except OSError:
        return None
    return report.st_ino, report.st_mtime_ns


@contextmanager
def all_or_nothing(output: Path) -> Iterator[Path]:
    """Give a new folder to write results to; when the block ends well they replace those in `output`.

    An exception leaves `output` as it was, and absent if it was absent; Ctrl-C while they are moved takes effect when
    all are. Other files in it are never touched.

    Raises:
        InputError: `output` cannot be written; also raised for every OSError in the block.
    """
    with _workspace(output) as workspace:
        new = workspace / "new"
        try:
            new.mkdir()
            yield new
            _keep_permissions(new, output)
            with _interrupts_held_back():
                _replace(new, output, workspace / OLD)
        except (OSError, SafetensorError) as error:
            raise _unwritable(output, error) from error


@contextmanager
def _workspace(output: Path) -> Iterator[Path]:
    missing = [path for path in (output, *output.parents) if not os.path.lexists(path)]
    workspace = None
    try:
        try:
            output.mkdir(parents=True, exist_ok=True)
            # Inside the output folder, so that it is on the same file system and moving is renaming.
            workspace = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=output))
        except OSError as error:
            raise _unwritable(output, error) from None
        yield workspace
    finally:
        if workspace is not None and not os.path.lexists(workspace / OLD):
            shutil.rmtree(workspace, ignore_errors=True)
        # Only what was made here and has stayed empty: rmdir refuses the rest.
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def _keep_permissions(new: Path, output: Path) -> None:
    """Give each result the permissions of the one whose place it takes: what was private stays private."""
    for path in new.rglob("*"):
        former = output / path.relative_to(new)
        # A link's own say nothing.
        if former.exists() and former.is_dir() == path.is_dir():
            path.chmod(stat.S_IMODE(former.stat().st_mode))


def _replace(new: Path, output: Path, old: Path) -> None:
    """Move results into the output folder and former ones out of it; undo everything when one move fails.

    The folder `old` is there afterwards only if a move could not be undone: what it holds is nowhere else.
    """
    begun: list[tuple[Path, Path]] = []
    old.mkdir()
    try:
        for name in results():
            for source, target in ((output / name, old / name), (new / name, output / name)):
                if os.path.lexists(source):
                    begun.append((source, target))
                    source.rename(target)
    except BaseException:
        for source, target in reversed(begun):
            if not os.path.lexists(source):
                target.rename(source)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM take effect when the block has ended. They only ever act in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
    if came:
        signal.raise_signal(came[0])


def _unwritable(output: Path, error: Exception) -> InputError:
    what = error.strerror or error if isinstance(error, OSError) else error
    return InputError(f"--output {output} cannot be written ({what}); give a folder that can be made and written to.")
