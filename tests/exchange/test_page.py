"""docs/other-engines.md: its commands run, and its recording is what its script records."""

import re
import shlex
from pathlib import Path

from tests.exchange.adapters import CASES, save
from vblora_triton.cli import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "other-engines.md").read_text(encoding="utf-8")


def test_commands_of_the_page_run(tmp_path, monkeypatch, capsys):
    saved = save(tmp_path, *CASES["vblora-full-linear"])
    (tmp_path / "out").mkdir()
    Path(saved.adapter).rename(tmp_path / "out" / "adapter")
    (tmp_path / "my-llama").symlink_to(saved.base)
    monkeypatch.chdir(tmp_path)
    lines = [line for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("vblora-triton ")]
    assert {arguments[0] for arguments in commands} == {"inspect", "check", "convert", "merge", "pack", "diff"}
    for arguments in commands:
        if arguments != ["check"]:  # it has tests of its own, and takes seconds
            assert main(arguments) == 0, capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"adapter", "lora", "lora-vllm", "merged", "small"}


def test_recording_is_what_the_script_records(tmp_path):
    from tools.record import record

    record(tmp_path)
    for name in ("inspect.cast", "inspect.svg"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / "docs" / name).read_text(encoding="utf-8"), name
