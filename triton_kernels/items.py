"""A parameter to update, and what kernels read of many of them: tables of numbers."""

import functools
import math
import struct
from collections.abc import Hashable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .._core.formats import Layout
from .families import Rule
from .kernel import BLOCK, OPERANDS, SLOTS
from .prologue import JOB, NUMBER_TYPES
from .random import RUN
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
    number: int = 0  # among the parameters of the step: its row of statistics and its factor
    scalar_state: float | Tensor | None = None  # where the rule has one: like ``step``, of this step or on the device


def dense_operands(item: Item, plain: bool) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """p, g and the states as the kernel takes them, dense in p's order; and what then has to be copied back, to where and whence.

    A layout that is not dense in p's order goes through a dense copy; the gradient's is not copied back. Formats that are not
    plain number elements, and visit them row by row.
    """
    operands = [item.p, item.g, *item.states]
    strides = item.p.stride()
    order, dense = storage_order(item.p.shape, strides) if plain else (None, False)
    if dense and all(t.stride() == strides for t in operands[1:]):
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
    return addresses + [0] * (OPERANDS - len(addresses))


def address_table(values: list[int]) -> Tensor:
    """Per tensor SLOTS numbers, from its number of elements, its addresses and its place."""
    found = torch.tensor(values, dtype=torch.int64, device="cpu").view(-1, SLOTS.value - 1)
    numel, addresses, place = found.split([1, 2 * OPERANDS, 3], dim=1)
    aligned = numel * (addresses % 16 == 0).all(dim=1, keepdim=True) * in_runs(place)
    return torch.cat([addresses[:, :OPERANDS], numel, aligned, addresses[:, OPERANDS:], place], dim=1)


def in_runs(place: Tensor) -> Tensor:
    """Where runs of random.py are whole: their elements follow one another, and a block has the end of at most one row."""
    row = place[:, 1:2]
    return (place % RUN.value == 0).all(dim=1, keepdim=True) & ((row == 0) | (row >= BLOCK))


def chunk_table(sizes: list[int], block: int = BLOCK) -> Tensor:
    """(tensor, first element) of every chunk."""
    counts = (torch.tensor(sizes, dtype=torch.int64, device="cpu") + block - 1) // block
    tensor = torch.repeat_interleave(counts)
    first_chunk = counts.cumsum(0) - counts
    return torch.stack([tensor, (torch.arange(len(tensor), device="cpu") - first_chunk[tensor]) * block], dim=1)


def job_of(item: Item, group: int) -> list[int]:
    """The numbers of a tensor in the table of jobs, in the order that prologue.py names."""
    counter = step = state = bits = step_type = state_type = 0
    if isinstance(item.step, Tensor):
        counter, step_type = item.step.data_ptr(), NUMBER_TYPES[item.step.dtype]
    else:
        step = item.step
    if isinstance(item.scalar_state, Tensor):
        state, state_type = item.scalar_state.data_ptr(), NUMBER_TYPES[item.scalar_state.dtype]
    elif item.scalar_state is not None:
        (bits,) = struct.unpack("<q", struct.pack("<d", item.scalar_state))
    return [group, int(item.sign), int(item.fresh), counter, step, state, bits, item.key, step_type, state_type]


def job_table(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu").view(-1, JOB.value)


def hyper_table(key: Hashable, rule: Rule, hypers: list[Mapping[str, float | Tensor]], device: torch.device) -> Tensor:
    """The hyper-parameters of every group, in the rule's order. Those that are tensors are copied on the device."""
    values = [hyper[name] for hyper in hypers for name in rule.hyper]
    # NaN is no hyper-parameter: a number that takes a tensor's place is seen as a change.
    numbers = [math.nan if isinstance(value, Tensor) else value for value in values]
    hyper = table(key, numbers, functools.partial(torch.tensor, dtype=torch.float64, device="cpu"), device)
    for cell, value in enumerate(values):
        if isinstance(value, Tensor):
            hyper[cell].copy_(value.view(()))
    return hyper
