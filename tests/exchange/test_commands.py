"""The commands: broken folders are one line and exit code 2, and nothing is written; help shows examples."""

import os
import random
import re

import pytest

from tests.exchange.adapters import CASES, save
from tests.finetune.case import everything_in
from tests.models import tiny_llama
from tests.test_checkpoint_fuzz import BIN, EVERY, METHODS, SAFE, adapters, copied
from vblora_triton.cli import main

assert adapters  # a fixture
pytestmark = pytest.mark.filterwarnings("ignore:`save_projection` is False")
COMMANDS = {
    "inspect": ["inspect", "BROKEN"],
    "convert": ["convert", "BROKEN", "--to", "lora", "out"],
    "merge": ["merge", "BROKEN", "out", "--base", "base"],
    "pack": ["pack", "BROKEN", "new/out"],
    "diff": ["diff", "BROKEN", "sound"],
    "diff-second": ["diff", "sound", "BROKEN"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_broken_folder_is_one_line_and_exit_code_2_and_nothing_is_written(
    command, method, adapters, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("base")
    copied(adapters[method, SAFE][0], tmp_path / "sound")
    for number, (file, change) in enumerate(EVERY):
        draw = random.Random(f"{command}/{method}/{file}/{change.__name__}")
        copied(draw.choice(adapters[method, BIN if file == BIN else SAFE]), tmp_path / "broken" / str(number))
        change(draw, tmp_path / "broken" / str(number) / file)
    before = everything_in(tmp_path)
    capfd.readouterr()
    for number, (file, change) in enumerate(EVERY):
        arguments = [f"broken/{number}" if word == "BROKEN" else word for word in COMMANDS[command]]
        # With its base model, and without it, where the file must do.
        if command != "merge" and number % 2:
            arguments += ["--base", "base"]
        assert main(arguments) == 2, (file, change)
        out, err = capfd.readouterr()
        assert out == ""
        assert re.fullmatch(rf"vblora-triton {arguments[0]}: error: .{{10,}}\n", err), err
        assert everything_in(tmp_path) == before, (file, change)


@pytest.mark.parametrize("command", ["inspect", "convert", "merge", "pack", "diff"])
def test_sound_folders_are_done_and_what_is_there_already_is_left_alone(command, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    saved = save(tmp_path, *CASES["vblora-full-linear"])
    arguments = ["adapter" if w in ("BROKEN", "sound") else w for w in COMMANDS[command]]
    capfd.readouterr()
    assert main(arguments) == 0
    out, err = capfd.readouterr()
    assert out
    assert err == ""
    if "out" in arguments[-3:] or "new/out" in arguments:
        before = everything_in(tmp_path)
        assert main(arguments) == 2
        assert "is there already" in capfd.readouterr().err
        assert everything_in(tmp_path) == before
    assert os.path.isdir(saved.adapter)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "adapter", "out", "--to", "gguf"], "argument --to: invalid choice"),
        (["convert", "adapter", "out"], "required: --to"),
        (
            ["convert", "adapter", "out", "--to", "lora", "--base", "./nowhere"],
            r"base model '\./nowhere' cannot be read",
        ),
        (["merge", "adapter", "out", "--base", "./nowhere"], r"'\./nowhere' is no folder here"),
        (["inspect", "nobody/nothing"], "which is no folder here"),
        (["convert", "adapter", "adapter/adapter_config.json/out", "--to", "lora"], "cannot be made: "),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    save(tmp_path, *CASES["vblora-full-linear"])
    before = everything_in(tmp_path)
    capfd.readouterr()
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    err = capfd.readouterr().err
    assert code == 2
    assert re.search(message, err), err
    assert err.count("\n") == 1
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("command", ["inspect", "convert", "merge", "pack", "diff"])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert re.search(rf"^examples:\n  vblora-triton {command} ", capsys.readouterr().out, re.MULTILINE)
