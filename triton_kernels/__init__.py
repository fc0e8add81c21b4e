"""The rules in Triton, imported as precond.triton_kernels."""

from .families import RULES
from .items import Item
from .launch import Clip, update
from .norms import norm

__all__ = ["RULES", "Clip", "Item", "norm", "update"]
