"""Tables and pictures of Adam or Gauss-Newton: bench/claims.py."""

from __future__ import annotations
from pathlib import Path
from typing import Any


def text(experiments: dict[str, Any]) -> str:
    return ""


def draw(experiments: dict[str, Any], folder: Path) -> None:
    pass
