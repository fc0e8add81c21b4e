"""The compiled update against the float64 reference: every row x dtype x shape x layout, with sentinels around buffers."""

from __future__ import annotations

import pytest
import torch
from families import ALL_RULES, BY_STATES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cases import BACKEND, CHUNK_SIZES, GRADIENT_LAYOUTS, LAYOUTS, SIZES
from support.parity import DTYPES, worst_error

import precond

# Another backend has the CPU's bits for every rule: test_same_bits.py.
rows = pytest.mark.parametrize("row", ALL_RULES if BACKEND == "cpu" else BY_STATES, ids=str)
shapes = pytest.mark.parametrize("row", BY_STATES, ids=str)
dtypes = pytest.mark.parametrize(("p_dtype", "g_dtype", "state_format"), DTYPES)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@rows
@dtypes
def test_every_size_matches_the_reference(row, p_dtype, g_dtype, state_format):
    worst_error(row, [(n,) for n in SIZES] + [()], p_dtype, g_dtype, state_format)


# All instruction sets have the same bits for every rule: test_same_bits.py. How they read and write does not depend on the rule.
@shapes
@dtypes
def test_every_size_matches_the_reference_with_lesser_instruction_sets(row, p_dtype, g_dtype, state_format, isa):
    worst_error(row, [(n,) for n in SIZES] + [()], p_dtype, g_dtype, state_format)


@shapes
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_chunks_match_the_reference(row, dtype):
    worst_error(row, [(n,) for n in CHUNK_SIZES], dtype, dtype, None)


@shapes
@pytest.mark.parametrize("p_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("p_layout", LAYOUTS)
@pytest.mark.parametrize("g_layout", GRADIENT_LAYOUTS)
def test_every_layout_matches_the_reference(row, p_dtype, p_layout, g_layout):
    worst_error(
        row, [(4, 6, 5, 7), (37, 53), (300,), (1, 9), (2, 0, 3), (3, 1, 5)], p_dtype, p_dtype, None, p_layout, g_layout
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(
    row=st.sampled_from(ALL_RULES),
    sizes=st.lists(st.integers(0, 2000), min_size=1, max_size=6),
    lr=st.floats(0, 1, exclude_min=True),  # at 0 a first step on zeros, or on nothing, only makes states
    weight_decay=st.floats(0, 1),
    dtypes=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_hyper_parameters_match_the_reference(row, sizes, lr, weight_decay, dtypes, seed):
    torch.manual_seed(seed)
    worst_error(row, [(n,) for n in sizes], *dtypes, lr=lr, weight_decay=weight_decay)


@settings(max_examples=40, deadline=None)
@given(
    # Below 0.5 the rounding of g - m in m + (1 - beta1) (g - m) counts in ulp of m, not of beta1 m.
    beta1=st.floats(0.5, 0.9999),
    beta2=st.floats(0, 0.99999),
    eps=st.floats(1e-12, 1e-2),
    l1_decay=st.floats(1e-6, 5),
    l1_cap=st.floats(0.01, 100),
    seed=st.integers(0, 2**31),
)
def test_any_adamw_parameters_match_the_reference(beta1, beta2, eps, l1_decay, l1_cap, seed):
    torch.manual_seed(seed)
    row = next(row for row in ALL_RULES if row.rule == "adamw_l1")
    worst_error(row, [(700,)], F32, F32, None, betas=(beta1, beta2), eps=eps, l1_decay=l1_decay, l1_cap=l1_cap)


def test_a_missing_l1_decay_is_bitwise_adamw():
    a, b = (torch.nn.Parameter(torch.linspace(-1, 1, 1000)) for _ in range(2))
    plain, zero = precond.AdamW([a]), precond.AdamW([b], l1_decay=0.0, l1_form="subgradient", l1_cap=3.0)
    for _ in range(5):
        a.grad = torch.randn(1000)
        b.grad = a.grad.clone()
        plain.step()
        zero.step()
    assert torch.equal(a, b)
    assert (a == 0).sum() == 0


def test_the_proximal_form_gives_exact_zeros_and_spares_coordinates_without_gradients():
    p = torch.nn.Parameter(torch.full((8,), 1e-3))
    optimizer = precond.AdamW([p], lr=1e-2, l1_decay=1.0, weight_decay=0.0)
    p.grad = torch.tensor([1e-3] * 4 + [0.0] * 4)
    optimizer.step()
    assert p.tolist()[:4] == [0.0] * 4
    assert p.tolist()[4:] == [torch.tensor(1e-3).item()] * 4
