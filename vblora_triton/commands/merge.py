"""`vblora-triton merge`: adapters merged into their base model on disk."""

from __future__ import annotations

from typing import Any

from vblora_triton.commands.folders import CODES, add_adapter, run_quietly, show
from vblora_triton.commands.parsing import add_command

_DESCRIPTION = """\
Write the base model with an adapter merged into its weights, complete with tokenizer and generation settings, as
transformers and every engine loads it. Files are read and written a tensor at a time, so that a large model needs
little memory; a run that was killed goes on where it was when it is started again."""

_EPILOG = f"""\
examples:
  vblora-triton merge out/adapter merged --base ./my-llama
  vblora-triton merge someone/their-adapter merged

{CODES}
A full disk leaves what was done, in .OUT.unfinished beside OUT, for the next run."""


def add_to(commands: Any) -> None:
    """Declare the subcommand."""
    parser = add_command(commands, "merge", run, "merge an adapter into its base model on disk", _DESCRIPTION, _EPILOG)
    add_adapter(parser)
    parser.add_argument("output", metavar="OUT", help="the folder to write, which must be new")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the base model, a folder or a hub id, saved as safetensors (default: what the adapter names)",
    )


def run(options: dict[str, Any]) -> int:
    """Merge; return the exit code."""
    from vblora_triton.exchange.merge import merge_to_folder

    done = run_quietly(merge_to_folder, options["adapter"], options["output"], options["base"], progressbar=True)
    resumed = f", {done.resumed} of them from an earlier run" if done.resumed else ""
    files = f"{done.shards} file{'s' * (done.shards > 1)} of weights{resumed}"
    show([f"{done.folder}: {done.layers} layers changed, {files}, {done.bytes:,d} bytes"])
    return 0
