"""Bad input raises with name, value and expectation, and leaves everything untouched.

Over 400 lines: a case or two for each message.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import subprocess
import sys

import pytest
import torch
from families import CLASSES
from support.cases import BACKEND

import precond

classes = pytest.mark.parametrize("row", CLASSES, ids=lambda row: row.cls.__name__)


def param(*shape, **kwargs):
    return torch.nn.Parameter(torch.randn(*(shape or (4,)), **kwargs))


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [
        ("AdamW", dict(lr=-1.0), r"Invalid learning rate: -1.0 \(lr must be >= 0\)"),
        ("AdamW", dict(lr=math.nan), "Invalid learning rate: nan"),
        ("AdamW", dict(lr=torch.tensor([0.1, 0.2])), "Tensor lr must be 1-element, got 2 elements"),
        ("AdamW", dict(lr=torch.tensor(0.1), foreach=True), "lr as a Tensor is not supported for capturable=False"),
        ("AdamW", dict(eps=-1e-8), "Invalid epsilon value: -1e-08"),
        ("AdamW", dict(betas=(1.0, 0.9)), "Invalid beta parameter at index 0: 1.0"),
        ("AdamW", dict(betas=(0.9, -0.1)), "Invalid beta parameter at index 1: -0.1"),
        ("AdamW", dict(betas=(0.9, torch.tensor(0.99))), "betas must be either both floats or both Tensors"),
        ("AdamW", dict(weight_decay=-1), "Invalid weight_decay value: -1"),
        ("AdamW", dict(l1_decay=-0.1), r"Invalid l1_decay value: -0.1 \(l1_decay must be >= 0\)"),
        ("AdamW", dict(l1_form="soft"), "l1_form must be 'proximal' or 'subgradient', got 'soft'"),
        ("AdamW", dict(l1_cap=0.0), "l1_cap must be > 0, got 0.0"),
        (
            "AdamW",
            dict(state_format="fp8"),
            "state_format must be None, 'fp32', 'bf16', 'fp16', 'int8' or its torch dtype, or 'int4', got 'fp8'",
        ),
        ("AdamW", dict(backend="gpu"), "backend must be None or one of cpu, cuda, triton, reference, got 'gpu'"),
        ("AdamW", dict(fused=True, foreach=True), "`fused` and `foreach` cannot be `True` together"),
        ("AdamW", dict(fused=True, differentiable=True), "`fused` does not support `differentiable`"),
        ("AdamW", dict(differentiable=True, backend="cpu"), "differentiable=True needs backend=None or 'reference'"),
        ("Adam", dict(l1_decay=0.1), "unexpected keyword argument 'l1_decay'"),
        ("Adagrad", dict(lr_decay=-0.5), r"Invalid lr_decay value: -0.5 \(lr_decay must be >= 0\)"),
        ("Adagrad", dict(initial_accumulator_value=-0.5), "Invalid initial_accumulator_value value: -0.5"),
        ("AdagradW", dict(l1_cap=-1.0), "l1_cap must be > 0, got -1.0"),
        ("RMSprop", dict(alpha=-0.5), "Invalid alpha value: -0.5"),
        ("RMSprop", dict(momentum=-0.5), "Invalid momentum value: -0.5"),
        ("RMSpropW", dict(l1_form="hard"), "l1_form must be 'proximal' or 'subgradient', got 'hard'"),
        ("SGDW", dict(l1_decay=-1.0), "Invalid l1_decay value: -1.0"),
        ("SGD", dict(lr=-0.5), "Invalid learning rate: -0.5"),
        ("SGD", dict(momentum=-0.5), r"Invalid momentum value: -0.5 \(momentum must be >= 0\)"),
        ("SGD", dict(weight_decay=-0.5), "Invalid weight_decay value: -0.5"),
        ("SGD", dict(nesterov=True), "Nesterov momentum requires a momentum and zero dampening, got momentum=0"),
        ("SGD", dict(lr=torch.ones(3)), "Tensor lr must be 1-element"),
    ],
)
def test_bad_hyper_parameters(cls, kwargs, message):
    with pytest.raises((ValueError, RuntimeError, TypeError), match=message):
        getattr(precond, cls)([param()], **kwargs)


@classes
def test_torchs_own_checks_of_parameters_hold(row):
    with pytest.raises(ValueError, match="empty parameter list"):
        row.cls([])
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        row.cls(param())
    p = param()
    with pytest.raises(ValueError, match="more than one parameter group"):
        row.cls([{"params": [p]}, {"params": [p]}])


def grad_of(p, g):
    p.grad_dtype = None
    p.grad = g
    return p


def sparse():
    p = param(4, 3)
    return [grad_of(p, torch.sparse_coo_tensor([[1]], torch.ones(1, 3), (4, 3), check_invariants=True))]


def expanded():
    base = torch.randn(1, 5)
    p = base.expand(4, 5).requires_grad_()
    return [grad_of(p, torch.randn(4, 5))]


def self_overlapping():
    p = torch.randn(10).as_strided((4, 4), (2, 1)).requires_grad_()
    return [grad_of(p, torch.randn(4, 4))]


def shared():
    base = torch.randn(10)
    return [grad_of(t.requires_grad_(), torch.randn(6)) for t in (base[:6], base[4:])]


def interleaved():
    base = torch.randn(4, 10)
    return [grad_of(t.requires_grad_(), torch.randn(4, 5)) for t in (base[:, :5], base[:, 4:9])]


@classes
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (sparse, "(does not support|not compatible with) sparse gradients"),
        (expanded, r"parameter 0 of group 0 must not overlap itself, got shape \(4, 5\) with strides \(0, 1\)"),
        (self_overlapping, "parameter 0 of group 0 must not overlap itself"),
        (shared, "parameter 0 of group 0 and parameter 1 of group 0 must not share memory"),
        (interleaved, "must not share memory"),
    ],
)
def test_bad_tensors_change_nothing(row, make, message):
    good = param()
    good.grad = torch.ones(4)
    params = [good, *make()]
    message = message.replace("parameter 1", "parameter 2").replace("parameter 0", "parameter 1")
    optimizer = row.cls(params, **row.kwargs)
    before, states = [p.detach().clone() for p in params], copy.deepcopy(dict(optimizer.state_dict()["state"]))
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    torch.testing.assert_close(optimizer.state_dict()["state"], states, rtol=0, atol=0)


@classes
def test_neighbours_in_one_buffer_are_legal(row):
    base = torch.randn(4, 11)
    params = [base[:, ::2].requires_grad_(), base[:, 1::2].requires_grad_()]
    params += [t.requires_grad_() for t in torch.randn(12).split([3, 4, 5])]
    for p in params:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in params]
    row.cls(params, **row.kwargs).step()
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@classes
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_nan_hyper_parameter_at_a_step_changes_nothing(row, name):
    p = param()
    optimizer = row.cls([p], **row.kwargs)
    p.grad = torch.ones(4)
    optimizer.step()
    before, state = p.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.param_groups[0][name] = math.nan
    with pytest.raises(ValueError, match=f"{name} must be a number, got nan"):
        optimizer.step()
    assert torch.equal(p, before)
    assert all(torch.equal(v, state[0][k]) for k, v in optimizer.state_dict()["state"][0].items())


@classes
def test_a_state_of_the_wrong_shape_is_named(row):
    p = param()
    optimizer = row.cls([p], **row.kwargs)
    p.grad = torch.ones(4)
    optimizer.step()
    key = optimizer.states.names(row.rule)[0]
    optimizer.state[p][key] = torch.zeros(5)
    with pytest.raises(RuntimeError, match=rf"{key} of parameter 0 of group 0 must have shape \(4,\)"):
        optimizer.step()


#: Every class, as it is made for matrices.
OF_MATRICES = {
    **{row.cls.__name__: functools.partial(row.cls, **row.kwargs) for row in CLASSES},
    "Muon": precond.Muon,
    "SOAP": precond.SOAP,
    "GaussNewton in a basis": functools.partial(precond.GaussNewton, basis="kronecker", curvature="gradient"),
    "Sophia": precond.Sophia,
    **{
        f"DualDescent {granularity}": functools.partial(precond.DualDescent, granularity=granularity, momentum=0.9)
        for granularity in precond.dual.GRANULARITIES
    },
}
matrices = pytest.mark.parametrize("make", OF_MATRICES.values(), ids=OF_MATRICES)


def named_groups():
    """Three matrices, two of them in a second group with names."""
    a, b, c = (param(4, 4) for _ in range(3))
    return [{"params": [("a", a)]}, {"params": [("b", b), ("c", c)]}], [a, b, c]


def give_ones(params):
    for p in params:
        p.grad = torch.ones_like(p) * torch.arange(1.0, 5.0)


@matrices
@pytest.mark.parametrize("names", [True, False])
@pytest.mark.parametrize("shape", [(5, 4), (4, 5), (2, 3)])
def test_a_parameter_of_another_size_is_named(make, names, shape):
    groups, params = named_groups()
    if not names:
        groups = [{"params": [p for _, p in group["params"]]} for group in groups]
    optimizer = make(groups)
    for _ in range(2):
        give_ones(params)
        optimizer.step()
    c = params[2]
    if not optimizer.state.get(c):
        return  # nothing of the old size
    c.grad = None
    c.data = torch.ones(shape)
    c.grad = torch.ones(shape)
    before = [p.detach().clone() for p in params]
    message = r"parameter 1 of group 1 \('c'\) must" if names else "parameter 1 of group 1 must"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@matrices
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (lambda: torch.ones(4, 4).to_sparse_csr(), "sparse gradients"),
        (lambda: torch.ones(4, 4, device="meta"), "must have its gradient on cpu, got meta"),
        (lambda: torch.ones(4, 4, dtype=torch.complex64), "must have a gradient of the same kind"),
    ],
)
def test_a_parameter_whose_gradient_does_not_fit_is_named(make, gradient, message):
    groups, params = named_groups()
    optimizer = make(groups)
    give_ones(params)
    params[1].grad = None

    class Odd(torch.nn.Parameter):  # torch checks what it is given
        grad = gradient()

    optimizer.param_groups[1]["params"][0] = Odd(torch.ones(4, 4))
    with pytest.raises(RuntimeError, match=message) as found:
        optimizer.step()
    assert "parameter 0 of group 1 ('b')" in str(found.value)


@matrices
def test_a_state_on_another_device_is_named(make):
    groups, params = named_groups()
    optimizer = make(groups)
    for _ in range(2):
        give_ones(params)
        optimizer.step()
    state = optimizer.state[params[1]]
    for key in [key for key, t in state.items() if isinstance(t, torch.Tensor) and t.dim()]:
        before, state[key] = state[key], state[key].to("meta")
        with pytest.raises(
            RuntimeError, match=rf"{key} of parameter 0 of group 1 \('b'\) must have shape \(4, 4\) on cpu"
        ):
            optimizer.step()
        state[key] = before


@pytest.mark.parametrize("name", ["factor_left_0", "basis_right_0"])
@pytest.mark.parametrize("make", [OF_MATRICES["SOAP"], OF_MATRICES["GaussNewton in a basis"]])
def test_a_factor_of_another_size_is_named(make, name):
    groups, params = named_groups()
    optimizer = make(groups)
    give_ones(params)
    optimizer.step()
    optimizer.state[params[1]][name] = torch.eye(3)
    with pytest.raises(RuntimeError, match=rf"{name} of parameter 0 of group 1 \('b'\) must have shape \(4, 4\)"):
        optimizer.step()


def test_errors_of_one_class_name_the_parameter():
    given, params = named_groups()

    def fresh(b=params[1]):
        """Groups that no optimizer has completed."""
        return [given[0].copy(), {"params": [("b", b), ("c", params[2])]}]

    place = r"parameter 0 of group 1 \('b'\)"
    give_ones(params)
    params[1].grad = torch.full((4, 4), math.nan)
    with pytest.raises(ValueError, match=rf"factor_left_0 of {place}: a must be finite"):
        precond.SOAP(fresh()).step()
    with pytest.raises(torch.linalg.LinAlgError, match=f"the direction of {place} has no singular values"):
        precond.DualDescent(fresh(), granularity="spectral").step()
    params[0].grad = None
    with pytest.raises(RuntimeError, match=f"update_curvature must be called before the first step.*{place}"):
        precond.GaussNewton(fresh()).step()
    estimates = [None, torch.ones(3), None]
    with pytest.raises(RuntimeError, match=rf"an estimate must have shape \(4, 4\) for {place}, got \(3,\)"):
        precond.GaussNewton(fresh()).update_curvature(estimates=estimates)
    with pytest.raises(RuntimeError, match=f"must come before estimates of {place}, to make their basis"):
        precond.GaussNewton(fresh(), basis="kronecker").update_curvature(estimates=[None, torch.ones(4, 4), None])
    b = param(4, 4, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match=f"{place} must be real for update_curvature"):
        precond.GaussNewton(fresh(b)).update_curvature(estimates=[None, torch.ones(4, 4), None])
    b.grad = torch.ones(4, 4, dtype=torch.complex64)
    with pytest.raises(
        RuntimeError, match=f"Muon does not support complex parameters, got torch.complex64 for {place}"
    ):
        precond.Muon(fresh(b)).step()
    with pytest.raises(ValueError, match=rf"Muon only supports 2D parameters.*torch.Size\(\[4\]\): {place}"):
        precond.Muon(fresh(param(4)))


@matrices
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_number_that_is_none_in_float32_is_named(make, name):
    groups, params = named_groups()
    optimizer = make(groups)
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[1][name] = 1e39
    give_ones(params)
    with pytest.raises(ValueError, match=f"{name} must be at most 3.403e\\+38 in magnitude, as a float32, got 1e\\+39"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_float64_parameters_take_numbers_that_are_none_in_float32():
    p = param(dtype=torch.float64)
    p.grad = torch.ones_like(p)
    precond.SGD([p], lr=1e39).step()
    assert (p < -1e38).all()


@classes
def test_a_forced_backend_that_cannot_take_a_tensor_says_why(row):
    p = param(dtype=torch.float64)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"backend='cpu' must get float32, bfloat16, .* torch.float64 on cpu"):
        row.cls([p], **row.kwargs, backend="cpu").step()


def test_capturable_on_the_cpu_is_an_error():
    p = param()
    p.grad = torch.ones(4)
    for cls in (precond.Adam, precond.AdamW, precond.RMSprop, precond.RMSpropW):
        with pytest.raises(
            AssertionError, match="If capturable=True, params and state_steps must be on supported devices"
        ):
            cls([p], capturable=True).step()


def run_python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"PRECOND_ISA": "mmx"}, "PRECOND_ISA must be one of .*baseline.* on this CPU, got mmx"),
        ({"PRECOND_BACKEND": "gpu"}, "backend must be None or one of cpu, cuda, triton, reference, got 'gpu'"),
        ({"PRECOND_BACKEND": "triton", "TRITON_INTERPRET": "0"}, "backend='triton' cannot run here"),
    ],
)
def test_wrong_environment_variables_are_errors(env, message):
    result = run_python("import torch, precond; precond.SGD([torch.nn.Parameter(torch.ones(1))])", **env)
    assert result.returncode != 0
    import re

    assert re.search(message, result.stderr), result.stderr


def test_environment_variables_choose():
    result = run_python(
        "from precond import _C; from precond._core import backend; print(_C.selected_isa(), backend.check(None))",
        PRECOND_ISA="baseline",
        PRECOND_BACKEND="reference",
    )
    assert result.stdout.split() == ["baseline", "reference"], result.stderr


def test_without_the_extension_the_reference_backend_serves_and_cpu_says_why():
    code = """
