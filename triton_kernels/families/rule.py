"""What the files of families share: the facts of a rule, and how its scalars come from hyper-parameters.

``update(p, g, *states, scalars, DECAY, OPTION)`` returns a step and the new states of a block of elements, in fp32. ``scalars``
points at the floats that depend on the step but not on the element. The step is what the rule takes from p: the tuple (rate,
direction, den, v, at) of decays.py. The rule leaves p alone: ``update_block`` of kernel.py applies the step and the decay. A rule
without a decay returns the new p itself in place of a step. A rule without states returns its step alone.

``set_scalars(hyper, step, fresh, scalar_state, scalars, mask, DECAY, OPTION)`` writes those floats for a block of tensors: from
the hyper-parameters of each, in fp64, the number of its step, and whether the step made its states. ``advance(hyper, step,
scalar_state, mask)``, where a rule has a scalar state, returns that state after the step; ``set_scalars`` is given it rounded to
fp32. ``step`` and ``scalar_state`` are None for a rule that does not say it reads the one or has the other.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Rule(NamedTuple):
    """The functions of a rule and its facts, under the names of ``reference.Rule`` where that has them too."""

    update: triton.JITFunction
    set_scalars: triton.JITFunction
    hyper: tuple[str, ...]  # in the order of csrc's Hyper
    states: tuple[str, ...] = ()  # of every element, under torch's names, in the order of the update's arguments
    second_moments: tuple[str, ...] = ()  # those of them whose codes have no sign
    reads_step: bool = False  # its scalars depend on the number of the step
    scalar_states: tuple[str, ...] = ()  # of every parameter: at most one
    advance: triton.JITFunction | None = None  # of the scalar state
    decay: str = ""  # which of decays.py
    option: str = ""  # what tells rules of the same functions apart
    parts: bool = False  # parts ride along, parts.py
    averages: bool = False  # the last of the states is the average of the weights


def with_decays(rule: Rule, name: str, *, coupled: str | None = None, suffix: str = "") -> dict[str, Rule]:
    """A rule with each intrinsic decay and, under the name ``coupled``, with the penalty in the gradient."""
    threshold = "l1" if "l1_cap" in rule.hyper else "plain_l1"
    names = {
        f"{name}{suffix}": "l2",
        f"{name}_l1{suffix}": f"{threshold}_proximal",
        f"{name}_l1_subgradient{suffix}": f"{threshold}_subgradient",
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
