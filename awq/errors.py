"""What the quantizer raises. The runtime turns these into its own sentences and exit codes.

AwqError
├── RecipeError        an architecture without a recipe, or a block that does not fit its recipe
├── OptionsError       a search that cannot be run
├── WeightsError       a weight that cannot be quantized
└── CalibrationError   inputs that say nothing, or hold NaN or Inf
"""

from __future__ import annotations


class AwqError(Exception):
    """An error to show to the user as it is: `message` says what, `remedy` what to do."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}"


class RecipeError(AwqError):
    """There is no recipe for an architecture, or a block lacks what its recipe names."""


class OptionsError(AwqError):
    """An option has a value that cannot work."""


class WeightsError(AwqError):
    """A weight holds NaN or Inf, or has a size that the format cannot hold."""


class CalibrationError(AwqError):
    """The calibration inputs are missing, misshapen, or not finite."""
