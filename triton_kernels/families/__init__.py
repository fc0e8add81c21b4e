"""The rules, a file for each family as in csrc/rules: the text of its updates and of their scalars, and their facts."""

import importlib

from ...reference import FAMILIES, Composed
from .parts import with_average, with_parts
from .rule import Rule

RULES: dict[str, Rule] = Composed({"parts": with_parts, "ema": with_average})
for _family in FAMILIES:
    RULES.update(importlib.import_module(f"{__name__}.{_family}").RULES)
