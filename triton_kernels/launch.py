"""Tensors to launches: one prologue and one update for each rule and set of formats, with all tensors that share them."""

import functools
import math
import struct
from collections.abc import Hashable, Mapping
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .._core.formats import Layout
from . import kernel, prologue
from .families import RULES, Rule
from .formats import FORMATS
from .tables import storage_order, table


class Item(NamedTuple):
    """One parameter to update, in place."""

    rule: str
    p: Tensor
    g: Tensor
    states: list[Tensor]
    hyper: Mapping[str, float | Tensor]  # one object per group; its tensors are read on the device
    step: int | Tensor  # the number of this step, or a counter on the device, which the launch advances
    fresh: bool
    sign: float
    layout: Layout
    beside: list[Tensor | None]  # of p, g and the states: remainders and scales
    key: int  # of the random bits, where the layout draws
    scalar_state: float | Tensor | None = None  # where the rule has one: like ``step``, of this step or on the device


class Clip(NamedTuple):
    """What a step does with the norm of the gradients; csrc/plan/norm.h. None where there is no tensor to read or write."""

    total: Tensor | None
    grad_norm: Tensor | None
    clip_coef: Tensor | None
    skipped: Tensor | None
    max_norm: float
    inf: bool
    skip_nonfinite: bool

    def to(self, device: torch.device) -> "Clip":
        """With the total on a device."""
        return self if self.total is None else self._replace(total=self.total.to(device))


NO_CLIP = Clip(total=None, grad_norm=None, clip_coef=None, skipped=None, max_norm=0.0, inf=False, skip_nonfinite=False)


def update(
    items: list[Item],
    grad_coef: float = 1.0,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip_value: float = math.inf,
    clip: Clip = NO_CLIP,
) -> None:
    """Update every item in place; items that share a rule, formats and a device share a launch.

    A loss scaler's tensors are on a device. Nothing here waits for one: what is there is read there.
    """
    launches: dict[tuple[object, ...], list[Item]] = {}
    for item in items:
        formats = [item.layout.param, FORMATS[item.g.dtype], *item.layout.states]
        launches.setdefault((item.rule, item.p.device, *formats), []).append(item)
    for (rule, device, *formats), members in launches.items():
        scaler = [None if t is None else t.to(device) for t in (grad_scale, found_inf)]
        # Triton launches on the current device.
        with torch.cuda.device_of(members[0].p):
            launch(rule, device, formats, members, grad_coef, *scaler, clip_value, clip.to(device))
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
) -> None:
    """One prologue and one update for tensors of one rule and one set of formats."""
    rule = RULES[name]
    hypers = {id(item.hyper): item.hyper for item in items}
    group_of = {name: group for group, name in enumerate(hypers)}
    slots, sizes, jobs, copies, alive = [], [], [], [], []
    for item in items:
        operands, copied_back = dense_operands(item)
        copies += copied_back
        alive.append(operands)
        sizes.append(item.p.numel())
        slots += slots_of(item, operands)
        jobs += job_of(item, group_of[id(item.hyper)])

    key = (name, device, *formats, len(items), slots[1])
    tensors = table(("tensors", *key), slots, address_table, device)
    chunks = table(("chunks", *key), sizes, chunk_table, device)
    jobs_table = table(("jobs", *key), jobs, job_table, device)
    hyper = hyper_table(("hyper", *key), rule, list(hypers.values()), device)
    scalars = torch.empty(len(items) * prologue.SCALAR_FLOATS.value, dtype=torch.float32, device=device)
    control = torch.empty(1 + len(items), dtype=torch.float32, device=device)
    run_prologue(rule, hyper, jobs_table, scalars, control, grad_coef, grad_scale, found_inf, clip)
    kernel.update_kernel[(len(chunks),)](
        chunks,
        tensors,
        scalars,
        control,
        clip_value,
        **update_constants(rule, formats),
        num_warps=kernel.WARPS,
        enable_fp_fusion=False,
    )
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
    clip: Clip = NO_CLIP,
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
        **prologue_constants(rule),
        num_warps=1,
        enable_fp_fusion=False,
    )


def prologue_constants(rule: Rule) -> dict[str, object]:
    """What the prologue is compiled for."""
    return {
        "SET_SCALARS": rule.set_scalars,
        "ADVANCE": rule.advance,
        "DECAY": rule.decay,
        "OPTION": rule.option,
        "HYPERS": len(rule.hyper),
        "BLOCK": prologue.BLOCK,
    }


