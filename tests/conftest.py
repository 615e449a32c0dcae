"""What all tests share: the read-only reference folder and the paths of this checkout."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def shared_folder() -> Path | None:
    """The folder of references and data, beside the project or where SMALLSEG_SHARED points; None when absent."""
    folder = Path(os.environ.get("SMALLSEG_SHARED", ROOT.parent / "shared"))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference folder; the test is skipped when it is absent."""
    folder = shared_folder()
    if folder is None:
        pytest.skip("reference folder not found: put it at ../shared or set SMALLSEG_SHARED")
    return folder


@pytest.fixture(scope="session")
def deterministic_weights(shared: Path):
    """The module that fills state dicts for the reference outputs."""
    specification = importlib.util.spec_from_file_location(
        "deterministic_weights", shared / "reference" / "deterministic_weights.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
