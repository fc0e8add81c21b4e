"""Where pickles of models with BNP's hooks, made by precond 0.1.0 before it had folders, look for these classes."""

from ._wrappers.inputs import Inputs, Observer

__all__ = ["Inputs", "Observer"]