def update_constants(rule: Rule, formats: list[str]) -> dict[str, object]:
    """What the update is compiled for. formats: of p, g and the states."""
    p, g, s0, s1, s2 = [*formats, "fp32", "fp32", "fp32"][: kernel.OPERANDS]
    return {
        "UPDATE": rule.update,
        "DECAY": rule.decay,
        "OPTION": rule.option,
        "STATES": len(rule.states),
        "P": p,
        "G": g,
        "S0": s0,
        "S1": s1,
        "S2": s2,
        "BLOCK": kernel.BLOCK,
    }


def dense_operands(item: Item) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """p, g and the states as the kernel takes them, dense in p's order; and what then has to be copied back, to where and whence.

    A layout that is not dense in p's order goes through a dense copy; the gradient's is not copied back. Formats that number
    elements visit them row by row.
    """
    operands = [item.p, item.g, *item.states]
    strides = item.p.stride()
    order, dense = storage_order(item.p.shape, strides) if item.layout.plain else (None, False)
    if dense and all(t.stride() == strides for t in operands):
        return operands, []
    views = operands if order is None else [t.permute(order) for t in operands]
    operands = [t.contiguous() for t in views]
    written = [(views[k], operands[k]) for k in range(len(views)) if k != 1]
    return operands, [(to, back) for to, back in written if to.data_ptr() != back.data_ptr()]


def slots_of(item: Item, operands: list[Tensor]) -> list[int]:
    """The numbers of a tensor that ``address_table`` takes."""
    addresses = padded([t.data_ptr() for t in operands])
    beside = padded([0 if t is None else t.data_ptr() for t in item.beside])
    return [item.p.numel(), *addresses, *beside, *item.layout.place]


def padded(addresses: list[int]) -> list[int]:
    return addresses + [0] * (kernel.OPERANDS - len(addresses))


def address_table(values: list[int]) -> Tensor:
    """Per tensor SLOTS numbers, from its number of elements, its addresses and its place."""
    found = torch.tensor(values, dtype=torch.int64).view(-1, kernel.SLOTS.value - 1)
    numel, addresses, place = found.split([1, 2 * kernel.OPERANDS, 3], dim=1)
    aligned = numel * (addresses % 16 == 0).all(dim=1, keepdim=True)
    return torch.cat([addresses[:, : kernel.OPERANDS], numel, aligned, addresses[:, kernel.OPERANDS :], place], dim=1)


def chunk_table(sizes: list[int]) -> Tensor:
    """(tensor, first element) of every chunk."""
    counts = (torch.tensor(sizes, dtype=torch.int64) + kernel.BLOCK - 1) // kernel.BLOCK
    tensor = torch.repeat_interleave(counts)
    first_chunk = counts.cumsum(0) - counts
    return torch.stack([tensor, (torch.arange(len(tensor)) - first_chunk[tensor]) * kernel.BLOCK], dim=1)


def job_of(item: Item, group: int) -> list[int]:
    """The numbers of a tensor in the table of jobs, in the order that prologue.py names."""
    counter, step = on_device(item.step)
    state, value = on_device(item.scalar_state)
    (value_bits,) = struct.unpack("<i", struct.pack("<f", value))
    return [group, int(item.sign), int(item.fresh), counter, int(step), state, value_bits, item.key]


def on_device(value: float | Tensor | None) -> tuple[int, float]:
    """An address, or else a value."""
    return (value.data_ptr(), 0) if isinstance(value, Tensor) else (0, value or 0)


def job_table(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).view(-1, prologue.JOB.value)


def hyper_table(key: Hashable, rule: Rule, hypers: list[Mapping[str, float | Tensor]], device: torch.device) -> Tensor:
    """The hyper-parameters of every group, in the rule's order. Those that are tensors are copied on the device."""
    values = [hyper[name] for hyper in hypers for name in rule.hyper]
    # NaN is no hyper-parameter: a number that takes a tensor's place is seen as a change.
    numbers = [math.nan if isinstance(value, Tensor) else value for value in values]
    hyper = table(key, numbers, functools.partial(torch.tensor, dtype=torch.float64), device)
    for cell, value in enumerate(values):
        if isinstance(value, Tensor):
            hyper[cell].copy_(value.view(()))
    return hyper
