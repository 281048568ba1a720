"""`make gpu` where there is no GPU, and what it says of the environment."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.environment import environment
from bench.records import Record, Results
from tools import gpu

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_writes_nothing_and_exits_3(tmp_path):
    command = [sys.executable, "-m", "tools.gpu", "--out", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 3
    assert result.stderr == "There is no GPU here: nothing was run.\n"
    assert list(tmp_path.iterdir()) == []


def run(monkeypatch, out, *options) -> dict:
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(out), *options])
    with pytest.raises(SystemExit):
        gpu.main()
    return json.loads((out / "gpu.json").read_text())


def test_later_parts_join_the_earlier_ones_within_the_time_of_one_command(monkeypatch, tmp_path):
    given = []

    def part(folder, seconds, commit):
        given.append(round(seconds))
        return {"ok": True}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda commit: {"commit": commit})
    monkeypatch.setattr(gpu, "PARTS", dict.fromkeys(gpu.PARTS, part))
    run(monkeypatch, tmp_path, "--parts", "tests", "--commit", "abc")
    found = run(monkeypatch, tmp_path, "--parts", "times", "--commit", "def")
    assert {name: found[name]["commit"] for name in ("tests", "times")} == {"tests": "abc", "times": "def"}
    assert given == [560, 560]
    assert run(monkeypatch, tmp_path).keys() == {"environment", *gpu.PARTS}
    assert given[2:] == [280, 187, 280, 560]


def test_times_are_of_the_commit_that_was_given_and_none_of_ours_may_fail(monkeypatch, tmp_path):
    commands = []

    def bench(command, **_):
        commands.append(command)
        key = ("block", "x", 1, "bf16", "vblora")
        names = ("ours_compiled", "peft_patched", "peft_compiled")
        made = [Record(*key, name, "fwd", status="failed", reason="no") for name in names]
        Results({}, tmp_path / "bench.json").add(made)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", bench)
    found = gpu.run_times(tmp_path, 120, "abc")
    assert commands[0][-2:] == ["--commit", "abc"]
    assert found["ok"] is False
    ids = [line.partition(":")[0].rpartition("/")[2] for line in found["not_ok"]]
    assert ids == ["ours_compiled", "peft_patched"]


def test_environment_names_versions_and_commit():
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["cpu"]
    assert found["threads"] == torch.get_num_threads()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode == 0:
        assert found["commit"].removesuffix("-dirty") == head.stdout.strip()
    assert environment("abc")["commit"] == "abc"
