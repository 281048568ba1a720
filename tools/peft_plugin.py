"""A pytest plugin: PEFT's own tests of VB-LoRA and VeRA, with PEFT's layers or with ours, one line of JSON for each.

    pytest -p tools.peft_plugin --record FILE [--patched | --ours] [--no-hub] tests

What FILE has the outcome of is not run again, and a test that ended its process counts as "stopped".
"""

import functools
import importlib
import inspect
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

# A test's name, or the source of one that is run once: VB-LoRA and VeRA, and neither PVeRA nor "several".
WANTED = re.compile(r"VB-?LoRA|(?<![a-zA-Z])vblora|(?<![a-zA-Z])(VeRA|VERA|Vera(?![a-z])|vera(?![a-z]))")
OFFLINE = re.compile(
    r"OfflineModeIsEnabled|LocalEntryNotFound|ConnectionError|ConnectError|couldn't connect to|outgoing traffic"
    r"|offline mode|Cannot find the requested files in the|not the path to a directory containing a file"
)
OPS = {"vblora": "vblora_linear", "vera": "vera_linear"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, required=True, help="the file of outcomes")
    parser.addoption("--no-hub", action="store_true", help="let every request to the Hub fail, at once")
    parser.addoption("--patched", action="store_true", help="run PEFT's layers with vblora_triton's ops")
    parser.addoption("--ours", action="store_true", help="run vblora_triton's objects in the place of PEFT's")


def pytest_configure(config: pytest.Config) -> None:
    calls: Counter[str] = Counter()
    if config.getoption("--no-hub"):
        _refuse_requests()
    if config.getoption("--patched") or config.getoption("--ours"):
        from vblora_triton import ops, patch_peft

        for method, name in OPS.items():
            setattr(ops, name, _counting(getattr(ops, name), method, calls))
        if config.getoption("--patched"):
            patch_peft(backend="reference")
        else:
            put_ours_in_place()
    config.pluginmanager.register(Recorder(config.getoption("--record"), calls))


def put_ours_in_place() -> None:
    """Put our classes and functions under PEFT's names, wherever PEFT itself has them, before a test imports them.

    But for those functions of PEFT's that give to ours what is ours, and serve the methods that tests compare with too.
    """
    import peft

    import vblora_triton
    from vblora_triton.integrations.in_peft import ANSWERS
    from vblora_triton.tuner import seen

    seen.tell(peft)
    ours = {name: getattr(vblora_triton, name) for name in vblora_triton.__all__ if hasattr(peft, name)}
    # Enums that know other methods too.
    kept = {"PeftType", "TaskType", *(answer.__name__ for answer, _ in ANSWERS)}
    ours = {name: value for name, value in ours.items() if name not in kept}
    for name in [name for name in ours if name.startswith("PEFT_TYPE_TO_")]:
        ours[name] = {**getattr(peft, name), **ours[name]}
    for module in [module for name, module in sys.modules.items() if f"{name}.".startswith("peft.")]:
        for name in ours.keys() & vars(module).keys():
            setattr(module, name, ours[name])
    for method, layer in {"vblora": "VBLoRALayer", "vera": "VeraLayer"}.items():
        for package in (f"peft.tuners.{method}", f"peft.tuners.{method}.layer"):
            home = importlib.import_module(f"vblora_triton.tuners.{method}.layer")
            setattr(sys.modules[package], layer, getattr(home, layer))
            sys.modules[package].Linear = home.Linear


def _refuse_requests() -> None:
    # PEFT's tests take HF_HUB_OFFLINE back, and where there is no network each request is tried for most of a minute.
    from huggingface_hub import set_client_factory
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import get_session

    def refuse(request: Any) -> None:
        raise OfflineModeIsEnabled(f"{request.url} was not asked: --online lets PEFT's tests reach the Hub.")

    client = type(get_session())
    set_client_factory(lambda: client(event_hooks={"request": [refuse]}))


def _counting(op: Any, method: str, calls: Counter[str]) -> Any:
    @functools.wraps(op)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[method] += 1
        return op(*args, **kwargs)

    return counted


def read_record(path: Path) -> dict[str, dict[str, Any]]:
    """The last line of each test in a file of outcomes; one that only started has "stopped"."""
    if not path.exists():
        return {}
    # The last line may be cut off where the process was killed.
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return {entry["id"]: entry for entry in map(json.loads, lines)}


class Recorder:
    """Chooses the tests, and writes down what became of each."""

    def __init__(self, path: Path, calls: Counter[str]) -> None:
        self.path, self.calls = path, calls
        self.known = read_record(path)
        self.entry: dict[str, Any] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        dropped = [item for item in items if item.nodeid in self.known or not is_wanted(item)]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            outcome = "hub" if OFFLINE.search(report.longreprtext) else "not collected"
            self._write({"id": report.nodeid, "outcome": outcome, "why": _last_line(report)})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.calls.clear()
        self.entry = {"id": nodeid, "outcome": "passed", "why": "", "started": time.time()}
        self._write({**self.entry, "outcome": "stopped", "why": "it ended the process, or took too long"})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and self.entry["outcome"] == "passed":
            self.entry |= {"outcome": "skipped", "why": _last_line(report)}
        elif report.failed and self.entry["outcome"] != "failed":
            outcome = "hub" if OFFLINE.search(report.longreprtext) else "failed"
            self.entry |= {"outcome": outcome, "why": _last_line(report)}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._write(self.entry | {"calls": dict(self.calls), "seconds": time.time() - self.entry["started"]})

    def _write(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def is_wanted(item: pytest.Item) -> bool:
    """Say whether a test is one of VB-LoRA's or VeRA's."""
    if WANTED.search(item.nodeid.replace("test_vblora.py", "VBLoRA").replace("test_vera.py", "VeRA")):
        return True
    # A parametrized test's source names every method there is.
    function = getattr(item, "function", None)
    return function is not None and not hasattr(item, "callspec") and bool(WANTED.search(inspect.getsource(function)))


def _last_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    lines = [line[2:].strip() for line in report.longreprtext.splitlines() if line.startswith("E  ")]
    return (lines or report.longreprtext.splitlines() or [""])[0][:300]