import sys
sys.modules["precond._C"] = None
import torch, precond
p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
precond.AdamW([p]).step()
print(p.tolist()[0] < 1)
try:
    precond.AdamW([p], backend="cpu")
except RuntimeError as error:
    print(error)
"""
    result = run_python(code)
    assert "True" in result.stdout, result.stderr
    assert "backend='cpu' cannot run here: the compiled extension is missing" in result.stdout


@pytest.mark.parametrize("backend", [BACKEND, "reference"])
@pytest.mark.parametrize("state_format", ["int8", "int4"])
@pytest.mark.parametrize("cls", [precond.AdamW, precond.Lion, precond.SGD, precond.Muon, precond.DualDescent])
@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (32, 128), (4096,)])
def test_codes_of_another_shape_are_an_error_that_names_the_state_and_the_parameter(cls, state_format, shape, backend):
    options = {"momentum": 0.9} if cls in (precond.SGD, precond.DualDescent) else {}
    first, p = (torch.nn.Parameter(torch.randn(64, 64)) for _ in range(2))
    optimizer = cls([{"params": [first]}, {"params": [p]}], **options, state_format=state_format, backend=backend)
    for q in (first, p):
        q.grad = torch.randn_like(q)
    optimizer.step()
    p.data = torch.randn(shape)
    p.grad = torch.randn_like(p)
    with pytest.raises(
        (TypeError, RuntimeError), match=r"^(exp_avg|momentum_buffer)\w* of parameter 0 of group 1 must have"
    ):
        optimizer.step()
