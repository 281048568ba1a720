"""Checkpoints: a run that is stopped goes on to the very results of one that was not."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.finetune.case import ADAPTER, RATES, TINY, comparable, finetune, save_model, save_texts
from vblora_triton.finetune import training

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    return ["--model", save_model(folder / "model"), "--data", *save_texts(folder), *TINY, *ADAPTER, *RATES]


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """The results of a run that was not stopped."""
    output = tmp_path_factory.mktemp("whole")
    assert finetune(*given, "--output", output) == 0
    return comparable(output)


def stopped(given, output, monkeypatch, capsys):
    """Run and press Ctrl-C at the fourth step; checkpoints are of every second."""
    on_step_end = training._LossBar.on_step_end

    def press(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training._LossBar, "on_step_end", press)
        assert finetune(*given, "--output", output, "--checkpoint-every", 2) == 130
    said = capsys.readouterr().err
    assert re.search(
        r"interrupted; nothing was written; .*checkpoint-4 is kept, and --resume goes on from it\n\Z", said
    )
    assert [path.name for path in output.iterdir()] == ["checkpoints"]


def test_a_resumed_run_ends_as_one_that_was_not_stopped(given, whole, tmp_path, monkeypatch, capsys):
    stopped(given, tmp_path, monkeypatch, capsys)
    assert finetune(*given, "--output", tmp_path, "--resume") == 0
    report, tensors = comparable(tmp_path)
    assert report == whole[0]
    assert all(torch.equal(tensors[name], whole[1][name]) for name in whole[1])
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_does_not_pass_over_checkpoints_or_go_on_from_those_of_another(given, tmp_path, monkeypatch, capsys):
    stopped(given, tmp_path, monkeypatch, capsys)
    assert finetune(*given, "--output", tmp_path) == 2
    assert "checkpoint-4 of a run that did not end; go on with --resume, or delete" in capsys.readouterr().err
    assert finetune(*given, "--output", tmp_path, "--resume", "--batch-size", "3") == 2
    assert re.search("--batch-size is 3, but the run in .* had 4; give what it had", capsys.readouterr().err)
    (tmp_path / "checkpoints" / "options.json").write_text("{")
    assert finetune(*given, "--output", tmp_path, "--resume") == 2
    assert "options.json cannot be read" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints"}


def test_sigterm_is_taken_as_ctrl_c(given, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    arguments = [*given, "--output", tmp_path / "out", "--steps", "100000", "--checkpoint-every", "5"]
    command = [sys.executable, "-m", "vblora_triton", "finetune", *map(str, arguments)]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        end = time.monotonic() + 120
        while not list(tmp_path.glob("out/checkpoints/*/trainer_state.json")) and time.monotonic() < end:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert re.search(r"interrupted; nothing was written; .*checkpoint-\d+ is kept, and --resume goes on", said)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoints"]


def test_losses_are_reported_to_what_is_asked_for(given, tmp_path, monkeypatch):
    seen = []

    class Reporter(training.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs.get("loss"))

    integrations = "transformers.integrations.integration_utils"
    monkeypatch.setattr("vblora_triton.finetune.options.get_available_reporting_integrations", lambda: ["swanlab"])
    monkeypatch.setitem(sys.modules[integrations].INTEGRATION_TO_CALLBACK, "swanlab", Reporter)
    assert finetune(*given, "--output", tmp_path, "--report-to", "swanlab") == 0
    assert (
        len([loss for loss in seen if loss is not None]) == json.loads((tmp_path / "report.json").read_text())["steps"]
    )
