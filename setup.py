"""What pyproject.toml cannot say: where tinychat_kernels lies, and that its CPU kernels are compiled if they can be."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "kernels"))

from tinychat_kernels import build
from tinychat_kernels.errors import BuildError


class BuildKernels(build_ext):
    """Compiles one library with a plain C interface: it fits every Python and every torch."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], build.LIBRARY))

    def build_extension(self, ext: Extension) -> None:
        objects = Path(self.build_temp).absolute()
        path = Path(self.get_ext_fullpath(ext.name)).absolute()
        try:
            build.compile_library(path, build.find_compiler(), objects)
        except BuildError as error:
            self.warn(f"tinychat is installed without its CPU kernels and will be slow: {error}")


setup(
    ext_modules=[Extension("tinychat_kernels._cpu", [])],
    cmdclass={"build_ext": BuildKernels},
    package_dir={"tinychat_kernels": "kernels/tinychat_kernels"},
)
