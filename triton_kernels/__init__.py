"""The rules in Triton, imported as precond.triton_kernels."""

from .kernel import RULES, Item, update

__all__ = ["RULES", "Item", "update"]
