"""Everything that only a GPU can show: `make gpu PY=python3 OUT=folder`, or some of its parts, PARTS="first ops".

The suite natively in three parts, the decisive tests first; what the forecast assumes, asked of the GPU;
compute-sanitizer on small cases where it is installed; the quick cases of the benchmark; each kernel's time beside its
forecast. It writes gpu.json to the folder; parts that are run later into the same folder join those that are there.
Each part keeps to --seconds, by default what fits a command of its own that may take 600 s. Beside gpu.json each part
of the suite writes a line of JSON for every test as it ends: a run that is killed leaves them. Without a GPU it says so
and exits 3.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.device import Cuda
from bench.environment import environment
from bench.records import load, problems
from tools.forecast.compare import RESULTS, compare
from tools.questions import answers

ROOT = Path(__file__).parents[1]
# Of the suite what runs kernels, by parts, and the processes that share one: each compiles what it runs. Tests of full
# size want much of the GPU's memory.
TESTS = {
    "first": (
        ["test_gpu.py", *(f"kernels/test_{name}.py" for name in ("partials", "expand", "parameters", "dropout"))],
        4,
    ),
    "ops": (
        sorted(f"ops/{path.name}" for path in (ROOT / "tests/ops").glob("test_*.py") if "_cpu" not in path.name),
        8,
    ),
    "layers": (["test_gpu_stacks.py", "vblora", "vera", "integrations/test_patch_peft.py", "finetune/test_run.py"], 8),
}


def limited(seconds: float, command: list[str], **environment: str) -> int | None:
    """The exit status of a command, or None where the time did not suffice: then its processes are killed."""
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def run_tests(part: str, folder: Path, seconds: float, commit: str | None = None) -> dict[str, Any]:
    """Run a part of the suite natively; count what ended, from the lines of `gpu_plugin`, and name what failed."""
    log = (folder / f"{part}.jsonl").resolve()
    log.unlink(missing_ok=True)
    names, processes = TESTS[part]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tools.gpu_plugin"]
    command += ["-n", str(min(processes, os.cpu_count() or 1)), "--dist", "worksteal"]
    start = time.monotonic()
    code = limited(seconds, [*command, *(str(ROOT / "tests" / name) for name in names)], GPU_TESTS_LOG=str(log))
    ended: dict[str, dict[str, Any]] = {}
    for line in map(json.loads, log.read_text().splitlines() if log.exists() else []):
        # Of a test that ended its process there is a second one, of the process.
        if ended.get(line["test"], {}).get("outcome") != "failed":
            ended[line["test"]] = line
    counts = Counter(line["outcome"] for line in ended.values())
    failed = {test: line.get("error", "") for test, line in ended.items() if line["outcome"] == "failed"}
    slowest = sorted(ended.values(), key=lambda line: -line["seconds"])[:10]
    return {
        "ok": code == 0 and bool(counts["passed"]),
        "exit_code": code,
        "seconds": round(time.monotonic() - start, 1),
        **counts,
        "failures": failed,
        "slowest": {line["test"]: line["seconds"] for line in slowest},
    }


# Accesses outside of what is allocated; of shared memory without a barrier; reads of what nobody wrote.
SANITIZERS = ("memcheck", "racecheck", "initcheck")


def run_sanitizer(folder: Path, seconds: float, commit: str | None = None) -> dict[str, Any]:
    """Run `tools.sanitizer` under each of compute-sanitizer's tools; say what they said last."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        return {"ok": True, "ran": False, "reason": "compute-sanitizer is not installed"}
    found: dict[str, Any] = {"ok": True, "ran": True}
    end = time.monotonic() + seconds
    # Compiled before, and in none of the three times.
    if limited(seconds / 4, [sys.executable, "-m", "tools.sanitizer"]) != 0:
        return {"ok": False, "ran": False, "reason": "the cases fail, or take too long, without it"}
    for i, tool in enumerate(SANITIZERS):
        limit = (end - time.monotonic()) / (len(SANITIZERS) - i)
        log = folder / f"{tool}.log"
        command = [program, "--tool", tool, "--error-exitcode", "9", "--log-file", str(log.resolve())]
        # Past the end of a tensor lies another one where PyTorch hands out pieces of what it keeps.
        code = limited(limit, [*command, sys.executable, "-m", "tools.sanitizer"], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        found[tool] = {"exit_code": code, "limit": round(limit), "summary": lines[-5:]}
        found["ok"] = found["ok"] and code == 0
    return found


def run_times(folder: Path, seconds: float, commit: str | None = None) -> dict[str, Any]:
    """Run the benchmark's quick cases; their results are in bench.json beside gpu.json."""
    path = (folder / "bench.json").resolve()
    # An earlier run's must not pass for this one's.
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench", "--quick", "--json", str(path), "--minutes", str(seconds / 60 - 0.5)]
    code = limited(seconds, [*command, *(["--commit", commit] if commit else [])])
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


def run_questions(folder: Path, seconds: float, commit: str | None = None) -> dict[str, Any]:
    """Ask the GPU what the forecast assumes."""
    return {"ok": True, **answers(Cuda())}


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
    "first": partial(run_tests, "first"),
    "questions": run_questions,
    "ops": partial(run_tests, "ops"),
    "layers": partial(run_tests, "layers"),
    "sanitizer": run_sanitizer,
    "times": run_times,
    "forecast": run_forecast,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder for gpu.json")
    parser.add_argument("--commit", help="the commit, where the checkout has no history")
    parser.add_argument("--seconds", type=float, default=500, help="limit of each part (default 500)")
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
    # Written after each part: one that breaks, or runs out of time, takes nothing with it.
    for part in options.parts:
        # The part's own commit: an earlier part may be of another.
        result[part] = run_part(part, options.out, options.seconds, options.commit) | {"commit": found["commit"]}
        path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "times"}, indent=2))
    raise SystemExit(0 if all(result[part]["ok"] for part in options.parts) else 1)


if __name__ == "__main__":
    main()
