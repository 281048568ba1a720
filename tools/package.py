"""Build the wheel and the sdist, and try each in a fresh virtual environment: `make package`.

The environments hold nothing but what is tried; its dependencies they see in the environment that runs this, so that
nothing is downloaded. Looked at are: that a wheel without kernels is not built; that the sdist holds every file of the
repository, and its tests can be collected; that the wheel's command runs, its requirements are met and declared, and
mypy sees its types. Exits 1 at the first thing that is wrong.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable
from importlib.metadata import Distribution, packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What calls a module of ours is there when it is called.
CALLERS = {"vllm"}
TYPED = """\
from vblora_triton import PeftModel, VBLoRAConfig, get_peft_model
reveal_type(VBLoRAConfig(r=4).r)
reveal_type(PeftModel.from_pretrained)
VBLoRAConfig(r="four")
"""
PROBE = """\
import importlib, pathlib, sys, vblora_triton
folder = pathlib.Path(vblora_triton.__file__).parent
assert folder.is_relative_to(sys.prefix), folder
names = sorted(path.stem for path in (folder / "kernels").glob("*.py"))
assert not (folder / "kernels").is_symlink()
assert names == sys.argv[1:], names
for name in names:
    importlib.import_module(f"vblora_triton.kernels.{name}")
try:
    import tests
except ImportError:
    pass
else:
    raise AssertionError("the tests were installed")
"""


class PackageError(Exception):
    """What is wrong with the package."""


def run(*command: object, cwd: Path, fails: bool = False) -> str:
    """Run a command and return what it printed.

    Raises:
        PackageError: it failed, or with `fails` it did not.
    """
    # Not what the caller's environment adds to the search path.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True)
    shown = done.stdout + done.stderr
    if (done.returncode != 0) != fails:
        raise PackageError(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{shown[-4000:]}")
    return shown


def fresh(folder: Path, package: Path) -> Path:
    """Make a virtual environment with one package in it, and return its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    inside = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # A plain path: the .pth files in it, such as that of an editable install, are not followed.
    (inside / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    offline = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    run(sys.executable, "-m", "pip", "--python", python, "install", *offline, package, cwd=folder)
    return python


def check_sdist(sdist: Path, work: Path) -> Path:
    """Look at the source distribution, and return the folder that it unpacks to."""
    with tarfile.open(sdist) as archive:
        archive.extractall(work, filter="data")
    source = work / sdist.name.removesuffix(".tar.gz")
    if (ROOT / ".git").exists():
        tracked = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
        missing = [name for name in tracked if name and not os.path.lexists(source / name)]
        if missing:
            raise PackageError(f"{sdist.name} lacks {', '.join(missing)}; MANIFEST.in says what it holds.")
    if not (source / "vblora_triton" / "kernels").is_symlink():
        raise PackageError(f"{sdist.name} has the kernels twice.")
    python = fresh(work / "from-sdist", sdist)
    run(python, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", cwd=source)
    return source


def check_refusal(source: Path, work: Path) -> None:
    """Check that without the link to the kernels nothing is built."""
    link = source / "vblora_triton" / "kernels"
    link.unlink()
    # As git leaves it where the system has no links.
    link.write_text("../kernels")
    build = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", work / "none", source)
    if "vblora_triton/kernels must be a link" not in run(*build, cwd=work, fails=True):
        raise PackageError("A wheel without kernels is refused, but not by name.")


def check_wheel(wheel: Path, work: Path) -> None:
    """Try the wheel: its modules, its command, its requirements and its types."""
    (metadata,) = Distribution.discover(name="vblora_triton", path=[str(wheel)])
    if stray := undeclared(metadata.requires or ()):
        raise PackageError(f"pyproject.toml does not require what has {', '.join(stray)}, which is imported.")
    python = fresh(work / "from-wheel", wheel)
    run(python, "-c", PROBE, *sorted(path.stem for path in (ROOT / "kernels").glob("*.py")), cwd=work)
    few = ["--pretraining-steps", "1", "--steps", "1", "--batch-size", "1", "--seq-len", "32"]
    run(python.parent / "vblora-triton", "finetune", *few, "--output", work / "demo", cwd=work)
    if not (work / "demo" / "report.json").is_file():
        raise PackageError("The command left no report.")
    run(sys.executable, "-m", "pip", "--python", python, "check", cwd=work)
    (work / "typed.py").write_text(TYPED)
    (work / "mypy.ini").write_text("[mypy]\n[mypy-torch.*,transformers.*,triton.*]\nfollow_imports = skip\n")
    mypy = (sys.executable, "-m", "mypy", "--python-executable", python, "--cache-dir", work / "cache", "typed.py")
    shown = run(*mypy, cwd=work, fails=True)
    wanted = [
        'Revealed type is "int"',
        r"vblora_triton\.peft_model\.PeftModel|vblora_triton\.model\.PeftModel",
        "arg-type",
    ]
    if not all(re.search(pattern, shown) for pattern in wanted) or shown.count(": error:") != 1:
        raise PackageError(f"mypy does not see the wheel's types:\n{shown}")


def undeclared(required: Iterable[str]) -> list[str]:
    """Name the modules that the package imports, and that belong to none of its requirements."""
    declared = {_plain(line) for line in required}
    found = set()
    for path in (ROOT / "vblora_triton").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            found |= {name.partition(".")[0] for name in names}
    homes = packages_distributions()
    outside = found - sys.stdlib_module_names - {"vblora_triton"} - CALLERS
    return sorted(name for name in outside if not declared & set(map(_plain, homes.get(name, [name]))))


def _plain(requirement: str) -> str:
    """Return the name that a requirement begins with, in the one spelling of its several."""
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.package", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "package", help="emptied first")
    work = parser.parse_args(arguments).out.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", work / "dist", ROOT, cwd=work)
        (sdist,), (wheel,) = (work / "dist").glob("*.tar.gz"), (work / "dist").glob("*.whl")
        check_wheel(wheel, work)
        check_refusal(check_sdist(sdist, work), work)
    except PackageError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{wheel.name} and {sdist.name}: right, in {work / 'dist'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
