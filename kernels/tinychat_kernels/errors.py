"""What the kernels raise. The runtime turns these into its own sentences and exit codes."""

from __future__ import annotations


class KernelError(Exception):
    """An op, a backend or a shape that cannot run here."""


class LayoutError(KernelError):
    """Packed weights that do not fit their spec, or a layout that cannot hold them."""


class BuildError(KernelError):
    """Kernels that cannot be compiled here."""
