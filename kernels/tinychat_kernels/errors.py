"""What the kernels raise. The runtime turns these into its own sentences and exit codes."""

from __future__ import annotations


class KernelError(Exception):
    """An op, a backend or a shape that cannot run here."""


class LayoutError(KernelError):
    """Packed weights that do not fit their spec, or a layout that cannot hold them."""


class BuildError(KernelError):
    """Kernels that cannot be compiled here."""


class SettingError(KernelError):
    """An environment variable that asks for what is not here; the message says what is."""

    def __init__(self, message: str, variable: str) -> None:
        super().__init__(message)
        self.variable = variable
