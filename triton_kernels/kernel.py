"""One launch per (rule, formats) for all tensors: a table of addresses, a table of chunks, load, rule, store."""

import functools
import math
from collections.abc import Hashable, Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rules, scalars
from .formats import FORMATS, address, decode, encode
from .tables import storage_order, table

BLOCK = 1024
WARPS = 4
# Tensors per program of the prologue, with one warp: a counter is then read before any thread writes it.
PROLOGUE_BLOCK = 32
# Slots of a tensor in the address table: p, g, up to three states, the number of elements, and again that number if every
# address is a multiple of 16 bytes, else 0.
SLOTS = tl.constexpr(7)
# Numbers of a tensor for the prologue: group, sign, fresh, the address of its counter, the number of this step.
JOB = 5


class Rule(NamedTuple):
    """A rule's functions, its decay and the number of its states."""

    update: triton.JITFunction
    decay: str
    scalars: triton.JITFunction
    hyper: tuple[str, ...]
    states: int


def with_decays(name: str, coupled: str | None, update, scalar_function, hyper, states: int, suffix: str = "") -> dict:
    """A rule with each intrinsic decay and, under the name ``coupled``, with the penalty in the gradient."""
    names = {
        f"{name}{suffix}": "l2",
        f"{name}_l1{suffix}": "l1_proximal",
        f"{name}_l1_subgradient{suffix}": "l1_subgradient",
    }
    if coupled is not None:
        names[coupled + suffix] = "coupled"
    return {rule: Rule(update, decay, scalar_function, hyper, states) for rule, decay in names.items()}


_SGD = scalars.sgd_momentum_scalars, scalars.SGD_HYPER
_ADAM = scalars.adam_scalars, scalars.ADAM_HYPER
_RMSPROP = scalars.rmsprop_scalars, scalars.RMSPROP_HYPER
RULES = {
    **with_decays("sgdw", "sgd", rules.sgd, scalars.sgd_scalars, scalars.SGD_HYPER, 0),
    **with_decays("sgdw", "sgd", rules.sgd_momentum, *_SGD, 1, "_momentum"),
    **with_decays("sgdw", "sgd", rules.sgd_nesterov, *_SGD, 1, "_nesterov"),
    **with_decays("adamw", "adam", rules.adam, *_ADAM, 2),
    **with_decays("adamw", "adam", rules.adam_amsgrad, *_ADAM, 3, "_amsgrad"),
    **with_decays("adagradw", "adagrad", rules.adagrad, scalars.adagrad_scalars, scalars.ADAGRAD_HYPER, 1),
    **with_decays("rmspropw", "rmsprop", rules.rmsprop, *_RMSPROP, 1),
    **with_decays("rmspropw", "rmsprop", rules.rmsprop_centered, *_RMSPROP, 2, "_centered"),
    **with_decays("rmspropw", "rmsprop", rules.rmsprop_momentum, *_RMSPROP, 2, "_momentum"),
    **with_decays("rmspropw", "rmsprop", rules.rmsprop_centered_momentum, *_RMSPROP, 3, "_centered_momentum"),
    **with_decays("lion", None, rules.lion, scalars.lion_scalars, scalars.LION_HYPER, 1),
}


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


class Clip(NamedTuple):
    """What a step does with the norm of the gradients; csrc/norm.h. A tensor is None where there is nothing to read or write."""

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


NO_CLIP = Clip(None, None, None, None, 0.0, False, False)


@triton.jit
def clamped(g, limit):
    """g between -limit and limit; a NaN stays a NaN."""
    g = tl.where(g > limit, limit, g)
    return tl.where(g < -limit, -limit, g)


