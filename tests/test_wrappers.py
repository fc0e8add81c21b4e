"""What all wrappers promise as optimizers: their entries are states that checkpoints, copies and resets see, around any base.

Over 400 lines: all of it runs on the same pairs of a wrapper and a base. Several ranks: test_wrappers_sharded.py.
"""

from __future__ import annotations

import collections
import copy
import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.cases import bits_equal
from support.training import backward, model, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import precond

HYPER = {"mode": "output", "compose": "gradient"}
#: A wrapper around a base of a model; what is given to GradientRegularizer is of precond.
WRAPS = {
    "FOP": lambda net, base: precond.FOP(base, 0.05, **HYPER),
    "FOP matrix": lambda net, base: precond.FOP(base, 0.5, "input", normalize=("matrix", "step"), compose="gradient"),
    "FOP diagonal": lambda net, base: precond.FOP(base, 0.5, "diagonal", normalize=None, compose="gradient"),
    "FOP direction": lambda net, base: precond.FOP(base, 0.05, "output"),
    "BNP": lambda net, base: precond.BNP(net, base, stat_momentum=0.5),
    "BNP direction": lambda net, base: precond.BNP(net, base, stat_momentum=0.5, compose="direction"),
    "FOP of BNP": lambda net, base: precond.FOP(precond.BNP(net, base, stat_momentum=0.5), 0.05, **HYPER),
    "BNP of FOP": lambda net, base: precond.BNP(net, precond.FOP(base, 0.05, **HYPER), stat_momentum=0.5),
    "FOP of FOP": lambda net, base: precond.FOP(precond.FOP(base, 0.05, **HYPER), 0.05, **HYPER),
    "regularizer": lambda net, base: precond.GradientRegularizer(base, rho=0.1, radius=0.1),
}
#: With and without states; torch's and ours.
BASES = {
    "SGD": lambda ps: precond.SGD(ps, lr=0.05),
    "AdamW": lambda ps: precond.AdamW(ps, lr=0.02),
    "AdamW int8": lambda ps: precond.AdamW(ps, lr=0.02, state_format="int8"),
    "torch SGD": lambda ps: torch.optim.SGD(ps, lr=0.05),
    "torch momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "torch Adam": lambda ps: torch.optim.Adam(ps, lr=0.02, weight_decay=0.1),
}
CASES = [(w, b) for w in WRAPS for b in BASES if w != "regularizer" or not b.startswith("torch")]
cases = pytest.mark.parametrize(("wrap", "base"), CASES)
#: torch's classes count the step in which states are made (pytorch#164929).
uncounted = pytest.mark.parametrize(("wrap", "base"), [(w, b) for w, b in CASES if b not in ("torch Adam",)])

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled:UserWarning", "ignore::FutureWarning")


def pair(wrap, base, seed=0):
    net = model(seed)
    return net, WRAPS[wrap](net, BASES[base](net.parameters()))


def step(net, optimizer, seed):
    if isinstance(optimizer, precond.GradientRegularizer):
        return optimizer.step(lambda: backward(net, seed))
    backward(net, seed)
    return optimizer.step()


def run(net, optimizer, steps, start=0):
    for i in range(start, start + steps):
        step(net, optimizer, i)
    return net


