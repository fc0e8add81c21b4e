"""What the files of families share: the facts of a rule, and how its scalars come from hyper-parameters.

The update of a rule is ``update(p, g, *states, scalars, DECAY, OPTION)`` and returns the new p and states, all fp32. ``scalars``
points at the floats that depend on the step but not on the element; the prologue has them written by ``set_scalars(hyper, step,
fresh, scalar_state, scalars, mask, DECAY, OPTION)``, in fp64 for a block of tensors at once: from their hyper-parameters, the
numbers of their steps, and whether that is their first. A rule with a scalar state has ``advance(hyper, step, scalar_state,
mask)``, which returns the state after the step; as ``scalar_state`` it is given that, rounded to fp32. What a rule does not say
that it has or reads is None.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Rule(NamedTuple):
    """The functions of a rule, and what launches, tables and plans have to know of it."""

    update: triton.JITFunction
    set_scalars: triton.JITFunction
    hyper: tuple[str, ...]  # in the order of csrc's Hyper
    states: tuple[str, ...] = ()  # of every element, under torch's names, in the order of the update's arguments
    second_moments: tuple[str, ...] = ()  # those of them that formats of few bits keep the root of
    reads_step: bool = False  # its scalars depend on the number of the step
    scalar_states: tuple[str, ...] = ()  # of every parameter: at most one
    advance: triton.JITFunction | None = None  # of the scalar state
    decay: str = ""  # which of decays.py
    option: str = ""  # what tells rules of the same functions apart


def with_decays(rule: Rule, name: str, *, coupled: str | None = None, suffix: str = "") -> dict[str, Rule]:
    """A rule with each intrinsic decay and, under the name ``coupled``, with the penalty in the gradient."""
    names = {
        f"{name}{suffix}": "l2",
        f"{name}_l1{suffix}": "l1_proximal",
        f"{name}_l1_subgradient{suffix}": "l1_subgradient",
    }
    if coupled is not None:
        names[coupled + suffix] = "coupled"
    return {each: rule._replace(decay=decay) for each, decay in names.items()}


def positions(count: int) -> tuple[tl.constexpr, ...]:
    """Where the fields of a rule stand among its scalars, in the order of csrc's struct."""
    return tuple(tl.constexpr(i) for i in range(count))


@triton.constexpr_function
def position(names, name):
    return names.index(name)


@triton.jit
def given(hyper, HYPER: tl.constexpr, NAME: tl.constexpr, mask):
    """A hyper-parameter. hyper: where those of each tensor's group begin; HYPER: their names."""
    return tl.load(hyper + position(HYPER, NAME), mask=mask)


@triton.jit
def put(at, value, mask):
    """Write a scalar."""
    tl.store(at, value.to(tl.float32), mask=mask)
