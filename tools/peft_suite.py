"""PEFT's own tests of VB-LoRA and VeRA, with PEFT as it is and with its layers patched: `make peft-suite`.

With `--objects ours` the other run has our models, configurations and functions in the place of PEFT's, and its tests
say how far they can stand in for them; docs/differences-from-peft.md has what differs on purpose.

The source distribution of the installed version of PEFT carries its tests. They are fetched with pip, unpacked to the
output folder, given small models in the place of those that they want from the Hub, and run twice. It prints the
counts, every difference, how many calls went through our ops, and which tests still want the Hub. A run that was
interrupted goes on where it was.

It exits 1 where a method never came to our ops, where the patched run fails what the other passes, or where less than
690 of a method's tests pass with our objects.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.peft_models import make_models
from tools.peft_plugin import read_record

ROOT = Path(__file__).parents[1]
MODES = ("unpatched", "patched")
# How many tests of each method have to pass with our objects, of those that pass with PEFT's.
ENOUGH = 690
METHODS = ("vblora", "vera")
# What its tests import, and the development environment does not have.
NEEDED = ("attrs", "datasets", "diffusers", "parameterized", "scipy")
# Most telling first; what is left when the time is over is reported as not run.
GROUPS = {
    "own": ["test_vblora.py", "test_vera.py"],
    "custom": ["test_custom_models.py"],
    "api": [
        "test_low_level_api.py",
        "test_initialization.py",
        "test_tuners_utils.py",
        "test_other.py",
        "test_config.py",
        "test_helpers.py",
        "test_quantization.py",
    ],
    "hub": [
        "test_decoder_models.py",
        "test_encoder_decoder_models.py",
        "test_feature_extraction_models.py",
        "test_seq_classifier.py",
        "test_token_classification_qa.py",
        "test_torch_compile.py",
    ],
}


def fetch(folder: Path, version: str) -> Path:
    """Return the folder of PEFT's tests, fetched with pip where it is not there yet."""
    tests = folder / f"peft-{version}" / "tests"
    if not tests.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", "peft", "--no-build-isolation", "--dest", str(folder), f"peft=={version}"]
        subprocess.run(command, check=True)
        with tarfile.open(folder / f"peft-{version}.tar.gz") as archive:
            members = [m for m in archive.getmembers() if m.name.startswith(f"peft-{version}/tests/")]
            archive.extractall(folder, members=members, filter="data")
        # Not in the distribution, though the tests import each other.
        (tests / "__init__.py").touch()
    return tests


def interpreter(folder: Path) -> str:
    """Return a Python that has what PEFT's tests import: this one, or one beside it that sees its packages."""
    if all(map(importlib.util.find_spec, NEEDED)):
        return sys.executable
    python = folder / "venv" / "bin" / "python"
    done = folder / "venv" / ".installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder / "venv")], check=True)
        own = subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
        paths = dict.fromkeys(p for p in sys.path if p.endswith("-packages"))
        Path(own, "beside.pth").write_text("\n".join(paths or [sysconfig.get_path("purelib")]) + "\n")
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*command, "-c", str(ROOT / "constraints.txt"), *NEEDED], check=True)
        done.touch()
    return str(python)


def run(python: str, tests: Path, files: list[str], record: Path, mode: str, online: bool, seconds: float) -> bool:
    """Run some files of tests in one mode, and add the outcomes to the record; False where the time did not suffice."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    environment |= {} if online else {"HF_DATASETS_OFFLINE": "1"}
    command = [python, "-m", "pytest", "-q", "--no-header", "--tb=short", "--continue-on-collection-errors"]
    # An empty configuration, so that neither ours nor PEFT's has a say.
    command += ["-c", os.devnull, f"--rootdir={tests.parent}", "-p", "no:cacheprovider"]
    command += ["-p", "tools.peft_plugin", f"--record={record}"]
    command += [] if online else ["--no-hub"]
    command += [] if mode == "unpatched" else [f"--{mode}"]
    command += [f"tests/{name}" for name in files if (tests / name).exists()]
    with record.with_suffix(".log").open("a", encoding="utf-8") as log:
        try:
            subprocess.run(
                command, cwd=tests.parent, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return False
    return True


def compare(
    unpatched: dict[str, dict[str, Any]], patched: dict[str, dict[str, Any]], mode: str = "patched"
) -> dict[str, Any]:
    """Count the outcomes of both runs, and name every test that did not end the same way.

    Args:
        mode: of the second run, "patched" or "ours".
    Returns:
        "mode"; "kept": method -> number of tests that pass both ways; "counts": mode -> outcome -> number;
        "calls": method -> number, of the patched run; "hub": the tests that want
        the Hub; "failing": id -> why, of those that fail both ways; "differences": id -> both outcomes and why;
        "broken": ids that pass unpatched, and do not patched; "only_in_one": ids that were run in one of them.
    """
    both = {name: (unpatched[name], patched[name]) for name in unpatched if name in patched}
    differences = {
        name: {"unpatched": a["outcome"], mode: b["outcome"], "why": b["why"] or a["why"]}
        for name, (a, b) in both.items()
        if a["outcome"] != b["outcome"]
    }
    calls: Counter[str] = Counter()
    for entry in patched.values():
        calls.update(entry.get("calls", {}))
    kept: Counter[str] = Counter()
    for name, (a, b) in both.items():
        kept.update(methods_of(name) if (a["outcome"], b["outcome"]) == ("passed", "passed") else ())
    return {
        "mode": mode,
        "kept": {method: kept[method] for method in METHODS},
        "counts": {
            label: dict(Counter(entry["outcome"] for entry in found.values()))
            for label, found in (("unpatched", unpatched), (mode, patched))
        },
        "calls": {method: calls[method] for method in METHODS},
        "hub": sorted(name for name, (a, _) in both.items() if a["outcome"] == "hub"),
        "failing": {
            name: f"{a['outcome']}: {a['why']}"
            for name, (a, b) in both.items()
            if a["outcome"] == b["outcome"] and a["outcome"] in ("failed", "stopped", "not collected")
        },
        "differences": differences,
        "broken": sorted(name for name, d in differences.items() if d["unpatched"] == "passed"),
        "only_in_one": sorted(unpatched.keys() ^ patched.keys()),
    }


def methods_of(name: str) -> list[str]:
    """Name the methods, of both, that a test's id speaks of."""
    short = (
        name.replace("test_vblora.py", "VBLoRA").replace("test_vera.py", "VeRA").lower().replace("vb-lora", "vblora")
    )
    return [method for method in METHODS if re.search(rf"(?<![a-z]){method}", short)]


