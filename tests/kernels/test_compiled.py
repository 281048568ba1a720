"""What only the compiled code of a kernel shows, and no run under the interpreter on a small tensor."""

import json

import pytest
import torch

from tests.kernels.compiled import in_another_process, launches
from tests.kernels.ttir import overflows, precisions, read_and_written_without_barrier

HERE = __name__
# An activation, the rows of s or p, its columns where it is stored by columns, and the partials of ds: each of them has
# more than 2^31 elements in one of these, whose strides themselves have 32 bits.
LARGE = {
    "vblora-rows-r64": {"method": "vblora", "M": 2**26 + 17, "K": 256, "N": 512, "r": 64},
    "vblora-rows-r4-dropout": {"method": "vblora", "M": 2**30 + 17, "K": 256, "N": 256, "r": 4, "p": 0.1},
    "vblora-columns": {"method": "vblora", "M": 2**24 + 17, "K": 1024, "N": 2048, "r": 4, "strided": True},
    "vblora-columns-fp32": {"method": "vblora", "M": 2**22 + 17, "K": 2048, "N": 1024, "r": 8, "strided": True}
    | {"dtype": "float32", "b": 64, "p": 0.1},
    "vblora-partials": {"method": "vblora", "M": 2**24 + 17, "K": 28672, "N": 28672, "r": 1, "base": False},
    "vera-rows": {"method": "vera", "M": 2**24 + 17, "K": 256, "N": 512, "r": 256},
    "vera-rows-fp32-dropout": {"method": "vera", "M": 2**26 + 17, "K": 256, "N": 256, "r": 64}
    | {"dtype": "float32", "p": 0.1},
    "vera-columns": {"method": "vera", "M": 2**24 + 17, "K": 1024, "N": 2048, "r": 64, "strided": True},
}
# Both sides of every choice that the rank, the dtype and dropout make between variants of a kernel.
VARIANTS = [
    {"method": method, "M": M, "K": 1024, "N": 3072, "r": r, "dtype": dtype, "p": p, "base": base}
    for method in ("vblora", "vera")
    for M, r, dtype, p, base in (
        (4096, 4, "float32", 0.0, True),
        (4096, 64, "float32", 0.1, False),
        (7, 16, "float32", 0.0, True),
        (4096, 4, "bfloat16", 0.0, True),
        (4096, 16, "bfloat16", 0.1, False),
        (300, 64, "float16", 0.0, True),
    )
]


def with_dtype(sizes: dict) -> dict:
    return sizes | {"dtype": getattr(torch, sizes.get("dtype", "bfloat16"))}


@pytest.mark.parametrize("name", LARGE)
def test_no_offset_is_computed_in_32_bits_that_it_does_not_fit(name):
    assert in_another_process(f"{HERE}:print_overflows", name) == {}


def print_overflows(name: str) -> None:
    found = {
        f"{i} {launch.kernel}": overflows(launch.ttir, launch.grid, launch.integers())
        for i, launch in enumerate(launches(**with_dtype(LARGE[name])))
    }
    print(json.dumps({launch: lines for launch, lines in found.items() if lines}))


@pytest.mark.parametrize(("precision", "expected"), [("highest", "ieee"), ("high", "tf32x3"), ("medium", "tf32")])
def test_fp32_is_multiplied_as_torch_says_and_the_parameters_gradients_in_full(precision, expected):
    found = in_another_process(f"{HERE}:print_precisions", precision)
    assert len(found) >= 7
    for kernel, used in found.items():
        # The gradients of the parameters are sums of few products, whose time does not matter.
        assert set(used) <= ({"ieee"} if "parameter" in kernel or "bank" in kernel else {expected}), kernel
    assert {used for uses in found.values() for used in uses} >= {expected}


def print_precisions(precision: str) -> None:
    found: dict[str, set[str]] = {}
    torch.set_float32_matmul_precision(precision)
    for sizes in VARIANTS:
        if sizes["dtype"] == "float32":
            for launch in launches(**with_dtype(sizes)):
                found.setdefault(launch.kernel, set()).update(precisions(launch.ttir))
    print(json.dumps({kernel: sorted(used) for kernel, used in found.items()}))


def test_threads_wait_for_one_another_before_they_read_what_a_kernel_wrote():
    assert in_another_process(f"{HERE}:print_without_barrier") == {}


def print_without_barrier() -> None:
    found = {}
    for sizes in VARIANTS:
        for launch in launches(**with_dtype(sizes)):
            if pointers := read_and_written_without_barrier(launch.ttir):
                found[f"{launch.kernel} {sizes}"] = pointers
    print(json.dumps(found))
