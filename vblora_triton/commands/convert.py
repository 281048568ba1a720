"""`vblora-triton convert`: adapters as LoRA."""

from __future__ import annotations

from typing import Any

from vblora_triton.commands.folders import CODES, add_adapter, add_base, run_quietly, show
from vblora_triton.commands.parsing import add_command

_DESCRIPTION = """\
Write a VB-LoRA or VeRA adapter as a standard LoRA adapter of PEFT's format, for engines that know only that. The
factors are written down as they are, so that the result computes the same; there is no approximation but the
rounding of --dtype. It is larger than the original, and cannot be turned back."""

_EPILOG = f"""\
examples:
  vblora-triton convert out/adapter --to lora out/lora
  vblora-triton convert out/adapter --to lora out/lora-vllm --for vllm
  vblora-triton convert vera-adapter --to lora lora --base ./my-llama --dtype float16

VeRA's files do not always tell how many inputs a layer has: the base model's configuration does.

{CODES}"""


def add_to(commands: Any) -> None:
    """Declare the subcommand."""
    parser = add_command(
        commands, "convert", run, "write an adapter as LoRA, for vLLM, SGLang and others", _DESCRIPTION, _EPILOG
    )
    add_adapter(parser)
    parser.add_argument("output", metavar="OUT", help="the folder to write, which must be new")
    parser.add_argument("--to", choices=["lora"], required=True, help="the format")
    parser.add_argument(
        "--for",
        dest="engine",
        choices=["vllm"],
        help="check what the engine would refuse; 16 bits are the default then",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="of the factors (default: float32; with --for, the base model's 16 bits, or bfloat16)",
    )
    add_base(parser)


def run(options: dict[str, Any]) -> int:
    """Convert; return the exit code."""
    from vblora_triton.exchange.convert import convert_to_lora

    done = run_quietly(
        convert_to_lora,
        options["adapter"],
        options["output"],
        base=options["base"],
        dtype=options["dtype"],
        engine=options["engine"],
    )
    show(
        [
            f"{done.folder}: LoRA of rank {done.rank} for {done.layers} layers, {done.dtype}, {done.bytes:,d} bytes",
            *(f"  {note}" for note in done.notes),
        ]
    )
    return 0
