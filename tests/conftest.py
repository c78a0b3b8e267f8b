"""Fixtures that every test file shares: the golden arrays, the recipe that seeded them, and the photographs when they are there."""

import importlib.util
import os
from pathlib import Path

import matplotlib
import numpy as np
import pytest

matplotlib.use("agg")

HERE = Path(__file__).parent
ROOT = HERE.parent


@pytest.fixture(scope="session")
def recipe():
    """The module that fills weights, pictures and targets with numbers seeded by name."""
    spec = importlib.util.spec_from_file_location("recipe", HERE / "golden" / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def golden():
    """`golden("r50")` is the dictionary of arrays in tests/golden/r50.npz."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(HERE / "golden" / f"{name}.npz") as arrays:
            return dict(arrays)

    return load


@pytest.fixture(scope="session")
def bccd() -> Path:
    """The folder of blood-cell photographs that ANNOTATED_DETR_BCCD names."""
    folder = os.environ.get("ANNOTATED_DETR_BCCD")
    if not folder:
        pytest.skip("ANNOTATED_DETR_BCCD does not name the folder of blood-cell photographs")
    return Path(folder)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Path:
    """Scenes that a test draws go into a folder of the test run, not into the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["ANNOTATED_DETR_CACHE"] = str(folder)
    return folder
