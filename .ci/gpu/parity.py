"""Whether the CUDA backend has the bits of the CPU backend: what rides along with AdamW, AdamW in every format, with and without
clipping, then all rules.

A line for each case; where bits differ it names the tensors.
"""

from __future__ import annotations

import argparse
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from kit import CUDA

# Before precond, which the tests' modules import.
# isort: split
from families import ALL_RULES, BY_RULE, OPTIMIZERS
from results import finish, say
from support.cases import memory

import precond
from precond._core import formats as _formats
from precond._core.formats import STATE_FORMATS

F32, BF16, F16, C64 = torch.float32, torch.bfloat16, torch.float16, torch.complex64
STEPS = 4
#: dtype, weight_format
WEIGHTS = [(F32, None), *((dtype, form) for dtype in (BF16, F16) for form in (None, *_formats.WEIGHT_FORMATS))]
STATES = (None, *(name for name in STATE_FORMATS if isinstance(name, str)))
FORMATS = [(C64, None, None), *((*weight, state) for weight in WEIGHTS for state in STATES)]
#: Formats in which the other rules are compared.
FEW = [(F32, None, None), (BF16, None, None), (BF16, "split24", "int8"), (F16, "stochastic", "int4")]
#: Around vectors, chunks and blocks; matrices whose rows are whole groups of codes, the last an element into its memory.
SHAPES = [(1,), (1025,), (8193,), (70_001,), (130, 640), (72, 64)]

PLAIN, CLIPPED = {}, {"max_grad_norm": 1.0}
#: What rides along in the pass of a step.
PARTS = [
    {"statistics": True},
    {"ema_decay": 0.9},
    {"cautious": "both", "ema_decay": 0.9, "ema_format": "bf16", "statistics": 2, **CLIPPED},
    {"cautious": "update", "cautious_rescale": True},
    {"max_update_rms": 0.3, "statistics": True},
]

#: rule, dtype, weight_format, state_format, options
Case = tuple[str, torch.dtype, "str | None", "str | None", dict[str, Any]]


def cases() -> Iterator[Case]:
    for options in PARTS:
        for formats in FEW:
            yield ("adamw", *formats, options)
    for statistics in (False, True):
        for rule in ("schedule_free_adamw", "schedule_free_sgd"):
            yield (rule, *FEW[2], {"statistics": statistics})
    for options in (PLAIN, CLIPPED):
        for formats in FORMATS:
            yield ("adamw", *formats, options)
    for formats in FEW:
        # Beyond the family the table's classes write a curvature as plain numbers.
        for row in OPTIMIZERS if formats[2] == "int4" else ALL_RULES:
            if row.rule != "adamw":
                yield (row.rule, *formats, PLAIN)


def name_of(case: Case) -> str:
    rule, dtype, weight_format, state_format, options = case
    words = [rule, str(dtype).removeprefix("torch."), weight_format or "plain", f"states {state_format or 'plain'}"]
    asked = ["clipped"] if options == CLIPPED else [f"{name}={value}" for name, value in options.items()]
    return " ".join([*words, *asked])


def trained(case: Case, backend: str, where: str) -> dict[str, torch.Tensor]:
    """Parameters, states and statistics after a few steps."""
    rule, dtype, weight_format, state_format, options = case
    generator = torch.Generator().manual_seed(3)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, dtype=dtype if dtype == C64 else F32)
        return values.to(dtype)

    params = []
    for shape in SHAPES:
        values = random(shape)
        begin = 1 if shape == SHAPES[-1] else 0  # memory from an allocator is aligned
        buffer = torch.zeros(begin + values.numel(), dtype=dtype, device=where)
        params.append(torch.nn.Parameter(buffer[begin:].view(shape).copy_(values)))
    row = BY_RULE[rule]
    group = {"params": params, "weight_format": weight_format, "state_format": state_format}
    torch.manual_seed(3)  # of stochastic rounding
    optimizer = row.cls([group], **row.kwargs, **options, backend=backend)
    for _ in range(STEPS):
        for p in params:
            p.grad = random(p.shape).to(where)
        optimizer.step()
    found = {f"p{k}": memory(p) for k, p in enumerate(params)}
    for k, p in enumerate(params):
        found |= {f"{n}{k}": memory(v) for n, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
    if options.get("statistics"):
        found["statistics"] = memory(optimizer.engine.report.sums)  # torch's sqrt of float64 differs by a bit
    return found


def compare(case: Case) -> bool:
    found, expected = trained(case, "cuda", CUDA.name), trained(case, "cpu", "cpu")
    wrong = [f"{name}: {(bits != expected[name]).float().mean():.2g} of the bytes" for name, bits in found.items()
             if not torch.equal(bits, expected[name])]  # fmt: skip
    say(what="parity", case=name_of(case), equal=not wrong, wrong=wrong[:8])
    return not wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=80, help="after which no case is begun (default 80)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every N-th case only (default 1)")
    asked = parser.parse_args()
    warnings.simplefilter("ignore", precond.PrecisionWarning)
    todo = {name_of(case): functools.partial(compare, case) for case in list(cases())[:: asked.every]}
    finish("parity", "cases equal", todo, asked.seconds)


if __name__ == "__main__":
    main()
