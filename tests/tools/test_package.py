"""What `make package` finds wrong; that it finds nothing is for CI to see."""

import io
import subprocess
import tarfile

import pytest

from tools import package


def test_an_import_that_nothing_required_brings_is_named():
    project = pytest.importorskip("tomllib").loads((package.ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], "matplotlib"]
    for extra in ("peft", "bnb", "torchao"):
        lines += project["optional-dependencies"][extra]
    assert package.undeclared(lines) == []
    lacking = [line for line in lines if not line.startswith(("PyYAML", "tqdm"))]
    assert package.undeclared(lacking) == ["tqdm", "yaml"]


def test_a_file_of_the_repository_that_the_sdist_lacks_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "ROOT", tmp_path)
    (tmp_path / "Makefile").touch()
    subprocess.run("git init -q && git add Makefile", shell=True, cwd=tmp_path, check=True)
    with tarfile.open(tmp_path / "x-1.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("x-1/PKG-INFO"), io.BytesIO())
    with pytest.raises(package.PackageError, match=r"x-1\.tar\.gz lacks Makefile; MANIFEST"):
        package.check_sdist(tmp_path / "x-1.tar.gz", tmp_path)


def test_a_command_that_fails_or_should_have_is_shown(tmp_path):
    with pytest.raises(package.PackageError, match=r"exit code 3\nwhy"):
        package.run("sh", "-c", "echo why; exit 3", cwd=tmp_path)
    with pytest.raises(package.PackageError, match="exit code 0"):
        package.run("true", cwd=tmp_path, fails=True)
