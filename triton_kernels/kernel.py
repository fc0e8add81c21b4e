"""One launch per (rule, formats) for all tensors: a table of addresses, a table of chunks, load, rule, store."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rules, scalars
from .formats import address, decode, encode

FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
BLOCK = 1024
WARPS = 4
# Slots of a tensor in the address table: p, g, up to three states, the number of elements, and again that number if every
# address is a multiple of 16 bytes, else 0.
SLOTS = tl.constexpr(7)


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
}


class Item(NamedTuple):
    """One parameter to update, in place."""

    rule: str
    p: Tensor
    g: Tensor
    states: list[Tensor]
    hyper: dict[str, float]
    step: int
    fresh: bool
    grad_coef: float


@triton.jit
def update_block(
    slots,
    offsets,
    mask,
    row,
    grad_coef,
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
    g = grad_coef * decode(address(slots + 1, G, FULL), offsets, mask, G, FULL)
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
        update_block(slots, offsets, mask, row, grad_coef, RULE, DECAY, STATES, P, G, S0, S1, S2, True)
    else:
        update_block(slots, offsets, mask, row, grad_coef, RULE, DECAY, STATES, P, G, S0, S1, S2, False)


def in_order_of(p: Tensor) -> list[int]:
    """The dimensions of p from the slowest to the fastest in memory."""
    return sorted(range(p.dim()), key=lambda d: -p.stride(d) if p.shape[d] > 1 else 0)


def update(items: list[Item], skip: float = 0.0) -> None:
    """Update every item in place; items that share a rule and formats share a launch."""
    launches: dict[tuple[str, ...], list[Item]] = {}
    for item in items:
        if item.p.numel() > 0:
            formats = [FORMATS[t.dtype] for t in (item.p, item.g, *item.states)]
            launches.setdefault((item.rule, *formats), []).append(item)
    for key, group in launches.items():
        launch(RULES[key[0]], group, skip)


class Tables(NamedTuple):
    """What a launch reads from device memory and what it was made from: uploaded again only when an address changed."""

    numbers: list[list[int]]
    tensors: Tensor
    chunks: Tensor


_tables: dict[tuple[object, ...], Tables] = {}
_TABLES_KEPT = 64


def to_device(values: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Upload without waiting for the device."""
    host = torch.tensor(values, dtype=dtype)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def tables_of(key: tuple[object, ...], numbers: list[list[int]], device: torch.device) -> Tables:
    """The device's tables for these numbers, kept from the last step if they are the same."""
    kept = _tables.pop(key, None)
    if kept is None or kept.numbers != numbers:
        chunks = [(i, begin) for i, row in enumerate(numbers) for begin in range(0, row[5], BLOCK)]
        kept = Tables(numbers, to_device(numbers, torch.int64, device), to_device(chunks, torch.int64, device))
    while len(_tables) >= _TABLES_KEPT:
        del _tables[next(iter(_tables))]
    _tables[key] = kept
    return kept


def launch(rule: Rule, items: list[Item], skip: float) -> None:
    """One prologue and one update for tensors of one rule and one set of formats."""
    device = items[0].p.device
    numbers, copies, alive = [], [], []
    for item in items:
        order = in_order_of(item.p)
        operands = [t.permute(order) for t in (item.p, item.g, *item.states)]
        # A layout that is not dense in p's order goes through a dense copy; the gradient's is not copied back.
        flat = [t.contiguous() for t in operands]
        alive.append(flat)
        written = [(operands[k], flat[k]) for k in range(len(flat)) if k != 1]
        copies += [(to, back) for to, back in written if to.data_ptr() != back.data_ptr()]
        addresses = [t.data_ptr() for t in flat]
        numel = item.p.numel()
        aligned = numel if all(a % 16 == 0 for a in addresses) else 0
        numbers.append(addresses + [0] * (5 - len(addresses)) + [numel, aligned])

    formats = [FORMATS[t.dtype] for t in (items[0].p, items[0].g, *items[0].states)]
    tables = tables_of((device, rule.update, rule.decay, *formats, len(items), numbers[0][0]), numbers, device)
    hyper = to_device([[item.hyper[name] for name in rule.hyper] for item in items], torch.float64, device)
    steps = to_device([item.step for item in items], torch.float32, device)
    fresh = to_device([item.fresh for item in items], torch.int32, device)
    control = to_device([skip] + [item.grad_coef for item in items], torch.float32, device)
    rows = torch.empty(len(items) * scalars.ROW_FLOATS.value, dtype=torch.float32, device=device)
    scalars.prologue[(triton.cdiv(len(items), 32),)](
        hyper,
        steps,
        fresh,
        rows,
        len(items),
        SCALARS=rule.scalars,
        DECAY=rule.decay,
        HYPERS=len(rule.hyper),
        ROW=scalars.ROW_FLOATS.value,
        BLOCK=32,
        enable_fp_fusion=False,
    )
    state_formats = formats[2:] + ["fp32"] * 3
    update_kernel[(len(tables.chunks),)](
        tables.chunks,
        tables.tensors,
        rows,
        control,
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
