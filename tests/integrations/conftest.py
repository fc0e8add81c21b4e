"""Trainers of other libraries, as installed by ``make test-integrations``; nothing here uses a network."""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
os.environ.update(OFFLINE)


def pytest_collection_modifyitems(items):
    """The warnings of other libraries are theirs; those of precond stay errors."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"), append=False)
            item.add_marker(pytest.mark.filterwarnings("error:::precond"))


@pytest.fixture(scope="session")
def library():
    """Imports a library by name. Without it a test is skipped, and fails where PRECOND_NEED_INTEGRATIONS is 1."""

    def load(name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if os.environ.get("PRECOND_NEED_INTEGRATIONS") == "1":
                return importlib.import_module(name)
            return pytest.importorskip(name)

    return load
