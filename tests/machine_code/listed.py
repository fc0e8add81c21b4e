"""The kernels that are executed: those of kernels.cu, and Triton's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from .sass import plain

KERNELS = Path(__file__).with_name("kernels.cu")


class Case(NamedTuple):
    title: str
    rule: str
    formats: tuple[str, ...]  # of p, g and the states
    kernel: str = ""  # CUDA: the template with its arguments. Triton has one, update_kernel

    @property
    def triton(self) -> bool:
        return self.kernel == ""

    @property
    def whole(self) -> bool:
        """Whether it takes whole chunks of dense, aligned tensors alone."""
        return self.kernel.startswith("update_fixed_kernel")

    @property
    def groups(self) -> bool:
        """Whether elements share scales."""
        return any("int" in format for format in self.formats)


def cuda_cases() -> list[Case]:
    """The CASE lines of kernels.cu."""
    found = re.findall(r'^CASE\("(.*?)", "(.*?)", "(.*?)", (.*)\)$', KERNELS.read_text(), re.MULTILINE)
    return [Case(title, rule, tuple(formats.split()), plain(kernel)) for title, rule, formats, kernel in found]


TRITON = [
    Case("Triton AdamW fp32", "adamw", ("fp32",) * 4),
    Case("Triton AdamW bf16", "adamw", ("bf16",) * 4),
    Case("Triton SGD momentum fp32", "sgd_momentum", ("fp32",) * 3),
    Case("Triton Lion fp32", "lion", ("fp32",) * 3),
    Case("Triton Adagrad fp32", "adagrad", ("fp32",) * 3),
    Case("Triton DualDescent, power, momentum, fp32", "dual_power_momentum", ("fp32",) * 3),
    Case("Triton AdamW split24 + int8", "adamw", ("bf16_split24", "bf16", "int8", "uint8")),
    Case("Triton AdamW fp32 + bf16 states, v drawn", "adamw", ("fp32", "fp32", "bf16", "bf16_stochastic")),
    Case("Triton AdamW split32 + fp32", "adamw", ("bf16_split32", "bf16", "fp32", "fp32")),
    Case("Triton SGD momentum split24 + int8", "sgd_momentum", ("bf16_split24", "bf16", "int8")),
    Case("Triton Lion split24 + int8", "lion", ("bf16_split24", "bf16", "int8")),
    Case("Triton AdamW stochastic + int8", "adamw", ("bf16_stochastic", "bf16", "int8", "uint8")),
    Case("Triton AdamW stochastic + int4", "adamw", ("bf16_stochastic", "bf16", "int4", "uint4")),
]
CASES = {case.title: case for case in [*cuda_cases(), *TRITON]}
# Executed on every push; the others by `make test-all` and `python -m bench codegen`.
HANDFUL = (
    "AdamW fp32 + ema",
    "AdamW fp32",
    "AdamW bf16",
    "SGD momentum fp32",
    "Lion fp32",
    "AdamW bf16, fp32 gradients, mixed states",
    "AdamW split24 + int8, whole",
    "AdamW stochastic + int4, whole",
    "Triton AdamW fp32",
    "Triton AdamW bf16",
    "Triton AdamW split24 + int8",
)
