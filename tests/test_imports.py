"""Imports go one way, those inside functions too; the package is light to import, and `kernels` stays a folder."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

import vblora_triton

ROOT = Path(__file__).parents[1]
# Not twice what kernels/ has; of the tests the one file that the benchmark shares with them.
SOURCES = [
    "tests/tolerance.py",
    *(
        path.relative_to(ROOT).as_posix()
        for folder in ("kernels", "vblora_triton", "bench", "tools")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not path.relative_to(ROOT).is_relative_to("vblora_triton/kernels")
    ),
]

# The order of the tree, from the bottom up. A file may import what stands in a line above its own, and from its own
# folder; what shares a line is apart from each other. The longest name that fits a file counts.
ORDER = [
    ["kernels"],
    ["vblora_triton/ops"],
    ["vblora_triton/errors", "vblora_triton/hub"],
    ["vblora_triton/integrations/quantization"],
    ["vblora_triton/tuner"],
    ["vblora_triton/vblora", "vblora_triton/vera"],
    ["vblora_triton/methods", "vblora_triton/tuners"],
    [
        "vblora_triton/card",
        "vblora_triton/distributed",
        "vblora_triton/folder",
        "vblora_triton/optim",
        "vblora_triton/status",
        "vblora_triton/integrations/transformers",
    ],
    ["vblora_triton/injected", "vblora_triton/mapping"],
    ["vblora_triton/checkpoint", "vblora_triton/preparation"],
    ["vblora_triton/state_dicts"],
    ["vblora_triton/model"],
    ["vblora_triton/task_models"],
    ["vblora_triton/peft_model"],
    ["vblora_triton/auto", "vblora_triton/finetune", "vblora_triton/integrations"],
    ["vblora_triton/exchange"],
    ["vblora_triton/integrations/vllm"],
    ["vblora_triton/__init__"],
    ["vblora_triton/commands"],
    ["vblora_triton/cli"],
    ["vblora_triton/__main__"],
    ["tests/tolerance"],
    ["bench"],
    ["tools"],
]

# What a file may import beside the standard library, where that is less than its place in the order allows: the first
# row that matches its path.
ONLY = [
    ("kernels/*.py", {"torch", "triton", "numpy", "kernels/"}),
    ("vblora_triton/ops/reference.py", {"torch"}),
    ("vblora_triton/ops/*.py", {"torch", "kernels/", "vblora_triton/ops/"}),
    (
        "vblora_triton/*/config.py",
        {f"vblora_triton/{name}.py" for name in ("hub", "tuner/config", "tuner/fields", "tuner/method", "tuner/seen")},
    ),
    ("vblora_triton/tuner/method.py", set()),
    ("vblora_triton/tuner/seen.py", set()),
]


def file_of(module: str) -> str | None:
    """The source file of a module of this repository."""
    path = module.removeprefix("vblora_triton.") if module.startswith("vblora_triton.kernels") else module
    path = path.replace(".", "/")
    return next((file for file in (f"{path}.py", f"{path}/__init__.py") if file in SOURCES), None)


def imported(source: str, text: str) -> set[str]:
    """What a file imports, at any depth: files of this repository by path, of other packages the name alone.

    Imports under TYPE_CHECKING count like any others: those in vblora_triton/__init__.py are what it imports when it is
    first asked for them. That Python runs the __init__.py of the packages above a module first is left aside.
    """
    package = ".".join(Path(source).parts[:-1])
    modules = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            inner = {f"{base}.{alias.name}" for alias in node.names}
            modules |= {name if file_of(name) else base for name in inner}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            modules |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
        elif isinstance(node, ast.Constant) and re.fullmatch(r"vblora_triton(\.\w+)+:\w+", str(node.value)):
            # As pkgutil.resolve_name takes it.
            modules.add(node.value.partition(":")[0])
    found = {file_of(name) or name.partition(".")[0] for name in modules}
    return found - sys.stdlib_module_names


def layer(source: str) -> tuple[int, str]:
    """The line of the order that a file belongs to, and the name there that says so."""
    stem = source.removesuffix(".py")
    places = [(number, name) for number, line in enumerate(ORDER) for name in line if f"{stem}/".startswith(f"{name}/")]
    assert places, f"{source} has no place in ORDER"
    return max(places, key=lambda place: len(place[1]))


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return {source: imported(source, (ROOT / source).read_text(encoding="utf-8")) for source in SOURCES}


def test_no_import_leads_back(graph):
    assert graph["vblora_triton/cli.py"] & graph.keys()
    try:
        TopologicalSorter({source: found & graph.keys() for source, found in graph.items()}).prepare()
    except CycleError as error:
        pytest.fail("a circle of imports: " + " -> ".join(reversed(error.args[1])))


def test_imports_follow_the_order(graph):
    layers = {source: layer(source) for source in graph}
    assert {name for _, name in layers.values()} == {name for line in ORDER for name in line}
    wrong = [
        f"{source} imports {other}"
        for source, found in graph.items()
        for other in found & graph.keys()
        if layers[other] != layers[source] and layers[other][0] >= layers[source][0]
    ]
    assert not wrong
    # What is left of our own names: the other tests, or modules that do not exist.
    ours = {"vblora_triton", "kernels", "bench", "tools", "tests"}
    assert not [(source, found & ours) for source, found in graph.items() if found & ours]


def test_the_bottom_needs_nothing_but_what_it_may(graph):
    for source, found in graph.items():
        allowed = next((names for pattern, names in ONLY if Path(source).match(pattern)), None)
        if allowed is not None:
            folders = tuple(name for name in allowed if name.endswith("/"))
            stray = {name for name in found - allowed if not name.startswith(folders or " ")}
            assert not stray, f"{source} may import {sorted(allowed)} and the standard library"


def test_what_the_package_imports_when_asked_is_what_it_declares(graph):
    homes = {file_of(f"vblora_triton.{home}") for home in vblora_triton._HOMES.values()}
    assert None not in homes
    assert homes <= graph["vblora_triton/__init__.py"]


@pytest.mark.parametrize(
    ("source", "line", "found"),
    [
        ("kernels/expand.py", "from . import tuning", {"kernels/tuning.py"}),
        ("kernels/expand.py", "from .launch import launch", {"kernels/launch.py"}),
        ("vblora_triton/ops/vera.py", "from vblora_triton.kernels.vera import f", {"kernels/vera.py"}),
        ("vblora_triton/card.py", "def f():\n    from vblora_triton import cli", {"vblora_triton/cli.py"}),
        ("vblora_triton/card.py", "from vblora_triton import PeftModel", {"vblora_triton/__init__.py"}),
        ("vblora_triton/card.py", "import_module('vblora_triton.cli')", {"vblora_triton/cli.py"}),
        ("vblora_triton/card.py", "resolve_name('vblora_triton.cli:main')", {"vblora_triton/cli.py"}),
        ("vblora_triton/card.py", "if x:\n    import tests.models, os, torch.nn", {"tests", "torch"}),
    ],
)
def test_every_form_of_an_import_is_seen(source, line, found):
    assert imported(source, line) == found


def test_kernels_does_not_shadow_hugging_faces_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "vblora_triton" / "kernels").readlink() == Path("../kernels")


def test_importing_the_package_is_light_and_asks_no_gpu_and_patching_peft_imports_no_compiler():
    heavy = {"torch", "transformers", "huggingface_hub", "triton", "peft", "bitsandbytes"}
    code = (
        f"import sys, vblora_triton; print({heavy} & sys.modules.keys()); "
        f"import torch; import vblora_triton.ops; print('triton' in sys.modules, torch.cuda.is_initialized()); "
        f"import vblora_triton.integrations.peft; print('torch._dynamo' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:3] == ["set()", "False False", "False"]
