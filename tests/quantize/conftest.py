"""What the tests of the quantizer share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny models, made when first asked for: see quantize_runs."""
    return tmp_path_factory.mktemp("models")
