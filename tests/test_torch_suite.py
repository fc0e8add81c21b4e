"""What PyTorch's own optimizer tests (test/test_optim.py, test/optim/test_optim.py) ask for and no other file here does."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from families import DROP_INS
from torch.autograd import gradcheck
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

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
    p = torch.nn.Parameter(torch.tensor(1.0)).clone()
    p.grad = torch.tensor(2.0)
    lr = torch.tensor([[0.25]], dtype=torch.float64, requires_grad=True)
    precond.SGD([p], lr=lr, differentiable=True).step()
    assert p.shape == ()
    assert p.item() == 0.5
    p.backward()
    assert lr.grad.tolist() == [[-2.0]]


@drop_ins
def test_fused_on_the_meta_device_is_an_error_before_anything_is_made(row):
    p = torch.nn.Parameter(torch.empty(3, device="meta"))
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
        params = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float64, torch.float32)]
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


#: torch's own table of what its optimizers take and refuse, for those that precond replaces.
INFOS = [info for info in optim_db if hasattr(precond, info.optim_cls.__name__)]
infos = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.optim_cls.__name__)


def stepped(cls, kwargs, steps, p=None, saved=None):
    """A matrix, which Muon takes too, and its optimizer after some steps, from a checkpoint or from nothing."""
    p = torch.nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3) if p is None else p.detach().clone())
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
    cls = getattr(precond, info.optim_cls.__name__)
    for given in info.optim_inputs_func(device="cpu"):
        p, optimizer = stepped(cls, given.kwargs, 4)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        torch.testing.assert_close(saved, optimizer.state_dict(), rtol=0, atol=0)
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
        torch.testing.assert_close(resumed.state_dict(), again.state_dict(), rtol=0, atol=0)
        assert set(resumed.param_groups[0]) == set(cls([p], **given.kwargs).param_groups[0])
        assert str(resumed)


@infos
def test_what_torch_refuses_is_refused_in_its_words(info):
    cls = getattr(precond, info.optim_cls.__name__)
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
