"""One launch per (rule, formats) for all tensors: a table of addresses, a table of chunks, load, rule, store."""

import functools
import math
from collections.abc import Hashable, Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._core.formats import Layout
from . import rules, scalars
from .formats import BESIDE, FORMATS, block_at, draws, is_plain, load, operand, store
from .kernels import clamped
from .random import draw_of, words_at
from .tables import storage_order, table

BLOCK = 1024
WARPS = 4
# Parts of a block that is not full or not aligned, where formats are not plain. A whole one, with a predicate and an address for
# each element, takes 188 registers for sm_90 with a split weight and 8-bit states; in four parts the full block's 124 decide.
PARTS = 4
# Tensors per program of the prologue, with one warp: a counter is then read before any thread writes it.
PROLOGUE_BLOCK = 32
# Slots of a tensor in the address table: p, g, up to three states, the number of elements, and again that number if every
# address is a multiple of 16 bytes, else 0; then what lies beside p, g and the states, and where the elements are in the
# unsharded tensor.
OPERANDS = 5
PLACE = tl.constexpr(BESIDE.value + OPERANDS)
SLOTS = tl.constexpr(PLACE.value + 3)
# Numbers of a tensor for the prologue: group, sign, fresh, the address of its counter, the number of this step, the key of its
# random bits.
JOB = 6


class Rule(NamedTuple):
    """A rule's functions, its decay, the number of its states, and what else tells it from rules of the same functions."""

    update: triton.JITFunction
    decay: str
    scalars: triton.JITFunction
    hyper: tuple[str, ...]
    states: int
    option: str = ""


def with_decays(
    name: str, coupled: str | None, update, scalar_function, hyper, states: int, suffix: str = "", option: str = ""
) -> dict:
    """A rule with each intrinsic decay and, under the name ``coupled``, with the penalty in the gradient."""
    names = {
        f"{name}{suffix}": "l2",
        f"{name}_l1{suffix}": "l1_proximal",
        f"{name}_l1_subgradient{suffix}": "l1_subgradient",
    }
    if coupled is not None:
        names[coupled + suffix] = "coupled"
    return {rule: Rule(update, decay, scalar_function, hyper, states, option) for rule, decay in names.items()}


_SGD = scalars.sgd_momentum_scalars, scalars.SGD_HYPER
_ADAM = scalars.adam_scalars, scalars.ADAM_HYPER
_RMSPROP = scalars.rmsprop_scalars, scalars.RMSPROP_HYPER
_GAUSS_NEWTON = rules.gauss_newton, scalars.gauss_newton_scalars, scalars.GAUSS_NEWTON_HYPER
_KERNELS = ("ratio", "smoothed", "clip", "asinh", "log", "power")
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
    **{f"dual_{name}": Rule(rules.dual, "l2", scalars.dual_scalars, scalars.DUAL_HYPER, 0, name) for name in _KERNELS},
    **{
        f"dual_{name}_momentum": Rule(
            rules.dual_momentum, "l2", scalars.dual_momentum_scalars, scalars.DUAL_HYPER, 1, name
        )
        for name in _KERNELS
    },
    "average": Rule(rules.average, "", scalars.average_scalars, scalars.AVERAGE_HYPER, 1),
    **with_decays("gauss_newton", None, *_GAUSS_NEWTON, 2),
    **with_decays("gauss_newton", None, *_GAUSS_NEWTON, 2, "_root", "root"),
    **with_decays("gauss_newton", None, *_GAUSS_NEWTON, 2, "_own", "own"),
    **with_decays("gauss_newton", None, *_GAUSS_NEWTON, 2, "_own_root", "own_root"),
    "perturb": Rule(rules.perturb, "", scalars.perturb_scalars, scalars.PERTURB_HYPER, 1),
    "perturb_adaptive": Rule(rules.perturb_adaptive, "", scalars.perturb_adaptive_scalars, scalars.PERTURB_HYPER, 2),
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
    layout: Layout
    beside: list[Tensor | None]  # of p, g and the states: remainders and scales
    key: int  # of the random bits, where the layout draws


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


NO_CLIP = Clip(None, None, None, None, 0.0, False, False)


