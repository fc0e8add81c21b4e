"""Tensors to launches: one prologue and one update for each rule and set of formats, with all tensors that share them."""

import math

import torch
import triton
from torch import Tensor

from .._core.formats.names import PLAIN
from .._core.norm import NOTHING, Clip
from .._core.statistics import NO_EXTRAS, Extras
from . import kernel, prologue, statistics
from .families import RULES, Rule
from .families.parts import FACTOR
from .items import Item, address_table, chunk_table, dense_operands, hyper_table, job_of, job_table, slots_of
from .tables import table


def update(
    items: list[Item],
    grad_coef: float = 1.0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip_value: float = math.inf,
    clip: Clip = NOTHING,
    extras: Extras = NO_EXTRAS,
) -> None:
    """Update every item in place; items that share a rule, formats and a device share a launch.

    A loss scaler's tensors are on a device. Nothing here waits for one: what is there is read there.
    """
    launches: dict[tuple[object, ...], list[Item]] = {}
    for item in items:
        formats = [item.layout.param, PLAIN[item.g.dtype], *item.layout.states]
        launches.setdefault((item.rule, item.p.device, *formats), []).append(item)
    for (rule, device, *formats), members in launches.items():
        scaler = [None if t is None else t.to(device) for t in (grad_scale, found_inf)]
        # Triton launches on the current device.
        with torch.cuda.device_of(members[0].p):
            launch(rule, device, formats, members, grad_coef, *scaler, clip_value, clip.to(device), extras)
        clip = clip._replace(grad_norm=None, clip_coef=None, skipped=None)  # the first launch has written them


def launch(
    name: str,
    device: torch.device,
    formats: list[str],
    items: list[Item],
    grad_coef: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip_value: float,
    clip: Clip,
    extras: Extras,
) -> None:
    """One prologue and one update for tensors of one rule and one set of formats."""
    rule = RULES[name]
    hypers = {id(item.hyper): item.hyper for item in items}
    group_of = {name: group for group, name in enumerate(hypers)}
    plain = items[0].layout.plain  # of all: they share formats
    slots, sizes, jobs, copies, alive = [], [], [], [], []
    for item in items:
        operands, copied_back = dense_operands(item, plain)
        copies += copied_back
        alive.append(operands)
        sizes.append(item.p.numel())
        slots += slots_of(item, operands)
        jobs += job_of(item, group_of[id(item.hyper)])

    key = (name, device, *formats, len(items), slots[1])
    tensors = table(("tensors", *key), slots, address_table, device)
    jobs_table = table(("jobs", *key), jobs, job_table, device)
    hyper = hyper_table(("hyper", *key), rule, list(hypers.values()), device)
    scalars = torch.empty(len(items) * prologue.SCALAR_FLOATS.value, dtype=torch.float32, device=device)
    control = torch.empty(1 + len(items), dtype=torch.float32, device=device)
    counts = not extras.only
    run_prologue(rule, hyper, jobs_table, scalars, control, grad_coef, grad_scale, found_inf, clip, counts)
    constants = update_constants(rule, formats)
    numbers = [item.number for item in items]
    if extras.factors is not None and rule.parts:
        of_items = extras.factors.to(device)[torch.tensor(numbers, device=device)]
        scalars.view(len(items), -1)[:, FACTOR.value] = of_items
    if extras.sums is not None and rule.parts:
        statistics.run(key, sizes, numbers, tensors, scalars, control, clip_value, constants, extras.sums, extras.only)
    else:
        chunks = table(("chunks", *key), sizes, chunk_table, device)
        kernel.update_kernel[(len(chunks),)](
            chunks, tensors, scalars, control, clip_value, **constants, num_warps=kernel.WARPS, enable_fp_fusion=False
        )
    if extras.only:
        return
    for to, back in copies:
        to.copy_(back)


def run_prologue(
    rule: Rule,
    hyper: Tensor,
    jobs: Tensor,
    scalars: Tensor,
    control: Tensor,
    grad_coef: float = 1.0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Clip = NOTHING,
    counts: bool = True,
) -> None:
    """Fill ``scalars`` and ``control`` for the tensors of a table of jobs."""
    prologue.prologue[(triton.cdiv(len(jobs), prologue.BLOCK),)](
        hyper,
        jobs,
        scalars,
        control,
        grad_scale,
        found_inf,
        grad_coef,
        len(jobs),
        clip.total,
        clip.grad_norm,
        clip.clip_coef,
        clip.skipped,
        clip.max_norm,
        INF=clip.inf,
        SKIP_NONFINITE=clip.skip_nonfinite,
        **prologue_constants(rule, counts),
        num_warps=1,
        enable_fp_fusion=False,
    )


def prologue_constants(rule: Rule, counts: bool = True) -> dict[str, object]:
    """What the prologue is compiled for."""
    return {
        "SET_SCALARS": rule.set_scalars,
        "READS_STEP": rule.reads_step,
        "ADVANCE": rule.advance,
        "DECAY": rule.decay,
        "OPTION": rule.option,
        "HYPERS": len(rule.hyper),
        "HAS_PARTS": rule.parts,
        "COUNTS": counts,
        "BLOCK": prologue.BLOCK,
    }


def update_constants(rule: Rule, formats: list[str]) -> dict[str, object]:
    """What the update is compiled for. formats: of p, g and the states."""
    *formats, average = formats if rule.averages else [*formats, "" if rule.parts else "off"]
    p, g, s0, s1, s2 = [*formats, "fp32", "fp32", "fp32"][:5]
    return {
        "UPDATE": rule.update,
        "DECAY": rule.decay,
        "OPTION": rule.option,
        "STATES": len(rule.states) - rule.averages,
        "P": p,
        "G": g,
        "S0": s0,
        "S1": s1,
        "S2": s2,
        "AVERAGE": average,
        "BLOCK": kernel.BLOCK,
    }
