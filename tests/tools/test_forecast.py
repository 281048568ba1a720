"""The forecast follows every kernel through its source, runs a case end to end, and refuses what is not declared."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.cases import Case
from bench.device import Cpu
from bench.providers import ours
from bench.report import NOTHING, render
from tools.forecast import compare, predict
from tools.forecast.machine_code import Instruction
from tools.forecast.program import follow
from tools.forecast.source import UndeclaredError
from tools.kernels_report import launch_all, launch_all_vera
from vblora_triton.kernels import launch

ROOT = Path(__file__).parents[2]


def launches() -> list[tuple]:
    """Every launch that ships, in the classes of M that differ, with and without dropout."""
    calls: list[tuple] = []
    with launch.intercepted(lambda *call: calls.append(call)):
        for M in (1, 256, 4096):
            launch_all(4096, 11008, M, 2048, torch.bfloat16, p=0.1)
            launch_all_vera(11008, 4096, M, torch.bfloat16, p=0.1)
    return calls


def test_every_loop_of_every_kernel_has_a_count():
    kernels = set()
    for kernel, grid, arguments in launches():
        for program in ([0] * len(grid), [size - 1 for size in grid]):
            found = follow(kernel, grid, arguments, program)
            unknown = [place for place, counts in found.trips.items() if None in counts]
            assert not unknown, f"{kernel.fn.__name__}: no count of the loops at {unknown}"
            undecided = [place for place, holds in found.conditions.items() if None in holds]
            assert not undecided, f"{kernel.fn.__name__}: no side of the conditions at {undecided}"
        kernels.add(kernel.fn.__name__)
    lines = [line for path in (ROOT / "kernels").glob("*.py") for line in path.read_text().splitlines()]
    assert kernels == {line[4:].split("(")[0] for line in lines if line.startswith("def _") and "_kernel(" in line}


def test_pointers_are_followed_to_the_tensors_that_they_came_from():
    touched = {
        kernel.fn.__name__: {
            name for names in follow(kernel, grid, arguments, [0] * len(grid)).tensors.values() for name in names
        }
        for kernel, grid, arguments in launches()
    }
    assert touched["_shrink_bwd_kernel"] >= {"X_ptr", "DS_ptr", "DX_ptr", "DA_ptr", "Bank_ptr", "Idx_ptr", "W_ptr"}
    # Through a helper, and in a branch that program 0 does not take.
    assert touched["_parameter_grads_kernel"] >= {"DA_ptr", "DB_ptr", "DLogitsB_ptr", "DBank_ptr"}
    assert touched["_scale_kernel"] >= {"D_ptr", "B_ptr", "C_ptr", "Partials_ptr"}
    assert touched["_pack_rows_kernel"] >= {"V_ptr", "Out_ptr", "Partials_ptr", "Total_ptr"}


def write_kernel(folder: Path, loop: str):
    """A kernel whose loop is this line, made from a file of its own."""
    source = f"""
    import triton
    import triton.language as tl


    @triton.jit
    def _looping_kernel(X_ptr, Y_ptr, M, N, BLOCK: tl.constexpr):
        pid = tl.program_id(0)
        found = tl.load(X_ptr + pid)
        if pid < 2:
            tl.store(Y_ptr + pid, found)
        {loop}
            tl.store(Y_ptr + start, found)
    """
    path = folder / f"kernel_{len(list(folder.iterdir()))}.py"
    path.write_text(textwrap.dedent(source))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._looping_kernel


def count(folder: Path, loop: str, program: int = 0) -> list:
    arguments = {"X_ptr": torch.empty(8), "Y_ptr": torch.empty(8), "M": 100, "N": 7, "BLOCK": 32}
    kernel = write_kernel(folder, loop)
    found = follow(kernel, (4,), arguments, (program,))
    assert list(found.conditions.values()) == [[program < 2]]
    (trips,) = found.trips.values()
    return trips


def test_counts_follow_the_program_and_declarations(tmp_path):
    assert count(tmp_path, "for start in range(pid * BLOCK, M, BLOCK):") == [4]
    assert count(tmp_path, "for start in range(pid * BLOCK, M, BLOCK):", program=3) == [1]
    assert count(tmp_path, "for start in range(0, found):") == [None]
    assert count(tmp_path, "for start in range(0, found):  # trips: cdiv(M, 2 * N)") == [8]
    assert count(tmp_path, "for start in range(0, M, BLOCK):  # all rows; trips: cdiv(M, BLOCK)") == [4]


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ("range(0, found):  # trips: cdiv(M, WIDTH)", "name 'WIDTH' is not defined"),
        ("range(0, found):  # trips: N / 2", "no number of iterations"),
        ("range(0, M, BLOCK):  # trips: 5", "the source says 4"),
    ],
)
def test_a_wrong_declaration_is_refused_with_its_kernel_and_text(tmp_path, declared, message):
    with pytest.raises(UndeclaredError, match=message) as error:
        count(tmp_path, f"for start in {declared}")
    assert "_looping_kernel: the loop at kernel_" in str(error.value)
    assert declared.partition("trips: ")[2] in str(error.value)


def test_a_loop_without_a_declaration_stops_with_its_kernel_file_line_and_text(tmp_path):
    kernel = write_kernel(tmp_path, "for start in range(0, found):")
    arguments = {"X_ptr": torch.empty(8), "Y_ptr": torch.empty(8), "M": 100, "N": 7, "BLOCK": 32}
    file, number = Path(kernel.fn.__code__.co_filename).name, 12
    code = [
        Instruction(op, op, op, (file, number), predicate, None, 1, 7, 7, 0, target=target)
        for op, predicate, target in (("MOV", None, None), ("BRA", "P0", 0), ("EXIT", None, None))
    ]
    call = SimpleNamespace(kernel=kernel, compiled=SimpleNamespace(kernel="_looping_kernel"))
    found = follow(kernel, (4,), arguments, (0,))
    with pytest.raises(UndeclaredError, match=f"_looping_kernel: .* {file}:{number} ") as error:
        predict._trips(code, call, found)
    assert "for start in range(0, found):" in str(error.value)


def test_a_small_case_is_forecast_end_to_end_and_no_kernel_is_below_its_floor(tmp_path):
    path = tmp_path / "forecast.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    options = ["--method", "vblora", "--tokens", "512", "--linears", "o", "--json", str(path)]
    command = [sys.executable, "-m", "tools.forecast", *options]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    headings = [line for line in result.stdout.splitlines() if "FORECAST, not measured" in line]
    assert len(headings) == 2
    found = json.loads(path.read_text())
    assert "not a measurement" in found["what"]
    assert found["made_by"]["torch"] == torch.__version__
    assert found["made_by"]["commit"]
    assert len(found["launches"]) == 7
    assert [row["kernel"] for row in found["launches"] if not 0 <= row["floor"] < row["us"]] == []
    assert all(1 < block["floors"] < block["ratio"] for block in found["blocks"])
    # x is 4 MiB: each byte of it comes from DRAM once, at 4.3 TB/s.
    shrink = next(row for row in found["launches"] if row["kernel"] == "_shrink_fwd_kernel")
    assert shrink["parts"]["DRAM"] == pytest.approx(512 * 4096 * 2 / 4.3e12 * 1e6, rel=0.1)
    # The benchmark's report does not take it for a result of a GPU.
    assert render(tmp_path) == NOTHING


@pytest.fixture(scope="module")
def veras_launches(tmp_path_factory):
    path = tmp_path_factory.mktemp("forecast") / "vera.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    options = ["--method", "vera", "--tokens", "512", "--r", "256", "--linears", "o", "--json", str(path)]
    command = [sys.executable, "-m", "tools.forecast", *options]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(path.read_text())["launches"]


def test_pytorchs_products_take_their_floor_over_0_85(veras_launches):
    products = [row for row in veras_launches if row["kernel"] in ("mm", "addmm")]
    # p and y; dp, dx and D.
    assert [row["side"] for row in products] == ["forward"] * 2 + ["backward"] * 3
    p = products[0]
    read_and_written = 2 * 512 * 4096 + 2 * 512 * 4096 + 4 * 512 * 512
    assert p["floor"] == pytest.approx(max(read_and_written / 4.3e12, 2 * 512 * 4096 * 512 / 790e12) * 1e6)
    assert all(row["us"] == pytest.approx(row["floor"] / 0.85 + predict.NODE) for row in products)


def test_vera_launches_its_products_two_kernels_each_way_and_nothing_else(veras_launches):
    sides = {side: [row["kernel"] for row in veras_launches if row["side"] == side] for side in ("forward", "backward")}
    assert sides == {
        "forward": ["mm", "_pack_rows_kernel", "_scale_kernel", "addmm"],
        "backward": ["mm", "_scale_kernel", "mm", "_pack_rows_kernel", "addmm"],
    }


def test_no_launch_of_vera_moves_more_than_twice_the_bytes_that_it_is_given(veras_launches):
    moved = {
        f"{row['side']} {row['kernel']}": row["bytes_moved"] / row["bytes"] for row in veras_launches if "grid" in row
    }
    assert len(moved) == 4
    assert {kernel: ratio for kernel, ratio in moved.items() if not 0.5 < ratio < 2} == {}


def test_measured_over_forecast_is_printed_for_each_kernel_of_ours(tmp_path, monkeypatch, capsys):
    forward = {"_a_kernel": 2.0, "_sum_kernel": 1.0}
    backward = {"_b_kernel": 5.0, "_sum_kernel": 3.0, "autograd's addition of dx": 9.0}
    both = [{"method": "vblora", "r": 4, "tokens": 12, "kernels_us": us} for us in (forward, backward)]
    path = tmp_path / "forecast.json"
    path.write_text(json.dumps({"blocks": both}))

    class FakeProfile:
        def __init__(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def key_averages(self):
            times = {"_a_kernel": 3.0, "_sum_kernel": 2.0, "Memcpy DtoD": 7.0, "cublas": 8.0}
            return [SimpleNamespace(key=key, self_device_time_total=us) for key, us in times.items()]

    device = Cpu()
    device.is_launch = lambda event: not event.key.startswith("Memcpy")
    monkeypatch.setattr(compare, "profile", FakeProfile)
    monkeypatch.setattr(compare, "Case", lambda *_, method, r: Case("block", "tiny", 12, "fp32", method, r, h=12, b=16))
    monkeypatch.setattr(compare, "ours", lambda backend: ours("reference"))
    rows = compare.compare(device, path)
    found = {row["kernel"]: (row["measured_us"], row["forecast_us"], row["measured_over_forecast"]) for row in rows}
    assert found == {"_a_kernel": (3.0, 2.0, 1.5), "_sum_kernel": (2.0, 4.0, 0.5), "_b_kernel": (None, 5.0, None)}
    printed = capsys.readouterr().out
    assert "sum_kernel                            2.0          4.0   0.50" in printed


def test_host_times_are_written_with_the_processor_and_peft_beside_ours(tmp_path):
    pytest.importorskip("peft")
    path = tmp_path / "host.json"
    command = [sys.executable, "-m", "tools.forecast.host", "--seconds", "0.05", "--json", str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(path.read_text())
    assert found["made_by"].keys() == {"cpu", "python", "torch", "triton", "peft", "commit", "date"}
    whose = {"base alone"} | {f"{m}: {who}" for m in ("vblora", "vera") for who in ("op", "layer", "PEFT's layer")}
    assert found["times"].keys() == whose
    assert all(0 < times["forward"] < times["forward and backward"] for times in found["times"].values())
