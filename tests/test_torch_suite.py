"""What PyTorch's own optimizer tests (test/test_optim.py, test/optim/test_optim.py) ask for and no other file here does."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import itertools
import weakref

import pytest
import torch
from families import DROP_INS
from support.torchs_table import INFOS, infos, inputs, ours, taken_by
from torch.autograd import gradcheck
from torch.nn import Parameter
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing import assert_close
from torch.testing._internal.common_optimizers import OptimizerErrorEnum

import precond

drop_ins = pytest.mark.parametrize("row", DROP_INS, ids=lambda row: row.cls.__name__)

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def values(*shape):
    return torch.rand(shape, dtype=torch.float64, requires_grad=True)


def differentiable_steps(cls, options, p, g, states, steps=1):
    """The parameter and its states after steps whose gradients depend on the parameter."""
    p = p.clone()
    optimizer = cls([p], differentiable=True, **options)
    optimizer.state[p].update({name: state.clone() for name, state in states.items()})
    if optimizer.states.keeps_step(optimizer.rule_of(optimizer.param_groups[0])):
        optimizer.state[p]["step"] = torch.tensor(10.0)
    for _ in range(steps):
        p.grad = g * p.sum()
        optimizer.step()
    return p, *(optimizer.state[p][name] for name in states)


@pytest.mark.parametrize(
    ("cls", "options", "states"),
    [
        (precond.SGD, dict(momentum=0.9, nesterov=True, weight_decay=0.1), ("momentum_buffer",)),
        (precond.Adam, dict(amsgrad=True, weight_decay=0.1), MOMENTS),
        (precond.AdamW, dict(amsgrad=True, maximize=True), MOMENTS),
        (precond.AdamW, dict(l1_decay=0.3), MOMENTS[:2]),
        (precond.Adagrad, dict(lr_decay=0.1, weight_decay=0.1), ("sum",)),
        (precond.RMSprop, dict(momentum=0.9, centered=True), ("square_avg", "momentum_buffer", "grad_avg")),
    ],
)
def test_a_differentiable_step_has_the_gradient_of_its_formula(cls, options, states):
    def function(p, g, *tensors):
        # The mean is small, or the variance would be cut off at 0.
        given = {name: t * 0.01 if name == "grad_avg" else t for name, t in zip(states, tensors, strict=True)}
        return differentiable_steps(cls, dict(lr=0.9, **options), p, g, given)

    assert gradcheck(function, [values(5) for _ in range(2 + len(states))])


@pytest.mark.parametrize(
    "info", [i for i in INFOS if "differentiable" in i.supported_impls], ids=lambda i: i.optim_cls.__name__
)
def test_a_differentiable_step_has_the_gradient_of_every_input(info):
    """With the states of a run that was not differentiable, half a unit away from where roots of them are steep."""
    for given in info.optim_inputs_func(device="cpu"):
        p = values(6)
        p.grad = values(6).detach()
        optimizer = ours(info)([p], **given.kwargs)
        optimizer.step()
        states = {k: (s + 0.5).requires_grad_() if s.shape == p.shape else s for k, s in optimizer.state[p].items()}

        def function(p, g, *tensors, kwargs=given.kwargs, states=states):
            p = p.clone()
            p.grad = g
            optimizer = ours(info)([p], differentiable=True, **kwargs)
            optimizer.state[p].update({name: tensor.clone() for name, tensor in zip(states, tensors, strict=True)})
            optimizer.step()
            return p, *(state for state in optimizer.state[p].values() if state.requires_grad)

        assert gradcheck(function, (values(6), values(6), *states.values())), given


@pytest.mark.parametrize(
    ("cls", "states", "names"),
    [
        (precond.SGD, (), ("lr", "weight_decay")),
        (precond.SGD, ("momentum_buffer",), ("lr", "weight_decay", "momentum", "dampening")),
        (precond.Adam, MOMENTS[:2], ("lr", "weight_decay", "betas")),
        (precond.AdamW, MOMENTS[:2], ("lr", "weight_decay", "betas")),
        (precond.Adagrad, ("sum",), ("lr", "weight_decay", "lr_decay")),
        (precond.RMSprop, ("square_avg",), ("lr", "weight_decay", "alpha")),
    ],
)
def test_autograd_sees_tensor_hyper_parameters(cls, states, names):
    """torch learns lr, weight_decay and betas that way. One of shape [1] counts as a scalar."""
    start, gradient, given = values(5).detach(), values(5).detach(), {name: values(5).detach() for name in states}
    scalars = [
        torch.tensor([value] if name == "lr" else value, dtype=torch.float64, requires_grad=True)
        for name in names
        for value in ((0.8, 0.95) if name == "betas" else (0.5,))
    ]

    def function(*tensors):
        options = dict(zip((name for name in names if name != "betas"), tensors, strict=False))
        if "betas" in names:
            options["betas"] = tensors[-2:]
        return differentiable_steps(cls, options, start, gradient, given, steps=2)[0]

    assert gradcheck(function, scalars)


def test_a_tensor_lr_of_one_element_keeps_the_shape_of_a_scalar_parameter():
    p = Parameter(torch.tensor(1.0)).clone()
    p.grad = torch.tensor(2.0)
    lr = torch.tensor([[0.25]], dtype=torch.float64, requires_grad=True)
    precond.SGD([p], lr=lr, differentiable=True).step()
    assert p.shape == ()
    assert p.item() == 0.5
    p.backward()
    assert lr.grad.tolist() == [[-2.0]]


@drop_ins
def test_fused_on_the_meta_device_is_an_error_before_anything_is_made(row):
    p = Parameter(torch.empty(3, device="meta"))
    optimizer = row.cls([p], fused=True)
    before = dict(optimizer.state)
    p.grad = torch.empty_like(p)
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"):
        optimizer.step()
    assert optimizer.state == before


@pytest.mark.parametrize("cls", [precond.AdamW, precond.Adagrad, precond.RMSprop])
def test_a_counter_has_torchs_dtype_where_no_kernel_counts(cls):
    """torch counts in float64 where that is the default dtype; a kernel always in float32."""
    torch.set_default_dtype(torch.float64)
    try:
        params = [Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float64, torch.float32)]
        optimizer = cls(params)
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    steps = [optimizer.state[p]["step"] for p in params]
    assert [step.dtype for step in steps] == [torch.float64, torch.float32]
    assert [step.item() for step in steps] == [2.0, 2.0]
    # A checkpoint goes on under either default.
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [3.0, 3.0]


def stepped(cls, kwargs, steps, p=None, saved=None):
    """A matrix, which Muon takes too, and its optimizer after some steps, from a checkpoint or from nothing."""
    p = Parameter(torch.linspace(-1, 1, 6).view(2, 3) if p is None else p.detach().clone())
    optimizer = cls([p], **kwargs)
    if saved is not None:
        optimizer.load_state_dict(saved)
    for i in range(steps):
        p.grad = torch.linspace(0.1 * i - 0.2, 1.0, 6).view(2, 3)
        optimizer.step()
    return p, optimizer


def test_every_drop_in_is_in_torchs_table():
    assert len(INFOS) == 10


@infos
def test_checkpoints_are_deterministic_and_load_what_is_older(info):
    """Loaded by torch.load with weights_only, without newer options, with steps that are Python numbers."""
    cls = ours(info)
    for given in info.optim_inputs_func(device="cpu"):
        p, optimizer = stepped(cls, given.kwargs, 4)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        assert_close(saved, optimizer.state_dict(), rtol=0, atol=0)
        older = copy.deepcopy(saved)
        for group in older["param_groups"]:
            for flag in info.not_og_supported_flags:
                group.pop(flag, None)
        for state in older["state"].values():
            if "step" in state:
                state["step"] = state["step"].item()
        stepped(cls, given.kwargs, 1, p, older)
        q, resumed = stepped(cls, given.kwargs, 3, p, copy.deepcopy(saved))
        r, again = stepped(cls, given.kwargs, 3, p, copy.deepcopy(saved))
        assert torch.equal(q, r)
        assert_close(resumed.state_dict(), again.state_dict(), rtol=0, atol=0)
        assert set(resumed.param_groups[0]) == set(cls([p], **given.kwargs).param_groups[0])
        assert str(resumed)


@infos
def test_what_torch_refuses_is_refused_in_its_words(info):
    cls = ours(info)
    cases = info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
    assert len(cases) >= 5
    for case in cases:
        given = case.optimizer_error_input
        warns = issubclass(case.error_type, Warning)
        expected = pytest.warns if warns else pytest.raises
        if case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
            with expected(case.error_type, match=case.error_regex):
                cls(given.params, **given.kwargs)
        else:
            optimizer = cls(given.params, **given.kwargs)
            with expected(case.error_type, match=case.error_regex):
                optimizer.step()


@infos
def test_flags_that_torch_takes_are_taken(info):
    """In every combination, with a number and a tensor as lr, at the constructor and at the step."""
    names = [
        name
        for name in ("foreach", "fused", "capturable", "differentiable")
        if name in inspect.signature(info.optim_cls).parameters
    ]
    kinds = [(False, True) if name in ("capturable", "differentiable") else (None, False, True) for name in names]
    taken = 0
    for flags in itertools.product(*kinds):
        for lr in (1e-3, torch.tensor(1e-3)):
            kwargs = dict(zip(names, flags, strict=True), lr=lr)
            found = []
            for cls in (info.optim_cls, ours(info)):
                p = taken_by(kwargs, Parameter(torch.ones(2, 3)))
                p.grad = torch.ones(2, 3)
                try:
                    cls([p], **kwargs).step()
                except (AssertionError, RuntimeError, ValueError) as error:
                    found.append(type(error))
                else:
                    found.append(p.detach())
            theirs, mine = found
            if isinstance(theirs, torch.Tensor):
                assert_close(mine, theirs, msg=str(kwargs))
                taken += 1
            elif isinstance(mine, type):
                assert mine is theirs, kwargs
            else:  # torch's implementation of foreach cannot do it; here it is one step for all
                assert kwargs["foreach"], kwargs
                assert kwargs["differentiable"], kwargs
    assert taken >= 2


@infos
def test_an_infinite_lr_does_what_torchs_does(info):
    found = []
    for cls in (info.optim_cls, ours(info)):
        p = Parameter(torch.ones(2, 3))
        p.grad = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.5, 1.0]])
        cls([p], lr=float("inf")).step()
        found.append(p.detach())
    assert_close(*found, equal_nan=True)


@infos
def test_hooks_fire_in_torchs_order_and_may_replace_the_arguments(info):
    calls = []

    def note(what):
        return lambda *_: calls.append(what)

    for kwargs in inputs(info):
        p = Parameter(torch.ones(1, 2))
        optimizer, another = ours(info)([p], **kwargs), torch.optim.SGD([p])
        handles = [
            register_optimizer_step_pre_hook(note("all pre")),
            register_optimizer_step_post_hook(note("all post")),
            *(each.register_step_pre_hook(note("pre")) for each in (optimizer, another)),
            *(each.register_step_post_hook(note("post")) for each in (optimizer, another)),
        ]
        try:
            for each in (optimizer, another, optimizer):
                calls.clear()
                each.step()
                assert calls == ["all pre", "pre", "post", "all post"]
        finally:
            for handle in handles:
                handle.remove()
        calls.clear()
        optimizer.step()
        assert calls == []
        handle = optimizer.register_step_pre_hook(lambda self, *_: ((self, lambda: 7), {}))
        assert optimizer.step() == 7
        handle.remove()
        optimizer.register_step_pre_hook(lambda *_: 3)
        with pytest.raises(RuntimeError, match="must return None or a tuple"):
            optimizer.step()


@infos
def test_hooks_of_saving_and_loading_may_change_what_is_saved(info):
    def add(optimizer):
        optimizer.state["note"] = 1

    def take_out(optimizer, saved):
        return saved | {"had": saved["state"].pop("note", None)}

    def in_place(optimizer, saved):
        saved["param_groups"][0]["lr"] = 0.002

    def anew(optimizer, saved):
        saved = copy.deepcopy(saved)
        saved["param_groups"][0]["lr"] = 0.003
        return saved

    def look(optimizer):
        optimizer.state["lr"] = optimizer.param_groups[0]["lr"]

    for kwargs in inputs(info):
        make = functools.partial(ours(info), [Parameter(torch.ones(2, 3))], **kwargs)
        optimizer = make()
        optimizer.register_state_dict_post_hook(take_out)
        assert optimizer.state_dict()["had"] is None
        optimizer.register_state_dict_pre_hook(add)
        saved = optimizer.state_dict()
        assert saved["had"] == 1
        assert "note" not in saved["state"]
        # The last hook's rate is the one that is loaded; the last hook is not the one that was put first.
        for hooks, expected in (([in_place], 0.002), ([in_place, anew], 0.003)):
            for prepend in (False, True):
                optimizer = make()
                for hook in hooks:
                    optimizer.register_load_state_dict_pre_hook(hook, prepend=prepend)
                optimizer.register_load_state_dict_post_hook(look)
                optimizer.load_state_dict(optimizer.state_dict())
                assert optimizer.state["lr"] == (0.002 if prepend else expected)


@infos
def test_a_scheduler_knows_whether_the_optimizer_has_stepped(info):
    def wrong(first, second):
        optimizer = ours(info)([Parameter(torch.ones(2, 2))])
        scheduler = StepLR(optimizer, 3)
        for _ in range(2):
            for what in (first, second):
                {"optimizer": optimizer, "scheduler": scheduler}[what].step()

    wrong("optimizer", "scheduler")  # a warning would be an error
    with pytest.warns(UserWarning, match=r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        wrong("scheduler", "optimizer")


@infos
def test_an_optimizer_is_freed_without_the_garbage_collector(info):
    def run():
        p = Parameter(torch.ones(2, 2))
        optimizer = ours(info)([p])
        scheduler = StepLR(optimizer, 3)
        for _ in range(2):
            p.grad = torch.ones(2, 2)
            optimizer.step()
            scheduler.step()
        return weakref.ref(optimizer), weakref.ref(p)

    gc.disable()
    try:
        assert [ref() for ref in run()] == [None, None]
    finally:
        gc.enable()


@infos
@pytest.mark.parametrize("named", list(itertools.product((False, True), repeat=2)), ids=str)
def test_names_come_and_go_between_checkpoints(info, named):
    for kwargs in inputs(info, skip=("differentiable",)):
        p = Parameter(torch.linspace(-1, 1, 6).view(2, 3))
        q = Parameter(p.detach().clone())
        a, b = (
            ours(info)([("w", each)] if has_names else [each], **copy.deepcopy(kwargs))
            for each, has_names in zip((p, q), named, strict=True)
        )
        p.grad = q.grad = torch.linspace(-0.2, 1.0, 6).view(2, 3)
        a.step()
        b.load_state_dict(copy.deepcopy(a.state_dict()))
        with torch.no_grad():
            q.copy_(p)
        a.step()
        b.step()
        assert torch.equal(p, q)
        saved = [each.state_dict() for each in (a, b)]
        assert_close(saved[0]["state"], saved[1]["state"], rtol=0, atol=0)
        assert saved[1]["param_groups"][0].get("param_names") == (["w"] if any(named) else None)
        # A group that stands there twice has the same numbers for its parameters (torch's issue 36831).
        b.param_groups.extend(b.param_groups)
        assert b.state_dict()["param_groups"][0] == b.state_dict()["param_groups"][1]
