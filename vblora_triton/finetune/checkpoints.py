"""A run's checkpoints: where they are, and whether another run may go on from them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from vblora_triton.errors import InputError
from vblora_triton.tuner.config import replacing

CHECKPOINTS = "checkpoints"
OPTIONS = "options.json"
# These may be others when a run is resumed: they do not change what is trained.
FREE = ("resume", "checkpoint_every", "report_to", "backend", "output")


def folder_of(output: Path) -> Path:
    """Return the folder in a run's output that holds its checkpoints."""
    return output / CHECKPOINTS


def newest(output: Path) -> Path | None:
    """Return the newest complete checkpoint of an unfinished run, or None."""
    found = [path for path in folder_of(output).glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    # Trainer writes this file last.
    whole = [path for path in found if (path / "trainer_state.json").is_file()]
    return max(whole, key=lambda path: int(path.name.partition("-")[2]), default=None)


def _settings(options: Any) -> dict[str, Any]:
    return json.loads(json.dumps({name: value for name, value in vars(options).items() if name not in FREE}))


def check_checkpoints(output: Path, options: Any) -> None:
    """Check that checkpoints in the output folder and what is asked for fit each other.

    Raises:
        InputError: there are some, and --resume is not given; there are none, and it is; or another run made them.
    """
    folder, last = folder_of(output), newest(output)
    if options.resume and last is None:
        raise InputError(f"--resume: there is no checkpoint in {folder}; leave it out to start from the beginning.")
    if not options.resume:
        if last is not None:
            raise InputError(
                f"{folder} holds {last.name} of a run that did not end; go on with --resume, or delete that folder."
            )
        return
    try:
        former = json.loads((folder / OPTIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--resume: {folder / OPTIONS} cannot be read ({error}); start again elsewhere.") from None
    now = _settings(options)
    changed = [name for name in now if former.get(name) != now[name]]
    if changed:
        name = changed[0]
        raise InputError(
            f"--resume: --{name.replace('_', '-')} is {now[name]!r}, but the run in {folder} had {former.get(name)!r}; "
            "give what it had, or start another run elsewhere."
        )


def begin(output: Path, options: Any) -> None:
    """Make the folder for checkpoints, and note there what run they are of."""
    folder = folder_of(output)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / OPTIONS) as path:
        path.write_text(json.dumps(_settings(options), indent=2) + "\n", encoding="utf-8")


def finish(output: Path) -> None:
    """Delete the checkpoints of a run whose results are written."""
    if os.path.lexists(folder_of(output)):
        shutil.rmtree(folder_of(output), ignore_errors=True)
