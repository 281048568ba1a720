"""Record `vblora-triton inspect` in a terminal: docs/inspect.cast, for asciinema's player, and docs/inspect.svg.

    python -m tools.record

The adapter is made on the spot, from a seed, and the times are made up, so that the same code records the same.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text
from transformers import LlamaConfig, LlamaForCausalLM

from vblora_triton import VBLoRAConfig, get_peft_model
from vblora_triton.cli import main

COMMAND = ["inspect", "my-adapter"]
WIDTH = 100
KEY_SECONDS, LINE_SECONDS = 0.06, 0.05


def make_adapter(folder: Path) -> None:
    """Write an adapter for four layers of a Llama whose logits favour some vectors of the bank."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64))
    config = VBLoRAConfig(r=4, num_vectors=64, vector_length=64, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(base, config)
    favour = torch.randn(64).sort(descending=True).values
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logits" in name:
                parameter.copy_(torch.randn(parameter.shape) + favour)
    model.save_pretrained(folder)


def shown() -> list[str]:
    """Return what the command prints."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(io.StringIO()) as out:
        os.chdir(work)
        try:
            make_adapter(Path("my-adapter"))
            code = main(COMMAND)
        finally:
            os.chdir(before)
    assert code == 0
    return out.getvalue().splitlines()


def cast(typed: str, lines: list[str]) -> str:
    """Return a recording in asciicast's format, version 2."""
    header = {"version": 2, "width": WIDTH, "height": len(lines) + 3, "title": typed}
    events, now = [[0.0, "o", "$ "]], 0.5
    for key in typed:
        now += KEY_SECONDS
        events.append([round(now, 2), "o", key])
    for line in ["", *lines, "$ "]:
        now += LINE_SECONDS
        events.append([round(now, 2), "o", line if line == "$ " else f"{line}\r\n"])
    return "\n".join(json.dumps(part, ensure_ascii=False) for part in (header, *events)) + "\n"


def picture(typed: str, lines: list[str]) -> str:
    """Return the last frame as SVG."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    for line in (f"$ {typed}", *lines):
        console.print(Text(line))
    return console.export_svg(title="vblora-triton", unique_id="inspect")


def record(folder: Path) -> None:
    """Write both files into a folder."""
    typed, lines = "vblora-triton " + " ".join(COMMAND), shown()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "inspect.cast").write_text(cast(typed, lines), encoding="utf-8")
    (folder / "inspect.svg").write_text(picture(typed, lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Record `vblora-triton inspect` for the documentation.")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder to write to (default: docs)")
    record(parser.parse_args().out)
