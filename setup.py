"""What pyproject.toml cannot say: where tinychat_kernels lies, and compiled extensions (none yet)."""

from __future__ import annotations

from setuptools import setup

setup(ext_modules=[], package_dir={"tinychat_kernels": "kernels/tinychat_kernels"})
