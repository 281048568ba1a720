"""The map of the code holds: imports go one way, the package is light to import, and `kernels` stays a folder."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STDLIB = set(sys.stdlib_module_names)

# Which modules a file may import at any depth: the first row that matches its path. Names are prefixes, relative
# imports resolved; the standard library is always allowed.
RULES = [
    ("kernels/", {"torch", "triton", "numpy", "vblora_triton.kernels"}),
    ("vblora_triton/ops/reference.py", {"torch"}),
    ("vblora_triton/ops/", {"torch", "vblora_triton.kernels", "vblora_triton.ops"}),
    ("vblora_triton/**/config.py", {"vblora_triton.tuner.config", "vblora_triton.hub"}),
]


def imports(path: Path) -> set[str]:
    """Every module that the file imports, with relative imports resolved, `from package import module` included."""
    package = path.relative_to(ROOT).parent.parts
    if package[0] == "kernels":
        package = ("vblora_triton", *package)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found |= {module} if module not in ("vblora_triton", "vblora_triton.kernels") else set()
            found |= {f"{module}.{alias.name}" for alias in node.names if module.startswith("vblora_triton")}
    return {name for name in found if name.split(".")[0] not in STDLIB}


def sources() -> list[Path]:
    package = (p for p in (ROOT / "vblora_triton").rglob("*.py") if "kernels" not in p.parts)
    return sorted([*(ROOT / "kernels").glob("*.py"), *package])


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    relative = path.relative_to(ROOT)
    found = imports(path)
    assert not {name for name in found if name.split(".")[0] in ("tests", "bench")}
    for pattern, allowed in RULES:
        if str(relative).startswith(pattern) or relative.match(pattern):
            stray = {n for n in found if not any(n == a or n.startswith(a + ".") for a in allowed)}
            assert not stray, f"{relative} may import {sorted(allowed)} and the standard library"
            break


def test_kernels_does_not_shadow_hugging_faces_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "vblora_triton" / "kernels").readlink() == Path("../kernels")


def test_importing_the_package_imports_neither_triton_nor_peft_and_asks_no_gpu():
    code = (
        "import sys, torch, vblora_triton; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'triton', 'peft', 'bitsandbytes'}), "
        "torch.cuda.is_initialized())"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[0] == "[] False"
