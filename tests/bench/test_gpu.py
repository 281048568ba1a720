"""`make gpu` where there is no GPU, and what it says of the environment."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.environment import environment

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_writes_nothing_and_exits_3(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 3
    assert result.stderr == "There is no GPU here: nothing was run.\n"
    assert list(tmp_path.iterdir()) == []


def test_environment_names_versions_and_commit():
    found = environment()
    assert found["torch"] == torch.__version__
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode == 0:
        assert found["commit"].removesuffix("-dirty") == head.stdout.strip()
    assert environment("abc")["commit"] == "abc"
