"""Several processes, as torchrun starts them: together they do what one does, and the first one speaks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.finetune.case import ADAPTER, RATES, TINY, B, H, K, R, comparable, finetune, save_model, save_texts
from vblora_triton.finetune import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    return ["--model", save_model(folder / "model"), "--data", *save_texts(folder), *TINY, *RATES]


@pytest.fixture(scope="module")
def one(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    assert finetune(*given, *ADAPTER, "--output", folder) == 0
    return comparable(folder)


@pytest.mark.parametrize(
    "launch",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_two_processes_share_a_step_and_give_one_processs_adapter(launch, given, one, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env.pop("TRITON_INTERPRET", None)
    # In a file, because torchrun would take --r for one of its own.
    options = {"r": R, "num-vectors": H, "vector-length": B, "topk": K, "output": str(tmp_path / "two")}
    (tmp_path / "options.json").write_text(json.dumps(options))
    command = ["-m", "vblora_triton", "finetune", *map(str, given), "--config", str(tmp_path / "options.json")]
    done = subprocess.run(
        [sys.executable, "-m", *launch, *command], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    (report, tensors), (two, others) = one, comparable(tmp_path / "two")
    assert two["loss_after"] == pytest.approx(report["loss_after"], rel=1e-4)
    for name, tensor in tensors.items():
        torch.testing.assert_close(others[name], tensor, rtol=0, atol=2e-3)
    assert done.stdout.count("Written to") == done.stdout.count("VB-LoRA on") / 2 == 1
    assert done.stderr.count(" 0/6 [") == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "3"}, "--batch-size 4 cannot be shared by 3 processes; give a multiple"),
        ({"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP is set, but this command keeps the whole model"),
    ],
)
def test_processes_that_cannot_work_together_are_refused_by_the_first_one(
    environment, message, given, tmp_path, monkeypatch, capsys
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert finetune(*given, "--output", tmp_path) == 2
    assert message in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        finetune(*given, "--output", tmp_path)
    assert capsys.readouterr() == ("", "")


def test_what_goes_wrong_in_another_process_alone_is_said_by_that_one(given, tmp_path, monkeypatch, capsys):
    def fail(plan):
        raise InputError("no memory")

    monkeypatch.setattr("vblora_triton.finetune.run._run", fail)
    monkeypatch.setenv("RANK", "1")
    assert finetune(*given, "--output", tmp_path) == 2
    assert capsys.readouterr().err == "vblora-triton finetune: error: process 1: no memory\n"
