"""BNP's transform of gradients: the kernel against float64, in any layout and dtype."""

from __future__ import annotations

import math

import pytest
import torch
from support.cases import bits_equal

from precond._core import backend as _backend
from precond._wrappers import standardised as _standardised
from precond.bnp import precondition_gradients

KERNEL_SHAPES = [((1, 1), 1), ((3, 7), 1), ((257, 200), 1), ((40, 3, 3, 3), 1), ((6, 5, 13), 2), ((8, 1, 3, 3), 8)]


def operands(shape, groups, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    gW, gb = (torch.randn(size, generator=generator).to(dtype) for size in (shape, shape[:1]))
    mean = 3 * torch.randn(groups * shape[1], generator=generator)
    return gW, gb, mean.to(dtype), (0.1 + torch.rand(groups * shape[1], generator=generator)).to(dtype)


@pytest.mark.parametrize(("shape", "groups"), KERNEL_SHAPES)
def test_the_kernel_is_as_near_to_float64_as_its_operands(shape, groups):
    gW, gb, mean, inv_s2 = operands(shape, groups)
    GW, Gb = _standardised._by_kernel(gW, gb, mean, inv_s2 * 0.5, 0.5)
    exact_W, exact_b = precondition_gradients(*(t.double() for t in (gW, gb, mean, inv_s2)), 0.5)
    mu, scale = (_standardised._per_column(v.double(), gW) for v in (mean, inv_s2))
    terms = (gW.double().abs() + (mu * _standardised._per_row(gb.double(), gW)).abs()) * scale * 0.5
    ulp = 2.0**-23
    assert ((GW - exact_W).abs() <= 2 * ulp * terms).all()
    # The sums: a rounding for each of the 64 partial sums' additions, at most.
    sums = gb.double().abs() * 0.5 + (terms * mu.abs()).flatten(1).sum(1)
    longest = math.ceil(gW[0].numel() / 64) + 6
    assert ((Gb - exact_b).abs() <= (2 + longest) * ulp * sums).all()


@pytest.mark.parametrize(("shape", "groups"), KERNEL_SHAPES)
def test_the_kernel_has_the_same_bits_for_any_threads_and_instruction_set(shape, groups):
    gW, gb, mean, inv_s2 = operands(shape, groups)
    before, threads = _backend._C.selected_isa(), torch.get_num_threads()
    results = []
    try:
        for isa in _backend._C.available_isas():
            _backend._C.select_isa(isa)
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append(_standardised._by_kernel(gW, gb, mean, inv_s2, 1.0))
    finally:
        _backend._C.select_isa(before)
        torch.set_num_threads(threads)
    assert gW.numel() > 32768 or shape[0] < 257
    for GW, Gb in results[1:]:
        assert bits_equal(GW, results[0][0])
        assert bits_equal(Gb, results[0][1])


@pytest.mark.parametrize(("shape", "groups"), KERNEL_SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "other", "bfloat16", "no kernel"])
def test_any_layout_and_dtype_has_the_same_transform(monkeypatch, shape, groups, layout):
    gW, gb, mean, inv_s2 = operands(shape, groups)
    calls = []
    kernel = _standardised._by_kernel
    monkeypatch.setattr(_standardised, "_by_kernel", lambda *args: calls.append(1) or kernel(*args))
    if layout == "no kernel":
        monkeypatch.setattr(_backend, "_C", None)
    if layout == "other":
        gW = gW.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "bfloat16":
        gW, gb = gW.bfloat16(), gb.bfloat16()
    GW, Gb = precondition_gradients(gW, gb, mean, inv_s2, 0.25)
    assert bool(calls) == (layout == "contiguous" or (layout == "other" and gW.is_contiguous()))
    assert GW.shape == gW.shape
    assert GW.dtype == gW.dtype
    exact_W, exact_b = precondition_gradients(*(t.double() for t in (gW, gb, mean, inv_s2)), 0.25)
    tolerance = dict(rtol=1e-2, atol=1e-2) if layout == "bfloat16" else dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(GW.double(), exact_W, **tolerance)
    torch.testing.assert_close(Gb.double(), exact_b, **tolerance)


def test_flushed_denormals_change_no_bit():
    gW, gb, mean, inv_s2 = operands((3, 70), 1)
    small = gW * 1e-38, gb * 1e-38, mean, inv_s2, 1.0
    expected = _standardised._by_kernel(*small)
    torch.set_flush_denormal(True)
    try:
        found = _standardised._by_kernel(*small)
    finally:
        torch.set_flush_denormal(False)
    assert 0 < expected[0].abs().min() < 1e-38
    assert bits_equal(found[0], expected[0])
    assert bits_equal(found[1], expected[1])
