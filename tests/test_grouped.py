"""Grouped: the numbers of its optimizers apart, as one optimizer.

Over 400 lines: all of it is one class, on the same combinations of methods.
"""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref

import pytest
import torch
from support import multipass
from support.cases import BACKEND, bits_equal
from support.multipass import BF16, F32, give, params_of
from support.ranks import on_two_ranks
from torch import nn

import precond
from precond._core.optimizer import FusedOptimizer

SHAPES = ((6, 10), (10, 6), (5,), (3, 2, 2), (), (64, 64), (128,))
MATRICES = ((6, 10), (10, 6), (64, 64))
KRONECKER = dict(lr=0.01, clip=1.0, curvature="gradient", basis="kronecker", basis_frequency=2)
LOW = dict(weight_format="split24", state_format="int8")

#: Groups of each combination: a class, its options, and the shapes of its parameters.
COMBINATIONS = {
    "muon and adamw": [(precond.Muon, dict(lr=0.02), MATRICES), (precond.AdamW, dict(lr=3e-3), SHAPES)],
    "one pass": [
        (precond.AdamW, dict(lr=3e-3), SHAPES),
        (precond.Lion, dict(lr=1e-3), SHAPES),
        (precond.SGD, dict(lr=0.1, momentum=0.9, dampening=0.5), SHAPES),
        (precond.RMSprop, dict(lr=1e-3), SHAPES),
        (precond.NAdam, dict(lr=1e-3), SHAPES),
        (precond.Adagrad, dict(initial_accumulator_value=0.5), SHAPES),
    ],
    "two groups of one class": [
        (precond.AdamW, dict(lr=3e-3), SHAPES),
        (precond.Muon, dict(lr=0.02), MATRICES),
        (precond.AdamW, dict(lr=1e-3, weight_decay=0.0, amsgrad=True), SHAPES),
    ],
    "soap and dual": [
        (precond.SOAP, dict(lr=3e-3, precondition_frequency=2), SHAPES),
        (precond.DualDescent, dict(lr=0.1, momentum=0.9), SHAPES),
        (precond.DualDescent, dict(lr=0.1, granularity="entry"), SHAPES),
        (precond.Sophia, dict(lr=1e-3), SHAPES),
    ],
    "gauss-newton": [(precond.GaussNewton, KRONECKER, SHAPES), (precond.Adam, dict(lr=3e-3), SHAPES)],
}
LOW_BITS = [
    (precond.AdamW, dict(lr=3e-3, **LOW), SHAPES),
    (precond.Muon, dict(lr=0.02, **LOW), MATRICES),
    (precond.Lion, dict(lr=1e-3, weight_format="stochastic", state_format="bf16"), SHAPES),
]
combinations = pytest.mark.parametrize("combination", [*COMBINATIONS])


def start(parts, dtype=F32, apart=False, **settings):
    """Parameters, and either one optimizer of all or one for each class; parameters have names, which random bits hang on."""
    params, groups = [], []
    for number, (cls, options, shapes) in enumerate(parts):
        own = params_of(shapes, dtype, seed=number)
        params.extend(own)
        groups.append(dict(params=[(f"{number}.{i}", p) for i, p in enumerate(own)], optimizer=cls, **options))
    if not apart:
        return params, [precond.Grouped(groups, **settings)]
    return params, [
        cls([{k: v for k, v in group.items() if k != "optimizer"} for group in groups if group["optimizer"] is cls])
        for cls in dict.fromkeys(group["optimizer"] for group in groups)
    ]


def run(params, optimizers, steps, coefs=None):
    for i in steps:
        give(params, i)
        for p in params:
            if coefs is not None:
                p.grad = p.grad.float() * coefs[i]
        for optimizer in optimizers:
            sophia = isinstance(optimizer, precond.Sophia)
            if i % 3 == 0 and (sophia or any(g.get("optimizer") == "Sophia" for g in optimizer.param_groups)):
                optimizer.update_curvature(2.0)
            optimizer.step()


def states_of(params, optimizers):
    found = {}
    for number, p in enumerate(params):
        for optimizer in optimizers:
            found.update({(number, name): value for name, value in optimizer.state.get(p, {}).items()})
    return found


def assert_same(params, optimizers, others, theirs):
    assert all(bits_equal(p.detach(), q.detach()) for p, q in zip(params, others, strict=True))
    ours, found = states_of(params, optimizers), states_of(others, theirs)
    assert ours.keys() == found.keys()
    for key, value in found.items():
        assert multipass.same(ours[key], value) if isinstance(value, torch.Tensor) else ours[key] == value, key


