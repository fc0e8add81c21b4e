"""The rules in Triton, imported as precond.triton_kernels."""

from .families import RULES
from .items import Item
from .launch import update
from .norms import norm

__all__ = ["RULES", "Item", "norm", "update"]
