"""What rules say of themselves: it is what their formulas do, in every text, and what an optimizer must declare besides."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from families.alone import Alone

from precond import _C, reference
from precond._core.formats import SECOND_MOMENTS
from precond._core.optimizer import FusedOptimizer
from precond._methods.multipass import MultiPass

rules = pytest.mark.parametrize("name", reference.RULES)
#: Numbers that any rule takes.
HYPER = dict(
    lr=0.1, rho=0.9, weight_decay=0.1, l1_decay=0.1, l1_cap=10.0, momentum=0.9, dampening=0.1, beta1=0.9, beta2=0.99, eps=1e-3,
    lr_decay=0.1, alpha=0.9, lookahead=0.1, scale=0.7, exponent=0.5, offset=0.3, slope=0.4, clip=100.0, corrected=1.0,
    radius=0.1, q=0.9, mu_product=0.5, warmup_steps=10.0, r=0.5, weight_lr_power=2.0, lr_max=0.2, weight_sum=0.7,
)  # fmt: skip


@rules
def test_a_formula_reads_the_step_where_its_rule_says_so(name):
    rule = reference.RULES[name]
    values = torch.linspace(0.1, 1.0, 12, dtype=torch.float64).view(4, 3).unbind()
    found = []
    for step in (3, 4):
        p, states = rule.update(values[0], values[1], values[2:2] + (values[2],) * len(rule.states), HYPER, step, False)
        found.append(torch.stack([p, *states]))
    assert torch.equal(*found) != rule.reads_step
    numbers = [HYPER[key] for key in _C.rules[name].hyper]
    assert (_C.scalars(name, numbers, 3.0, False) == _C.scalars(name, numbers, 4.0, False)) != rule.reads_step


@rules
def test_the_three_texts_say_the_same_of_a_rule(name):
    from precond import triton_kernels

    rule, compiled, triton = reference.RULES[name], _C.rules[name], triton_kernels.RULES[name]
    facts = (rule.states, rule.second_moments, rule.reads_step, tuple(rule.scalars))
    assert (triton.states, triton.second_moments, triton.reads_step, triton.scalar_states) == facts
    assert (triton.advance is None) == (rule.advance is None)
    moments = tuple(rule.states[k] for k in compiled.second_moments)
    assert (compiled.states, moments, compiled.reads_step) == (len(rule.states), rule.second_moments, rule.reads_step)
    assert compiled.scalar_states == len(rule.scalars)
    assert tuple(triton.hyper) == compiled.hyper


@rules
def test_second_moments_are_states_and_say_how_much_a_step_keeps(name):
    rule = reference.RULES[name]
    assert set(rule.second_moments) == SECOND_MOMENTS & set(rule.states)
    assert isinstance(rule.keeps, float) or rule.keeps in _C.rules[name].hyper
    assert (rule.advance is None) == (not rule.scalars)
    # The one that is given a second moment by its caller keeps all of it.
    assert bool(rule.keeps) == bool(rule.second_moments) or name == "perturb_adaptive"


def halving(p, g, states, hyper, step, fresh):
    """Steps that halve, by a product that is a state."""
    return p - hyper["product"] * g, ()


@pytest.fixture
def product(monkeypatch):
    """A rule with a state of one number, and an optimizer of it."""
    rule = reference.Rule(
        halving, (), reads_step=True, scalars={"product": 1.0}, advance=lambda hyper, step, x: x * hyper["ratio"]
    )
    monkeypatch.setitem(reference.RULES, "halving", rule)

    def make(params, ratio=0.5, **settings):
        return Alone(params, "halving", {"ratio": ratio}, backend="reference", **settings)

    return make


def stepped(optimizer, p, g=1.0):
    p.grad = torch.full_like(p, g)
    optimizer.step()
    return p.item()


def test_a_scalar_state_is_made_advanced_and_read_by_the_formula(product):
    p = torch.nn.Parameter(torch.zeros(()))
    optimizer = product([p])
    assert [stepped(optimizer, p) for _ in range(3)] == [-0.5, -0.75, -0.875]
    value = optimizer.state[p]["product"]
    assert (value.item(), value.dtype, value.shape) == (0.125, torch.float32, ())
    assert optimizer.state[p]["step"] == 3.0


def test_a_formula_reads_a_scalar_state_as_it_is_stored(product):
    p = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = product([p], ratio=1 / 3)
    assert stepped(optimizer, p) == -torch.tensor(1 / 3, dtype=torch.float32).item()


def test_a_scalar_state_continues_from_a_checkpoint_and_a_copy(product):
    p = torch.nn.Parameter(torch.zeros(()))
    optimizer = product([p])
    stepped(optimizer, p)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    q = torch.nn.Parameter(p.detach().clone().bfloat16())
    loaded = product([q])
    loaded.load_state_dict(torch.load(file))
    assert loaded.state[q]["product"].dtype == torch.float32
    twin, again = copy.deepcopy((p, optimizer))
    assert [stepped(loaded, q), stepped(again, twin), stepped(optimizer, p)] == [-0.75] * 3


def test_a_scalar_state_stays_the_tensor_that_it_is_where_it_can(product):
    p = torch.nn.Parameter(torch.zeros(()))
    optimizer = product([p])
    stepped(optimizer, p)
    optimizer.state[p]["product"] = 0.25
    assert stepped(optimizer, p) == -0.625
    given = optimizer.state[p]["product"] = torch.full((1,), 0.5, dtype=torch.float64)
    assert stepped(optimizer, p) == -0.875
    assert optimizer.state[p]["product"] is given
    assert given == 0.25
    optimizer.state[p]["product"] = torch.full((1,), 0.5, dtype=torch.bfloat16)
    assert stepped(optimizer, p) == -1.125
    assert optimizer.state[p]["product"].dtype == torch.float32


def test_a_skipped_step_does_not_advance_a_scalar_state(product):
    p = torch.nn.Parameter(torch.zeros(()))
    optimizer = product([p], max_grad_norm=10.0, nonfinite="skip")
    stepped(optimizer, p)
    assert stepped(optimizer, p, float("nan")) == -0.5
    optimizer.found_inf = torch.ones(())
    assert stepped(optimizer, p) == -0.5
    assert (optimizer.state[p]["product"], optimizer.skipped_steps) == (0.5, 2)


def test_a_first_step_that_is_skipped_leaves_no_scalar_state(product):
    p = torch.nn.Parameter(torch.zeros(()))
    optimizer = product([p], max_grad_norm=10.0, nonfinite="skip")
    stepped(optimizer, p, float("nan"))
    assert stepped(optimizer, p) == -0.5


@pytest.mark.parametrize(
    ("base", "body", "message"),
    [
        (FusedOptimizer, {"_check_defaults": print}, "Mine must declare _row: the rule and the hyper-parameters"),
        (FusedOptimizer, {"_row": print}, "Mine must declare _check_defaults"),
        (MultiPass, {"_row": print, "_check_defaults": print}, "Mine must declare _why_not_one_pass"),
        (Alone, {"_sparse_rules": frozenset({"sdg"})}, r"Mine\._sparse_rules must be rules .* got \['sdg'\]"),
        (Alone, {"_group_options": {"state_format": None}}, r"Mine\._group_options must have .*weight_format"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_an_optimizer_that_forgets_a_declaration_is_an_error_where_it_is_defined(base, body, message):
    with pytest.raises(TypeError, match=message):
        type("Mine", (base,), body)


def test_triton_says_the_same_of_its_rules():
    from precond import triton_kernels

    def facts(rule, scalars):
        return rule.states, rule.second_moments, rule.reads_step, tuple(scalars)

    theirs = {name: facts(rule, rule.scalar_states) for name, rule in triton_kernels.RULES.items()}
    assert theirs == {name: facts(rule, rule.scalars) for name, rule in reference.RULES.items()}
