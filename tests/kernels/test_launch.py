"""Launching at once what Triton compiled before: the same as by Triton, and by Triton wherever somebody looks on."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vblora_triton.kernels import compose, expand, parameters, partials, select, shrink, vera_operands

ROOT = Path(__file__).parents[2]
CASES = ("plain", "other addresses", "divisible by 16", "one", "other dtype", "no x", "x at 4 bytes", "y at 4 bytes")
CASES += ("other scale", "other constexpr", "two dimensions", "8 warps", "4 stages", "shuffled")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What `launched.py` prints."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.kernels.launched"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_the_second_launch_hands_over_what_triton_does_without_asking_it(launched, case):
    found = launched["cases"][case]
    (directly, asked), by_triton = found["launch"], found["triton"]
    assert directly == by_triton
    assert len(by_triton) == 1
    assert asked == 0


def test_every_case_was_run(launched):
    assert set(launched["cases"]) == set(CASES)


def test_an_empty_grid_launches_nothing(launched):
    assert launched["empty grid"] == [[], 0]


def test_the_stream_is_the_current_one(launched):
    (call,), asked = launched["other stream"]
    assert call.startswith("[3, 1, 1, 17, ")
    assert asked == 0


def test_another_device_has_its_own_function(launched):
    (first, first_asked), (second, second_asked) = launched["other device"]
    assert (first_asked, second_asked) == (1, 0)
    assert first == second != launched["first device"][0]
    assert launched["first device"] == launched["cases"]["plain"]["launch"]


def test_triton_launches_where_somebody_looks_on(launched):
    assert launched["hooked"] == [1, 1]
    assert launched["before the run"] == [1, 7]
    assert launched["debug"] == 1
    assert launched["after"] == 0


def test_pointers_are_the_first_parameters_of_every_kernel():
    modules = (compose, expand, parameters, partials, select, shrink, vera_operands)
    kernels = {name: value for m in modules for name, value in vars(m).items() if name.endswith("_kernel")}
    assert len(kernels) >= 11
    for name, kernel in kernels.items():
        are_pointers = [parameter.endswith("_ptr") for parameter in inspect.signature(kernel.fn).parameters]
        assert are_pointers == sorted(are_pointers, reverse=True), name
        assert 1 < sum(are_pointers) < len(are_pointers)
