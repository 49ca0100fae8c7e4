"""`python -m tinychat` is the command `tinychat`."""

from __future__ import annotations

from tinychat.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
