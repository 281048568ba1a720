"""`make gpu` where there is no GPU, and what it says of the environment."""

import json
import subprocess
import sys
from pathlib import Path

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


def test_later_parts_join_the_earlier_ones_each_within_the_time_of_a_command_of_its_own(monkeypatch, tmp_path):
    given = []

    def part(folder, seconds, commit):
        given.append(seconds)
        return {"ok": True}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda commit: {"commit": commit})
    monkeypatch.setattr(gpu, "PARTS", dict.fromkeys(gpu.PARTS, part))
    run(monkeypatch, tmp_path, "--parts", "first", "--commit", "abc")
    found = run(monkeypatch, tmp_path, "--parts", "times", "--commit", "def")
    assert {name: found[name]["commit"] for name in ("first", "times")} == {"first": "abc", "times": "def"}
    assert given == [500, 500]
    assert run(monkeypatch, tmp_path).keys() == {"environment", *gpu.PARTS}
    assert len(given) == 2 + len(gpu.PARTS)


def test_every_part_of_the_suite_is_there():
    assert [
        ROOT / "tests" / name
        for names, _ in gpu.TESTS.values()
        for name in names
        if not (ROOT / "tests" / name).exists()
    ] == []


TESTS = """
import time
import pytest
from tools import gpu_plugin

@pytest.mark.parametrize("i", range(4))
def test_good(i):
    pass

def test_wrong():
    assert "apples" == "pears"

def test_spoils_its_process(monkeypatch):
    # As after an illegal access, which this machine cannot have.
    gpu_plugin.is_broken = lambda: True
    raise RuntimeError("an illegal memory access was encountered")

@pytest.mark.parametrize("i", range(4))
def test_after(i):
    assert not gpu_plugin.is_broken()
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A part of the suite of one file, in two processes."""
    path = tmp_path / "test_some.py"
    path.write_text(TESTS)
    monkeypatch.setitem(gpu.TESTS, "some", ([str(path)], 2))
    return path


def test_what_a_test_spoils_ends_with_it_and_every_test_leaves_a_line(suite, tmp_path):
    found = gpu.run_tests("some", tmp_path, 100)
    assert not found["ok"]
    assert (found["passed"], found["failed"]) == (8, 2)
    wrong, spoilt = sorted(found["failures"].items(), reverse=True)
    assert "test_wrong" in wrong[0]
    assert "assert 'apples' == 'pears'" in wrong[1]
    assert "test_spoils_its_process" in spoilt[0]
    assert "an illegal memory access was encountered" in spoilt[1]


def test_a_part_that_runs_out_of_time_leaves_what_had_ended_and_no_process(suite, tmp_path):
    suite.write_text("import time\n\ndef test_quick():\n    pass\n\ndef test_slow():\n    time.sleep(1000)\n")
    found = gpu.run_tests("some", tmp_path, 8)
    assert (found["ok"], found["exit_code"], found["passed"]) == (False, None, 1)
    assert found["seconds"] < 60
    assert not [line for line in subprocess.check_output(["ps", "ax"], text=True).splitlines() if str(suite) in line]


def test_a_part_of_which_all_pass_is_ok(suite, tmp_path):
    suite.write_text("def test_good():\n    pass\n")
    assert gpu.run_tests("some", tmp_path, 100)["ok"]
    suite.write_text("")
    assert not gpu.run_tests("some", tmp_path, 100)["ok"]


def test_times_are_of_the_commit_that_was_given_and_none_of_ours_may_fail(monkeypatch, tmp_path):
    commands = []

    def bench(seconds, command):
        commands.append(command)
        key = ("block", "x", 1, "bf16", "vblora")
        names = ("ours_compiled", "peft_patched", "peft_compiled")
        made = [Record(*key, name, "fwd", status="failed", reason="no") for name in names]
        Results({}, tmp_path / "bench.json").add(made)
        return 0

    monkeypatch.setattr(gpu, "limited", bench)
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