@combinations
def test_it_steps_like_its_optimizers_apart(combination):
    parts = COMBINATIONS[combination]
    (ours, a), (theirs, b) = start(parts), start(parts, apart=True)
    run(ours, a, range(5))
    run(theirs, b, range(5))
    assert_same(ours, a, theirs, b)


def test_formats_and_random_bits_are_those_of_named_parameters_apart():
    (ours, a), (theirs, b) = start(LOW_BITS, BF16), start(LOW_BITS, BF16, apart=True)
    run(ours, a, range(5))
    run(theirs, b, range(5))
    assert_same(ours, a, theirs, b)


@combinations
def test_all_gradients_have_one_norm(combination):
    parts = COMBINATIONS[combination]
    (ours, (a,)), (theirs, b) = start(parts, max_grad_norm=2.0), start(parts, apart=True)
    coefs = []
    for i in range(4):
        run(ours, [a], range(i, i + 1))
        norm = torch.nn.utils.get_total_norm([p.grad for p in ours])
        assert a.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        coefs.append(a.clip_coef.clone())
    if combination != "soap and dual":  # Sophia's updates are not clipped, its steps are
        run(theirs, b, range(4), coefs)
        assert_same(ours, [a], theirs, b)


@combinations
@pytest.mark.parametrize("how", ["norm", "scaler"])
def test_a_skipped_step_changes_nothing_in_any_group(combination, how):
    params, (optimizer,) = start(
        COMBINATIONS[combination], max_grad_norm=1.0, nonfinite="skip" if how == "norm" else "propagate", fused=True
    )
    for settled in (False, True):
        if settled:
            run(params, [optimizer], range(2))
        before = copy.deepcopy((params, states_of(params, [optimizer])))
        give(params, 5)
        params[-1].grad.view(-1)[0] = math.inf
        if how == "scaler":
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
        optimizer.step()
        optimizer.grad_scale = optimizer.found_inf = None
        assert all(bits_equal(p.detach(), q.detach()) for p, q in zip(params, before[0], strict=True))
        now = states_of(params, [optimizer])
        # A device decides by itself, and what was made for the step stays: zeros.
        assert all(BACKEND == "cuda" and not now[key].any() for key in now.keys() - before[1].keys())
        assert all(multipass.same(now[k], v) for k, v in before[1].items() if isinstance(v, torch.Tensor))
        assert optimizer.skipped_steps.item() == 1 + settled


def test_one_pass_methods_share_a_plan():
    params, (optimizer,) = start(COMBINATIONS["one pass"], max_grad_norm=1.0)
    run(params, [optimizer], range(3))
    (plan,) = optimizer.engine.plans.values()
    assert len(plan.compiled) == 1
    assert not plan.in_python


@combinations
def test_it_resumes_with_the_same_bits(combination):
    parts = COMBINATIONS[combination]
    straight, a = start(parts)
    run(straight, a, range(6))
    params, (first,) = start(parts)
    run(params, [first], range(3))
    for p in params:
        p.grad = None
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    again, (second,) = start(parts)
    for p, q in zip(again, params, strict=True):
        p.data.copy_(q)
    second.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy((params, first)), pickle.loads(pickle.dumps((params, first)))
    for others, resumed in ((again, second), *copied):
        run(others, [resumed], range(3, 6))
        assert_same(others, [resumed], straight, a)


def test_schedulers_groups_and_late_groups():
    _, (optimizer,) = start(COMBINATIONS["muon and adamw"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 0.5, lambda _: 0.25])
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.00075]
    optimizer.step()
    scheduler.step()
    late = nn.Parameter(torch.ones(3, 3))
    optimizer.add_param_group(dict(params=[("late", late)], optimizer="Lion", lr=0.5, note="kept"))
    assert optimizer.param_groups[2]["betas"] == (0.9, 0.99)
    assert optimizer.param_groups[2]["note"] == "kept"
    late.grad = torch.ones(3, 3)
    optimizer.step()
    assert "exp_avg" in optimizer.state[late]
    optimizer.param_groups[2]["lr"] = 0.0
    before = late.detach().clone()
    optimizer.step()
    assert torch.equal(late, before)


def test_arguments_may_be_shared_by_all_groups_that_take_them():
    p, q = params_of(((3, 3), (3,)))
    groups = [dict(params=[p], optimizer=precond.Muon, lr=0.1), dict(params=[q])]
    optimizer = precond.Grouped(groups, optimizer=precond.AdamW, lr=0.5, betas=(0.5, 0.5), fused=True)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.5)
    assert "betas" not in optimizer.param_groups[0]
    assert optimizer._step_supports_amp_scaling
    assert copy.deepcopy(optimizer)._step_supports_amp_scaling


