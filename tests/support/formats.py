"""Optimizers with storage formats, and their steps held to the reference backend: what tests and benchmarks run."""

from __future__ import annotations

import copy

import torch

from precond._core import formats as _formats

from .cases import BACKEND, random_values

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
#: Every format at least once, and what is used most.
MIXES = [
    (BF16, "split24", "int8"),
    (BF16, "stochastic", "int4"),
    (BF16, "split32", "bf16"),
    (F16, "stochastic", "fp16"),
    (F16, "split24", "int8"),
    (F16, "split32", "fp32"),
    (F32, None, "int8"),
]
# Coded with full groups and with several chunks; too small, and of odd rows.
SHAPES = [(64, 64), (33, 4, 32), (300, 192), (7,), (65, 63), ()]


def make(row, dtype, weight_format, state_format, *, shapes=SHAPES, backend=BACKEND, seed=1, scale=1.0, **kwargs):
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(random_values(shape, dtype, scale)) for shape in shapes]
    formats = dict(weight_format=weight_format, state_format=state_format)
    return params, row.cls(params, **{**row.kwargs, **formats, **kwargs}, backend=backend)


def give_gradients(params, make_values=random_values):
    for p in params:
        p.grad = make_values(p.shape).to(p.dtype)


def numbers_of(codes, name, p):
    """Codes of a state as numbers with a sign, in the order of their values."""
    form = _formats.code_format(name, "int8" if codes.shape == p.shape else "int4")
    bare, largest = _formats.codec.bare_codes(codes, form, p.shape), _formats.names.LEVELS[form]
    return torch.where(bare > largest, -(bare & largest), bare)


def assert_close_codes(ours, theirs, p, q):
    """The same draws, so nearly all codes agree; where rounding of the rule differs, a code may be its neighbour."""
    for name, x in ours.items():
        y = theirs[name]
        if not isinstance(x, torch.Tensor):
            assert x == y, name
            continue
        a, b = (x, y) if x.is_floating_point() else (x.int(), y.int())
        if f"{name}_scale" in ours:
            a, b = (numbers_of(t, name, p) for t in (x, y))
        far = (a.float() - b.float()).abs()
        if x.dtype == F32:
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), name
        elif x.is_floating_point():
            assert (far <= 0.01 * b.float().abs() + 1e-6).all(), name
        elif name != "remainder":
            assert (far <= 1).all(), name
        # A few differ everywhere, and a remainder in its last bits.
        allowed = 1.0 if x.dtype == F32 or x.shape[-1:] != p.shape[-1:] else 0.3 if name == "remainder" else 0.03
        assert (far != 0).sum() <= max(1, allowed * far.numel()), name
    eps = torch.finfo(p.dtype).eps
    assert ((p - q).float().abs() <= 2 * eps * q.float().abs() + 1e-6).all()


def check_against_reference(row, dtype, weight_format, state_format):
    """Three steps of a rule in some formats beside the reference backend, another text of every format with the same draws. Each
    starts from the same state. Not for a steep rule, where one ulp of an operand changes many codes.
    """
    params, optimizer = make(row, dtype, weight_format, state_format)
    others, reference = make(row, dtype, weight_format, state_format, backend="reference")
    for _ in range(3):
        give_gradients(params)
        for p, q in zip(params, others, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
        for p, q in zip(params, others, strict=True):
            assert_close_codes(optimizer.state[p], reference.state[q], p.detach(), q.detach())
        with torch.no_grad():
            for p, q in zip(params, others, strict=True):
                q.copy_(p)
        reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
