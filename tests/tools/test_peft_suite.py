"""`make peft-suite`: which tests are chosen, what is written of each, and what counts as a difference."""

import json
import sys
from types import SimpleNamespace

import pytest

from tools import peft_suite
from tools.peft_plugin import OFFLINE, WANTED, is_wanted, read_record

pytest.importorskip("peft")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("tests/test_vblora.py::TestVBLoRA::test_save", True),
        ("tests/test_vera.py::TestVera::test_save", True),
        ("tests/test_custom_models.py::test_forward[Vanilla MLP 1 VeRA-MLP-VeraConfig-config0]", True),
        ("tests/test_custom_models.py::test_forward[Vanilla MLP 1 VBLoRA]", True),
        ("tests/test_decoder_models.py::test_merge[VeraConfig-config2]", True),
        ("tests/test_other.py::test_vera_shared", True),
        ("tests/test_pvera.py::TestPVeRA::test_save", False),
        ("tests/test_custom_models.py::test_several_averages[Vanilla MLP 1 LoRA]", False),
        ("tests/test_custom_models.py::test_forward[PveraConfig]", False),
    ],
)
def test_tests_of_both_methods_are_chosen_by_name(name, wanted):
    assert is_wanted(SimpleNamespace(nodeid=name, callspec=None)) == wanted


def test_a_test_that_is_run_once_is_chosen_by_its_source():
    def of_vera():
        return "VeraConfig"

    def of_none():
        return "LoraConfig"

    assert is_wanted(SimpleNamespace(nodeid="a", function=of_vera))
    assert not is_wanted(SimpleNamespace(nodeid="a", function=of_none))
    assert not is_wanted(SimpleNamespace(nodeid="a", function=of_vera, callspec="LoRA"))
    assert not WANTED.search("LoraConfig")
    assert OFFLINE.search("huggingface_hub.errors.OfflineModeIsEnabled: Cannot reach")


def entry(outcome: str, why: str = "", **calls: int) -> dict:
    return {"outcome": outcome, "why": why, "calls": calls}


def test_differences_are_named_and_only_lost_passes_count_as_broken():
    unpatched = {"a": entry("passed"), "b": entry("failed", "x"), "c": entry("hub"), "d": entry("passed")}
    unpatched |= {"e": entry("failed", "z"), "f": entry("passed"), "g": entry("stopped", "s")}
    patched = {
        "a": entry("passed", vera=2),
        "b": entry("passed", vblora=1),
        "c": entry("hub"),
        "d": entry("failed", "y"),
    }
    patched |= {"e": entry("failed", "z", vera=1), "g": entry("stopped", "s")}
    result = peft_suite.compare(unpatched, patched)
    assert result["counts"]["unpatched"] == {"passed": 3, "failed": 2, "hub": 1, "stopped": 1}
    assert result["calls"] == {"vblora": 1, "vera": 3}
    assert result["hub"] == ["c"]
    assert result["broken"] == ["d"]
    assert result["differences"].keys() == {"b", "d"}
    assert result["failing"] == {"e": "failed: z", "g": "stopped: s"}
    assert result["only_in_one"] == ["f"]
    lines: list[str] = []
    peft_suite.print_report({"peft": "0.1", "not_run": ["hub patched"], **result}, lines.append)
    text = "\n".join(lines)
    assert "DIFFERS: d\n    passed -> failed: y" in text
    assert "vblora 1, vera 3" in text
    assert "Not finished in time: hub patched" in text


TESTS = """
import os, torch, peft, pytest
from torch import nn

def layer():
    config = peft.VeraConfig(target_modules=["0"], r=2)
    return peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)

def test_vera_forward():
    assert layer()(torch.ones(1, 4)).shape == (1, 4)

def test_vera_is_as_it_was():
    from vblora_triton import is_patched
    assert not is_patched()

def test_vera_from_the_hub():
    import huggingface_hub
    huggingface_hub.model_info("facebook/opt-125m")

@pytest.mark.skip(reason="not today")
def test_vera_skipped():
    pass

def test_of_something_else():
    assert False

def test_vera_that_ends_the_process():
    os._exit(3)

def test_vera_after_it():
    assert layer()(torch.ones(1, 4)).shape == (1, 4)
"""


def test_both_runs_write_down_every_outcome_and_go_on_after_a_crash(tmp_path):
    tests = tmp_path / "peft" / "tests"
    tests.mkdir(parents=True)
    (tests / "__init__.py").touch()
    (tests / "test_some.py").write_text(TESTS)
    (tests / "test_broken.py").write_text("import nothing_of_this_name")
    found = {}
    for mode in peft_suite.MODES:
        record = tmp_path / f"{mode}.jsonl"
        for _ in range(2):
            assert peft_suite.run(sys.executable, tests, ["test_some.py", "test_broken.py"], record, mode, False, 100)
        found[mode] = read_record(record)
        lines = [json.loads(line) for line in record.read_text().splitlines()]
        assert sum(line["id"].endswith("test_vera_forward") for line in lines) == 2, "started and finished, once"
    outcomes = {
        mode: {name.rpartition("::")[2]: e["outcome"] for name, e in entries.items()} for mode, entries in found.items()
    }
    expected = {
        "test_vera_forward": "passed",
        "test_vera_is_as_it_was": "passed",
        "test_vera_from_the_hub": "hub",
        "test_vera_skipped": "skipped",
        "test_vera_that_ends_the_process": "stopped",
        "test_vera_after_it": "passed",
        "tests/test_broken.py": "not collected",
    }
    assert outcomes["unpatched"] == expected
    assert outcomes["patched"] == expected | {"test_vera_is_as_it_was": "failed"}
    result = peft_suite.compare(*found.values())
    assert result["calls"] == {"vblora": 0, "vera": 2}
    assert result["broken"] == ["tests/test_some.py::test_vera_is_as_it_was"]


def test_what_takes_too_long_is_said_to(tmp_path):
    tests = tmp_path / "peft" / "tests"
    tests.mkdir(parents=True)
    (tests / "test_some.py").write_text("import time\ndef test_vera(): time.sleep(100)\n")
    record = tmp_path / "record.jsonl"
    assert not peft_suite.run(sys.executable, tests, ["test_some.py"], record, "unpatched", False, 0.5)