@triton.jit
def update_block(
    slots,
    block,
    row,
    grad_coef,
    clip_value,
    RULE: tl.constexpr,
    DECAY: tl.constexpr,
    OPTION: tl.constexpr,
    STATES: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """Load, rule, store. FULL: every offset is an element, and the addresses are aligned."""
    p_at = operand(slots, P, FULL)
    p = load(p_at, block, P, BLOCK, FULL)
    g = clamped(grad_coef * load(operand(slots + 1, G, FULL), block, G, BLOCK, FULL), clip_value)
    word = 0
    if draws(P, S0, S1, S2):
        word = words_at(*scalars.seed_in(row), slots + PLACE, block[0], BLOCK)
    if STATES == 0:
        p = RULE(p, g, row, DECAY, OPTION)
    elif STATES == 1:
        s0_at = operand(slots + 2, S0, FULL)
        s0 = load(s0_at, block, S0, BLOCK, FULL)
        p, s0 = RULE(p, g, s0, row, DECAY, OPTION)
        store(s0_at, block, s0, draw_of(word, 1), S0, BLOCK, FULL)
    elif STATES == 2:
        s0_at = operand(slots + 2, S0, FULL)
        s1_at = operand(slots + 3, S1, FULL)
        s0 = load(s0_at, block, S0, BLOCK, FULL)
        s1 = load(s1_at, block, S1, BLOCK, FULL)
        p, s0, s1 = RULE(p, g, s0, s1, row, DECAY, OPTION)
        store(s0_at, block, s0, draw_of(word, 1), S0, BLOCK, FULL)
        store(s1_at, block, s1, draw_of(word, 2), S1, BLOCK, FULL)
    else:
        s0_at = operand(slots + 2, S0, FULL)
        s1_at = operand(slots + 3, S1, FULL)
        s2_at = operand(slots + 4, S2, FULL)
        s0 = load(s0_at, block, S0, BLOCK, FULL)
        s1 = load(s1_at, block, S1, BLOCK, FULL)
        s2 = load(s2_at, block, S2, BLOCK, FULL)
        p, s0, s1, s2 = RULE(p, g, s0, s1, s2, row, DECAY, OPTION)
        store(s0_at, block, s0, draw_of(word, 1), S0, BLOCK, FULL)
        store(s1_at, block, s1, draw_of(word, 2), S1, BLOCK, FULL)
        store(s2_at, block, s2, draw_of(word, 3), S2, BLOCK, FULL)
    store(p_at, block, p, draw_of(word, 0), P, BLOCK, FULL)


@triton.constexpr_function
def part_of(block, *names):
    return block if all(is_plain(name) for name in names) else block // PARTS


@triton.jit
def update_kernel(
    chunks_ptr,
    tensors_ptr,
    rows_ptr,
    control_ptr,
    clip_value,
    RULE: tl.constexpr,
    DECAY: tl.constexpr,
    OPTION: tl.constexpr,
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
    slots = tensors_ptr + tensor * SLOT
    row = rows_ptr + tensor * ROW
    grad_coef = tl.load(control_ptr + 1 + tensor)
    # The skip flag leaves no elements, so that a skipped step neither reads nor writes.
    skip = tl.load(control_ptr) != 0.0
    numel = tl.where(skip, 0, tl.load(slots + 5))
    aligned = tl.where(skip, 0, tl.load(slots + 6))
    PART: tl.constexpr = part_of(BLOCK, P, S0, S1, S2)
    block = block_at(begin, numel, BLOCK)
    if begin + BLOCK <= aligned:
        update_block(
            slots, block, row, grad_coef, clip_value, RULE, DECAY, OPTION, STATES, P, G, S0, S1, S2, BLOCK, True
        )
    elif PART == BLOCK:
        update_block(
            slots, block, row, grad_coef, clip_value, RULE, DECAY, OPTION, STATES, P, G, S0, S1, S2, BLOCK, False
        )
    else:
        for part in range(BLOCK // PART):
            first = begin + part * PART
            if first < numel:
                part_block = block_at(first, numel, PART)
                update_block(
                    slots,
                    part_block,
                    row,
                    grad_coef,
                    clip_value,
                    RULE,
                    DECAY,
                    OPTION,
                    STATES,
                    P,
                    G,
                    S0,
                    S1,
                    S2,
                    PART,
                    False,
                )


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
    for (rule, device, *formats), group in launches.items():
        scaler = [None if t is None else t.to(device) for t in (grad_scale, found_inf)]
        # Triton launches on the current device.
        with torch.cuda.device_of(group[0].p):
            launch(RULES[rule], device, formats, group, grad_coef, *scaler, clip_value, clip.to(device))
        clip = clip._replace(grad_norm=None, clip_coef=None, skipped=None)  # the first launch has written them


def address_table(values: list[int]) -> Tensor:
    """Per tensor SLOTS numbers, from its number of elements, its addresses and its place."""
    found = torch.tensor(values, dtype=torch.int64).view(-1, SLOTS.value - 1)
    numel, addresses, place = found.split([1, 2 * OPERANDS, 3], dim=1)
    aligned = numel * (addresses % 16 == 0).all(dim=1, keepdim=True)
    return torch.cat([addresses[:, :OPERANDS], numel, aligned, addresses[:, OPERANDS:], place], dim=1)


def padded(addresses: list[int]) -> list[int]:
    return addresses + [0] * (OPERANDS - len(addresses))


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
        order, dense = storage_order(item.p.shape, strides) if item.layout.plain else (None, False)
        if not dense or any(t.stride() != strides for t in operands):
            # A layout that is not dense in p's order goes through a dense copy; the gradient's is not copied back. Formats
            # that number elements visit them row by row.
            views = operands if order is None else [t.permute(order) for t in operands]
            operands = [t.contiguous() for t in views]
            alive.append(operands)
            written = [(views[k], operands[k]) for k in range(len(views)) if k != 1]
            copies += [(to, back) for to, back in written if to.data_ptr() != back.data_ptr()]
        numel = item.p.numel()
        sizes.append(numel)
        places.append(numel)
        places += padded([t.data_ptr() for t in operands])
        places += padded([0 if t is None else t.data_ptr() for t in item.beside])
        places += item.layout.place
        counter, step = (item.step.data_ptr(), 0) if isinstance(item.step, Tensor) else (0, item.step)
        jobs += [group_of[id(item.hyper)], int(item.sign), int(item.fresh), counter, step, item.key]

    key = (rule.update, rule.decay, rule.option, device, *formats, len(items), places[1])
    tensors = table(("tensors", *key), places, address_table, device)
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
        OPTION=rule.option,
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
        OPTION=rule.option,
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
