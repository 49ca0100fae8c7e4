"""What can go wrong, as a tree. A message is a sentence with numbers; the remedy says what to do.

TinychatError           1   anything of ours that fits nowhere below
├── UsageError          2   a flag, an argument or a request field
├── ModelError          3   a model folder, a hub id, weights
│   └── FormatError     3   a file that is not what it claims to be
├── MediaError          4   a picture that cannot be read
└── CapacityError       5   memory or context that does not suffice

The numbers are the exit codes of the command line; 130 (interrupted) is the shell's own.
"""

from __future__ import annotations


class TinychatError(Exception):
    """An error to show to the user as it is: `message` says what, `remedy` what to do."""

    exit_code = 1

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}"


class UsageError(TinychatError):
    """A flag, an argument or a request field has a value that cannot work."""

    exit_code = 2


class ModelError(TinychatError):
    """A model cannot be found, is not supported, or does not agree with its config."""

    exit_code = 3


class FormatError(ModelError):
    """A file is damaged, or is not in the format that it claims."""


class MediaError(TinychatError):
    """A picture cannot be read, or is too large to be read safely."""

    exit_code = 4


class CapacityError(TinychatError):
    """The memory or the context does not suffice for what was asked."""

    exit_code = 5
