"""The rules, a file for each family as in csrc/rules: the text of its updates and of their scalars, and their facts."""

from . import adagrad, adam, dual, gauss_newton, lion, perturb, rmsprop, sgd
from .rule import Rule

RULES: dict[str, Rule] = {
    **sgd.RULES,
    **adam.RULES,
    **adagrad.RULES,
    **rmsprop.RULES,
    **lion.RULES,
    **dual.RULES,
    **gauss_newton.RULES,
    **perturb.RULES,
}
