"""What pyproject.toml cannot say of the build: kernels/ must be in every wheel, and be a link in every sdist."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

LINK = Path("vblora_triton", "kernels")


class BuildPy(build_py):
    def run(self) -> None:
        # git checks the link out as a small file where the system has no links, and no package is found there.
        if not (LINK / "expand.py").is_file():
            raise SystemExit(
                f"{LINK} must be a link to ../kernels, and is none here, so that nothing with the kernels in it can be "
                "built; check out with `git -c core.symlinks=true`, or copy the folder kernels there."
            )
        super().run()


class Sdist(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        # Copied, the kernels would be there twice, and a change of one folder would not change what runs.
        super().make_release_tree(base_dir, [name for name in files if LINK not in Path(name).parents])
        (Path(base_dir) / LINK).symlink_to("../kernels")


setup(cmdclass={"build_py": BuildPy, "sdist": Sdist})
