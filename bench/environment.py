"""What a result was measured on."""

import platform
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch


def environment(commit: str | None = None) -> dict[str, Any]:
    """GPU, CPU and threads, versions, commit and time, for a result file.

    Args:
        commit: where the checkout has no history to ask.
    """
    versions = {}
    for name in ("torch", "triton", "transformers", "peft"):
        try:
            versions[name] = __import__(name).__version__
        except ImportError:
            versions[name] = None
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": _driver(),
        "capability": torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions,
        "commit": commit or _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    """The processor's name, where Linux tells it; else what the platform calls it."""
    listed = Path("/proc/cpuinfo")
    for line in listed.read_text(errors="replace").splitlines() if listed.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def _commit() -> str:
    root = Path(__file__).parents[1]
    if shutil.which("git") is None:
        return "unknown"
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or "unknown"