class Mine(torch.optim.Adam):
    """No class of precond."""


class Steps(precond.AdamW):
    """Does something else at a step."""

    def step(self, closure=None):
        super().step(closure)


P = [nn.Parameter(torch.ones(3, 3))]


@pytest.mark.parametrize(
    ("groups", "options", "error", "message"),
    [
        (P, {}, TypeError, "params must be groups, dictionaries with 'params' and 'optimizer', got a parameter"),
        ([dict(params=P)], {}, TypeError, "optimizer must be a class of precond in each group, or the name of one, got None"),
        ([dict(params=P, optimizer="Nobody")], {}, TypeError, "or the name of one, got 'Nobody'"),
        ([dict(params=P, optimizer=torch.optim.AdamW)], {}, TypeError, r"got torch.optim.adamw.AdamW, .*: use precond.AdamW"),
        ([dict(params=P, optimizer=Mine)], {}, TypeError, "Mine, which cannot share a norm, a plan and a decision to skip"),
        ([dict(params=P, optimizer=precond.FOP)], {}, TypeError, "must be a method, got FOP, which goes around an optimizer"),
        ([dict(params=P, optimizer=precond.Grouped)], {}, TypeError, "must be a method, got Grouped"),
        ([dict(params=P, optimizer="Settings")], {}, TypeError, "or the name of one, got 'Settings'"),
        ([dict(params=P, optimizer=FusedOptimizer)], {}, TypeError, "must be a method, got the base class FusedOptimizer"),
        ([dict(params=P, optimizer=Steps)], {}, TypeError, "must not have a step of its own, got Steps"),
        ([dict(params=set(P), optimizer=precond.AdamW)], {}, TypeError, "ordered collections"),
        ([dict(params=P, optimizer=precond.AdamW, seed=1)], {}, TypeError, "seed concerns the whole step: give it to Grouped"),
        ([dict(params=P, optimizer=precond.AdamW, lr=-1.0)], {}, ValueError, "Invalid learning rate: -1.0"),
        ([dict(params=P, optimizer=precond.AdamW)], dict(momentum=0.5), TypeError, "got 'momentum', which no group's optimizer"),
        ([dict(params=P, optimizer=precond.AdamW)], dict(differentiable=True), RuntimeError, "differentiable must be False"),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected(groups, options, error, message):
    with pytest.raises(error, match=message):
        precond.Grouped(groups, **options)


def test_errors_give_the_number_of_the_group():
    groups = [dict(params=params_of(((3, 3),)), optimizer="Muon"), dict(params=params_of(((3,),)), optimizer="Muon")]
    with pytest.raises(ValueError, match="parameter 0 of group 1"):
        precond.Grouped(groups)
    c = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    c.grad = torch.ones_like(c)
    optimizer = precond.Grouped([groups[0], dict(params=[c], optimizer="Muon")])
    with pytest.raises(RuntimeError, match=r"Muon does not support complex .* parameter 0 of group 1"):
        optimizer.step()


def test_a_checkpoint_of_other_methods_is_refused():
    _, (optimizer,) = start(COMBINATIONS["muon and adamw"])
    saved = optimizer.state_dict()
    saved["param_groups"][0]["optimizer"] = "SOAP"
    with pytest.raises(ValueError, match="group 0 must be of Muon in the checkpoint too, got 'SOAP'"):
        optimizer.load_state_dict(saved)
    del saved["param_groups"][0]["optimizer"]  # as an optimizer of one method saves it
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["optimizer"] == "Muon"


def test_a_group_of_an_older_checkpoint_keeps_what_it_does_not_say():
    params, (optimizer,) = start(COMBINATIONS["muon and adamw"])
    saved = optimizer.state_dict()
    for name in ("maximize", "amsgrad", "decoupled_weight_decay"):
        del saved["param_groups"][1][name]
    optimizer.load_state_dict(saved)
    run(params, [optimizer], range(1))
    assert optimizer.param_groups[1]["amsgrad"] is False


def test_a_norm_takes_one_plan_for_all_steps():
    for make in (
        lambda ps, **own: precond.Muon(ps, **own),
        lambda ps, **own: precond.Grouped(ps, optimizer="Muon", **own),
    ):
        params = params_of(MATRICES)
        optimizer = make(params, max_grad_norm=1.0)
        run(params, [optimizer], range(2))
        (plan,) = optimizer._beginning.engine.plans.values()
        run(params, [optimizer], range(2, 4))
        assert [*optimizer._beginning.engine.plans.values()] == [plan]


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_nothing_keeps_it_or_its_parameters_alive(combination):
    params, (optimizer,) = start(COMBINATIONS[combination], max_grad_norm=1.0)
    run(params, [optimizer], range(2))
    count = len(optimizer.param_groups[-1]["params"])
    gone, left = [weakref.ref(p) for p in params[-count:]], params[:-count]
    for p in params[-count:]:
        optimizer.state.pop(p, None)
    del optimizer.param_groups[-1], params, p
    run(left, [optimizer], range(2, 4))
    gc.collect()
    assert not [ref for ref in gone if ref() is not None]
    gc.disable()
    try:
        whole = weakref.ref(optimizer)
        del optimizer
        assert whole() is None
    finally:
        gc.enable()


def test_errors_number_groups_of_one_pass_among_all():
    params, (optimizer,) = start(
        [(precond.Muon, {}, MATRICES), (precond.AdamW, {}, SHAPES), (precond.Lion, {}, SHAPES)]
    )
    run(params, [optimizer], range(1))
    optimizer.state[params[-1]]["exp_avg"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"exp_avg of parameter 6 of group 2 \('2.6'\) must have shape"):
        run(params, [optimizer], range(1, 2))


def test_states_that_a_checkpoint_asks_for_leave_the_first_step_what_it_is():
    """SGD's first step differs where there is dampening; Muon's states appear beside its own."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    runs = []
    for asked in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3))
        sgd = dict(optimizer=precond.SGD, lr=0.1, momentum=0.9, dampening=0.3)
        optimizer = precond.Grouped.for_model(net, matrices=precond.Muon, rest=sgd)
        if asked:
            get_optimizer_state_dict(net, optimizer)
        run(list(net.parameters()), [optimizer], range(4))
        runs.append([p.detach() for p in net.parameters()])
    assert all(bits_equal(p, q) for p, q in zip(*runs, strict=True))


@pytest.mark.parametrize("cls", [precond.SGD, precond.RMSprop, precond.AdamW])
def test_wrappers_see_the_class_of_each_group(cls):
    runs = []
    for grouped in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        options = dict(lr=0.01, weight_decay=0.3)
        base = (
            precond.Grouped(net.parameters(), optimizer=cls, **options) if grouped else cls(net.parameters(), **options)
        )
        optimizer = precond.BNP(net, base, compose="direction")
        for i in range(4):
            optimizer.zero_grad()
            net(torch.randn(8, 6, generator=torch.Generator().manual_seed(i))).square().mean().backward()
            optimizer.step()
        runs.append([p.detach() for p in net.parameters()])
    assert all(bits_equal(p, q) for p, q in zip(*runs, strict=True))
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.ones(2, 2)
    soap = precond.GradientRegularizer(precond.Grouped([p], optimizer=precond.SOAP))
    with pytest.raises(TypeError, match="base must have no basis, got a SOAP"):
        soap.step(lambda: p.sum())


def test_a_class_of_the_users_own_may_be_a_method():
    class Slow(precond.AdamW):
        def _row(self, group):
            row = super()._row(group)
            return row._replace(hyper={**row.hyper, "lr": row.hyper["lr"] / 2})

    p, q = params_of(((3, 3), (3, 3)))
    give([p, q], 0)
    q.data.copy_(p), q.grad.copy_(p.grad)
    precond.Grouped([dict(params=[p], optimizer=Slow, lr=0.2)]).step()
    precond.AdamW([q], lr=0.1).step()
    assert torch.equal(p, q)


def test_for_a_model_it_separates_hidden_matrices():
    model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 7))
    optimizer = precond.Grouped.for_model(
        model,
        matrices=dict(optimizer=precond.Muon, lr=0.02),
        rest=dict(optimizer="AdamW", weight_decay=0.3),
        max_grad_norm=1.0,
    )
    found = {(g["optimizer"], *g["param_names"]): g["weight_decay"] for g in optimizer.param_groups}
    assert found == {
        ("AdamW", "0.weight", "3.weight"): 0.3,
        ("AdamW", "1.bias", "2.weight", "2.bias", "3.bias"): 0.0,
        ("Muon", "1.weight"): 0.1,
    }


@pytest.mark.parametrize("weight_decay", [None, 0.0, 0.1])
def test_for_a_model_norms_and_biases_never_decay(weight_decay):
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2))
    rest = dict(optimizer=precond.AdamW, weight_decay=0.3)
    optimizer = precond.Grouped.for_model(net, matrices=precond.Muon, rest=rest, weight_decay=weight_decay)
    muons = 0.1 if weight_decay is None else weight_decay
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0, muons]


@pytest.mark.parametrize("methods", [(precond.Muon, precond.AdamW), (precond.SOAP, precond.Muon), (precond.SOAP,) * 2])
def test_parameters_of_any_methods_must_not_share_memory(methods):
    memory = torch.zeros(6, 4)
    params = [nn.Parameter(memory[begin : begin + 4]) for begin in (0, 2)]
    groups = [dict(params=[p], optimizer=method) for p, method in zip(params, methods, strict=True)]
    optimizer = precond.Grouped(groups)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 and parameter 0 of group 1 must not share memory"):
        optimizer.step()
    assert not optimizer.state
    assert not memory.any()


def test_for_a_model_it_tells_convolutions_from_experts():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 4, 5))

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4), Experts(), nn.Conv1d(4, 4, 3), nn.Linear(4, 2))
    optimizer = precond.Grouped.for_model(model, matrices=precond.Muon, rest=precond.AdamW)
    found = {tuple(g["param_names"]): g.get("flatten") for g in optimizer.param_groups if g["optimizer"] == "Muon"}
    assert found == {("0.weight", "3.weight"): True, ("1.weight",): None, ("2.up",): False}
    give(list(model.parameters()), 0)
    optimizer.step()
    alone = precond.Grouped.for_model(model, matrices=dict(optimizer="Muon", flatten=True), rest=precond.AdamW)
    assert [g["flatten"] for g in alone.param_groups if g["optimizer"] == "Muon"] == [True]


def test_it_is_an_optimizer():
    def make(params):
        matrices = [p for p in params if p.dim() == 2]
        rest = [p for p in params if p.dim() != 2]
        groups = [dict(params=matrices, optimizer=precond.Muon), dict(params=rest, optimizer=precond.AdamW)]
        return precond.Grouped(groups, optimizer=precond.SGD)

    multipass.check_is_an_optimizer(make)


def test_curvature_goes_to_the_groups_that_have_one():
    params, (optimizer,) = start([(precond.AdamW, {}, ((2,),)), (precond.Sophia, {}, ((3,), (2, 2)))])
    optimizer.update_curvature(estimates=None if give(params, 0) else [torch.ones(3), None])
    assert optimizer.state[params[1]]["curvature_step"] == 1
    assert not optimizer.state.get(params[2])
    with pytest.raises(ValueError, match="one per parameter of those groups, 2, got 1"):
        optimizer.update_curvature(estimates=[None])
    with pytest.raises(RuntimeError, match="needs a group of Sophia, or of GaussNewton"):
        start([(precond.AdamW, {}, ((2,),))])[1][0].update_curvature()


def test_torchs_form_of_a_checkpoint_has_no_options_of_ours():
    params, (optimizer,) = start(LOW_BITS, BF16)
    run(params, [optimizer], range(2))
    plain = precond.to_torch_state_dict(optimizer)
    assert all("optimizer" not in group and "state_format" not in group for group in plain["param_groups"])
    assert plain["state"][0]["exp_avg"].dtype == F32


REDUNDANCY = """
from torch.distributed.optim import ZeroRedundancyOptimizer
def start():
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (4, 4), (5,), (3,))]
    matrices = dict(params=params[:2], optimizer=precond.Muon, lr=0.1)
    return params, [matrices, dict(params=params[2:], optimizer=precond.AdamW, lr=0.1)]
(ours, groups), (theirs, others) = start(), start()
whole = precond.Grouped(groups, max_grad_norm=1.0)
shared = ZeroRedundancyOptimizer(others, precond.Grouped, max_grad_norm=1.0)
for i in range(3):
    torch.manual_seed(i)
    for p, q in zip(ours, theirs):
        p.grad = torch.randn(p.shape)
        q.grad = p.grad.clone()
    whole.step()
    shared.step()
assert all(torch.equal(p, q) for p, q in zip(ours, theirs))
assert torch.equal(whole.grad_norm, shared.optim.grad_norm)
shared.consolidate_state_dict(0)
if rank == 0:
    assert [group["optimizer"] for group in shared.state_dict()["param_groups"]] == ["Muon", "AdamW"]
"""


def test_zero_redundancy_gives_each_rank_some_of_the_groups_parameters(tmp_path):
    on_two_ranks(REDUNDANCY, tmp_path)
