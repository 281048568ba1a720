"""A pytest plugin for long runs on a GPU, `-p tools.gpu_plugin`: what ended is on disk, and no test spoils the next.

A line of JSON for each test as it ends goes to the file that GPU_TESTS_LOG names: "test", "outcome", "seconds" and of a
failure the end of what pytest says. After an illegal access every further call of its process fails: a worker of
pytest-xdist whose GPU does not answer any more ends there, and xdist starts another one for the tests that are left.
"""

import json
import os
import sys
from typing import Any

import pytest

# Of what pytest says of a failure, characters that are kept.
KEPT = 2000


def pytest_runtest_logreport(report: Any) -> None:
    # Of a test that a worker ran its process has written; of one that ended a worker nobody has.
    from_worker = hasattr(report, "node") and report.when in ("setup", "call", "teardown")
    if from_worker or (report.when != "call" and report.outcome == "passed"):
        return
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
    if report.when != "call":
        line["when"] = report.when
    if report.failed:
        line["error"] = str(report.longrepr)[-KEPT:]
    # One write: lines of several processes do not mix.
    with open(os.environ["GPU_TESTS_LOG"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ and is_broken():
        os._exit(3)


def is_broken() -> bool:
    """Whether this process cannot use its GPU any more."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
