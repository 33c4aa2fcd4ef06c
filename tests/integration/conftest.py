"""Fixtures of tests that train."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_runs import write_clips


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The catalogue of twelve moving clips of two shapes."""
    return write_clips(tmp_path_factory.mktemp("clips"))