@triton.jit
def update_block(
    slots,
    offsets,
    mask,
    row,
    grad_coef,
    clip_value,
    RULE: tl.constexpr,
    DECAY: tl.constexpr,
    STATES: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    FULL: tl.constexpr,
):
    """Load, rule, store. FULL: every offset is an element, and the addresses are aligned."""
    p_ptr = address(slots, P, FULL)
    p = decode(p_ptr, offsets, mask, P, FULL)
    g = clamped(grad_coef * decode(address(slots + 1, G, FULL), offsets, mask, G, FULL), clip_value)
    if STATES == 0:
        p = RULE(p, g, row, DECAY)
    elif STATES == 1:
        s0_ptr = address(slots + 2, S0, FULL)
        s0 = decode(s0_ptr, offsets, mask, S0, FULL)
        p, s0 = RULE(p, g, s0, row, DECAY)
        encode(s0_ptr, offsets, mask, s0, S0, FULL)
    elif STATES == 2:
        s0_ptr = address(slots + 2, S0, FULL)
        s1_ptr = address(slots + 3, S1, FULL)
        s0 = decode(s0_ptr, offsets, mask, S0, FULL)
        s1 = decode(s1_ptr, offsets, mask, S1, FULL)
        p, s0, s1 = RULE(p, g, s0, s1, row, DECAY)
        encode(s0_ptr, offsets, mask, s0, S0, FULL)
        encode(s1_ptr, offsets, mask, s1, S1, FULL)
    else:
        s0_ptr = address(slots + 2, S0, FULL)
        s1_ptr = address(slots + 3, S1, FULL)
        s2_ptr = address(slots + 4, S2, FULL)
        s0 = decode(s0_ptr, offsets, mask, S0, FULL)
        s1 = decode(s1_ptr, offsets, mask, S1, FULL)
        s2 = decode(s2_ptr, offsets, mask, S2, FULL)
        p, s0, s1, s2 = RULE(p, g, s0, s1, s2, row, DECAY)
        encode(s0_ptr, offsets, mask, s0, S0, FULL)
        encode(s1_ptr, offsets, mask, s1, S1, FULL)
        encode(s2_ptr, offsets, mask, s2, S2, FULL)
    encode(p_ptr, offsets, mask, p, P, FULL)


