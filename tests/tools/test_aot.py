"""Every kernel compiles, without a GPU, for every chip that it ships for, in the shapes that ship."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Each chip's report, from a process of its own: in this one, kernels may be interpreted or the GPU's own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    # Llama-2-7B's and Llama-3-70B's q, k, gate and down; h 256 and 2048; 1, 256, 4096 and 16384 tokens.
    command = [sys.executable, "-m", "tools.kernels_report", "--json", "--targets"]
    processes = {
        target: subprocess.Popen(
            [*command, target],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for target in TARGETS
    }
    results = {target: (*process.communicate(), process.returncode) for target, process in processes.items()}
    for target, (_, error, code) in results.items():
        assert code == 0, f"{target}: {error}"
    return {target: json.loads(output) for target, (output, _, _) in results.items()}


def kernels_defined() -> set[str]:
    lines = [line for path in (ROOT / "kernels").glob("*.py") for line in path.read_text().splitlines()]
    return {line[4:].split("(")[0] for line in lines if line.startswith("def _") and "_kernel(" in line}


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_spills_within_shared_memory(reports, target):
    rows = reports[target]
    assert {row["kernel"] for row in rows} == kernels_defined()
    assert [row for row in rows if row["spills"]] == []
    assert [row for row in rows if row["shared"] > row["shared_limit"]] == []


PRODUCTS = {"_shrink_fwd_kernel", "_expand_fwd_kernel", "_expand_bwd_kernel", "_shrink_bwd_kernel"}
# Those that touch activations; of VeRA's the products are PyTorch's.
ACTIVATIONS = PRODUCTS | {"_drop_kernel"}


@pytest.mark.parametrize("target", TARGETS)
def test_offsets_into_activations_are_64_bits_wide(reports, target):
    """An activation may have more than 2^31 elements; triton computes offsets in 32 bits unless told otherwise."""
    rows = [row for row in reports[target] if row["kernel"] in ACTIVATIONS and row["dtype"] != "fp32"]
    assert {row["kernel"] for row in rows if row["offsets_64"]} == ACTIVATIONS
    assert [row for row in rows if row["offsets_32"]] == []


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_activations_are_loaded_and_written_16_bytes_at_a_time(reports, target):
    rows = [row for row in reports[target] if row["kernel"] in ACTIVATIONS and row["M"] == 4096]
    rows = [row for row in rows if row["shape"].startswith("llama") and row["dtype"] == "bf16"]
    assert {row["kernel"] for row in rows} == ACTIVATIONS
    # Beside activations only a bias has 16 bits, and mixtures in terms, which are as wide: no load of two bytes.
    assert [row for row in rows if row["narrow_loads"] and not row["Bias"]] == []
    # Expand reads no activation where the base's product is added later.
    reading = [row for row in rows if row["kernel"] != "_expand_fwd_kernel" or row["Base"]]
    assert [row for row in reading if not row["wide_loads"]] == []
    writing = [row for row in rows if row["kernel"] in ("_expand_fwd_kernel", "_shrink_bwd_kernel")]
    assert {(row["Base"], row["Bias"]) for row in writing} == {(True, False), (False, True), (False, False)}
    assert [row for row in writing if not row["wide_stores"]] == []


def test_bf16_products_run_on_hoppers_matrix_unit(reports):
    rows = [
        row for row in reports["sm_90"] if row["kernel"] in PRODUCTS and row["dtype"] == "bf16" and row["M"] == 4096
    ]
    assert {row["kernel"] for row in rows} == PRODUCTS
    # Its instruction takes 64 rows. Shrink's programs have 32, for as many programs as multiprocessors at one partial.
    assert [row for row in rows if not row["wgmma"] and row.get("r", 4) <= 16 and row["BLOCK_M"] >= 64] == []
    assert [row for row in rows if not row["wgmma"] and not row["mma"]] == []
