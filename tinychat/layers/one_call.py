"""Parts of a model that kernels run as a whole, in place of their modules."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from tinychat_kernels.errors import KernelError


class Obstacle(Exception):
    """Why the modules of a part run, and not the kernels."""


@contextmanager
def refused() -> Generator[None, None, None]:
    """What the kernels do not take becomes an Obstacle."""
    try:
        yield
    except KernelError as error:
        raise Obstacle(str(error)) from error
