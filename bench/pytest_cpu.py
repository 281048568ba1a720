"""pytest-benchmark cases for the CPU: `python -m bench.pytest_cpu`, or pytest with this file's path.

Each group is a case of `bench.cases.on_cpu`; its rows are this package's layers, PEFT's, PEFT's patched by this
package, and the base.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.cases import DIRECTIONS, Case, on_cpu
from bench.cpu import COMPARED
from bench.device import Cpu
from bench.files import forms, open_form
from bench.providers import Provider, UnavailableError
from bench.workloads import Workload, make_base

# Few rounds: `python -m bench` measures the same turn by turn; this is for pytest-benchmark's own reports and history.
ROUNDS = {"rounds": 10, "warmup_rounds": 2, "iterations": 1}


@contextmanager
def _skip_unavailable() -> Iterator[None]:
    import pytest

    try:
        yield
    except UnavailableError as error:
        pytest.skip(str(error))


def pytest_generate_tests(metafunc) -> None:
    """Every case in its directions by everyone who is compared."""
    if "direction" in metafunc.fixturenames:
        cases = [case for suite in ("layer", "model") for case in on_cpu(suite)]
        found = [(c, d, p) for c in cases for d in DIRECTIONS[c.suite] for p in COMPARED]
        ids = [f"{c.id(d)}/{p.name}" for c, d, p in found]
        metafunc.parametrize(("case", "direction", "provider"), found, ids=ids)
    if "form" in metafunc.fixturenames:
        pairs = [(case, form, what) for case in on_cpu("load") for form in forms(case) for what in ("save", "load")]
        ids = [f"{case.id(what)}/{form.name}" for case, form, what in pairs]
        metafunc.parametrize(("case", "form", "what"), pairs, ids=ids)


def test_layers(benchmark, case: Case, direction: str, provider: Provider) -> None:
    device = Cpu().device
    benchmark.group = case.id(direction)
    workload = Workload(case, direction, device)
    with _skip_unavailable():
        model = workload.prepare(provider.adapt(case, make_base(case, device)))
    benchmark.pedantic(workload.call(model), args=(0,), **ROUNDS)


def test_files(benchmark, case: Case, form, what: str, tmp_path: Path) -> None:
    benchmark.group = case.id(what)
    base = make_base(case, Cpu().device)
    with _skip_unavailable():
        save, load = open_form(case, form, base, tmp_path)
    save()
    benchmark.pedantic(save if what == "save" else load, **ROUNDS)


def main() -> int:
    missing = [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{' and '.join(missing)} not installed: its cases were skipped.")
        return 0
    import pytest

    options = ["-q", "-p", "no:cacheprovider", "--benchmark-only", "--benchmark-columns=median,iqr,rounds"]
    options += ["--benchmark-group-by=group", "--benchmark-name=short", "--benchmark-warmup=off"]
    return int(pytest.main([*options, __file__, *sys.argv[1:]]))


if __name__ == "__main__":
    raise SystemExit(main())
