"""Packages that only some functions need: imported when they are called, with an error that says what to install."""

from __future__ import annotations

import importlib
from typing import Any


def need(module: str, user: str) -> Any:
    """A module of an optional package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{user} needs {package}: pip install 'precond[diagnostics]'", name=package) from error