def print_report(result: dict[str, Any], say: Callable[[str], None] = print) -> None:
    """Print both counts, every difference, the calls, and what was not run."""
    outcomes = sorted({outcome for counts in result["counts"].values() for outcome in counts})
    say(f"\nPEFT {result['peft']}, its tests of VB-LoRA and VeRA")
    say(f"{'':12}" + "".join(f"{outcome:>15}" for outcome in outcomes))
    for mode, counts in result["counts"].items():
        say(f"{mode:12}" + "".join(f"{counts.get(outcome, 0):>15}" for outcome in outcomes))
    say("\nCalls through our ops: " + ", ".join(f"{method} {n:,}" for method, n in result["calls"].items()))
    if result["hub"]:
        say(f"{len(result['hub'])} tests want models from the Hub (counted as hub; --online lets them try).")
    for name, why in result["failing"].items():
        say(f"fails both ways: {name}\n    {why}")
    for name, found in result["differences"].items():
        say(f"DIFFERS: {name}\n    {found['unpatched']} -> {found[result['mode']]}: {found['why']}")
    say(
        f"{len(result['differences'])} differences; {len(result['broken'])} tests pass unpatched and not "
        f"{result['mode']}."
    )
    say("Pass both ways: " + ", ".join(f"{method} {n}" for method, n in result["kept"].items()))
    if result["not_run"]:
        say(f"Not finished in time: {', '.join(result['not_run'])}. Call it again to go on.")
    if result["only_in_one"]:
        say(f"{len(result['only_in_one'])} tests were run one way only.")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.peft_suite", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/peft-suite"), help="folder for all of it")
    parser.add_argument("--objects", choices=("patched", "ours"), default="patched", help="of the second run")
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--seconds", type=float, default=1500, help="limit of the whole; call again to go on")
    parser.add_argument("--fresh", action="store_true", help="forget the outcomes of earlier runs")
    parser.add_argument("--online", action="store_true", help="let the tests fetch models from the Hub")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    version = importlib.metadata.version("peft")
    folder = options.out.resolve() / version
    records = folder / "records"
    if options.fresh:
        shutil.rmtree(records, ignore_errors=True)
    records.mkdir(parents=True, exist_ok=True)
    tests, python = fetch(folder, version), interpreter(folder)
    if not options.online:
        make_models(tests.parent)
    modes = ("unpatched", options.objects)
    found: dict[str, dict[str, dict[str, Any]]] = {mode: {} for mode in modes}
    not_run = []
    for group in options.groups:
        for mode in modes:
            record = records / f"{group}-{mode}.jsonl"
            left = end - time.monotonic()
            if left <= 0 or not run(python, tests, GROUPS[group], record, mode, options.online, left):
                not_run.append(f"{group} {mode}")
            found[mode] |= read_record(record)
            print(f"{group} {mode}: {dict(Counter(e['outcome'] for e in read_record(record).values()))}", flush=True)
    result = {"peft": version, "not_run": not_run, **compare(*found.values(), options.objects)}
    (folder / f"result-{options.objects}.json").write_text(json.dumps(result, indent=2) + "\n")
    print_report(result)
    short = min(result["kept"].values()) < ENOUGH if options.objects == "ours" else result["broken"]
    raise SystemExit(1 if short or not all(result["calls"].values()) else 0)


if __name__ == "__main__":
    main()
