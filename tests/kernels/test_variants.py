"""How many variants of each kernel are compiled does not follow the number of tokens."""

import json
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Batches of varying length: small ones, all that Triton's look at arguments tells apart, and any others.
TOKENS = [*range(1, 41), *(2**i + d for i in range(6, 17) for d in (-16, -1, 0)), *range(640, 65537, 4096)]
TOKENS += random.Random(0).sample(range(41, 65537), 200 - len(TOKENS))
CASES = {
    "vblora": {"K": 4096, "N": 11008, "h": 256, "r": 4},
    "vblora-dropout": {"K": 4096, "N": 11008, "h": 2048, "r": 4, "p": 0.05},
    "vblora-fp16-r16": {"K": 4096, "N": 4096, "h": 256, "r": 16, "dtype": "fp16"},
    "vblora-fp32": {"K": 1024, "N": 3072, "h": 90, "r": 3, "b": 64, "dtype": "fp32"},
    "vera": {"K": 4096, "N": 11008, "r": 256},
    "vera-dropout-fp16": {"K": 1024, "N": 3072, "r": 20, "p": 0.05, "dtype": "fp16"},
}


@pytest.mark.parametrize("name", CASES)
def test_200_numbers_of_tokens_compile_at_most_6_variants_of_a_kernel(name):
    assert len(set(TOKENS)) == 200
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # In a process of its own: in this one kernels may be interpreted, which knows no variants.
    code = f"from tests.kernels.test_variants import count_variants; count_variants({name!r})"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    counts = json.loads(found.stdout)
    assert len(counts) >= (3 if name.startswith("vera") else 7)
    assert {launch: count for launch, count in counts.items() if count > 6} == {}


def count_variants(name: str) -> None:
    """Print as JSON how many variants Triton would compile for all of TOKENS, by its own look at the arguments.

    For each launch of a step by itself: with a base's result, a bias or neither, each is compiled in its own way.
    """
    import triton

    from tools.aot import compiling
    from tools.kernels_report import DTYPES, launch_all, launch_all_vera
    from vblora_triton.kernels.launch import intercepted

    case = dict(CASES[name])
    case["dtype"] = DTYPES[case.get("dtype", "bf16")]
    launch_step = launch_all_vera if name.startswith("vera") else launch_all
    variants: dict[str, set[str]] = defaultdict(set)
    launched: Counter[str] = Counter()

    def look(kernel, grid, arguments):
        *_, bind = kernel.device_caches[triton.runtime.driver.active.get_current_device()]
        _, specialization, options = bind(**arguments)
        launched[kernel.fn.__name__] += 1
        launch = f"{kernel.fn.__name__} {launched[kernel.fn.__name__]}"
        variants[launch].add(repr((specialization, sorted(options.items()))))

    with compiling("sm_90"), intercepted(look):
        for M in TOKENS:
            launched.clear()
            launch_step(M=M, **case)
    print(json.dumps({launch: len(found) for launch, found in variants.items()}))
