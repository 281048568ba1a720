"""Everything that only a GPU can show, in one run: `make gpu PY=python3 OUT=folder`.

The suite natively, compute-sanitizer on small cases where it is installed, the quick cases of the benchmark, and each
kernel's time beside its forecast. It writes gpu.json to the folder; parts that are run later into the same folder join
those that are there. All parts together keep to --seconds, which by default fits a command that may take 600 s; where
that is too little, give each part a command of its own: --parts tests, then --parts sanitizer, and so on. Without a GPU
it says so and exits 3.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.environment import environment
from bench.records import load, problems
from tools.forecast.compare import RESULTS, compare

ROOT = Path(__file__).parents[1]
TESTS = [
    "ops",
    "test_gpu.py",
    "vblora",
    "vera",
    "integrations/test_patch_peft.py",
    "finetune/test_run.py",
]


def limited(seconds: float, *module: str) -> int | None:
    """The exit status of `python -m module`, or None where the time did not suffice."""
    try:
        return subprocess.run([sys.executable, "-m", *module], cwd=ROOT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return None


def run_tests(folder: Path, seconds: float, commit: str | None = None) -> dict[str, Any]:
    """Run the tests that run kernels, natively; count what pytest counted and name what failed."""
    report = (folder / "pytest.xml").resolve()
    tests = [f"tests/{name}" for name in TESTS]
    code = limited(seconds, "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests)
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


def run_sanitizer(folder: Path, seconds: float, commit: str | None = None) -> dict[str, Any]:
    """Run `tools.sanitizer` under compute-sanitizer's memcheck and racecheck; say what they said last."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        return {"ok": True, "ran": False, "reason": "compute-sanitizer is not installed"}
    found: dict[str, Any] = {"ok": True, "ran": True}
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "tools.sanitizer"]
        try:
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds / 2)
        except subprocess.TimeoutExpired:
            found |= {"ok": False, tool: f"took more than {seconds / 2:.0f} s"}
            continue
        lines = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("=========")]
        found[tool] = {"exit_code": result.returncode, "summary": lines[-5:]}
        found["ok"] = found["ok"] and result.returncode == 0
    return found


def run_times(folder: Path, seconds: float, commit: str | None = None) -> dict[str, Any]:
    """Run the benchmark's quick cases; their results are in bench.json beside gpu.json."""
    path = (folder / "bench.json").resolve()
    # An earlier run's must not pass for this one's.
    path.unlink(missing_ok=True)
    options = ["--quick", "--json", str(path), "--minutes", str(seconds / 60 - 0.5)]
    code = limited(seconds, "bench", *options, *(["--commit", commit] if commit else []))
    if not path.exists():
        return {"ok": False, "exit_code": code, "reason": "no results"}
    header, records = load(path)
    bad = problems(records)
    return {"ok": code == 0 and bool(records) and not bad, "exit_code": code, "header": header, "not_ok": bad}


def run_forecast(folder: Path, seconds: float, commit: str | None = None) -> dict[str, Any]:
    """Print measured / forecast of each kernel. Whatever it is, it fails nothing: the forecast never met a GPU."""
    if not RESULTS.exists():
        return {"ok": True, "reason": f"there is no {RESULTS.name}; `make forecast` makes it"}
    return {"ok": True, "kernels": compare()}


def run_part(part: str, folder: Path, seconds: float, commit: str | None) -> dict[str, Any]:
    """Run one part; what it raises is its result."""
    try:
        return PARTS[part](folder, seconds, commit)
    except Exception as error:
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}


def earlier(path: Path) -> dict[str, Any]:
    """What gpu.json holds from runs of other parts; nothing where there is none, or half of one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


PARTS: dict[str, Callable[[Path, float, str | None], dict[str, Any]]] = {
    "tests": run_tests,
    "sanitizer": run_sanitizer,
    "times": run_times,
    "forecast": run_forecast,
}
# Shares of the time that is left; a part alone has all of it.
SHARES = {"tests": 3, "sanitizer": 1, "times": 1, "forecast": 1}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder for gpu.json")
    parser.add_argument("--commit", help="the commit, where the checkout has no history")
    parser.add_argument("--seconds", type=float, default=560, help="limit of all parts together (default 560)")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="only these")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU here: nothing was run.", file=sys.stderr)
        raise SystemExit(3)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "gpu.json"
    found = environment(options.commit)
    # Not what these parts said before: a run that is killed must not leave it standing.
    kept = {name: value for name, value in earlier(path).items() if name not in options.parts}
    result: dict[str, Any] = {**kept, "environment": found}
    path.write_text(json.dumps(result, indent=2) + "\n")
    end = time.monotonic() + options.seconds
    # Written after each part: one that breaks, or runs out of time, takes nothing with it.
    for i, part in enumerate(options.parts):
        share = SHARES[part] / sum(SHARES[name] for name in options.parts[i:])
        limit = max(1.0, (end - time.monotonic()) * share)
        # The part's own commit: an earlier part may be of another.
        result[part] = run_part(part, options.out, limit, options.commit) | {"commit": found["commit"]}
        path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "times"}, indent=2))
    raise SystemExit(0 if all(result[part]["ok"] for part in options.parts) else 1)


if __name__ == "__main__":
    main()