def assert_same(one, other, a=None, b=None):
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert bits_equal(p.detach(), q.detach())
        if a is not None:
            assert a.state.get(p, {}).keys() == b.state.get(q, {}).keys()
            for name, value in a.state.get(p, {}).items():
                other_value = b.state[q][name]
                assert torch.equal(value, other_value) if isinstance(value, torch.Tensor) else value == other_value, (
                    name
                )
                assert value is not other_value or not isinstance(value, torch.Tensor)


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def through(way, net, optimizer, folder, other, fresh):
    """Bring model and states of one optimizer into another."""
    options = {"flat": FLAT, "full": FULL, "flat file": FLAT}.get(way, StateDictOptions())
    if way == "torch.save":
        file = io.BytesIO()
        torch.save((net.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        weights, states = torch.load(file, weights_only=True)
        other.load_state_dict(weights)
        fresh.load_state_dict(states)
        return
    weights, states = get_state_dict(net, optimizer, options=options)
    if way.endswith("file"):
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)
        weights, states = get_state_dict(other, fresh, options=options)
        loaded = {"model": weights, "optimizer": states}
        dcp.load(loaded, checkpoint_id=folder)
        weights, states = loaded["model"], loaded["optimizer"]
    states = copy.deepcopy(states)
    set_state_dict(other, fresh, model_state_dict=weights, optim_state_dict=states, options=options)


#: torch takes full_state_dict only where there is a state.
WAYS = ["torch.save", "flat", "full", "file"]
THROUGH = [(*case, way) for case in CASES for way in WAYS if (*case, way) != ("regularizer", "SGD", "full")]


@pytest.mark.parametrize(("wrap", "base", "way"), THROUGH)
def test_a_checkpoint_resumes_to_the_bit(wrap, base, way, tmp_path):
    net, optimizer = pair(wrap, base)
    run(net, optimizer, 3)
    other, fresh = pair(wrap, base, seed=1)
    through(way, net, optimizer, tmp_path, other, fresh)
    assert_same(net, other, optimizer, fresh)
    run(net, optimizer, 3, 3)
    run(other, fresh, 3, 3)
    assert_same(net, other, optimizer, fresh)


@uncounted
@pytest.mark.parametrize("options", [StateDictOptions(), FLAT], ids=["plain", "flat"])
def test_asking_for_a_checkpoint_before_the_first_step_changes_nothing(wrap, base, options):
    (one, asked), (other, plain) = pair(wrap, base), pair(wrap, base)
    saved = get_optimizer_state_dict(one, asked, options=options)
    assert asked.param_groups == asked.base.param_groups
    assert [group["lr"] for group in asked.param_groups] == [group["lr"] for group in plain.param_groups]
    set_optimizer_state_dict(one, asked, copy.deepcopy(saved), options=options)
    run(one, asked, 4)
    run(other, plain, 4)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


@cases
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_continues_with_the_same_bits(wrap, base, way):
    net, optimizer = pair(wrap, base)
    run(net, optimizer, 3)
    pairs = (net, optimizer)
    other, twin = copy.deepcopy(pairs) if way == "deepcopy" else pickle.loads(pickle.dumps(pairs))
    assert_same(net, other, optimizer, twin)
    run(net, optimizer, 3, 3)
    run(other, twin, 3, 3)
    assert_same(net, other, optimizer, twin)


@cases
def test_cleared_states_are_those_of_a_new_optimizer(wrap, base):
    net, optimizer = pair(wrap, base)
    run(net, optimizer, 3)
    other = copy.deepcopy(net)
    new = WRAPS[wrap](other, BASES[base](other.parameters()))
    optimizer.state.clear()
    assert not any(len(wrapper.own) for wrapper in (optimizer, *optimizer._wrappers_inside()))
    run(net, optimizer, 3, 3)
    run(other, new, 3, 3)
    assert_same(net, other)


@cases
def test_states_groups_and_defaults_may_be_assigned(wrap, base):
    (one, optimizer), (other, plain) = pair(wrap, base), pair(wrap, base)
    run(one, optimizer, 2)
    states, groups, defaults = optimizer.state, optimizer.param_groups, optimizer.defaults
    optimizer.state = collections.defaultdict(dict)
    assert not optimizer.own
    optimizer.state, optimizer.param_groups, optimizer.defaults = states, list(groups), dict(defaults)
    innermost = [optimizer, *optimizer._wrappers_inside()][-1].base
    assert innermost.state is states
    assert innermost.param_groups is optimizer.param_groups is not groups
    assert innermost.defaults is optimizer.defaults is not defaults
    run(one, optimizer, 2, 2)
    run(other, plain, 4)
    assert_same(one, other)


@cases
def test_a_parameter_may_get_its_first_gradient_late(wrap, base):
    """torch's optimizers take an empty state for a first step."""
    net, optimizer = pair(wrap, base)
    other, plain = pair(wrap, base)
    for i in range(4):
        for trained, of in ((net, optimizer), (other, plain)):
            trained[0].bias.requires_grad_(i >= 2)
            step(trained, of, i)
        if i < 2:
            # What others may leave for a parameter without a gradient.
            plain.state[other[0].bias] = {}
    assert_same(net, other)
    assert net[0].bias in optimizer.state or base in ("SGD", "torch SGD")


@cases
def test_a_base_that_fails_leaves_the_entries(wrap, base):
    net, optimizer = pair(wrap, base)
    run(net, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    innermost = [optimizer, *optimizer._wrappers_inside()][-1].base

    def fails():
        raise KeyError("no step")

    innermost.step = fails
    with pytest.raises(KeyError, match="no step"):
        step(net, optimizer, 2)
    del innermost.step
    after = optimizer.state_dict()["state"]
    assert after.keys() == before.keys()
    assert all(after[i].keys() == before[i].keys() for i in before)


@cases
def test_a_checkpoint_of_the_base_alone_starts_without_entries(wrap, base):
    net = model()
    alone = BASES[base](net.parameters())
    train(net, alone, 3)
    for options in (None, StateDictOptions(strict=False), StateDictOptions(flatten_optimizer_state_dict=True)):
        other, optimizer = pair(wrap, base)
        run(other, optimizer, 2)
        if options is None:
            optimizer.load_state_dict(alone.state_dict())
        else:
            set_optimizer_state_dict(
                other, optimizer, get_optimizer_state_dict(net, alone, options=options), options=options
            )
        assert not any(len(wrapper.own) for wrapper in (optimizer, *optimizer._wrappers_inside()))
        run(other, optimizer, 2)


@cases
def test_the_base_alone_loads_a_checkpoint_and_leaves_the_entries_be(wrap, base):
    net, optimizer = pair(wrap, base)
    run(net, optimizer, 3)
    other = copy.deepcopy(net)
    alone = BASES[base](other.parameters())
    alone.load_state_dict(optimizer.state_dict())
    twin = copy.deepcopy(other)
    plain = BASES[base](twin.parameters())
    plain.load_state_dict(copy.deepcopy(alone.state_dict()))
    for state in plain.state.values():
        for name in [name for name in state if name.startswith(("fop", "bnp"))]:
            del state[name]
    train(other, alone, 2, 3)
    train(twin, plain, 2, 3)
    assert_same(other, twin)
    again = WRAPS[wrap](other, alone)  # finds its entries in them
    assert len(again.own) == len(optimizer.own)


@cases
def test_hooks_of_checkpoints_and_steps_run_once(wrap, base):
    net, optimizer = pair(wrap, base)
    run(net, optimizer, 2)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda of: calls.append("state_dict pre"))
    optimizer.register_state_dict_post_hook(lambda of, saved: calls.append("state_dict post") or {**saved, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda of, saved: calls.append("load pre") or {n: v for n, v in saved.items() if n != "extra"}
    )
    optimizer.register_load_state_dict_post_hook(lambda of: calls.append("load post"))
    optimizer.register_step_pre_hook(lambda *args: calls.append("step pre"))
    optimizer.register_step_post_hook(lambda *args: calls.append("step post"))
    saved = optimizer.state_dict()
    assert saved["extra"] == 1
    optimizer.load_state_dict(saved)
    step(net, optimizer, 2)
    assert calls == ["state_dict pre", "state_dict post", "load pre", "load post", "step pre", "step post"]


@pytest.mark.parametrize("wrap", [name for name in WRAPS if name != "regularizer" and not name.endswith("direction")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", ["AdamW", "torch momentum"])
def test_entries_keep_their_dtype_in_a_checkpoint(wrap, dtype, base):
    """torch casts states to the parameter's."""
    nets = [model().to(dtype) for _ in range(2)]
    a, b = (WRAPS[wrap](net, BASES[base](net.parameters())) for net in nets)
    for i in range(2):
        torch.manual_seed(i)
        nets[0].zero_grad()
        nets[0](torch.randn(11, 5).to(dtype)).float().square().mean().backward()
        a.step()
    b.load_state_dict(a.state_dict())
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        for name, value in a.state[p].items():
            if name.startswith(("fop", "bnp")) and isinstance(value, torch.Tensor):
                assert b.state[q][name].dtype == value.dtype
                assert torch.equal(b.state[q][name], value)
                assert b.state[q][name].data_ptr() != value.data_ptr()
    kinds = {
        value.dtype for state in b.state.values() for name, value in state.items() if name.endswith(("mean", "er"))
    }
    assert torch.float32 in kinds


@pytest.mark.parametrize("wrap", [name for name in WRAPS if name != "regularizer"])
def test_a_plan_of_the_base_serves_all_steps(wrap, monkeypatch):
    from precond._core.engine import Engine

    built = []
    new = Engine._new
    monkeypatch.setattr(Engine, "_new", lambda *args: built.append(1) or new(*args))
    net, optimizer = pair(wrap, "AdamW")
    run(net, optimizer, 6)
    assert len(built) <= 3  # without states, with those of the first step, with the entries that the second makes
    built.clear()
    run(net, optimizer, 6)
    assert not built


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


@pytest.mark.parametrize(
    "make",
    [torch.optim.LBFGS, NeedsClosure, lambda ps: precond.GradientRegularizer(precond.SGD(ps))],
    ids=["lbfgs", "needs_closure", "regularizer"],
)
@pytest.mark.parametrize("wrap", ["FOP", "BNP"])
def test_a_base_that_needs_a_closure_is_refused(make, wrap):
    net = model()
    with pytest.raises(TypeError, match="base must be an optimizer that steps without a closure, got"):
        WRAPS[wrap](net, make(net.parameters()))
    assert not any(layer._forward_hooks for layer in net)


@pytest.mark.parametrize("wrap", ["FOP direction", "BNP direction"])
def test_an_average_of_what_is_changed_afterwards_is_refused(wrap):
    """It was an average of the variables that base steps in."""
    net, message = model(), "ema_decay must be None with compose='direction', .* got 0.5"
    with pytest.raises(ValueError, match=message):
        WRAPS[wrap](net, precond.AdamW(net.parameters(), ema_decay=0.5))
    first, *others = net.parameters()
    optimizer = WRAPS[wrap](net, precond.AdamW([first]))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": others, "ema_decay": 0.5})
    assert len(optimizer.param_groups) == 1


def test_old_pickles_bring_their_entries():
    """Of the time when entries were an attribute."""
    net, optimizer = pair("FOP", "torch Adam")
    run(net, optimizer, 3)
    old = optimizer.__getstate__()
    old["own"] = {p: dict(entries) for p, entries in optimizer.own.items()}
    for p in net.parameters():
        for name in old["own"][p]:
            del optimizer.state[p][f"fop_{name}"]
    new = precond.FOP.__new__(precond.FOP)
    new.__setstate__(old)
    assert {p: dict(entries) for p, entries in new.own.items()} == old["own"]


def test_a_view_of_entries_is_a_dictionary():
    net, optimizer = pair("FOP", "torch Adam")
    assert not optimizer.own
    run(net, optimizer, 2)
    p = net[0].weight
    assert set(optimizer.own) == set(net.parameters())
    assert set(optimizer.own[p]) == {"preconditioner", "previous_grad"}
    assert str(optimizer.own).count("preconditioner") == 4
    optimizer.own[p]["preconditioner"] = torch.eye(7) * 2
    assert torch.equal(optimizer.state[p]["fop_preconditioner"], torch.eye(7) * 2)
    del optimizer.own[p]
    assert p not in optimizer.own
    assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
    with pytest.raises(KeyError):
        optimizer.own[torch.ones(1)]


def test_a_parameter_that_left_the_groups_is_not_in_the_checkpoint():
    net, optimizer = pair("FOP", "torch SGD")
    run(net, optimizer, 2)
    optimizer.param_groups[0]["params"][:] = [nn.Parameter(p.detach().clone()) for p in net.parameters()]
    assert optimizer.state_dict()["state"] == {}


# torch.compile.


def data(seed):
    return torch.randn(11, 5, generator=torch.Generator().manual_seed(seed))


def compiled_run(wrap, base, way):
    """Parameters and values of closures after steps in the ways that people compile them."""
    net, optimizer = pair(wrap, base)
    x, values = [None], []

    def closure():
        optimizer.zero_grad()
        loss = net(x[0]).square().mean()
        loss.backward()
        return loss

    def whole():
        closure()
        optimizer.step()

    steps = {"step": optimizer.step, "closure": lambda: optimizer.step(closure), "whole": whole}
    what = steps[way.split()[-1]]
    run = torch.compile(what, backend="eager") if way.startswith("compiled") else what
    for seed in range(4):
        x[0] = data(seed)
        if what is optimizer.step:
            closure()
        values.append(run())
    return [p.detach().clone() for p in net.parameters()], [None if v is None else v.item() for v in values]


PAIRS = [(w, b) for w, b in CASES if b in ("AdamW", "torch momentum")]
#: GradientRegularizer's step takes nothing but a closure.
COMPILED = [
    (*pair, way) for pair in PAIRS for way in ("step", "closure", "whole") if way == "closure" or pair[0][:3] != "reg"
]


@pytest.mark.parametrize(("wrap", "base", "way"), COMPILED)
@pytest.mark.filterwarnings("ignore")  # what Dynamo says of profilers and graph breaks
def test_a_compiled_step_has_the_bits_of_an_eager_one(wrap, base, way):
    """Around each other too; test_compile.py has every method alone."""
    torch._dynamo.reset()
    eager, compiled = (compiled_run(wrap, base, f"{how} {way}") for how in ("eager", "compiled"))
    assert eager[1] == compiled[1]
    assert all(map(bits_equal, eager[0], compiled[0]))


# Gradients of another dtype than their parameter.

has_grad_dtype = pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch before 2.10")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@has_grad_dtype
def test_gradients_may_have_a_dtype_of_their_own(wrap, base, dtype):
    ends = []
    for grad_dtype in (torch.float32, dtype):
        net, optimizer = pair(wrap, base)
        for p in net.parameters():
            p.grad_dtype = grad_dtype
        run(net, optimizer, 3)
        assert {p.grad.dtype for p in net.parameters()} == {grad_dtype}
        ends.append([p.detach() for p in net.parameters()])
    start = model()
    for p, q, first in zip(*ends, start.parameters(), strict=True):
        assert not torch.equal(p, first)
        rounding = 0.1 if dtype == torch.bfloat16 else 1e-4
        assert (p - q).abs().max() <= rounding * (p - first).abs().max() + 1e-6
