"""The rules in Triton, imported as precond.triton_kernels."""

from .kernel import RULES, Clip, Item, update
from .norms import norm

__all__ = ["RULES", "Clip", "Item", "norm", "update"]
