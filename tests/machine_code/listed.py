"""The kernels that are executed: those of kernels.cu, and Triton's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from .sass import plain

KERNELS = Path(__file__).with_name("kernels.cu")


class Case(NamedTuple):
    title: str
    rule: str  # as cpu_text.cpp calls it
    formats: tuple[str, ...]  # of p, g and the states
    kernel: str  # CUDA: the template with its arguments. Triton: the name of the rule in RULES
    triton: bool = False


def cuda_cases() -> list[Case]:
    """The CASE lines of kernels.cu."""
    found = re.findall(r'^CASE\("(.*?)", "(.*?)", "(.*?)", (.*)\)$', KERNELS.read_text(), re.MULTILINE)
    return [Case(title, rule, tuple(formats.split()), plain(kernel)) for title, rule, formats, kernel in found]


TRITON = [
    Case("Triton AdamW fp32", "Adam<L2>", ("fp32",) * 4, "adamw", True),
    Case("Triton AdamW bf16", "Adam<L2>", ("bf16",) * 4, "adamw", True),
    Case("Triton SGD momentum fp32", "SGDMomentum<Coupled>", ("fp32",) * 3, "sgd_momentum", True),
    Case("Triton Lion fp32", "Lion<L2>", ("fp32",) * 3, "lion", True),
    Case("Triton Adagrad fp32", "Adagrad<Coupled>", ("fp32",) * 3, "adagrad", True),
    Case("Triton AdamW split24 + int8", "Adam<L2>", ("bf16_split24", "bf16", "int8", "uint8"), "adamw", True),
    Case("Triton AdamW stochastic + int4", "Adam<L2>", ("bf16_stochastic", "bf16", "int4", "uint4"), "adamw", True),
]
CASES = {case.title: case for case in [*cuda_cases(), *TRITON]}
# Executed on every push and by `python -m bench codegen --quick`; the others by `make test-all`.
HANDFUL = (
    "AdamW fp32",
    "AdamW bf16",
    "SGD momentum fp32",
    "Lion fp32",
    "AdamW split24 + int8",
    "Triton AdamW fp32",
    "Triton AdamW bf16",
    "Triton AdamW split24 + int8",
)
