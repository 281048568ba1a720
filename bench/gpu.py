"""Everything that only a GPU can show, in one run: `make gpu PY=python3 OUT=folder`.

The suite natively, compute-sanitizer on small cases where it is installed, and the quick cases of the benchmark. It
writes gpu.json to the folder. Without a GPU it says so and exits 3.
"""

import argparse
import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

from bench.environment import environment
from bench.records import load

ROOT = Path(__file__).parents[1]
TESTS = [
    "test_ops.py",
    "test_vera_ops.py",
    "test_gpu.py",
    "test_dropout.py",
    "test_selection.py",
    "test_ledger.py",
    "test_compile.py",
    "vblora",
    "vera",
    "integrations/test_patch_peft.py",
]


def run_tests(folder: Path, seconds: float) -> dict[str, Any]:
    """Run the tests that run kernels, natively; count what pytest counted and name what failed."""
    report = folder / "pytest.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += [f"tests/{name}" for name in TESTS]
    try:
        code: int | None = subprocess.run(command, cwd=ROOT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        code = None
    if not report.exists():
        return {"ok": False, "exit_code": code, "reason": f"no report; the limit was {seconds:.0f} s"}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    failed = [
        f"{c.get('classname')}::{c.get('name')}"
        for c in suite
        if c.find("failure") is not None or c.find("error") is not None
    ]
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return {"ok": code == 0, "exit_code": code, **counts, "failed": failed}


def run_sanitizer(folder: Path, seconds: float) -> dict[str, Any]:
    """Run `bench.small_cases` under compute-sanitizer's memcheck and racecheck; say what they said last."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        return {"ok": True, "ran": False, "reason": "compute-sanitizer is not installed"}
    found: dict[str, Any] = {"ok": True, "ran": True}
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "bench.small_cases"]
        try:
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds / 2)
        except subprocess.TimeoutExpired:
            found |= {"ok": False, tool: f"took more than {seconds / 2:.0f} s"}
            continue
        lines = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("=========")]
        found[tool] = {"exit_code": result.returncode, "summary": lines[-5:]}
        found["ok"] = found["ok"] and result.returncode == 0
    return found


def run_times(folder: Path, seconds: float) -> dict[str, Any]:
    """Run the benchmark's quick cases; their results are in bench.json beside gpu.json."""
    path = folder / "bench.json"
    command = [
        sys.executable,
        "-m",
        "bench",
        "--quick",
        "--json",
        str(path.resolve()),
        "--minutes",
        str(seconds / 60 - 0.5),
    ]
    try:
        code: int | None = subprocess.run(command, cwd=ROOT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        code = None
    if not path.exists():
        return {"ok": False, "exit_code": code, "reason": "no results"}
    header, records = load(path)
    # A rival that fails is its own affair; ours must be right and run.
    bad = [f"{r.id()}: {r.status}: {r.reason}" for r in records if r.status != "ok" and r.provider in OURS]
    return {"ok": code == 0 and bool(records) and not bad, "exit_code": code, "header": header, "not_ok": bad}


OURS = ("all", "ours", "ours_graph", "ours_reference")
PARTS = {"tests": run_tests, "sanitizer": run_sanitizer, "times": run_times}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder for gpu.json")
    parser.add_argument("--commit", help="the commit, where the checkout has no history")
    parser.add_argument("--seconds", type=float, default=500, help="limit of each part")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU here: nothing was run.", file=sys.stderr)
        raise SystemExit(3)
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"environment": environment(options.commit)}
    # Written after each part: one that breaks, or runs out of time, takes nothing with it.
    for part in options.parts:
        try:
            result[part] = PARTS[part](options.out, options.seconds)
        except Exception as error:
            result[part] = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        (options.out / "gpu.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "times"}, indent=2))
    raise SystemExit(0 if all(result[part]["ok"] for part in options.parts) else 1)


if __name__ == "__main__":
    main()