@triton.jit
def update_kernel(
    chunks_ptr,
    tensors_ptr,
    rows_ptr,
    control_ptr,
    clip_value,
    RULE: tl.constexpr,
    DECAY: tl.constexpr,
    STATES: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    ROW: tl.constexpr,
    SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one chunk. chunks_ptr: (tensor, first element); tensors_ptr: SLOT numbers each; control_ptr: the skip flag of the
    launch, then each tensor's gradient coefficient.
    """
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + 2 * chunk)
    begin = tl.multiple_of(tl.load(chunks_ptr + 2 * chunk + 1), BLOCK)
    offsets = begin + tl.arange(0, BLOCK)
    slots = tensors_ptr + tensor * SLOT
    row = rows_ptr + tensor * ROW
    grad_coef = tl.load(control_ptr + 1 + tensor)
    # The skip flag leaves no elements, so that a skipped step neither reads nor writes.
    skip = tl.load(control_ptr) != 0.0
    numel = tl.where(skip, 0, tl.load(slots + 5))
    aligned = tl.where(skip, 0, tl.load(slots + 6))
    mask = offsets < numel
    if begin + BLOCK <= aligned:
        update_block(slots, offsets, mask, row, grad_coef, clip_value, RULE, DECAY, STATES, P, G, S0, S1, S2, True)
    else:
        update_block(slots, offsets, mask, row, grad_coef, clip_value, RULE, DECAY, STATES, P, G, S0, S1, S2, False)


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
        formats = [FORMATS[t.dtype] for t in (item.p, item.g, *item.states)]
        launches.setdefault((item.rule, item.p.device, *formats), []).append(item)
    for (rule, device, *formats), group in launches.items():
        scaler = [None if t is None else t.to(device) for t in (grad_scale, found_inf)]
        # Triton launches on the current device.
        with torch.cuda.device_of(group[0].p):
            launch(RULES[rule], device, formats, group, grad_coef, *scaler, clip_value, clip.to(device))
        clip = clip._replace(grad_norm=None, clip_coef=None, skipped=None)  # the first launch has written them


def address_table(values: list[int], width: int) -> Tensor:
    """Per tensor SLOTS numbers, from its number of elements and its addresses."""
    found = torch.tensor(values, dtype=torch.int64).view(-1, 1 + width)
    numel, addresses = found[:, 0], found[:, 1:]
    slots = torch.zeros(len(found), SLOTS.value, dtype=torch.int64)
    slots[:, :width] = addresses
    slots[:, 5] = numel
    slots[:, 6] = numel * (addresses % 16 == 0).all(dim=1)
    return slots


def chunk_table(sizes: list[int]) -> Tensor:
    """(tensor, first element) of every chunk."""
    counts = (torch.tensor(sizes, dtype=torch.int64) + BLOCK - 1) // BLOCK
    tensor = torch.repeat_interleave(counts)
    first_chunk = counts.cumsum(0) - counts
    return torch.stack([tensor, (torch.arange(len(tensor)) - first_chunk[tensor]) * BLOCK], dim=1)


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


def launch(
    rule: Rule,
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
    places, sizes, jobs, copies, alive = [], [], [], [], []
    hypers = {id(item.hyper): item.hyper for item in items}
    group_of = {name: group for group, name in enumerate(hypers)}
    for item in items:
        operands = [item.p, item.g, *item.states]
        strides = item.p.stride()
        order, dense = storage_order(item.p.shape, strides)
        if not dense or any(t.stride() != strides for t in operands):
            # A layout that is not dense in p's order goes through a dense copy; the gradient's is not copied back.
            views = [t.permute(order) for t in operands]
            operands = [t.contiguous() for t in views]
            alive.append(operands)
            written = [(views[k], operands[k]) for k in range(len(views)) if k != 1]
            copies += [(to, back) for to, back in written if to.data_ptr() != back.data_ptr()]
        numel = item.p.numel()
        sizes.append(numel)
        places.append(numel)
        places += [t.data_ptr() for t in operands]
        counter, step = (item.step.data_ptr(), 0) if isinstance(item.step, Tensor) else (0, item.step)
        jobs += [group_of[id(item.hyper)], int(item.sign), int(item.fresh), counter, step]

    key = (rule.update, rule.decay, device, *formats, len(items), places[1])
    tensors = table(("tensors", *key), places, functools.partial(address_table, width=len(formats)), device)
    chunks = table(("chunks", *key), sizes, chunk_table, device)
    jobs_table = table(("jobs", *key), jobs, functools.partial(torch.tensor, dtype=torch.int64), device)
    hyper = hyper_table(("hyper", *key), rule, list(hypers.values()), device)
    rows = torch.empty(len(items) * scalars.ROW_FLOATS.value, dtype=torch.float32, device=device)
    control = torch.empty(1 + len(items), dtype=torch.float32, device=device)
    scalars.prologue[(triton.cdiv(len(items), PROLOGUE_BLOCK),)](
        hyper,
        jobs_table,
        rows,
        control,
        grad_scale,
        found_inf,
        grad_coef,
        len(items),
        *clip[:5],
        INF=clip.inf,
        SKIP_NONFINITE=clip.skip_nonfinite,
        SCALARS=rule.scalars,
        DECAY=rule.decay,
        HYPERS=len(rule.hyper),
        JOB=JOB,
        ROW=scalars.ROW_FLOATS.value,
        BLOCK=PROLOGUE_BLOCK,
        num_warps=1,
        enable_fp_fusion=False,
    )
    state_formats = formats[2:] + ["fp32"] * 3
    update_kernel[(len(chunks),)](
        chunks,
        tensors,
        rows,
        control,
        clip_value,
        RULE=rule.update,
        DECAY=rule.decay,
        STATES=rule.states,
        P=formats[0],
        G=formats[1],
        S0=state_formats[0],
        S1=state_formats[1],
        S2=state_formats[2],
        ROW=scalars.ROW_FLOATS.value,
        SLOT=SLOTS.value,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    for to, back in copies:
        to.copy_(back)
